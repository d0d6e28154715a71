"""Midtraining, SFT and RL: what they learn, how they stop and go on, what they refuse. On ranks: test_ranks.py."""

import json
import os
import signal

import pytest
import torch

from nanochat import attention, train
from nanochat.common import Stopped, UserError
from nanochat.compute import Compute
from scripts import chat_rl, chat_sft, mid_train
from tasks.arithmetic import Arithmetic
from tests import tiny
from tests.faults import FOLDERS, SETTINGS
from tests.rewarded_rl import even_length
from tests.test_gpt import small_model

SCRIPTS = {"mid": mid_train, "sft": chat_sft, "rl": chat_rl}
DEFAULTS = {name: dict(script.settings) for name, script in SCRIPTS.items()}


@pytest.fixture(scope="module")
def home(faults):
    """A base directory with a base model of 256 tokens' context, and conversations in a file."""
    faults.prepare_chats()
    return faults.base_dir


@pytest.fixture
def stage(home, monkeypatch):
    """Run a stage's main() in this process, with settings by name; returns the bytes of its last weights."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(home))

    def run(name: str, tag: str, **changes: object) -> bytes:
        usual = {**DEFAULTS[name], **SETTINGS[name], "model_tag": tag, "num_iterations": 6, "save_every": 3}
        usual |= {"max_new_tokens": 20} if name == "rl" else {"mixture": str(home / "chats.jsonl")}
        tiny.run_here(monkeypatch, SCRIPTS[name], usual | changes)
        steps = sorted((home / FOLDERS[name] / tag).glob("step_*"))
        return (steps[-1] / "model.safetensors").read_bytes()

    return run


@pytest.fixture
def rewarded(monkeypatch):
    """A reward that a new model earns now and then: an even number of tokens in what it says."""
    monkeypatch.setattr("tasks.arithmetic.Arithmetic.evaluate", even_length)


@pytest.mark.parametrize("name", ["mid", "sft"])
def test_the_loss_falls_and_is_recorded(home, stage, name):
    stage(name, f"learns_{name}", num_iterations=25, init_lr_frac=1.0)
    losses = [event["loss"] for event in tiny.events(home, name, f"learns_{name}", "step")]
    assert losses[-1] < 0.8 * losses[0]
    assert tiny.events(home, name, f"learns_{name}", "eval")[0]["val_loss"] < losses[0]
    assert len(tiny.events(home, name, f"learns_{name}", "sample")) == 5


@pytest.mark.parametrize("name", ["mid", "rl"])
def test_minutes_become_steps_and_leave_no_trace(home, stage, rewarded, name):
    """The trial steps change no weight, so a budget is the run that its number of steps gives."""
    budget = stage(name, f"budget_{name}", num_iterations=None, minutes=0.01)
    plan = tiny.events(home, name, f"budget_{name}", "plan")[0]
    assert "0.01 minutes" in plan["formula"]
    assert stage(name, f"counted_{name}", num_iterations=plan["num_steps"]) == budget


@pytest.mark.parametrize("name", ["mid", "sft", "rl"])
def test_a_stopped_run_continues_bit_for_bit(home, stage, rewarded, monkeypatch, name):
    """SIGTERM in the middle of the third step; the run saves, and goes on as if nothing had been."""
    whole = stage(name, f"whole_{name}")
    script, calls = SCRIPTS[name], []
    part = "policy_gradient" if name == "rl" else "accumulate"  # of a step, before the ranks agree on stopping
    there = getattr(script, part)

    def killed(*values, **named):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return there(*values, **named)

    monkeypatch.setattr(script, part, killed)
    with pytest.raises(Stopped):
        stage(name, f"stopped_{name}", save_every=-1)
    assert [path.name for path in (home / FOLDERS[name] / f"stopped_{name}").glob("step_*")] == ["step_000003"]
    monkeypatch.setattr(script, part, there)
    assert stage(name, f"stopped_{name}", resume=True, save_every=-1) == whole


def test_rl_changes_the_model_only_where_there_is_signal(stage, home, monkeypatch):
    """All answers equally good: nothing to learn, no weight changes, and in the end a diagnosis."""
    monkeypatch.setattr("tasks.arithmetic.Arithmetic.evaluate", lambda *_: True)
    unchanged = stage("rl", "dead", num_iterations=2)
    base = next((home / "base_checkpoints" / "t").glob("step_*")) / "model.safetensors"
    assert unchanged == base.read_bytes()
    with pytest.raises(
        UserError, match="no prompt taught anything for 2 steps; 0% of the answers have a `#### number`"
    ):
        stage("rl", "dead", max_dead_steps=2, fresh=True)
    # The run saved its two dead steps; resumed, it counted past the limit and went on for ever.
    with pytest.raises(UserError, match="no prompt taught anything for 3 steps"):
        stage("rl", "dead", max_dead_steps=2, resume=True)


def test_a_resumed_rl_run_keeps_its_number_of_steps(stage, home, rewarded):
    """Without --num-iterations it went on for once through all problems, at learning rates of another plan."""
    stage("rl", "planned", num_iterations=4, save_every=2)
    stage("rl", "planned", num_iterations=None, save_every=2, resume_from_step=2)
    assert [event["num_steps"] for event in tiny.events(home, "rl", "planned", "plan")] == [4, 4]


def test_one_changed_word_in_the_conversations_is_refused_on_resume(stage, home, tmp_path):
    """Only every fourth of 300 conversations is looked at to tell data sets apart; the file's bytes are as well."""
    file = tmp_path / "mine.jsonl"
    file.write_bytes((home / "chats.jsonl").read_bytes())
    stage("sft", "changed", num_iterations=2, mixture=str(file))
    file.write_bytes(file.read_bytes().replace(b"add 1 to 42.", b"add 1 to 43.", 1))
    with pytest.raises(UserError, match="was made with conversations = .*, this run has"):
        stage("sft", "changed", num_iterations=3, mixture=str(file), resume=True)


def test_rl_prints_its_vital_signs(stage, home, rewarded, capsys):
    stage("rl", "vital")
    steps = tiny.events(home, "rl", "vital", "step")
    keys = {"reward", "reward_std", "ended", "parsed", "groups_with_signal", "groups"}
    assert len(steps) == 6 and all(keys <= step.keys() and step["groups"] == 3 for step in steps)
    assert [event["step"] for event in tiny.events(home, "rl", "vital", "eval")] == [0, 6]
    assert "groups with signal" in capsys.readouterr().out


def test_rl_waited_for_a_plan_at_each_length_of_a_row(monkeypatch):
    """On Hopper; rows of few lengths give the same gradient."""
    answers = [([4, 5], [0, 1], 0.5), ([6, 7, 8], [1, 1, 1], -0.5)]
    group = [chat_rl.Rollout([1, 2, 3], tokens, mask, True, "", 0.0, gain) for tokens, mask, gain in answers]
    models, widths = [small_model(), small_model()], []
    for step, model in zip((1, 16), models, strict=True):
        monkeypatch.setitem(attention.LENGTHS, "cpu", step)
        sums = chat_rl.policy_gradient(model, [group], Compute(torch.device("cpu"), torch.float32))
        widths.append(sums.batches[0][0].size(1))
    assert widths == [5, 16]
    for exact, padded in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(padded.grad, exact.grad)


def test_a_batch_without_a_supervised_token_changes_no_weight(home):
    """Mean losses over nothing are NaN in nanochat; here such a step is none."""
    model = small_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizers = model.setup_optimizers(dtype=torch.float32)
    compute = Compute(torch.device("cpu"), torch.float32, 0, 1)
    stream = iter([(torch.zeros(2, 8, dtype=torch.long), torch.full((2, 8), -1), None)])
    agreed = train.agree(train.accumulate(model, stream, 1, compute), 0, optimizers, compute)
    result = train.update(optimizers, agreed, train.Rates(1.0, 0.9, 1.0), compute)
    assert result.tokens == 0 and result.loss == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_held_out_answers_beyond_the_row_end_sft_before_its_first_step(stage, home, tmp_path):
    """They gave "validation loss 0.0000", which --save-best kept as the best for ever."""
    lines = (home / "chats.jsonl").read_text().splitlines()
    long = json.dumps([{"role": "user", "content": "x" * 500}, {"role": "assistant", "content": "y"}])
    lines[::20] = [long] * len(lines[::20])  # these are held out
    file = tmp_path / "long.jsonl"
    file.write_text("\n".join(lines))
    with pytest.raises(UserError, match="no conversation of .* has a supervised token within 256 tokens"):
        stage("sft", "nothing", mixture=str(file))


def test_sft_of_an_sft_model_keeps_its_start(stage, home):
    """--fresh moved the start away, --resume never fitted, and another --model-tag was another start."""
    stage("sft", "first", num_iterations=2)
    with pytest.raises(UserError, match="over its own start; name both: --source-tag=first --model-tag=NEW"):
        stage("sft", "first", source="sft", source_tag=None, num_iterations=2, fresh=True)
    with pytest.raises(UserError, match="no sft checkpoint second .*; --source-tag names the start"):
        stage("sft", "second", source="sft", source_tag=None, num_iterations=2)
    again = {"source": "sft", "source_tag": "first", "num_iterations": 4, "save_every": 2}
    whole = stage("sft", "second", **again)
    assert stage("sft", "second", **again, resume_from_step=2) == whole
    assert [path.name for path in (home / FOLDERS["sft"] / "first").glob("step_*")] == ["step_000002"]


def test_rl_prompts_longer_than_the_context_are_left_out(stage, home, rewarded, monkeypatch, capsys):
    """One of them ended the run, and every run that resumed it; a step without answers had reward 0.000."""
    made = Arithmetic.get_example

    def long(task, index):
        example = made(task, index)
        if index in (0, 1, 2, 4):
            example["messages"][0]["content"] += " very" * 300
        return example

    monkeypatch.setattr(Arithmetic, "get_example", long)
    stage("rl", "long", num_iterations=2, eval_examples=6)
    steps = tiny.events(home, "rl", "long", "step")
    assert [(step["groups"], step["left_out"]) for step in steps] == [(0, 3), (2, 1)]
    assert "reward" in steps[1] and not {"reward", "ended", "parsed"} & steps[0].keys()
    assert tiny.events(home, "rl", "long", "eval")[0]["problems"] == 2
    output = capsys.readouterr().out
    assert "no answers, 3 prompts longer than the context" in output and "skipped, its" in output
    monkeypatch.setattr(Arithmetic, "get_example", lambda task, index: long(task, 0))
    with pytest.raises(UserError, match="no held-out prompt fits the context of 256 tokens"):
        stage("rl", "longer", num_iterations=2)


def test_mistakes_are_one_line(stage, home):
    with pytest.raises(UserError, match="--mixture=nowhere.jsonl: expected default, offline, or a file"):
        stage("mid", "wrong", mixture="nowhere.jsonl")
    with pytest.raises(UserError, match="--max-seq-len=512: expected 2 to 256"):
        stage("sft", "wrong", max_seq_len=512)


def test_weight_decay_of_rl_falls_to_0_as_its_line_says():
    decays = [chat_rl.rates_of(step, 10).weight_decay for step in range(10)]
    assert decays[0] == 1 and decays == sorted(decays, reverse=True) and decays[-1] < 0.05
