"""The plan says what the code does: shapes, state, memory, batches; and needs neither torch nor data."""

import json
import re
import shlex
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from nanochat import gpt, muon, sharding, sizing
from nanochat.common import UserError
from nanochat.compute import Compute
from nanochat.configurator import parse_args, read_block
from nanochat.device_batch import find_device_batch, step_fits
from nanochat.gpt import GPT, build_model, slice_rows
from nanochat.schedule import plan_batches

ROOT = Path(__file__).parent.parent

# Shapes whose memory is measured: layers, width, head size, context, rows, vocabulary, dtype.
SHAPES = [
    (2, 256, 64, 128, 4, 4096, "bfloat16"),
    (4, 256, 64, 256, 4, 4096, "float32"),
    (4, 192, 64, 256, 16, 4096, "bfloat16"),
    (2, 256, 64, 256, 32, 4096, "bfloat16"),
    (2, 256, 64, 512, 4, 4096, "bfloat16"),
    (4, 256, 64, 1024, 2, 4096, "bfloat16"),
    (4, 256, 64, 2048, 1, 4096, "bfloat16"),
    (2, 256, 64, 2048, 4, 4096, "bfloat16"),
    (4, 512, 128, 256, 4, 4096, "bfloat16"),
    (2, 256, 64, 256, 4, 32768, "bfloat16"),
]


def plan(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "scripts.plan", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


# -----------------------------------------------------------------------------
# The same numbers as the code


@pytest.mark.parametrize("depth", [1, 4, 7, 12, 20, 26, 32])
@pytest.mark.parametrize("options", [{}, {"kv_heads": 1, "window_pattern": "SSL", "vocab_size": 1000}])
def test_shape_parameters_and_flops_are_those_of_the_model(depth: int, options: dict) -> None:
    asked = {"depth": depth, "vocab_size": 65536, "sequence_len": 2048, **options}
    config = sizing.config_from_depth(**asked)
    assert asdict(config) == asdict(gpt.config_from_depth(**asked))
    assert config.windows() == gpt.config_from_depth(**asked).windows()
    with torch.device("meta"):
        model = GPT(gpt.GPTConfig(**asdict(config)))
    parameters = sizing.count_parameters(config)
    assert sum(parameters.values()) == model.num_params()
    assert parameters["embedding"] == model.wte.weight.numel()
    assert parameters["mlp"] == sum(p.numel() for block in model.blocks for p in block.mlp.parameters())
    assert sizing.flops_per_token(config) == model.estimate_flops()


@pytest.mark.parametrize("world_size", [1, 3, 6, 8])
def test_optimizer_state_is_that_of_one_rank(world_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (muon, sharding):
        monkeypatch.setattr(module, "ranks", lambda: (0, world_size))
    config = sizing.config_from_depth(5, 1001, 64, kv_heads=1)
    with torch.device("meta"):
        model = GPT(gpt.GPTConfig(**asdict(config)))
    held = sum(optimizer.state_bytes() for optimizer in model.setup_optimizers())
    assert sizing.optimizer_bytes(config, world_size) == held


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_loss_is_cut_into_as_many_slices(device: str) -> None:
    for tokens, vocab_size in ((256, 4096), (1025, 4096), (12288, 65536), (65536, 65536), (7, 300)):
        slices = slice_rows(tokens, vocab_size, torch.device(device))
        assert sizing.slice_count(tokens, vocab_size, device == "cpu") == len(slices)


def test_cards_are_those_whose_peak_is_known() -> None:
    assert sizing.find_card("AMD Radeon RX 7900 XTX") == ("7900 XTX", 24, 122.8, None)
    assert sizing.find_card("NVIDIA H100 PCIe") == ("H100 PCIe", 80, 756, 3.00)
    assert sizing.find_card("GeForce 256") is None


# -----------------------------------------------------------------------------
# Memory against measurement


def measured_and_planned(shape: tuple, mode: str, ranks: int = 1) -> tuple[int, int]:
    """Bytes of a training step on this CPU: counted by the allocator in processes of their own, and planned."""
    layers, width, head_dim, context, rows, vocab_size, dtype = shape
    sizes = {"n_layer": layers, "n_embd": width, "n_head": width // head_dim, "n_kv_head": width // head_dim}
    sizes |= {"sequence_len": context, "vocab_size": vocab_size}
    launcher = ["torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", "-m"] if ranks > 1 else []
    command = [sys.executable, "-m", *launcher, "tests.step_memory", json.dumps(sizes), str(rows), dtype, mode]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    counted = json.loads(re.findall(r"\{.lasting.+\}", result.stdout)[-1])
    size, words = 2 if dtype == "bfloat16" else 4, mode.split("+")
    on = {"compiled": "compiled" in words, "shard": "shard" in words, "recompute": "recompute" in words}
    how = sizing.Setup(world_size=ranks, size=size, cpu=True, **on)
    planned = sizing.memory(sizing.GPTConfig(**sizes), rows, how)
    assert planned.weights + planned.optimizer == counted["lasting"]
    if not how.shard:  # there all buffers of the optimizers are small
        assert planned.gradients + planned.update <= 1.5 * counted["update"]
        assert planned.gradients + planned.update >= 0.9 * counted["update"]
    return counted["lasting"] + max(counted["gradients"], counted["update"]), planned.total


@pytest.mark.soak
def test_planned_memory_is_what_an_eager_step_takes() -> None:
    measured, planned = measured_and_planned(SHAPES[0], "eager")
    assert abs(planned / measured - 1) < 0.15


@pytest.mark.soak
@pytest.mark.parametrize("mode", ["eager", "compiled"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_planned_memory_is_what_a_step_takes(shape: tuple, mode: str) -> None:
    measured, planned = measured_and_planned(shape, mode)
    print(f"| {mode} | {' | '.join(map(str, shape))} | {measured / 1e6:.1f} | {planned / 1e6:.1f} |")
    assert abs(planned / measured - 1) < 0.15


SHARDED = [(4, 256, 64, 256, 4, 4096, "bfloat16"), (8, 128, 64, 512, 2, 1024, "bfloat16")]
SHARDED += [(6, 512, 128, 2048, 1, 2048, "bfloat16"), (2, 256, 64, 256, 4, 32768, "bfloat16")]


@pytest.mark.soak
@pytest.mark.parametrize(
    ("ranks", "mode"), [(1, "eager+recompute"), (2, "eager+shard"), (3, "eager+shard+recompute"), (2, "compiled+shard")]
)
@pytest.mark.parametrize("shape", SHARDED, ids=str)
def test_planned_memory_is_what_a_sharded_or_recomputed_step_takes(shape: tuple, ranks: int, mode: str) -> None:
    measured, planned = measured_and_planned(shape, mode, ranks)
    print(f"| {ranks} x {mode} | {' | '.join(map(str, shape))} | {measured / 1e6:.1f} | {planned / 1e6:.1f} |")
    assert abs(planned / measured - 1) < 0.15


def test_what_does_not_fit_is_told_only_the_settings_that_are_still_off() -> None:
    words = ["--depth=48", "--gpus=6", "--vram-gb=24"]
    said = "try --recompute, --shard on several, --offload, a smaller --depth"
    assert said in plan(*words).stderr
    assert "try --offload, a smaller --depth" in plan(*words, "--shard", "--recompute").stderr
    offloaded = plan(*words, "--shard", "--recompute", "--offload").stdout
    assert "of the host's memory for each rank" in offloaded
    assert "--shard=True --offload=True --recompute=True" in offloaded.splitlines()[-1]


# -----------------------------------------------------------------------------
# Batches


@pytest.mark.parametrize(
    ("cards", "gigabytes", "rows", "micro_batches", "tokens"),
    [
        (6, 24, 6, 7, 516_096),
        (5, 24, 5, 10, 512_000),
        (1, 24, 5, 51, 522_240),
        (8, 80, 32, 1, 524_288),
        (7, 24, 6, 6, 516_096),
    ],
)
def test_any_number_of_cards_steps_by_about_as_many_tokens(
    cards: int, gigabytes: int, rows: int, micro_batches: int, tokens: int
) -> None:
    config = sizing.config_from_depth(20, 65536, 2048)
    budget = gigabytes * 1e9 * (1 - sizing.MARGIN)
    how = sizing.Setup(world_size=cards)
    most = sizing.most_rows(config, budget, how)
    assert sizing.memory(config, most, how).total <= budget < sizing.memory(config, most + 1, how).total
    batch = sizing.choose_batch(524288, most, 2048, cards)
    assert (batch.device_batch_size, batch.grad_accum_steps, batch.tokens) == (rows, micro_batches, tokens)


def test_every_plan_of_rows_is_one_that_base_train_makes() -> None:
    """base_train gets the device batch alone and must come to the same micro-batches."""
    for cards in range(1, 13):
        for most in (1, 2, 3, 5, 6, 9, 14, 24, 48, 300):
            batch = sizing.choose_batch(524288, most, 2048, cards)
            assert batch.device_batch_size <= most
            assert plan_batches(524288, batch.device_batch_size, 2048, cards) == batch
            assert abs(batch.tokens / 524288 - 1) <= sizing.TOTAL_TOLERANCE


def test_much_memory_is_no_reason_to_be_far_from_the_total() -> None:
    batch = sizing.choose_batch(524288, 914, 256, 1)
    assert (batch.device_batch_size, batch.grad_accum_steps) == (683, 3)


def test_the_known_launcher_of_six_cards_is_the_same_arithmetic() -> None:
    """Six 24 GB cards, six rows each, 393,216 tokens asked for: five micro-batches, 368,640 tokens."""
    batch = plan_batches(393216, 6, 2048, 6)
    assert (batch.grad_accum_steps, batch.tokens) == (5, 368_640)


# -----------------------------------------------------------------------------
# The script


def test_a_plan_needs_neither_torch_nor_numpy() -> None:
    program = """
import runpy, sys
sys.argv[1:] = ["--depth=20", "--gpus=6", "--vram-gb=24"]
runpy.run_module("scripts.plan", run_name="__main__", alter_sys=True)
assert not {"torch", "numpy", "pyarrow"} & set(sys.modules)
"""
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_six_cards_of_24_gb() -> None:
    text = plan("--depth=20", "--gpus=6", "--card=RX 7900 XTX").stdout
    assert "parameters: 560,988,160 = embedding 83,886,080" in text
    assert "fits: 6 rows in 21.6 GB" in text
    assert "516,096 tokens = 7 micro-batches x 6 rows x 2048 tokens x 6 ranks (asked for 524,288: 1.6% fewer)" in text
    assert "21,740 steps, 11,219,927,040 tokens" in text
    assert "3.92e+19 FLOPs" in text
    assert "assumed 40% MFU" in text
    assert "dollars" not in text  # no price of this card is known
    assert "nanochat.dataset -n 237" in text


def test_dollars_are_of_one_card_as_in_the_report() -> None:
    text = plan("--gpus=8", "--card=H100", "--mfu=0.5", "--dollars-per-hour=2").stdout
    hours, dollars = re.search(r"time: ([\d.]+) hours .*, ([\d,]+) dollars at 2 an hour", text).groups()  # type: ignore[union-attr]
    assert abs(float(hours) * 16 - float(dollars)) < 1


@pytest.mark.parametrize("words", [["--gpus=6", "--vram-gb=24"], ["--depth=4", "--kv-heads=2", "--target-flops=1e17"]])
def test_the_command_that_a_plan_ends_with_is_one_of_base_train(words: list[str]) -> None:
    line = plan(*words).stdout.splitlines()[-1]
    given = parse_args(read_block(ROOT / "scripts" / "base_train.py"), shlex.split(line.partition("base_train")[2]))
    asked = parse_args(read_block(ROOT / "scripts" / "plan.py"), words)
    for name, (value, _) in asked.items():
        assert name in ("gpus", "vram_gb") or given[name][0] == value


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--card=RTX 9999"], "--card='RTX 9999' is not in the table; give --vram-gb=GB, or one of: GB200"),
        (["--depth=32", "--vram-gb=8"], "a smaller --depth or --max-seq-len"),
        (["--num-iterations=5", "--target-flops=1e18"], "exactly one must be set"),
        (["--gpus=0"], "--gpus=0: expected more than 0"),
        (["--mfu=40"], "--mfu=40.0: expected a share"),
        (["--window-pattern=X"], "letters L and S"),
    ],
)
def test_a_mistake_is_one_line(words: list[str], says: str) -> None:
    result = plan(*words)
    assert result.returncode == 2
    assert says in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_device_batch_that_does_not_fit_is_said() -> None:
    text = plan("--vram-gb=24", "--device-batch-size=9").stdout
    assert "warning: --device-batch-size=9 does not fit; at most --device-batch-size=5" in text


def test_the_table_has_a_line_for_each_depth() -> None:
    lines = plan("--table", "--gpus=6", "--vram-gb=24").stdout.splitlines()
    depths = [line.split()[0] for line in lines if re.match(r"d\d", line)]
    assert depths == "d4 d6 d8 d10 d12 d16 d20 d24 d26 d32".split()
    assert any(line.startswith("d32") and "27." in line for line in lines)  # does not fit, and says what it needs


# -----------------------------------------------------------------------------
# The device batch of a run


def tiny_model() -> tuple[GPT, Compute]:
    config = gpt.GPTConfig(sequence_len=32, vocab_size=300, n_layer=2, n_head=2, n_kv_head=2, n_embd=32)
    return build_model(config, torch.device("cpu"), seed=0), Compute(torch.device("cpu"), torch.float32)


def test_a_step_on_trial_leaves_no_trace() -> None:
    model, compute = tiny_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    assert step_fits(model, 3, 32, compute)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
    assert all(p.grad is None for p in model.parameters())


def test_a_step_that_runs_out_of_memory_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    model, compute = tiny_model()
    whole = model.hidden

    def small(idx: torch.Tensor, *rest: object) -> torch.Tensor:
        if idx.size(0) > 4:
            raise torch.OutOfMemoryError
        return whole(idx, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(model, "hidden", small)
    assert not step_fits(model, 5, 32, compute)
    assert step_fits(model, 4, 32, compute)


def test_on_a_cpu_the_plan_decides(capsys: pytest.CaptureFixture[str]) -> None:
    model, compute = tiny_model()
    assert find_device_batch(model, 32 * 16, 32, compute, compiled=False) == 16
    assert "device batch: 16 rows" in capsys.readouterr().out


def test_a_model_without_room_for_one_row_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, compute = tiny_model()
    monkeypatch.setattr("nanochat.device_batch.available_memory", lambda: 100_000)
    with pytest.raises(UserError, match="not one row of 32 tokens fits"):
        find_device_batch(model, 512, 32, compute, compiled=False)
