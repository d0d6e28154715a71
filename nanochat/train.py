"""Verbs of a training loop: accumulate gradients, agree on the step, update; spikes, budgets in minutes, samples.

Plain functions that take values. The loops themselves are written out in the scripts, because reading them is the
point; what stands around a loop is run.py.
"""

import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat.adamw import AdamW
from nanochat.attention import round_length
from nanochat.common import NotFinite, StepFailed, UserError, print0
from nanochat.compute import Compute, can_compile, collective, synchronize
from nanochat.model import LanguageModel
from nanochat.muon import Muon
from nanochat.record import StepResult
from nanochat.schedule import cosine_to_zero, muon_momentum, trapezoid
from nanochat.sharding import is_sharded
from nanochat.signals import stop_votes, stopped_by

Stream = Iterator[tuple[Tensor, Tensor, Any]]  # inputs (B, T), targets (B, T), the position after them


@dataclass(frozen=True)
class Rates:
    """Of one step."""

    lr: float  # multiplies every group's initial learning rate
    momentum: float  # Muon's, as it is
    weight_decay: float  # multiplies Muon's initial weight decay


def rates_at(step: int, num_steps: int, warmup_ratio: float, warmdown_ratio: float, final_lr_frac: float) -> Rates:
    """The schedules of base, mid and SFT, at a step."""
    return Rates(
        lr=trapezoid(step, num_steps, warmup_ratio, warmdown_ratio, final_lr_frac),
        momentum=muon_momentum(step, num_steps),
        weight_decay=cosine_to_zero(step, num_steps),
    )


@dataclass
class Sums:
    """What the micro-batches of one step came to, on this rank."""

    totals: Tensor  # (2,) loss sum and counted tokens, on the device
    position: Any = None  # of the stream after them
    batches: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # inputs and targets (B, T), for a diagnosis
    error: UserError | None = None  # why the step could not be finished; agree() tells the other ranks


def zero_sums(compute: Compute) -> Sums:
    """Sums before the first micro-batch, in fp64 where the device has it."""
    dtype = torch.float32 if compute.device.type == "mps" else torch.float64
    return Sums(torch.zeros(2, dtype=dtype, device=compute.device))


def accumulate(model: LanguageModel, stream: Stream, grad_accum_steps: int, compute: Compute) -> Sums:
    """Forward and backward over the micro-batches of one step: gradients of the *sum* of the losses stay on the
    parameters, and update() divides them once. A UserError of the stream, such as a damaged shard, is kept in the
    result; a sharded model, whose other ranks need this one's weights, goes on with tokens that count nothing.
    """
    sums = zero_sums(compute)
    for _ in range(grad_accum_steps):
        if not sums.error:
            try:
                inputs, targets, sums.position = next(stream)
                sums.batches.append((inputs, targets))
            except UserError as error:
                sums.error = error
        if sums.error:
            if not is_sharded(model):
                return sums
            inputs = torch.zeros((1, 2), dtype=torch.long, device=compute.device)
            targets = torch.full_like(inputs, -1)
        with collective():
            loss = model(inputs, targets, loss_reduction="sum", dtype=compute.dtype)
            loss.backward()
        sums.totals += torch.stack([loss.detach(), (targets >= 0).sum()])
    return sums


@dataclass(frozen=True)
class Agreed:
    """What all ranks together know of a step before its update."""

    loss: float  # mean nats per counted token; not checked yet
    tokens: int  # counted tokens
    stop_signal: int  # a signal number when any rank was asked to stop, else 0
    sums: Sums  # this rank's part


def agree(sums: Sums, received: int, optimizers: Sequence[AdamW | Muon], compute: Compute) -> Agreed:
    """One small all-reduce that carries loss, tokens, failures and the wish to stop (`received`, a signal). Raises
    StepFailed, on every rank and with all gradients dropped, when any rank could not finish its micro-batches.
    """
    votes = torch.tensor([*stop_votes(received), float(sums.error is not None)], dtype=sums.totals.dtype)
    loss, tokens, *signals, failures = compute.sum(torch.cat([sums.totals, votes.to(sums.totals.device)])).tolist()
    if failures:
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        why = str(sums.error or f"{failures:.0f} of {compute.world_size} ranks could not finish the step")
        raise StepFailed(why, everywhere=failures == compute.world_size)
    return Agreed(loss / max(tokens, 1.0), int(tokens), stopped_by(signals), sums)


def update(
    optimizers: Sequence[AdamW | Muon],
    agreed: Agreed,
    rates: Rates,
    compute: Compute,
    spikes: "Spikes | None" = None,
    skip_spikes: bool = False,
) -> StepResult:
    """Average the gradients over the counted tokens of all ranks, and step. A step without a counted token changes
    nothing, nor does with skip_spikes one that is a spike. Raises NotFinite, on every rank and before the update, when
    loss or gradient is not finite on any.
    """
    squares = [optimizer.reduce_gradients(max(agreed.tokens, 1)) for optimizer in optimizers]
    grad_norm = compute.sum(torch.stack(squares).sum()).sqrt().item()
    if not (math.isfinite(agreed.loss) and math.isfinite(grad_norm)):
        figures = f"loss {agreed.loss}, gradient norm {grad_norm}"
        failed = NotFinite(f"{figures}: not finite, nothing was updated; resume with lower learning rates", True)
        failed.seen = agreed.sums
        raise failed
    spike = bool(spikes and agreed.tokens and spikes.see(agreed.loss, grad_norm, skip_spikes))
    if spike:
        figures = f"loss {agreed.loss:.4f}, gradient norm {grad_norm:.3f}"
        print0(f"spike: {figures}" + (", update skipped" if skip_spikes else ""))
    if agreed.tokens and not (spike and skip_spikes):
        for optimizer in optimizers:
            set_rates(optimizer, rates)
            optimizer.step()
    return StepResult(agreed.loss, agreed.tokens, grad_norm, agreed.stop_signal, spike)


def set_rates(optimizer: AdamW | Muon, rates: Rates) -> None:
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])
        group.setdefault("initial_weight_decay", group["weight_decay"])
        group["lr"] = group["initial_lr"] * rates.lr
        group["weight_decay"] = group["initial_weight_decay"] * rates.weight_decay
        if "momentum" in group:
            group["momentum"] = rates.momentum


class Spikes:
    """Finds and counts losses and gradient norms more than 6 standard deviations over the mean of the last 128 (the
    figures of OLMo-core's SkipStepOptimizer). `state()` is what must survive a resume.
    """

    WINDOW, ENOUGH, SIGMAS = 128, 64, 6.0

    def __init__(self) -> None:
        self.losses: deque[float] = deque(maxlen=self.WINDOW)
        self.norms: deque[float] = deque(maxlen=self.WINDOW)
        self.count = self.skipped = 0

    def see(self, loss: float, norm: float, skip: bool = False) -> bool:
        """Take notice of a step's figures; True when either is a spike, which counts as skipped with `skip`. Spikes
        stay among the steps before, so a loss that has risen for good is one for a few dozen steps and not for ever.
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
# When, and for how long


def every(interval: int, step: int, num_steps: int) -> bool:
    """True at each multiple of interval and at the last step; never for an interval of -1 or 0."""
    return interval > 0 and (step % interval == 0 or step == num_steps)


def steps_for_minutes(
    minutes: float, model: LanguageModel, gradients: Callable[[], Sums], compute: Compute, fewest: int = 8
) -> tuple[int, str]:
    """Steps of `gradients`, such as accumulate(), that fit into `minutes` with their update, and why so many. Trial
    steps with a learning rate of 0 tell the pace, so the run is bit for bit that of --num-iterations with the number.
    """
    optimizers = model.setup_optimizers(dtype=compute.dtype)

    def trial_step() -> None:
        update(optimizers, agree(gradients(), 0, optimizers, compute), Rates(0.0, 0.9, 0.0), compute)

    num_steps, trials = steps_in(minutes, trial_step, compute, fewest)
    return num_steps, f"{minutes:g} minutes at the pace of {trials} trial steps, which change nothing"


def steps_in(minutes: float, one_step: Callable[[], object], compute: Compute, fewest: int) -> tuple[int, int]:
    """Steps that fit into `minutes` at the median pace of the later half of some trial steps, and the number of these:
    `fewest` or more. They go on for a twentieth of the time, at most 30 s, because the first ones are slower (ten
    minutes became six and a half at the pace of steps 4 to 8), and until the last few differ by less than half.
    """
    seconds, uneven, last = list[float](), True, fewest // 2 + 1
    while (n := len(seconds)) < fewest or sum(seconds[1:]) < min(30, 3 * minutes) or (uneven and n < 5 * fewest):
        start = time.perf_counter()
        one_step()
        synchronize(compute.device)
        seconds.append(compute.sum(torch.tensor(time.perf_counter() - start)).item() / compute.world_size)
        uneven = max(seconds[-last:]) > 1.5 * min(seconds[-last:])
    return max(1, round(60 * minutes / statistics.median(seconds[n // 2 :]))), n


def compile_model(model: LanguageModel, device: torch.device) -> None:
    """torch.compile where its backend has what it needs; a CPU without a C++ compiler trains eagerly, and says so."""
    if can_compile(device):
        model.compile_parts()
    else:
        print0("compile: no C++ compiler found, training eagerly (about half the speed); Debian: apt-get install g++")


# -----------------------------------------------------------------------------
# Looking at it


def fits(prompt: Sequence[int], model: LanguageModel, name: object = None) -> bool:
    """Whether a prompt leaves room for an answer in the context; with a name, says so where it does not."""
    room = len(prompt) < model.config.sequence_len
    if name and not room:
        print0(f"  {name!r}: skipped, its {len(prompt)} tokens fill the context of {model.config.sequence_len}")
    return room


@torch.inference_mode()
def complete(model: LanguageModel, ids: Sequence[int], tokens: int, dtype: torch.dtype) -> list[int]:
    """The likeliest continuation of ids, up to the end of the context, all of it read again for each token: enough to
    look at a model, without an engine.
    """
    said = list(ids)
    for n in range(len(ids), min(len(ids) + tokens, model.config.sequence_len)):
        padded = F.pad(torch.tensor(said), (0, round_length(n, model.device) - n)).to(model.device)
        said.append(int(model.logits(model.hidden(padded[None], dtype)[:, n - 1]).argmax()))
    return said[len(ids) :]
