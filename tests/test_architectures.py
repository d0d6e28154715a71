"""Every architecture in the loop of all: it trains, resumes, runs on several ranks, shards, chats, and is looked at."""

import io
import sys

import pytest

from scripts import base_train, chat_cli
from tests import tiny
from tests.faults import STEPS, check_losses

ARCHITECTURES = {
    "fast": {"arch": "fast"},
    "gpt2": {"arch": "gpt2"},
    "alibi": {"arch": "gpt2", "positions": "alibi", "bias": False},
    "dropout": {"arch": "gpt2", "dropout": 0.1},
    "llama": {"arch": "llama", "kv_heads": 2},
}
COMMON = {"num_iterations": STEPS, "total_batch_size": 12 * 32, "eval_every": 10, "eval_tokens": 2_000}


def each(*quick: str) -> pytest.MarkDecorator:
    """Some architectures in the suite, the others in dev/soak.sh."""
    marks = {name: [] if name in quick else [pytest.mark.soak] for name in ARCHITECTURES}
    return pytest.mark.parametrize("name", [pytest.param(name, marks=marks[name]) for name in ARCHITECTURES])


@pytest.fixture(scope="module")
def faults(faults):
    faults.prepare_chats()
    return faults


def train(faults, name: str, ranks: int = 1, tag: str = "", **changes: object):
    """{kind: events} of a run, which happens once."""
    settings = {**COMMON, **ARCHITECTURES[name], "device_batch_size": 6 // ranks, "model_tag": f"{name}{ranks}{tag}"}
    return faults.train("base", {**settings, **changes}, ranks)


@each("fast", "dropout")
def test_it_learns_and_resumes_bit_for_bit(faults, name):
    whole = train(faults, name)["step"]
    assert whole[-1]["loss"] < 0.85 * whole[0]["loss"]
    settings = {**COMMON, **ARCHITECTURES[name], "device_batch_size": 6, "model_tag": f"{name}-again"}
    faults.start("base", settings, leave_after=7)
    assert faults.finish()[0] == [143]
    code, output = faults.run("base", {**settings, "resume": True})
    assert code == 0, output
    assert tiny.weights(faults.base_dir, f"{name}-again", STEPS) == tiny.weights(faults.base_dir, f"{name}1", STEPS)


def test_dropout_is_the_same_after_trial_steps_and_on_ranks_that_resume(faults):
    """Trial steps of --minutes drew from the generator that the run went on with; ranks all dropped the same places."""
    few = {"num_iterations": None, "minutes": 0.002, "eval_every": -1}
    steps = train(faults, "dropout", tag="-minutes", **few)["plan"][0]["num_steps"]
    train(faults, "dropout", tag="-counted", num_iterations=steps, eval_every=-1)
    weights = [tiny.weights(faults.base_dir, f"dropout1-{tag}", steps) for tag in ("minutes", "counted")]
    assert weights[0] == weights[1]
    train(faults, "dropout", 2, num_iterations=6)
    settings = {**COMMON, **ARCHITECTURES["dropout"], "device_batch_size": 3, "model_tag": "dropout2-again"}
    faults.start("base", {**settings, "num_iterations": 6}, 2, leave_after=3)
    assert faults.finish()[0] == [143, 143]
    code, output = faults.run("base", {**settings, "num_iterations": 6, "resume": True}, 2)
    assert code == 0, output
    assert tiny.weights(faults.base_dir, "dropout2-again", 6) == tiny.weights(faults.base_dir, "dropout2", 6)


@each("gpt2", "fast")
@pytest.mark.parametrize("shard", [pytest.param(False, marks=pytest.mark.soak), True])
def test_two_ranks_are_one(faults, name, shard):
    if name == "dropout":
        pytest.skip("each rank drops what it will")
    one, two = train(faults, name), train(faults, name, 2, f"-{shard}", shard=shard, sample_every=STEPS)
    check_losses(one["step"], two["step"])
    for a, b in zip(one["eval"], two["eval"], strict=True):
        for value in a.keys() & {"val_bpb", "val_bpb_quick"}:
            assert b[value] == pytest.approx(a[value], abs=1e-5)
    assert two["sample"]


@each("alibi", "fast")
def test_it_learns_to_chat_and_chats(faults, name, monkeypatch, capsys):
    train(faults, name, tag="-long", max_seq_len=128, num_iterations=2, sample_every=-1)
    settings = {"source_tag": f"{name}1-long", "mixture": str(faults.base_dir / "chats.jsonl"), "num_iterations": 2}
    code, output = faults.run("sft", {**settings, "model_tag": name, "max_seq_len": 128})
    assert code == 0, output
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(faults.base_dir))
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    quiet = {"compile": False, "max_tokens": 8, "device_type": "cpu", "dtype": "float32"}
    tiny.run_here(monkeypatch, chat_cli, {"source": "sft", "model_tag": name, "prompt": "Hello", **quiet})
    said = capsys.readouterr()
    assert said.out and f"chatsft_checkpoints/{name}/step_000002" in said.err


def test_a_checkpoint_says_what_it_is(faults):
    train(faults, "alibi")
    path = faults.base_dir / "base_checkpoints" / "alibi1" / f"step_{STEPS:06d}" / "meta.json"
    text = path.read_text()
    assert '"arch": "gpt2"' in text and '"positions": "alibi"' in text


def test_a_setting_of_another_architecture_is_refused(faults):
    code, output = faults.run("base", {"arch": "gpt2", "window_pattern": "SL", "model_tag": "refused"})
    assert code == 2 and "--window-pattern=SL: --arch=gpt2 has no such setting" in output
    assert base_train.settings["window_pattern"] is None
