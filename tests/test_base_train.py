"""base_train as a user runs it: what it learns, how it stops and goes on, what it refuses."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests import tiny
from tests.tiny import EAGER, RUN

GOLDEN = Path(__file__).parent / "golden.json"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A base directory with corpus, tokenizer, and one uninterrupted run tagged `whole`."""
    base_dir = tmp_path_factory.mktemp("home")
    tiny.prepare(base_dir)
    tiny.run(base_dir, "scripts.base_train", *RUN, *EAGER, "--model-tag=whole")
    return base_dir


def losses(home: Path, tag: str) -> list[float]:
    return [event["loss"] for event in tiny.events(home, "base", tag, "step")]


def test_golden_run(home):
    """
    Twenty steps at depth 2: the same bits in another fresh process, and near the stored losses on any machine. A change of the
    mathematics must say so and store new ones: set NANOCHAT_STORE_GOLDEN=1 and run this test.
    """
    tiny.run(home, "scripts.base_train", *RUN, *EAGER, "--model-tag=second")
    assert tiny.weights(home, "whole", 20) == tiny.weights(home, "second", 20)
    if os.environ.get("NANOCHAT_STORE_GOLDEN"):
        GOLDEN.write_text(json.dumps(losses(home, "whole")) + "\n")
    assert losses(home, "whole") == pytest.approx(json.loads(GOLDEN.read_text()), rel=2e-3)
    assert losses(home, "whole")[-1] < 0.75 * losses(home, "whole")[0]


def stop_at(home: Path, tag: str, step: int, signum: int, *flags: str) -> int:
    """Start a run, send it a signal when it has logged `step` steps, and return its exit code."""
    command = [sys.executable, "-m", "scripts.base_train", *RUN, *flags, f"--model-tag={tag}"]
    process = subprocess.Popen(command, env=tiny.environment(home), cwd=tiny.ROOT, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith(f"step {step}/"):
            process.send_signal(signum)
            break
    process.stdout.read()
    return process.wait(timeout=120)


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_run_continues_bit_for_bit(home, signum, code):
    tag = f"stopped{code}"
    assert stop_at(home, tag, 7, signum, *EAGER) == code
    saved = [path.name for path in (home / "base_checkpoints" / tag).iterdir()]
    assert len(saved) == 1 and saved[0] != "step_000020"
    tiny.run(home, "scripts.base_train", *RUN, *EAGER, f"--model-tag={tag}", "--resume")
    assert tiny.weights(home, tag, 20) == tiny.weights(home, "whole", 20)
    assert losses(home, tag) == losses(home, "whole")


def test_compiled_bf16_continues_bit_for_bit(home):
    """The fast path, on the CPU that is here: compiled blocks, bf16 matmuls, an intermediate checkpoint."""
    flags = [*RUN, "--dtype=bfloat16"]
    tiny.run(home, "scripts.base_train", *flags, "--model-tag=fast", "--save-every=8")
    tiny.run(home, "scripts.base_train", *flags, "--model-tag=fast2", "--save-every=8")
    whole = tiny.weights(home, "fast", 20)
    assert whole == tiny.weights(home, "fast2", 20)
    for path in (home / "base_checkpoints" / "fast2" / "step_000020").iterdir():
        path.unlink()
    tiny.run(home, "scripts.base_train", *flags, "--model-tag=fast2", "--save-every=8", "--resume-from-step=8")
    assert tiny.weights(home, "fast2", 20) == whole


def test_minutes_become_steps_and_leave_no_trace(home):
    """A budget in minutes is the run that its number of steps gives: the trial steps that measured the pace are undone."""
    flags = [flag for flag in RUN if "num-iterations" not in flag] + EAGER
    tiny.run(home, "scripts.base_train", *flags, "--model-tag=budget", "--minutes=0.01")
    plan = tiny.events(home, "base", "budget", "plan")[0]
    assert plan["num_steps"] >= 1 and "0.01 minutes" in plan["formula"]
    tiny.run(home, "scripts.base_train", *flags, "--model-tag=counted", f"--num-iterations={plan['num_steps']}")
    assert tiny.weights(home, "budget", plan["num_steps"]) == tiny.weights(home, "counted", plan["num_steps"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dept=3"], "Did you mean depth"),
        (["--depth=abc"], "depth=abc"),
        (["--depth"], "depth"),
        (["--num-iterations=5", "--minutes=1"], "at most one horizon"),
        (["--device-type=cuda"], "try --device-type=cpu"),
        (["--model-tag=whole"], "--resume"),
        (["--model-tag=whole", "--resume", "--seed=7"], "seed"),
        (["--model-tag=whole", "--resume", "--max-seq-len=16"], "sequence_len"),
        (["--model-tag=whole", "--resume-from-step=3"], "no step 3"),
        (["--model-tag=../up"], "letters"),
        (["--model-tag=none", "--resume"], "no base checkpoint none"),
        (["--corpus=elsewhere"], "elsewhere"),
        (["--head-dim=7"], "head-dim"),
    ],
)
def test_mistakes_get_one_line_and_exit_code_2(home, flags, message):
    command = ["scripts.base_train", *RUN, *EAGER, *flags]
    result = tiny.run(home, *command, check=False)
    assert result.returncode == 2
    assert message in result.stderr and len(result.stderr.strip().splitlines()) == 1, result.stderr


def test_missing_corpus_and_tokenizer_name_the_command(tmp_path, home):
    result = tiny.run(tmp_path, "scripts.base_train", *RUN, *EAGER, check=False)
    assert result.returncode == 2 and "python -m nanochat.dataset --source=docs" in result.stderr
    (tmp_path / "data").symlink_to(home / "data")
    result = tiny.run(tmp_path, "scripts.base_train", *RUN, *EAGER, check=False)
    assert result.returncode == 2 and "python -m scripts.tok_train" in result.stderr


def test_fresh_start_keeps_the_earlier_work(home):
    tiny.run(home, "scripts.base_train", *RUN, *EAGER, "--model-tag=again")
    before = tiny.weights(home, "again", 20)
    tiny.run(home, "scripts.base_train", *RUN, *EAGER, "--model-tag=again", "--fresh", "--seed=2")
    assert tiny.weights(home, "again", 20) != before
    aside = list((home / "base_checkpoints").glob("again-before-*/step_000020/model.safetensors"))
    assert [path.read_bytes() for path in aside] == [before]


def test_base_loss_and_chat_cli_read_what_base_train_wrote(home):
    scored = tiny.run(home, "scripts.base_loss", "--model-tag=whole", "--device-type=cpu", "--dtype=float32").stdout
    ended = tiny.events(home, "base", "whole", "eval")[-1]["val_bpb"]
    assert f"val bpb {ended:.4f}" in scored and "byte frequencies" in scored and "xz -9" in scored
    flags = [
        "--source=base",
        "--model-tag=whole",
        "-p",
        "The small",
        "--max-tokens=12",
        "--temperature=0",
        "--dtype=float32",
    ]
    text = tiny.run(home, "scripts.chat_cli", *flags).stdout.splitlines()[-1]
    assert text.startswith("The small") and len(text) > len("The small")
