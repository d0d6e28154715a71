"""When a run ends early and when it saves: signals, of which all ranks take the same notice, and the saving clock."""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Sequence
from types import FrameType
from typing import Any, Self

import torch

from nanochat.common import Stopped, get_rank
from nanochat.compute import Compute

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


class SignalWatch:
    """Remembers the first of SIGNALS until the loop asks for it, so that a step is finished and saved; not one that is
    ignored already, as SIGHUP (a closed terminal) is under nohup. A second SIGINT, a second or more later (a terminal
    and torchrun may both deliver the first), ends the process at once. On exit the old handlers come back.
    """

    def __init__(self, compute: Compute) -> None:
        self.compute = compute
        self.received = 0
        self.received_at = 0.0
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        wanted = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
        self.previous = {number: signal.signal(number, self.handle) for number in wanted}
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        self.previous = {}

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
        """For what takes long between steps: raise Stopped on every rank when any was asked to stop. Collective."""
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
