"""What stands between a run and its loss: signals, the clock, numbers that are not finite, spikes.

A step is finished whole or not at all. What ends a run early is an exception that every rank raises at the same place,
`Stopped` or `StepFailed`, while the weights are those of the last whole step: the loop saves them and lets it pass.
"""

import contextlib
import json
import math
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from nanochat.common import Stopped, get_base_dir, get_rank
from nanochat.compute import Compute
from nanochat.files import write_atomic
from nanochat.gpt import GPT
from nanochat.sharding import local

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


class SignalWatch:
    """Remembers the first SIGTERM, SIGINT, SIGUSR1 or SIGHUP (a closed terminal; not under nohup) until the loop asks
    for it, so that a step is finished and saved. A second SIGINT, a second or more later (a terminal and torchrun may
    both deliver the first), ends the process at once. Use as a context manager: the old handlers come back.
    """

    def __init__(self, compute: Compute) -> None:
        self.compute = compute
        self.received = 0
        self.received_at = 0.0

    def __enter__(self) -> Self:
        wanted = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
        self.previous: dict[int, Any] = {number: signal.signal(number, self.handle) for number in wanted}
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def handle(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            if number == signal.SIGINT and time.monotonic() - self.received_at >= 1:
                raise KeyboardInterrupt
            return
        self.received, self.received_at = number, time.monotonic()
        if get_rank() == 0:  # not by print(): the signal may have come in the middle of one, which Python refuses
            name = signal.Signals(number).name
            line = f"\n{name}: finishing this step, then saving (Ctrl-C again: stop at once, unsaved)\n"
            with contextlib.suppress(OSError):  # the terminal may be what has gone
                os.write(sys.__stdout__.fileno() if sys.__stdout__ else 1, line.encode())

    def poll(self) -> None:
        """Between steps, in evaluations: raise Stopped on every rank when any one was asked to stop. Collective, about
        a tenth of a millisecond.
        """
        votes = self.compute.sum(torch.tensor(stop_votes(self.received)))
        if stopped_by(votes.tolist()):
            raise Stopped(stopped_by(votes.tolist()))


def stop_votes(received: int) -> list[float]:
    """A rank's wish to stop as numbers that may be added up over ranks: one per signal of SIGNALS."""
    return [float(received == number) for number in SIGNALS]


def stopped_by(votes: Sequence[float]) -> int:
    """The signal that the votes of all ranks stand for, 0 for none: the first of SIGNALS that any rank received."""
    return next((int(number) for number, count in zip(SIGNALS, votes, strict=True) if count), 0)


class SaveClock:
    """Says when a checkpoint is due, by steps and by minutes; rank 0's clock counts."""

    def __init__(self, every_steps: int, every_minutes: float, compute: Compute):
        self.every_steps, self.every_minutes, self.compute = every_steps, every_minutes, compute
        self.saved_at = time.monotonic()

    def due(self, step: int) -> bool:
        """Whether to save after this step, the same on every rank; starts the minutes anew if so."""
        due = self.every_steps > 0 and step % self.every_steps == 0
        if not due and self.every_minutes > 0:
            late = time.monotonic() - self.saved_at >= 60 * self.every_minutes
            due = self.compute.any(self.compute.is_master and late)
        if due:
            self.saved_at = time.monotonic()
        return due


class Spikes:
    """Finds losses and gradient norms far above those of the steps before: more than 6 standard deviations over the
    mean of the last 128 (the figures of OLMo-core's SkipStepOptimizer). Counts them; whether such a step is skipped is
    the caller's decision. State that must survive a resume is `state()`.
    """

    WINDOW, ENOUGH, SIGMAS = 128, 64, 6.0

    def __init__(self) -> None:
        self.losses: deque[float] = deque(maxlen=self.WINDOW)
        self.norms: deque[float] = deque(maxlen=self.WINDOW)
        self.count = 0
        self.skipped = 0

    def see(self, loss: float, norm: float, skip: bool = False) -> bool:
        """Take notice of a step's figures; True when either is a spike, which counts as skipped with `skip`. Spikes
        stay among the steps before: after a loss has risen for good, a few dozen steps and not all that follow are
        spikes.
        """
        spike = self.is_far(loss, self.losses) or self.is_far(norm, self.norms)
        self.count += spike
        self.skipped += spike and skip
        self.losses.append(loss)
        self.norms.append(norm)
        return spike

    def is_far(self, value: float, before: deque[float]) -> bool:
        if len(before) < self.ENOUGH:
            return False
        mean = math.fsum(before) / len(before)
        deviation = math.sqrt(math.fsum((x - mean) ** 2 for x in before) / len(before))
        return value > mean + self.SIGMAS * deviation

    def summary(self) -> dict[str, int]:
        return {"spikes": self.count, "spikes_skipped": self.skipped}

    def state(self) -> dict[str, Any]:
        return {"losses": [*self.losses], "norms": [*self.norms], "count": self.count, "skipped": self.skipped}

    def restore(self, state: dict[str, Any]) -> None:
        self.losses.extend(state["losses"])
        self.norms.extend(state["norms"])
        self.count, self.skipped = state["count"], state["skipped"]


# -----------------------------------------------------------------------------
# What a failed step leaves behind


class HasGradients(Protocol):
    def own_gradients(self) -> Iterator[tuple[str, Tensor]]: ...


def write_bundle(
    name: str,
    step: int,
    batches: Sequence[tuple[Tensor, Tensor]],
    position: object,
    model: GPT,
    optimizers: Sequence[HasGradients],
    compute: Compute,
) -> Path:
    """Write down what a step saw whose numbers were not finite: one JSON file per rank in
    $NANOCHAT_BASE_DIR/failed/<name>-step_<step>/, with the token ids and targets of its batches, the position after
    them, the norms of the parameters and of the mean gradient as far as this rank has them. Returns the directory.
    """
    gradients = {key: tensor.norm().item() for optimizer in optimizers for key, tensor in optimizer.own_gradients()}
    parameters = {key: local(p.detach()).norm().item() for key, p in model.named_parameters()}
    suspects = [key for norms in (gradients, parameters) for key, norm in norms.items() if not math.isfinite(norm)]
    content = {
        "step": step,
        "rank": compute.rank,
        "not_finite": sorted(set(suspects)),
        "position_after": position,
        "gradient_norms": {key: str(norm) for key, norm in gradients.items()},  # str: JSON has no NaN
        "parameter_norms": {key: str(norm) for key, norm in parameters.items()},
        "batches": [{"inputs": inputs.tolist(), "targets": targets.tolist()} for inputs, targets in batches],
    }
    folder = get_base_dir() / "failed" / f"{name}-step_{step:06d}"
    write_atomic(folder / f"rank{compute.rank}.json", json.dumps(content, default=asdict) + "\n")
    return folder
