"""The same run on 1, 2, 3 and 6 ranks, every stage and every evaluation: gloo on CPU, the code path of many GPUs.

The parts are tested elsewhere: the rows of a rank (test_dataloader.py, test_chat_loader.py), its share of the
optimizers (test_optimizers.py), continuing on another number of ranks (test_durability.py).
"""

from typing import Any

import pytest

from nanochat.task_data import write_rows
from tests import tiny
from tests.faults import STEPS, Faults, check_losses, find_config, optimizer_bytes

ROWS = {"total_batch_size": 12 * 64, "max_seq_len": 64, "init_lr_frac": 1.0, "eval_every": 10}
SETTINGS: dict[str, dict[str, Any]] = {
    # 6 rows a step, one micro-batch on each rank; validation is all there is, 4,009 tokens.
    "base": {"depth": 6, "aspect_ratio": 8, "max_seq_len": 64, "total_batch_size": 6 * 64, "eval_tokens": 5_000},
    # 12 rows a step, two micro-batches on each rank.
    "mid": ROWS,
    "sft": ROWS,
    # Five prompts a step and seven to evaluate: no number of ranks divides them, and of six one has none to train on.
    "rl": {"examples_per_step": 5, "eval_examples": 7, "max_new_tokens": 4, "init_lr_frac": 1.0},
}
QUICK = {("base", 2), ("base", 6), ("mid", 2), ("sft", 3), ("rl", 3)}  # base on 3: also in test_durability.py
RUNS = [
    pytest.param(stage, ranks, marks=[] if (stage, ranks) in QUICK else pytest.mark.soak)
    for stage in SETTINGS
    for ranks in (2, 3, 6)
]


@pytest.fixture(scope="module")
def faults(faults):
    faults.prepare_chats(depth=2, aspect_ratio=24, max_seq_len=128)
    return faults


def train(faults: Faults, stage: str, ranks: int) -> dict[str, list[dict[str, Any]]]:
    """{kind: events} of a run, which happens once."""
    tag = f"{stage}{ranks}"
    settings = {**SETTINGS[stage], "num_iterations": STEPS, "model_tag": tag}
    if stage != "rl":
        settings["device_batch_size"] = 6 // ranks
    if stage in ("mid", "sft"):
        settings["mixture"] = str(faults.base_dir / "chats.jsonl")
    return faults.train(stage, settings, ranks)


@pytest.mark.parametrize(("stage", "ranks"), RUNS)
def test_losses_are_those_of_one_rank_and_optimizer_state_is_divided(faults, stage, ranks):
    """And so are the validations, whose batches the ranks do not share evenly: of 15 rows of chats in batches of 6,
    three are left for the last one, which leaves ranks with none.
    """
    one, many = train(faults, stage, 1), train(faults, stage, ranks)
    check_losses(one["step"], many["step"])
    whole, share = (run["plan"][0]["optimizer_state_bytes"] for run in (one, many))
    config = find_config(faults, stage, f"{stage}{ranks}")
    assert (whole, share) == (optimizer_bytes(config, 1), optimizer_bytes(config, ranks))
    if stage == "base":  # whose 24, 6 and 6 matrices of a shape ranks share evenly
        assert share * ranks == pytest.approx(whole, rel=0.01)
    value = {"base": "val_bpb", "rl": "pass_at"}.get(stage, "val_loss")
    assert len(one["eval"]) == len(many["eval"]) == (1 if stage == "base" else 2)
    for a, b in zip(one["eval"], many["eval"], strict=True):
        assert b[value] == (a[value] if stage == "rl" else pytest.approx(a[value], abs=1e-5))


# -----------------------------------------------------------------------------
# Evaluations on three ranks; base_eval's is in test_base_eval.py


def test_base_loss_on_three_ranks(faults):
    """Batches of 6 windows either way; in the last one of `quick` two are left, which the first rank gets."""
    common = {"model_tag": "t", "split_tokens": 5_000, "baselines": False}
    for ranks, rows in ((1, 6), (3, 2)):
        code, output = faults.run("base_loss", {**common, "device_batch_size": rows}, ranks)
        assert code == 0, output
    for kind in ("bpb", "bpb_quick"):
        train, val, *on_three = tiny.events(faults.base_dir, "base_loss", "t-step8", kind)
        assert -(-val["tokens"] // 128) % 6 == 2
        for a, b in zip((train, val), on_three, strict=True):
            assert b[kind] == pytest.approx(a[kind], abs=1e-6) and b["tokens"] == a["tokens"]


def test_chat_eval_on_three_ranks(faults, monkeypatch):
    """Seven answers to write, and two letters to choose: one rank has none."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(faults.base_dir))
    choices = {"text": ["p", "q", "r", "s"], "label": ["A", "B", "C", "D"]}
    rows = [{"id": str(i), "question": f"q{i}", "choices": choices, "answerKey": "AB"[i]} for i in range(2)]
    write_rows("allenai/ai2_arc", "ARC-Easy", "test", rows, "test")
    settings = {"source": "base", "model_tag": "t", "task_name": "Arithmetic|ARC-Easy", "max_problems": 7}
    for ranks in (1, 3):
        code, output = faults.run("chat_eval", {**settings, "max_new_tokens": 8, "log_answers": True}, ranks)
        assert code == 0, output
    assert [event["n"] for event in tiny.events(faults.base_dir, "chat_eval", "base-t", "task")] == [7, 2, 7, 2]
    one, three = (faults.base_dir / "records" / "answers").glob("*.jsonl")
    assert one.read_text() == three.read_text()
