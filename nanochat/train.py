"""
Verbs of a training loop: accumulate gradients, update, meter, decide "every so often", stop when told to.

Plain functions that take values. The loops themselves are written out in the scripts, because reading them is the
point.
"""

import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, NoReturn, Self, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from nanochat.adamw import AdamW
from nanochat.common import Record, Stopped, UserError, get_rank, print0
from nanochat.compute import Compute, peak_flops, synchronize
from nanochat.conversation import Conversations, decode_parts, parts_text, render_for_completion
from nanochat.dataloader import ChatPosition, Position, chat_stream, rows_in_epoch
from nanochat.engine import Engine
from nanochat.gpt import GPT
from nanochat.muon import Muon
from nanochat.schedule import BatchPlan, cosine_to_zero, muon_momentum, trapezoid
from nanochat.tokenizer import Tokenizer

AnyPosition = TypeVar("AnyPosition", Position, ChatPosition)
Stream = Iterator[tuple[Tensor, Tensor, AnyPosition]]


@dataclass(frozen=True)
class Rates:
    """Multipliers and values for one step, from the schedules."""

    lr: float  # multiplies every group's initial learning rate
    momentum: float  # Muon's
    weight_decay: float  # multiplies Muon's initial weight decay


def rates_at(step: int, num_steps: int, warmup_ratio: float, warmdown_ratio: float, final_lr_frac: float) -> Rates:
    """The schedules of every stage, at a step."""
    return Rates(
        lr=trapezoid(step, num_steps, warmup_ratio, warmdown_ratio, final_lr_frac),
        momentum=muon_momentum(step, num_steps),
        weight_decay=cosine_to_zero(step, num_steps),
    )


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did, the same on every rank."""

    loss: float  # mean nats per counted token, over all ranks and micro-batches
    tokens: int  # counted tokens
    grad_norm: float  # of the mean gradient, before the update
    stop_signal: int  # a signal number when any rank was asked to stop, else 0


def accumulate(
    model: GPT, stream: Stream[AnyPosition], grad_accum_steps: int, compute: Compute
) -> tuple[Tensor, AnyPosition]:
    """
    Forward and backward over the micro-batches of one step. Gradients of the *sum* of the losses stay on the
    parameters; the division happens once, in update(). Returns (loss sum, counted tokens) of this rank, still on the
    device, and the new position.
    """
    totals = torch.zeros(
        2, dtype=torch.float64 if compute.device.type != "mps" else torch.float32, device=compute.device
    )
    for _ in range(grad_accum_steps):
        inputs, targets, position = next(stream)
        loss = model(inputs, targets, loss_reduction="sum", dtype=compute.dtype)
        loss.backward()
        totals += torch.stack([loss.detach(), (targets >= 0).sum()])
    return totals, position


def update(
    optimizers: Sequence[AdamW | Muon], totals: Tensor, rates: Rates, compute: Compute, stop_signal: int = 0
) -> StepResult:
    """
    Average the gradients over all counted tokens of all ranks, and step. One small all-reduce carries loss, tokens and
    the wish to stop, so that all ranks agree on all three. A step without a counted token changes nothing.

    Raises UserError, on every rank and before the update, when loss or gradient is not finite.
    """
    stop = torch.zeros_like(totals[:1]) + stop_signal
    loss_sum, tokens, stop_sum = compute.sum(torch.cat([totals, stop])).tolist()
    squares = [optimizer.reduce_gradients(max(tokens, 1.0)) for optimizer in optimizers]
    grad_norm = compute.sum(torch.stack(squares).sum()).sqrt().item()
    loss = loss_sum / max(tokens, 1.0)
    if not (torch.isfinite(torch.tensor([loss, grad_norm])).all()):
        raise UserError(
            f"loss {loss}, gradient norm {grad_norm}: not finite, nothing was updated; resume with lower learning rates"
        )
    if tokens:
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group.setdefault("initial_lr", group["lr"])
                group.setdefault("initial_weight_decay", group["weight_decay"])
                group["lr"] = group["initial_lr"] * rates.lr
                group["weight_decay"] = group["initial_weight_decay"] * rates.weight_decay
                if "momentum" in group:
                    group["momentum"] = rates.momentum
            optimizer.step()
    # Signals of several ranks may have added up; which of them it was does not matter, that it was one does.
    return StepResult(loss, int(tokens), grad_norm, int(stop_sum) if stop_sum < signal.NSIG else int(signal.SIGTERM))


# -----------------------------------------------------------------------------
# Meter


@dataclass
class Meter:
    """
    Running figures of a loop: smoothed loss, time per step, tokens/s, FLOP/s, MFU where the card's peak is known, time
    left.

    The first `SKIP` steps after a start (compilation, caches) count in no rate. smooth_loss is an exponential mean with
    its start-up bias removed: after one step it is that step's loss. State that must survive a resume is `state()`.
    """

    flops_per_token: int
    num_steps: int
    compute: Compute
    tokens_per_step: int | None = None  # that the model computes; None = those that count in the loss
    smooth: float = 0.0
    steps: int = 0  # in the whole run
    train_seconds: float = 0.0  # optimizer-loop time of the whole run, evaluations and saves excluded
    timed_steps: int = 0
    timed_seconds: float = 0.0
    timed_tokens: int = 0
    here: int = 0  # steps since this process started
    started: float = field(default_factory=time.perf_counter)

    BETA = 0.9
    SKIP = 3

    def start(self) -> None:
        """Call right before a step; what happens between steps is nobody's training time."""
        self.started = time.perf_counter()

    def tick(self, result: StepResult) -> dict[str, Any]:
        """Account for one finished step; returns what is logged."""
        synchronize(self.compute.device)
        seconds = time.perf_counter() - self.started
        self.steps += 1
        self.here += 1
        self.train_seconds += seconds
        self.smooth = self.BETA * self.smooth + (1 - self.BETA) * result.loss
        if self.here > self.SKIP:
            self.timed_steps += 1
            self.timed_seconds += seconds
            self.timed_tokens += self.tokens_per_step or result.tokens
        return {
            "loss": round(result.loss, 6),
            "smooth_loss": round(self.smooth_loss, 6),
            "grad_norm": round(result.grad_norm, 6),
            "tokens": result.tokens,
            "seconds": round(seconds, 4),
        }

    @property
    def smooth_loss(self) -> float:
        return self.smooth / (1 - self.BETA**self.steps) if self.steps else 0.0

    @property
    def tokens_per_second(self) -> float:
        return self.timed_tokens / self.timed_seconds if self.timed_seconds else 0.0

    @property
    def flops_per_second(self) -> float:
        return self.tokens_per_second * self.flops_per_token

    @property
    def mfu(self) -> float | None:
        """Share of the cards' dense bf16 peak that the model's FLOPs use; None where the peak is unknown."""
        peak = peak_flops(self.compute.device)
        return self.flops_per_second / (peak * self.compute.world_size) if peak else None

    @property
    def eta_seconds(self) -> float:
        return (self.num_steps - self.steps) * self.timed_seconds / self.timed_steps if self.timed_steps else 0.0

    def summary(self) -> dict[str, Any]:
        return {
            "tokens_per_second": round(self.tokens_per_second),
            "flops_per_second": round(self.flops_per_second),
            "mfu": self.mfu and round(self.mfu, 4),
            "train_seconds": round(self.train_seconds, 2),
        }

    def state(self) -> dict[str, float]:
        return {"smooth": self.smooth, "steps": self.steps, "train_seconds": self.train_seconds}

    def restore(self, state: dict[str, float]) -> None:
        self.smooth, self.steps, self.train_seconds = state["smooth"], int(state["steps"]), state["train_seconds"]


def describe_rates(meter: Meter) -> str:
    """Speed for a progress bar: tokens/s, then MFU where known or FLOP/s where not."""
    mfu = meter.mfu
    return f"{meter.tokens_per_second:,.0f} tok/s, " + (
        f"MFU {mfu:.1%}" if mfu else f"{meter.flops_per_second / 1e9:,.0f} GFLOP/s"
    )


def progress_bar(num_steps: int, first_step: int) -> Any:
    """tqdm on rank 0's terminal; elsewhere silent, and show_progress prints lines."""
    return tqdm(total=num_steps, initial=first_step, unit="step", disable=get_rank() != 0 or not sys.stderr.isatty())


def show_progress(bar: Any, meter: Meter, logged: dict[str, Any]) -> None:
    """Move the bar; without a terminal print 20 lines per run, which a log can hold."""
    bar.update()
    bar.set_postfix_str(f"loss {meter.smooth_loss:.4f}, {describe_rates(meter)}")
    if bar.disable and (meter.steps % max(1, meter.num_steps // 20) == 0 or meter.steps == 1):
        left = f", {meter.eta_seconds / 60:.1f} min left" if meter.timed_steps else ""
        print0(
            f"step {meter.steps:,}/{meter.num_steps:,}: loss {meter.smooth_loss:.4f}, "
            f"gradient norm {logged['grad_norm']:.3f}, {1000 * logged['seconds']:.0f} ms, {describe_rates(meter)}{left}"
        )


def compile_model(model: GPT, device: torch.device) -> None:
    """
    torch.compile where its backend has what it needs; a CPU without a C++ compiler trains eagerly, and is told so.
    """
    if device.type == "cpu" and not any(shutil.which(name) for name in ("g++", "clang++", "c++")):
        print0("compile: no C++ compiler found, training eagerly (about half the speed); Debian: apt-get install g++")
        return
    model.compile_parts()


# -----------------------------------------------------------------------------
# When


def every(interval: int, step: int) -> bool:
    """True at each multiple of interval; never for -1 or 0."""
    return interval > 0 and step > 0 and step % interval == 0


class SignalWatch:
    """
    Remembers the first SIGINT, SIGTERM or SIGUSR1 until the loop asks for it, so that a step is finished and saved. A
    second SIGINT, a second or more later (a terminal and torchrun may both deliver the first), ends the process at
    once. Use as a context manager: the old handlers come back.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

    def __init__(self) -> None:
        self.received = 0
        self.received_at = 0.0

    def __enter__(self) -> Self:
        self.previous: dict[int, Any] = {number: signal.signal(number, self.handle) for number in self.SIGNALS}
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
            os.write(sys.__stdout__.fileno() if sys.__stdout__ else 1, line.encode())


def leave(stop_signal: int) -> NoReturn:
    """End the run after its save; run_main turns this into exit code 128 + signal."""
    raise Stopped(stop_signal)


# -----------------------------------------------------------------------------
# Budget in minutes


def steps_in(minutes: float, one_step: Callable[[], object], compute: Compute) -> int:
    """
    How many steps fit into `minutes`, from the pace of a few trial steps, equal on every rank. The caller throws away
    what the trial steps did, so that the run is bit for bit the one that --num-iterations with this number gives.

    The pace is the median of five steps in a row that differ by less than half; compilation, and other work on the
    machine, make earlier ones slower. After 40 steps it takes what it has.
    """
    seconds: list[float] = []
    while len(seconds) < 8 or (len(seconds) < 40 and max(seconds[-5:]) > 1.5 * min(seconds[-5:])):
        start = time.perf_counter()
        one_step()
        synchronize(compute.device)
        seconds.append(compute.sum(torch.tensor(time.perf_counter() - start)).item() / compute.world_size)
    return max(1, round(60 * minutes / sorted(seconds[-5:])[2]))


def steps_for_minutes(
    minutes: float, model: GPT, stream: Stream[Any], batch: BatchPlan, compute: Compute
) -> tuple[int, str]:
    """
    The number of steps and where it comes from, by timing real steps. The caller gives a stream of its own for it and
    restores the weights afterwards.
    """
    optimizers = model.setup_optimizers(dtype=compute.dtype)

    def trial_step() -> None:
        totals, _ = accumulate(model, stream, batch.grad_accum_steps, compute)
        update(optimizers, totals, Rates(lr=0.1, momentum=0.9, weight_decay=0.0), compute)

    num_steps = steps_in(minutes, trial_step, compute)
    return num_steps, f"{minutes:g} minutes at the pace of a few trial steps, which are undone"


def plan_chats(
    num_iterations: int | None,
    minutes: float | None,
    conversations: Conversations,
    tokenizer: Tokenizer,
    all_tokens: bool,
    model: GPT,
    batch: BatchPlan,
    compute: Compute,
) -> tuple[int, str]:
    """
    Steps of a stage that trains on conversations, and where the number comes from: as given, or as many as fit into
    `minutes` (the caller restores the weights), or one epoch. Raises UserError for both.
    """
    if num_iterations is not None and minutes is not None:
        raise UserError(f"--num-iterations={num_iterations} --minutes={minutes:g}: give at most one horizon")
    if (num_iterations is not None and num_iterations < 1) or (minutes is not None and minutes <= 0):
        raise UserError(f"--num-iterations={num_iterations} --minutes={minutes}: expected more than 0, or None")
    T = batch.sequence_len
    if minutes is not None:
        stream = chat_stream(conversations, tokenizer, batch.device_batch_size, T, compute, all_tokens)
        return steps_for_minutes(minutes, model, stream, batch, compute)
    if num_iterations is not None:
        return num_iterations, "as given"
    rows = rows_in_epoch(conversations, tokenizer, T, all_tokens)
    steps = max(1, round(rows / batch.rows))
    return steps, f"one epoch of about {rows:,} rows / {batch.rows} rows per step"


def row_length(model: GPT, max_seq_len: int | None) -> int:
    """Tokens per row: as asked, at most the model's context."""
    context = model.config.sequence_len
    if max_seq_len is not None and not 2 <= max_seq_len <= context:
        raise UserError(
            f"--max-seq-len={max_seq_len}: expected 2 to {context}, the context this model was trained with"
        )
    return max_seq_len or context


# -----------------------------------------------------------------------------
# Looking at it


def show_chats(
    questions: Sequence[str], model: GPT, tokenizer: Tokenizer, compute: Compute, record: Record, step: int
) -> None:
    """What the model answers to a few questions, the likeliest token each time; rank 0 only."""
    if not compute.is_master:
        return
    prompts = [render_for_completion([{"role": "user", "content": question}], tokenizer) for question in questions]
    answers, _ = Engine(model, tokenizer, compute.dtype).generate_batch(prompts, max_tokens=96, temperature=0)
    for question, answer in zip(questions, answers, strict=True):
        text = parts_text(decode_parts(answer, tokenizer))
        record.write("sample", step=step, prompt=question, text=text)
        print0(f"  {question!r} -> {text!r}")


def open_wandb(run: str, stage: str, settings: dict[str, Any]) -> Any:
    """A wandb run, or None for --run=dummy and on other ranks. WANDB_MODE=offline is respected by wandb itself."""
    if run == "dummy" or get_rank() != 0:
        return None
    try:
        import wandb
    except ImportError:
        raise UserError(f"--run={run} needs wandb: pip install wandb, or --run=dummy to do without") from None
    return wandb.init(project="nanochat" if stage == "base" else f"nanochat-{stage}", name=run, config=settings)
