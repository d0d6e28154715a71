"""Signals, the clock, spikes, and what a failed step leaves behind."""

import json
import os
import signal

import pytest
import torch

from nanochat import guard
from nanochat.common import Stopped
from nanochat.compute import Compute
from nanochat.guard import SaveClock, SignalWatch, Spikes, stop_votes, stopped_by, write_bundle
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
    monkeypatch.setattr(guard.time, "monotonic", lambda: now[0])
    assert [step for step in range(1, 10) if SaveClock(4, -1, CPU).due(step)] == [4, 8]
    assert not any(SaveClock(-1, -1, CPU).due(step) for step in range(1, 10))
    clock = SaveClock(5, 1.0, CPU)
    due = []
    for step in range(1, 12):
        now[0] += 25
        due += [step] if clock.due(step) else []
    assert due == [3, 5, 8, 10]  # every 75 s, the first multiple of 25 over a minute, and anew after each save


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


def test_a_bundle_tells_what_the_step_saw(base_dir):
    model = small_model()
    optimizers = model.setup_optimizers()
    inputs = torch.randint(0, 50, (2, 8))
    model(inputs, inputs, loss_reduction="sum").backward()
    model.lm_head.weight.grad[3, 1] = torch.nan
    for optimizer in optimizers:
        optimizer.reduce_gradients(16)
    folder = write_bundle("base-t", 12, [(inputs, inputs)], {"row": 5}, model, optimizers, CPU)
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
