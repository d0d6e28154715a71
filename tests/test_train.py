"""The verbs of a loop: averaging, metering, stopping."""

import itertools
import json
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch

from nanochat import train
from nanochat.common import NotFinite, StepFailed, UserError
from nanochat.compute import Compute
from nanochat.dataloader import Position
from nanochat.gpt import GPTConfig
from nanochat.model import build_model
from nanochat.train import Spikes

CPU = Compute(torch.device("cpu"), torch.float32)
CONFIG = GPTConfig(sequence_len=8, vocab_size=50, n_layer=1, n_head=1, n_kv_head=1, n_embd=16)
FLAT = train.Rates(lr=1.0, momentum=0.9, weight_decay=0.0)


def stream(*targets: torch.Tensor):
    for i, t in enumerate(targets):
        inputs = torch.randint(0, 50, t.shape, generator=torch.Generator().manual_seed(i))
        yield inputs, t, Position(rows_used=i + 1)


def a_step(model, *targets):
    optimizers = model.setup_optimizers()
    sums = train.accumulate(model, stream(*targets), len(targets), CPU)
    assert sums.position.rows_used == len(targets)
    return train.update(optimizers, train.agree(sums, 0, optimizers, CPU), FLAT, CPU)


@contextmanager
def unchanged(model):
    """Nothing in it may move a weight."""
    before = [p.clone() for p in model.parameters()]
    yield
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_tokens_weigh_the_same_in_full_and_in_sparse_batches():
    """nanochat averages each micro-batch and then the averages: a token in a sparse batch weighs more."""
    full, sparse = torch.randint(0, 50, (2, 8)), torch.full((2, 8), -1)
    sparse[0, 0] = 3
    model = build_model(CONFIG, CPU.device, 0)
    with torch.no_grad():
        model.lm_head.weight.normal_()
        losses = [model(x, y, loss_reduction="none") for x, y, _ in stream(full, sparse)]
    result = a_step(model, full, sparse)
    assert result.tokens == 17
    assert result.loss == pytest.approx(sum(x.sum().item() for x in losses) / 17, rel=1e-5)


def test_a_batch_without_a_target_adds_nothing():
    """All-masked micro-batches gave 0 / 0 = NaN; here the step is the one without them, bit for bit."""
    full, empty = torch.randint(0, 50, (2, 8)), torch.full((2, 8), -1)
    one, two = (build_model(CONFIG, CPU.device, 0) for _ in range(2))
    a_step(one, full)
    a_step(two, full, empty)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_a_step_without_any_target_changes_no_weight():
    model = build_model(CONFIG, CPU.device, 0)
    with unchanged(model):
        result = a_step(model, torch.full((2, 8), -1))
    assert (result.loss, result.tokens, result.grad_norm) == (0.0, 0, 0.0)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_gradient_that_is_not_finite_stops_before_the_update(value):
    model = build_model(CONFIG, CPU.device, 0)
    optimizers = model.setup_optimizers()
    sums = train.accumulate(model, stream(torch.randint(0, 50, (2, 8))), 1, CPU)
    model.wte.weight.grad[0, 0] = value
    with unchanged(model), pytest.raises(NotFinite, match="nothing was updated"):
        train.update(optimizers, train.agree(sums, 0, optimizers, CPU), FLAT, CPU)


def test_gradient_norm_is_that_of_the_mean_gradient():
    model = build_model(CONFIG, CPU.device, 0)
    targets = torch.randint(0, 50, (2, 8))
    inputs = next(stream(targets))[0]
    model(inputs, targets).backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm().item()
    model.zero_grad()
    assert a_step(model, targets).grad_norm == pytest.approx(norm, rel=1e-5)


def test_a_busy_start_does_not_shorten_a_budget_in_minutes(monkeypatch):
    """Steps of four seconds while something else was compiling turned six minutes into eighteen seconds of training."""
    clock = [0.0]
    paces = iter([20.0, 4.0, 4.0, 7.0, 5.0, 4.0, 4.1, 0.9, 0.2, 0.2, 0.21, 0.2, 0.2])
    monkeypatch.setattr(train.time, "perf_counter", lambda: clock[0])

    def one_step() -> None:
        clock[0] += next(paces)

    assert train.steps_in(1.0, one_step, CPU, 8)[0] == pytest.approx(300, abs=1)
    assert next(paces, None) is None


def test_ten_minutes_are_not_six_and_a_half_because_the_first_steps_are_slower(monkeypatch):
    """Within 5 % of what was asked, though 20 steps take half as long again, and now and then one takes three times."""
    clock, steps = [0.0], itertools.count()
    monkeypatch.setattr(train.time, "perf_counter", lambda: clock[0])

    def pace(step: int) -> float:
        return 21.0 if step == 0 else 0.3 if step < 20 else 0.6 if step % 50 == 0 else 0.2

    def one_step() -> None:
        clock[0] += pace(next(steps))

    num_steps, _ = train.steps_in(10.0, one_step, CPU, 8)
    assert sum(pace(step) for step in range(1, num_steps)) == pytest.approx(600, rel=0.05)
    assert clock[0] < 21 + 31  # what is undone


def test_every():
    assert [step for step in range(1, 9) if train.every(3, step, 8)] == [3, 6, 8]
    assert not any(train.every(interval, step, 8) for interval in (-1, 0) for step in range(1, 9))


def test_library_modules_import_without_side_effects():
    """Importing the training library must not probe a device, start a thread or print."""
    code = "import threading, nanochat.train, nanochat.engine, nanochat.checkpoint_manager as c, torch;"
    code += "assert not torch.cuda.is_initialized() and threading.active_count() == 1"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_a_skipped_spike_leaves_the_weights_alone():
    model = build_model(CONFIG, CPU.device, 0)
    optimizers, spikes, targets = model.setup_optimizers(), Spikes(), torch.randint(0, 50, (2, 8))
    for _ in range(Spikes.ENOUGH):
        spikes.see(1.0, 0.1)  # what the steps before were like
    sums = train.agree(train.accumulate(model, stream(targets), 1, CPU), 0, optimizers, CPU)
    with unchanged(model):
        result = train.update(optimizers, sums, FLAT, CPU, spikes=spikes, skip_spikes=True)
    assert result.spike and (spikes.count, spikes.skipped) == (1, 1) and optimizers[0].steps == 0


def test_a_damaged_shard_ends_the_step_and_not_the_others():
    """The rank that meets it still takes part in the all-reduce, which tells the others."""

    def damaged():
        yield next(stream(torch.randint(0, 50, (2, 8))))
        raise UserError("shard_00003.parquet: damaged")

    model = build_model(CONFIG, CPU.device, 0)
    sums = train.accumulate(model, damaged(), 2, CPU)
    with unchanged(model), pytest.raises(StepFailed, match="shard_00003"):
        train.agree(sums, 0, model.setup_optimizers(), CPU)
    assert all(p.grad is None for p in model.parameters())


def test_spikes_are_found_counted_and_survive_a_resume():
    rng = torch.Generator().manual_seed(0)
    calm = [(3 + 0.1 * torch.randn((), generator=rng).item(), 1.0) for _ in range(200)]
    spikes = Spikes()
    assert not any(spikes.see(*figures) for figures in calm[:63]) and not spikes.see(99.0, 1.0)  # too few to tell
    spikes = Spikes()
    assert not any(spikes.see(*figures) for figures in calm)
    again = Spikes()
    again.restore(json.loads(json.dumps(spikes.state())))
    for one in (spikes, again):
        assert one.see(3.9, 1.0) and one.see(3.0, 5.0, skip=True) and not one.see(3.1, 1.0)
        assert (one.count, one.skipped) == (2, 1)


def test_a_loss_that_has_risen_for_good_is_not_a_spike_for_ever():
    """With spikes left out of the statistics, --skip-spikes would have skipped every step from there on."""
    spikes = Spikes()
    for _ in range(128):
        spikes.see(2.0, 1.0)
    assert [spikes.see(3.0, 1.0) for _ in range(40)].count(True) < 10
