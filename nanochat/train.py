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
from nanochat.schedule import cosine_to_zero, learning_rate, muon_momentum
from nanochat.sharding import is_sharded
from nanochat.signals import stop_votes, stopped_by

Optimizers = Sequence[AdamW | Muon]
Stream = Iterator[tuple[Tensor, Tensor, Any]]  # inputs (B, T), targets (B, T), the position after them


@dataclass(frozen=True)
class Rates:
    """Of one step."""

    lr: float  # multiplies every group's initial learning rate
    momentum: float  # Muon's, as it is
    weight_decay: float  # multiplies Muon's initial weight decay


def rates_at(
    step: int, num_steps: int, warmup: float, warmdown: float, final: float, schedule: str = "trapezoid"
) -> Rates:
    """The schedules of base, mid and SFT, at a step."""
    lr = learning_rate(step, num_steps, warmup, warmdown, final, schedule)
    return Rates(lr, momentum=muon_momentum(step, num_steps), weight_decay=cosine_to_zero(step, num_steps))


@dataclass
class Sums:
    """What the micro-batches of one step came to, on this rank."""

    totals: Tensor  # (2,) loss sum and counted tokens, on the device
    position: Any = None  # of the stream after them
    batches: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # inputs and targets (B, T), for a diagnosis
    scale: float = 1.0  # of the gradients that the micro-batches left
    error: UserError | None = None  # why the step could not be finished; agree() tells the other ranks


def zero_sums(compute: Compute) -> Sums:
    """Sums before the first micro-batch, in fp64 where the device has it."""
    dtype = torch.float32 if compute.device.type == "mps" else torch.float64
    return Sums(torch.zeros(2, dtype=dtype, device=compute.device))


def accumulate(
    model: LanguageModel, stream: Stream, grad_accum_steps: int, compute: Compute, scale: float = 1.0
) -> Sums:
    """Forward and backward over the micro-batches of one step: gradients of the *sum* of the losses, times the scale,
    stay on the parameters, and update() divides them once. A UserError of the stream, such as a damaged shard, is kept
    in the result; a sharded model, whose other ranks need this one's weights, goes on with tokens that count nothing.
    """
    sums = zero_sums(compute)
    sums.scale = scale
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
        weights = None if scale == 1 else torch.full(targets.shape, scale, device=compute.device)
        with collective():
            loss = model(inputs, targets, weights, loss_reduction="sum", dtype=compute.dtype)
            loss.backward()
        sums.totals += torch.stack([loss.detach() / scale, (targets >= 0).sum()])
    return sums


@dataclass(frozen=True)
class Agreed:
    """What all ranks together know of a step before its update."""

    loss: float  # mean nats per counted token; not checked yet
    tokens: int  # counted tokens
    stop_signal: int  # a signal number when any rank was asked to stop, else 0
    sums: Sums  # this rank's part


def agree(sums: Sums, received: int, optimizers: Optimizers, compute: Compute) -> Agreed:
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
    optimizers: Optimizers,
    agreed: Agreed,
    rates: Rates,
    compute: Compute,
    spikes: "Spikes | None" = None,
    skip_spikes: bool = False,
    clip: tuple[str, float | None] = ("global", None),
) -> StepResult:
    """Average the gradients over the counted tokens of all ranks, clip them as clip_gradients() says where `clip` has a
    norm, and step. A step without a counted token changes nothing, nor does with skip_spikes one that is a spike, nor
    one whose gradient is more than fp16 holds. Raises NotFinite, on every rank and before the update, when loss or
    gradient is not finite on any.
    """
    squares = [optimizer.reduce_gradients(max(agreed.tokens, 1) * agreed.sums.scale) for optimizer in optimizers]
    grad_norm = compute.sum(torch.stack(squares).sum()).sqrt().item()
    if math.isfinite(agreed.loss) and spikes and spikes.overflow(grad_norm):
        print0(f"gradient norm {grad_norm} in fp16: update skipped, loss scale now {spikes.scale:g}")
        return StepResult(agreed.loss, agreed.tokens, grad_norm, agreed.stop_signal)
    if not (math.isfinite(agreed.loss) and math.isfinite(grad_norm)):
        figures = f"loss {agreed.loss}, gradient norm {grad_norm}"
        failed = NotFinite(f"{figures}: not finite, nothing was updated; resume with lower learning rates", True)
        failed.seen = agreed.sums
        raise failed
    spike = bool(spikes and agreed.tokens and spikes.see(agreed.loss, grad_norm, skip_spikes))
    if spike:
        print0(f"spike: loss {agreed.loss:.4f}, gradient norm {grad_norm:.3f}" + ", update skipped" * skip_spikes)
    if agreed.tokens and not (spike and skip_spikes):
        if clip[1]:
            clip_gradients(optimizers, clip[0], clip[1], grad_norm, compute)
        for optimizer in optimizers:
            set_rates(optimizer, rates)
            optimizer.step()
    return StepResult(agreed.loss, agreed.tokens, grad_norm, agreed.stop_signal, spike)


def set_rates(optimizer: AdamW | Muon, rates: Rates) -> None:
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])
        group.setdefault("initial_weight_decay", group["weight_decay"])
        group["lr"] = group["initial_lr"] * rates.lr
        if "momentum" in group:
            group["momentum"] = rates.momentum
            group["weight_decay"] = group["initial_weight_decay"] * rates.weight_decay


def clip_gradients(optimizers: Optimizers, how: str, limit: float, grad_norm: float, compute: Compute) -> None:
    """Scale the averaged gradients to a norm of at most `limit`: "global" all of them alike (arXiv 1211.5063),
    "parameter" each by its own norm; "normalize" gives each the norm `limit`, be it more or less than before (nanuGPT's
    Keller scaler). Each rank scales what it owns; collective but for "global".
    """
    own = {name: grad for optimizer in optimizers for name, grad in optimizer.own_gradients()}
    squares = dict.fromkeys(own, grad_norm**2 if how == "global" else 0.0)
    if how != "global":
        for part in compute.gather({name: grad.square().sum().item() for name, grad in own.items()}):
            squares |= {name: squares[name] + square for name, square in part.items() if name in own}
    for name, grad in own.items():
        factor = limit / max(math.sqrt(squares[name]), 1e-12)
        grad.mul_(factor if how == "normalize" else min(1.0, factor))


class Spikes:
    """Finds and counts losses and gradient norms more than 6 standard deviations over the mean of the last 128 (the
    figures of OLMo-core's SkipStepOptimizer), and gradients that fp16 cannot hold. `state()` is what must survive a
    resume.

    fp16 ends at 65,504 and at 6e-8. So its losses are multiplied by `scale` before the backward pass (arXiv
    1710.03740): an overflow halves it, and 2,000 steps in a row without one double it (as torch's GradScaler).
    """

    WINDOW, ENOUGH, SIGMAS = 128, 64, 6.0
    FIRST_SCALE, GROW_AFTER = 64.0, 2000  # of a sum of losses: with 1,024 tokens the 65,536 that GradScaler begins at

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.losses: deque[float] = deque(maxlen=self.WINDOW)
        self.norms: deque[float] = deque(maxlen=self.WINDOW)
        self.count = self.skipped = self.overflows = self.steady = 0
        self.is_scaled = dtype == torch.float16
        self.scale = self.FIRST_SCALE if self.is_scaled else 1.0

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

    def overflow(self, norm: float) -> bool:
        """Whether a gradient's norm is not finite in fp16, where a smaller scale may help; adapts the scale."""
        if not self.is_scaled or self.scale < 2**-10:
            return False
        too_large = not math.isfinite(norm)
        self.overflows += too_large
        self.steady = 0 if too_large else (self.steady + 1) % self.GROW_AFTER
        self.scale *= 0.5 if too_large else 1.0 if self.steady else 2.0
        return too_large

    def is_far(self, value: float, before: deque[float]) -> bool:
        if len(before) < self.ENOUGH:
            return False
        mean = math.fsum(before) / len(before)
        deviation = math.sqrt(math.fsum((x - mean) ** 2 for x in before) / len(before))
        return value > mean + self.SIGMAS * deviation

    def summary(self) -> dict[str, int]:
        return {"spikes": self.count, "spikes_skipped": self.skipped, "overflows_skipped": self.overflows}

    def state(self) -> dict[str, Any]:
        both = {"losses": [*self.losses], "norms": [*self.norms], "count": self.count, "skipped": self.skipped}
        return {**both, "scaling": [self.scale, self.steady, self.overflows]}

    def restore(self, state: dict[str, Any]) -> None:
        self.losses.extend(state["losses"])
        self.norms.extend(state["norms"])
        self.count, self.skipped = state["count"], state["skipped"]
        if self.is_scaled and "scaling" in state:
            self.scale, self.steady, self.overflows = state["scaling"]


# -----------------------------------------------------------------------------
# When, and for how long


def every(interval: int, step: int, num_steps: int) -> bool:
    """True at each multiple of interval and at the last step; never for an interval of -1 or 0."""
    return interval > 0 and (step % interval == 0 or step == num_steps)


def steps_for_minutes(
    minutes: float, optimizers: Optimizers, gradients: Callable[[], Sums], compute: Compute, fewest: int = 8
) -> tuple[int, str]:
    """Steps of `gradients`, such as accumulate(), that fit into `minutes` with their update, and why so many. Trial
    steps of `optimizers` of their own, with a learning rate of 0, tell the pace: the run is bit for bit that of
    --num-iterations with the number.
    """
    spikes = Spikes(compute.dtype)

    def trial_step() -> None:
        update(optimizers, agree(gradients(), 0, optimizers, compute), Rates(0.0, 0.9, 0.0), compute, spikes)

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
