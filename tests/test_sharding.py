"""--shard: the same run with weights, gradients and optimizer state in parts on all ranks. gloo on CPU.

Losses, checkpoints and validations are those of whole models; what ends a run early ends it on all ranks.
"""

import json
import math
import signal
from typing import Any

import pytest

from nanochat.gpt import GPTConfig
from tests import tiny
from tests.faults import STEPS, Faults, check_losses, find_config, optimizer_bytes

# On three ranks: 320 rows in parts of 107, 107 and 106; with one key/value head of four channels, the last rank has no
# row of c_k and c_v. Validation after half the steps leaves embedding and head whole, samples take a copy of the model.
BASE = {"head_dim": 4, "kv_heads": 1, "total_batch_size": 12 * 32, "eval_every": 10, "eval_tokens": 2_000}
CHAT = {"total_batch_size": 12 * 64, "max_seq_len": 64, "init_lr_frac": 1.0, "eval_every": 10}


@pytest.fixture(scope="module")
def faults(faults):
    faults.prepare_chats()
    return faults


def settings_of(faults: Faults, stage: str, tag: str, ranks: int) -> dict[str, Any]:
    """Twelve rows a step: two micro-batches on any number of ranks."""
    settings: dict[str, Any] = {"num_iterations": STEPS, "model_tag": tag, "device_batch_size": 6 // ranks}
    if stage == "base":
        return {**BASE, "sample_every": STEPS, **settings}
    return {**CHAT, **settings, "mixture": str(faults.base_dir / "chats.jsonl")}


def run(faults: Faults, stage: str, tag: str, ranks: int, **changes: Any) -> dict[str, list[dict[str, Any]]]:
    return faults.train(stage, {**settings_of(faults, stage, tag, ranks), **changes}, ranks)


def whole(faults: Faults, stage: str = "base") -> dict[str, list[dict[str, Any]]]:
    """The run on one rank that all others are compared with."""
    return run(faults, stage, f"{stage}-one", 1)


def sharded(faults: Faults, stage: str = "base", ranks: int = 2) -> dict[str, list[dict[str, Any]]]:
    return run(faults, stage, f"{stage}-{ranks}", ranks, shard=True)


def ends(faults: Faults, tag: str, ranks: int, changes: dict[str, Any] | None = None, **fault: Any) -> tuple[Any, str]:
    """A sharded base run that something happens to: the ranks' exit codes and the output."""
    settings = {**settings_of(faults, "base", tag, ranks), "shard": True, **(changes or {})}
    faults.start("base", settings, ranks, **fault)
    return faults.finish()


def part_bytes(config: GPTConfig, ranks: int) -> int:
    """fp32 parameters of one rank: of each matrix ceil(rows / ranks) rows."""
    C, G = config.n_embd, config.n_kv_head * config.head_dim
    matrices = config.n_layer * [(C, C), (G, C), (G, C), (C, C), (4 * C, C), (C, 4 * C)] + 2 * [(config.vocab_size, C)]
    return 4 * sum(math.ceil(rows / ranks) * columns for rows, columns in matrices)


@pytest.mark.parametrize(
    ("stage", "ranks"),
    [
        ("base", 2),
        ("base", 3),
        ("mid", 3),
        pytest.param("sft", 2, marks=pytest.mark.soak),
        pytest.param("base", 6, marks=pytest.mark.soak),
        pytest.param("mid", 2, marks=pytest.mark.soak),
        pytest.param("sft", 3, marks=pytest.mark.soak),
    ],
)
def test_a_sharded_run_is_the_whole_one_in_parts(faults, stage, ranks):
    one, many = whole(faults, stage), sharded(faults, stage, ranks)
    check_losses(one["step"], many["step"])
    for a, b in zip(one["eval"], many["eval"], strict=True):
        for value in a.keys() & {"val_bpb", "val_bpb_quick", "val_loss"}:
            assert b[value] == pytest.approx(a[value], abs=1e-5)
    assert one["sample"] and [event["text"] for event in many["sample"]] == [event["text"] for event in one["sample"]]
    config, plan = find_config(faults, stage, f"{stage}-{ranks}"), many["plan"][0]
    assert plan["parameter_bytes"] == part_bytes(config, ranks) < 1.03 * part_bytes(config, 1) / ranks
    assert plan["optimizer_state_bytes"] == optimizer_bytes(config, ranks)


def test_from_sharded_to_whole_and_back_and_to_fewer_ranks(faults):
    """Whole on 1, sharded on 3, whole on 2, sharded on 2: every five steps another way, and one continuation."""
    for number, (ranks, shard) in enumerate([(1, False), (3, True), (2, False), (2, True)]):
        how = {"shard": shard, "resume": number > 0}
        last = {"leave_after": 5} if number < 3 else {}
        codes, output = ends(faults, "moving", ranks, how, **last)
        assert codes == [143 if last else 0] * ranks, output
    check_losses(whole(faults)["step"], tiny.events(faults.base_dir, "base", "moving", "step"))


def test_recompute_and_offload_change_no_bit(faults):
    """On one machine without a GPU the host's memory is the device's; the way there is another all the same."""
    sharded(faults), whole(faults)
    run(faults, "base", "both", 2, shard=True, recompute=True, offload=True)
    run(faults, "base", "alone", 1, recompute=True)
    for tag, same in (("both", "base-2"), ("alone", "base-one")):
        assert tiny.weights(faults.base_dir, tag, STEPS) == tiny.weights(faults.base_dir, same, STEPS)


def test_a_sharded_run_that_is_stopped_resumes_bit_for_bit(faults):
    sharded(faults)
    codes, output = ends(faults, "twice", 2, leave_after=7, rank=1)
    assert codes == [143, 143] and "step_000007" in output, output
    run(faults, "base", "twice", 2, shard=True, resume=True)
    assert tiny.weights(faults.base_dir, "twice", STEPS) == tiny.weights(faults.base_dir, "base-2", STEPS)


@pytest.mark.soak
def test_a_compiled_sharded_or_recomputed_run_is_the_compiled_one(faults):
    one = run(faults, "base", "compiled-1", 1, compile=True)
    check_losses(one["step"], run(faults, "base", "compiled-2", 2, compile=True, shard=True)["step"])
    check_losses(one["step"], run(faults, "base", "compiled-3", 1, compile=True, recompute=True)["step"])
    both = {"compile": True, "shard": True, "recompute": True}
    check_losses(one["step"], run(faults, "base", "compiled-4", 3, **both)["step"])


# -----------------------------------------------------------------------------
# Ends


def test_a_damaged_shard_file_on_one_rank_does_not_hang_the_others(faults):
    """The others gather weights from a rank that has no batch: it must go on giving them."""
    codes, output = ends(faults, "damaged", 3, lose_text=(4, 1), rank=1)
    assert codes == [2, 2, 2], output
    assert "shard_00003.parquet is damaged" in output and "Traceback" not in output
    run(faults, "base", "damaged", 3, shard=True, resume=True)
    check_losses(whole(faults)["step"], tiny.events(faults.base_dir, "base", "damaged", "step"))


def test_a_rank_that_is_killed_in_a_sharded_run_ends_the_others_with_a_line_each(faults):
    codes, output = ends(faults, "killed", 3, kill_at=("loop", 150), rank=1)
    assert codes == [2, -signal.SIGKILL, 2], output
    assert output.count("another rank ended or hangs") == 2 and "Traceback" not in output


def test_a_rank_that_leaves_in_validation_ends_the_others_without_a_traceback(faults):
    """A batch of validation is a collective, too; when it failed, each rank said so in its own way."""
    codes, output = ends(faults, "left", 3, interrupt_validation=2, rank=1)
    assert codes == [2, 130, 2], output
    assert output.count("another rank ended or hangs") == 2 and "Traceback" not in output, output


@pytest.mark.parametrize(
    "kind", ["loss", *(pytest.param(kind, marks=pytest.mark.soak) for kind in ("gradient", "parameter"))]
)
def test_a_number_that_is_not_finite_ends_a_sharded_run_before_the_update(faults, kind):
    """A NaN in a parameter is found by the loss of the rank that sees it, and not saved: all ranks end with 3."""
    codes, output = ends(faults, f"nan-{kind}", 2, spoil=(kind, 6), rank=1)
    assert codes == [3, 3] and ("saved" in output.replace("is not saved", "")) == (kind != "parameter"), output
    bundles = sorted((faults.base_dir / "failed" / f"base-nan-{kind}-step_000005").iterdir())
    norms = [json.loads(path.read_text())["parameter_norms"] for path in bundles]
    assert len(norms) == 2 and norms[0].keys() == norms[1].keys() and "wte.weight" in norms[0]


# -----------------------------------------------------------------------------
# The batch that fits, and one rank


@pytest.mark.parametrize(("stage", "changes"), [("base", {"shard": True}), ("mid", {"recompute": True})])
def test_auto_takes_the_rows_that_need_the_fewest_micro_batches(faults, stage, changes):
    """Twelve rows a step on two ranks; this machine has memory for all of them at once."""
    settings = settings_of(faults, stage, f"{stage}-auto", 2) | {"num_iterations": 1, "device_batch_size": "auto"}
    code, output = faults.run(stage, {**settings, **changes}, 2)
    assert code == 0 and "1 micro-batch x 6 rows" in output, output


def test_one_rank_has_nothing_to_shard_and_says_so(faults):
    codes, output = ends(faults, "single", 1, {"num_iterations": 1})
    assert codes == [0] and "shard: one rank holds everything anyway" in output


@pytest.mark.parametrize(("ranks", "shard"), [(1, True), (2, False)])
def test_offload_without_anything_to_shard_is_one_line(faults, ranks, shard):
    codes, output = ends(faults, "offload-alone", ranks, {"shard": shard, "offload": True})
    assert codes == [2] * ranks and output.count("--offload goes with --shard on at least 2") == 1, output
    assert "Traceback" not in output
