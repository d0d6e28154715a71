"""Signals, the saving clock, running figures, and what a failed step leaves behind."""

import itertools
import json
import os
import signal
from dataclasses import replace

import pytest
import torch

from nanochat import record, signals
from nanochat.common import Stopped
from nanochat.compute import Compute
from nanochat.record import Meter, StepResult
from nanochat.run import Run, write_bundle
from nanochat.signals import SaveClock, SignalWatch, stop_votes, stopped_by
from nanochat.train import Sums
from tests.test_gpt import small_model

CPU = Compute(torch.device("cpu"), torch.float32)


def test_a_signal_is_remembered_and_the_handlers_come_back():
    before = signal.getsignal(signal.SIGTERM)
    with SignalWatch(CPU) as watch:
        assert watch.received == 0
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert watch.received == signal.SIGTERM  # the first one decides the exit code
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_signal_in_the_middle_of_a_print_is_no_traceback(monkeypatch, capfd):
    """RuntimeError: reentrant call inside <stdout>, and exit code 1 without a checkpoint."""

    def busy(*_: object, **__: object) -> None:
        raise RuntimeError("reentrant call")

    monkeypatch.setattr("builtins.print", busy)
    with SignalWatch(CPU) as watch:
        os.kill(os.getpid(), signal.SIGTERM)
        assert watch.received == signal.SIGTERM
    assert "SIGTERM: finishing this step, then saving" in capfd.readouterr().out


def test_every_rank_and_step_draws_numbers_of_its_own_whatever_came_before():
    """All ranks began with one seed, and dropped the same places."""

    def draw(seed: int, step: int, rank: int) -> tuple[float, ...]:
        replace(CPU, rank=rank, world_size=2).seed_step(seed, step)
        return tuple(torch.rand(4).tolist())

    where = list(itertools.product((42, 43), (0, 1, 20_000), (0, 1)))
    first = [draw(*place) for place in where]
    assert len(set(first)) == len(where) and first[::-1] == [draw(*place) for place in where[::-1]]


def test_a_second_ctrl_c_ends_at_once():
    with SignalWatch(CPU) as watch:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # the same key press, delivered by terminal and torchrun
        watch.received_at -= 1
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_two_ranks_that_both_got_sigterm_do_not_end_with_sigpwr():
    """Signal numbers were added up over ranks: 15 + 15 = 30, exit code 158."""
    votes = [sum(pair) for pair in zip(stop_votes(signal.SIGTERM), stop_votes(signal.SIGTERM), strict=True)]
    assert stopped_by(votes) == signal.SIGTERM
    assert stopped_by([0.0, 1.0, 3.0, 0.0]) == signal.SIGINT and stopped_by([0.0] * 4) == 0


def test_poll_raises_after_a_signal_and_not_before():
    with SignalWatch(CPU) as watch:
        watch.poll()
        os.kill(os.getpid(), signal.SIGUSR1)
        with pytest.raises(Stopped) as stopped:
            watch.poll()
        assert stopped.value.signum == signal.SIGUSR1


def test_saves_are_due_by_steps_and_by_minutes(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(signals.time, "monotonic", lambda: now[0])
    assert [step for step in range(1, 10) if SaveClock(4, -1, CPU).due(step)] == [4, 8]
    assert not any(SaveClock(-1, -1, CPU).due(step) for step in range(1, 10))
    clock = SaveClock(5, 1.0, CPU)
    due = []
    for step in range(1, 12):
        now[0] += 25
        due += [step] if clock.due(step) else []
    assert due == [3, 5, 8, 10]  # every 75 s, the first multiple of 25 over a minute, and anew after each save


def test_a_bundle_tells_what_the_step_saw(base_dir):
    model = small_model()
    optimizers = model.setup_optimizers()
    inputs = torch.randint(0, 50, (2, 8))
    model(inputs, inputs, loss_reduction="sum").backward()
    model.lm_head.weight.grad[3, 1] = torch.nan
    for optimizer in optimizers:
        optimizer.reduce_gradients(16)
    settings = {"save_every": -1, "save_minutes": -1}
    run = Run("base", "t", settings, {}, CPU)
    run.model, run.optimizers, run.meter = model, optimizers, Meter(flops_per_token=1, num_steps=20, steps=12)
    folder = write_bundle(run, Sums(torch.zeros(2), {"row": 5}, batches=[(inputs, inputs)]))
    content = json.loads((folder / "rank0.json").read_text())
    assert folder == base_dir / "failed" / "base-t-step_000012"
    assert content["not_finite"] == ["lm_head.weight"] and content["position_after"] == {"row": 5}
    assert content["batches"][0]["inputs"] == inputs.tolist()
    assert content["gradient_norms"].keys() == content["parameter_norms"].keys()


def test_nohup_is_respected():
    """A run started with nohup goes on when its terminal is closed."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with SignalWatch(CPU) as watch:
            os.kill(os.getpid(), signal.SIGHUP)
            assert watch.received == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_first_smoothed_loss_is_the_first_loss():
    """nanochat's mid-training divides by the wrong power: a first loss of 5.00 prints as 2.63."""
    meter = Meter(flops_per_token=100, num_steps=10)
    meter.tick(StepResult(loss=5.0, tokens=64, grad_norm=1.0, stop_signal=0))
    assert meter.smooth_loss == pytest.approx(5.0)
    for _ in range(50):
        meter.tick(StepResult(loss=2.0, tokens=64, grad_norm=1.0, stop_signal=0))
    assert meter.smooth_loss == pytest.approx(2.0, abs=0.02)


def test_meter_counts_all_tokens_of_a_step_and_skips_the_slow_start(monkeypatch):
    """Half a second a step after three that took ten (compilation): 128 tokens/s, and 10 * 128 FLOP/s."""
    clock = iter([0, 10, 0, 10, 0, 10, 0, 0.5, 0, 0.5])
    monkeypatch.setattr(record.time, "perf_counter", lambda: next(clock))
    meter = Meter(flops_per_token=10, num_steps=7)
    for step in range(5):
        meter.start()
        meter.tick(StepResult(loss=1.0, tokens=64, grad_norm=1.0, stop_signal=0))
        if step == 2:  # a run of three steps said 0 tok/s, 0 GFLOP/s
            assert meter.describe() == "warming up" and meter.summary() == {"train_seconds": 30.0}
    assert meter.tokens_per_second == pytest.approx(128)
    assert meter.flops_per_second == pytest.approx(1280)
    assert meter.eta_seconds == pytest.approx(1.0)
    assert meter.mfu is None  # a CPU's peak is not guessed
    assert meter.train_seconds == pytest.approx(31)


def test_meter_goes_on_after_a_resume():
    first = Meter(flops_per_token=1, num_steps=9)
    for loss in (4.0, 3.0):
        first.tick(StepResult(loss=loss, tokens=1, grad_norm=0.0, stop_signal=0))
    second = Meter(flops_per_token=1, num_steps=9)
    second.restore(first.state())
    for meter in (first, second):
        meter.tick(StepResult(loss=2.0, tokens=1, grad_norm=0.0, stop_signal=0))
    assert first.smooth_loss == second.smooth_loss and second.steps == 3
