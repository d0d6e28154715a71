"""base_train as a user runs it: what it learns, how it stops and goes on, what it refuses."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from nanochat.common import UserError
from tests import tiny
from tests.faults import SETTINGS, Faults
from tests.tiny import EAGER, RUN

SAME_RUN = {"num_iterations": 20, "eval_every": 10, "eval_tokens": 2000}  # as RUN and EAGER, with tests/faults.py's
GOLDEN = Path(__file__).parent / "golden.json"


@pytest.fixture(scope="module")
def home(own_home):
    """A base directory with corpus, tokenizer, and one uninterrupted run tagged `whole`."""
    tiny.run(own_home, "scripts.base_train", *RUN, *EAGER, "--model-tag=whole")
    return own_home


def train(faults: Faults, tag: str, **changes: object) -> None:
    """The run of RUN and EAGER, in a fork of a process that has imported everything: a second instead of five."""
    code, output = faults.run("base", {**SAME_RUN, "model_tag": tag, **changes})
    assert code == 0, output


def losses(home: Path, tag: str) -> list[float]:
    return [event["loss"] for event in tiny.events(home, "base", tag, "step")]


def test_golden_run(home, faults):
    """Twenty steps at depth 2: the same bits in another process, and near the stored losses on any machine. A change of
    the mathematics must say so and store new ones: set NANOCHAT_STORE_GOLDEN=1 and run this test.
    """
    train(faults, "second")
    assert tiny.weights(home, "whole", 20) == tiny.weights(home, "second", 20)
    if os.environ.get("NANOCHAT_STORE_GOLDEN"):
        GOLDEN.write_text(json.dumps(losses(home, "whole")) + "\n")
    assert losses(home, "whole") == pytest.approx(json.loads(GOLDEN.read_text()), rel=2e-3)
    assert losses(home, "whole")[-1] < 0.75 * losses(home, "whole")[0]


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_run_continues_bit_for_bit(home, faults, signum, code):
    """Stopped from outside, when it has logged 7 steps; the eighth waits for it, however busy the machine is."""
    tag = f"stopped{code}"
    signalled = home / f"signalled{code}"
    (pid,) = faults.start("base", {**SAME_RUN, "model_tag": tag}, wait_for_file=(8, str(signalled)))
    tiny.wait_until(lambda: "step 7/20" in (home / "faults.log").read_text())
    os.kill(pid, signum)
    signalled.touch()
    assert faults.finish()[0] == [code]
    saved = [path.name for path in (home / "base_checkpoints" / tag).iterdir()]
    assert len(saved) == 1 and saved[0] != "step_000020"
    train(faults, tag, resume=True)
    assert tiny.weights(home, tag, 20) == tiny.weights(home, "whole", 20)
    assert losses(home, tag) == losses(home, "whole")


def test_samples_that_do_not_fit_a_small_context_are_skipped(home, faults):
    """They ended the run, after hours, with an error."""
    train(faults, "narrow", max_seq_len=4, num_iterations=2, sample_every=2)
    assert [event["prompt"] for event in tiny.events(home, "base", "narrow", "sample")] == ["The"]


def test_a_closed_terminal_stops_a_run_after_saving(home):
    """It ended in an OSError from the progress bar, or by SIGHUP at once."""
    terminal, inner = os.openpty()
    command = [sys.executable, "-m", "scripts.base_train", *RUN, *EAGER, "--model-tag=hungup", "--num-iterations=4000"]
    options = {"env": tiny.environment(home), "cwd": tiny.ROOT, "start_new_session": True}
    # The pseudo-terminal becomes the controlling one, so that its end is SIGHUP and every write an error.
    take = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
    whole = [sys.executable, "-c", take, *command]
    with subprocess.Popen(whole, stdin=inner, stdout=inner, stderr=inner, **options) as process:
        os.close(inner)
        seen = b""
        while b"quick val bpb" not in seen:  # a terminal of no width shows no bar
            seen += os.read(terminal, 4096)
        os.close(terminal)
        assert process.wait(timeout=120) == 128 + signal.SIGHUP
    steps = [path.name for path in (home / "base_checkpoints" / "hungup").iterdir()]
    assert len(steps) == 1 and steps[0].startswith("step_")


def test_a_reader_that_has_gone_does_not_end_a_run(home):
    """`| head -1`, or a tee that was killed: BrokenPipeError in the middle of a step, and no checkpoint."""
    words = " ".join([sys.executable, "-m", "scripts.base_train", *RUN, *EAGER, "--model-tag=unheard"])
    result = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {words} | head -1"],
        env=tiny.environment(home),
        cwd=tiny.ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert tiny.weights(home, "unheard", 20) == tiny.weights(home, "whole", 20)


def test_compiled_bf16_continues_bit_for_bit(home, faults):
    """The fast path, on the CPU that is here: compiled blocks, bf16 matmuls, an intermediate checkpoint. Its losses are
    those of the eager run in fp32.
    """
    fast = {"compile": True, "dtype": "bfloat16", "save_every": 8}
    train(faults, "fast", **fast)
    whole = tiny.weights(home, "fast", 20)
    assert losses(home, "fast") == pytest.approx(losses(home, "whole"), rel=0.01)
    train(faults, "fast", **fast, resume_from_step=8)
    assert tiny.weights(home, "fast", 20) == whole
    kept = list((home / "base_checkpoints").glob("fast-before-*/step_*"))
    assert len(kept) == 2  # steps 16 and 20 of the first run


@pytest.fixture
def train_here(home, monkeypatch):
    """Run base_train's main() in this process, with settings given by name: a second instead of four."""
    from scripts import base_train

    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(home))
    usual = {**base_train.settings, **SETTINGS["base"], "num_iterations": 4}

    def run(**changes: object) -> None:
        tiny.run_here(monkeypatch, base_train, usual | changes)

    return run


def test_minutes_become_steps_and_leave_no_trace(home, train_here):
    """A budget in minutes is the run that its number of steps gives: those that measured the pace change nothing."""
    train_here(model_tag="budget", minutes=0.002, num_iterations=None)
    plan = tiny.events(home, "base", "budget", "plan")[0]
    assert plan["num_steps"] >= 1 and "0.002 minutes" in plan["formula"]
    train_here(model_tag="counted", num_iterations=plan["num_steps"])
    assert tiny.weights(home, "budget", plan["num_steps"]) == tiny.weights(home, "counted", plan["num_steps"])


@pytest.mark.parametrize("flags", [["--dept=3"], ["--depth=abc"], ["--depth"], ["--packing=depth"]])
def test_mistyped_settings_get_one_line_and_exit_code_2(home, flags):
    result = tiny.run(home, "scripts.base_train", *RUN, *flags, check=False)
    assert result.returncode == 2 and "depth" in result.stderr and len(result.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"device_type": "cuda"}, "try --device-type=cpu"),
        ({"model_tag": "whole"}, "--resume"),
        ({"model_tag": "whole", "resume": True, "seed": 7}, "seed"),
        ({"model_tag": "whole", "resume": True, "max_seq_len": 16}, "sequence_len"),
        ({"model_tag": "whole", "resume": True, "total_batch_size": 512}, "rows_per_step"),
        ({"model_tag": "whole", "resume_from_step": 3}, "no step 3"),
        ({"model_tag": "../up"}, "letters"),
        ({"model_tag": "none", "resume": True}, "no base checkpoint none"),
        ({"corpus": "elsewhere"}, "elsewhere"),
        ({"head_dim": 7}, "head-dim"),
        ({"model_tag": "whole", "resume": True, "eval_only": True}, "those of a checkpoint: .* scripts.base_loss"),
    ],
)
def test_mistakes_are_told_in_one_line(train_here, changes, message):
    with pytest.raises(UserError, match=message) as error:
        train_here(**changes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("optimizer", "told"), [("muon", True), ("adamw", False)])
def test_a_rate_that_the_optimizer_has_not_is_told(train_here, monkeypatch, capsys, optimizer, told):
    """base_train --lr=1e-3 trained by Muon at its own rates, without a word."""
    monkeypatch.setattr("scripts.base_train.GIVEN", {"lr", "beta2"})
    with pytest.raises(UserError, match="elsewhere"):
        train_here(lr=1e-3, beta2=0.98, optimizer=optimizer, corpus="elsewhere")
    assert ("warning: lr changes nothing without --optimizer=adamw" in capsys.readouterr().out) == told


def test_missing_corpus_and_tokenizer_name_the_command(tmp_path, home, train_here, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    with pytest.raises(UserError, match=r"python -m nanochat\.dataset --source=docs"):
        train_here()
    (tmp_path / "data").symlink_to(home / "data")
    with pytest.raises(UserError, match=r"python -m scripts\.tok_train"):
        train_here()


def test_fresh_start_keeps_the_earlier_work(home, train_here):
    train_here(model_tag="again")
    before = tiny.weights(home, "again", 4)
    train_here(model_tag="again", fresh=True, seed=2)
    assert tiny.weights(home, "again", 4) != before
    aside = list((home / "base_checkpoints").glob("again-before-*/step_000004/model.safetensors"))
    assert [path.read_bytes() for path in aside] == [before]


def test_a_finished_run_may_be_given_more_steps(home, train_here):
    train_here(model_tag="longer")
    train_here(model_tag="longer", resume=True, num_iterations=6)
    assert [event["step"] for event in tiny.events(home, "base", "longer", "step")] == [0, 1, 2, 3, 4, 5]


def test_a_finished_run_has_nothing_to_do(home, train_here, capsys):
    """dev/runcpu.sh and speedrun.sh call every stage again; the records must stay those of the run."""
    train_here(model_tag="done")
    before = tiny.events(home, "base", "done", "start")
    train_here(model_tag="done", resume=True)
    assert "this run is finished" in capsys.readouterr().out
    assert tiny.events(home, "base", "done", "start") == before


def test_base_loss_and_chat_cli_read_what_base_train_wrote(home, faults):
    flags = ["--device-type=cpu", "--dtype=float32", "--model-tag=whole"]
    code, scored = faults.run("base_loss", {"model_tag": "whole", "split_tokens": 2000, "device_batch_size": "auto"})
    assert code == 0 and "device batch: " in scored, scored
    ended = tiny.events(home, "base", "whole", "eval")[-1]["val_bpb"]
    assert f"val bpb {ended:.4f}" in scored and "byte frequencies" in scored and "xz -9" in scored
    options = ["--source=base", "-p", "The small", "--max-tokens=12", "--temperature=0"]
    text = tiny.run(home, "scripts.chat_cli", *flags, *options).stdout.splitlines()[-1]
    assert text.startswith("The small") and len(text) > len("The small")


def test_the_report_shows_what_was_recorded(home):
    printed = tiny.run(home, "nanochat.report", "generate").stdout
    assert "# Report\n" in printed and "**val bpb**" in printed and "**vocabulary**: 320 tokens" in printed
    assert (home / "report" / "report.md").read_text(encoding="utf-8") in printed
    tiny.run(home, "nanochat.report", "reset")
    assert not list((home / "records").glob("*.jsonl")) and list((home / "records").glob("before-*/*.jsonl"))
    assert "no records" in tiny.run(home, "nanochat.report", check=False).stderr


@pytest.mark.soak
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_compiled_runs_stopped_anywhere_continue_bit_for_bit(home, dtype, ranks):
    """Six moments each; the number of ranks stays, so the bits must too."""
    flags = [*RUN, f"--dtype={dtype}"]
    start = ["scripts.base_train"] if ranks == 1 else ["torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    start += [] if ranks == 1 else ["-m", "scripts.base_train", "--"]
    tiny.run(home, *start, *flags, f"--model-tag=soak-{dtype}-{ranks}", "--save-every=3")
    whole = tiny.weights(home, f"soak-{dtype}-{ranks}", 20)
    for step in (18, 15, 12, 9, 6, 3):
        tiny.run(
            home, *start, *flags, f"--model-tag=soak-{dtype}-{ranks}", "--save-every=3", f"--resume-from-step={step}"
        )
        assert tiny.weights(home, f"soak-{dtype}-{ranks}", 20) == whole, step


def test_the_best_validation_is_saved_and_spared(home, train_here, monkeypatch):
    """Between the steps that --save-every asks for, and not deleted by --keep-last when later ones are worse."""
    from scripts import base_train

    scores = iter([3.0, 2.0, 2.5, 2.75])

    def scored(model: object, stride: int, *_: object) -> base_train.BitsPerByte:
        return base_train.BitsPerByte(next(scores) if stride == 32 else 2.0, None, 1, 1, 1)

    monkeypatch.setattr(base_train, "validation_windows", lambda shards, tokenizer, T, stride, n: stride)
    monkeypatch.setattr(base_train, "evaluate_bpb", scored)
    train_here(model_tag="best", num_iterations=8, eval_every=2, save_best=True, keep_last=1)
    folder = home / "base_checkpoints" / "best"
    assert sorted(path.name for path in folder.glob("step_*")) == ["step_000004", "step_000008"]
    assert json.loads((folder / "best.json").read_text())["step"] == 4
    scored = [event["val_bpb_quick"] for event in tiny.events(home, "base", "best", "eval") if "val_bpb_quick" in event]
    assert scored == [3.0, 2.0, 2.5, 2.75]
