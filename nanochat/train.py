"""Verbs of a training loop: accumulate gradients, update, meter, decide "every so often".

Plain functions that take values. The loops themselves are written out in the scripts, because reading them is the
point.
"""

import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from nanochat.adamw import AdamW
from nanochat.checkpoint_manager import Checkpoint, restore_rng
from nanochat.common import NotFinite, StepFailed, Stopped, UserError, get_rank, print0
from nanochat.compute import Compute, can_compile, device_name, synchronize
from nanochat.conversation import Conversations, decode_parts, parts_text, render_for_completion
from nanochat.dataloader import chat_stream, rows_in_epoch
from nanochat.engine import Engine, Sampling
from nanochat.gpt import GPT
from nanochat.guard import Spikes, stop_votes, stopped_by, write_bundle
from nanochat.muon import Muon
from nanochat.record import Record
from nanochat.schedule import BatchPlan, cosine_to_zero, muon_momentum, trapezoid
from nanochat.sharding import gathering, is_sharded
from nanochat.sizing import find_card
from nanochat.tokenizer import Tokenizer

AnyPosition = TypeVar("AnyPosition")  # Position, ChatPosition, or the step of a stage that needs no more
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
    spike: bool = False  # loss or gradient norm far above those of the steps before


@dataclass
class Sums(Generic[AnyPosition]):
    """What the micro-batches of one step came to, on this rank."""

    totals: Tensor  # (2,) loss sum and counted tokens, on the device
    position: AnyPosition  # of the stream after them
    batches: list[tuple[Tensor, Tensor]]  # inputs and targets (B, T) each, kept for a diagnosis
    error: UserError | None = None  # why the step could not be finished; update() tells the other ranks


def accumulate(
    model: GPT, stream: Stream[AnyPosition], position: AnyPosition, grad_accum_steps: int, compute: Compute
) -> Sums[AnyPosition]:
    """Forward and backward over the micro-batches of one step that begins at `position`. Gradients of the *sum* of the
    losses stay on the parameters; the division happens once, in update(). A UserError of the stream, such as a damaged
    shard file, is kept in the result. The other ranks of a sharded model need this one's weights all the same, so it
    goes on with tokens that count nothing.
    """
    totals = torch.zeros(
        2, dtype=torch.float64 if compute.device.type != "mps" else torch.float32, device=compute.device
    )
    sums = Sums(totals, position, [])
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
        with gathering(model):
            loss = model(inputs, targets, loss_reduction="sum", dtype=compute.dtype)
            loss.backward()
        totals += torch.stack([loss.detach(), (targets >= 0).sum()])
    return sums


def update(
    optimizers: Sequence[AdamW | Muon],
    sums: Sums[Any],
    rates: Rates,
    compute: Compute,
    received: int = 0,
    spikes: Spikes | None = None,
    skip_spikes: bool = False,
) -> StepResult:
    """Average the gradients over all counted tokens of all ranks, and step. One small all-reduce carries loss, tokens,
    failures and the wish to stop (`received`, a signal), so that all ranks agree on all four. A step without a counted
    token changes nothing, nor does with skip_spikes one whose loss or gradient is a spike.

    Raises StepFailed, on every rank and before the update, when a rank could not finish the step, and NotFinite when
    loss or gradient is not finite on any.
    """
    votes = torch.tensor([*stop_votes(received), float(sums.error is not None)], dtype=sums.totals.dtype)
    summed = compute.sum(torch.cat([sums.totals, votes.to(sums.totals.device)])).tolist()
    (loss_sum, tokens), stop_signal, failures = summed[:2], stopped_by(summed[2:-1]), summed[-1]
    if failures:
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        why = str(sums.error or f"{failures:.0f} of {compute.world_size} ranks could not finish the step")
        raise StepFailed(why, everywhere=failures == compute.world_size)
    squares = [optimizer.reduce_gradients(max(tokens, 1.0)) for optimizer in optimizers]
    grad_norm = compute.sum(torch.stack(squares).sum()).sqrt().item()
    loss = loss_sum / max(tokens, 1.0)
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        why = (
            f"loss {loss}, gradient norm {grad_norm}: not finite, nothing was updated; resume with lower learning rates"
        )
        failed = NotFinite(why, everywhere=True)
        failed.seen = sums
        raise failed
    spike = bool(spikes and tokens and spikes.see(loss, grad_norm, skip_spikes))
    if tokens and not (spike and skip_spikes):
        for optimizer in optimizers:
            set_rates(optimizer, rates)
            optimizer.step()
    if spike:
        print0(f"spike: loss {loss:.4f}, gradient norm {grad_norm:.3f}" + (", update skipped" if skip_spikes else ""))
    return StepResult(loss, int(tokens), grad_norm, stop_signal, spike)


def set_rates(optimizer: AdamW | Muon, rates: Rates) -> None:
    """The rates of this step, from those that the optimizer was made with."""
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])
        group.setdefault("initial_weight_decay", group["weight_decay"])
        group["lr"] = group["initial_lr"] * rates.lr
        group["weight_decay"] = group["initial_weight_decay"] * rates.weight_decay
        if "momentum" in group:
            group["momentum"] = rates.momentum


# -----------------------------------------------------------------------------
# Meter


@dataclass
class Meter:
    """Running figures of a loop: smoothed loss, time per step, tokens/s, FLOP/s, MFU where the card's peak is known,
    time left.

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
            **({"spike": True} if result.spike else {}),
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
        """Share of the cards' dense bf16 peak that the model's FLOPs use; None for a card that is not in the table."""
        card = find_card(device_name(self.compute.device))
        return self.flops_per_second / (card.tflops * 1e12 * self.compute.world_size) if card else None

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
    rates = describe_rates(meter) if meter.timed_steps else "warming up"
    bar.set_postfix_str(f"loss {meter.smooth_loss:.4f}, {rates}")
    if bar.disable and (meter.steps % max(1, meter.num_steps // 20) == 0 or meter.steps == 1):
        left = f", {meter.eta_seconds / 60:.1f} min left" if meter.timed_steps else ""
        print0(
            f"step {meter.steps:,}/{meter.num_steps:,}: loss {meter.smooth_loss:.4f}, "
            f"gradient norm {logged['grad_norm']:.3f}, {1000 * logged['seconds']:.0f} ms, {rates}{left}"
        )


def compile_model(model: GPT, device: torch.device) -> None:
    """torch.compile where its backend has what it needs; a CPU without a C++ compiler trains eagerly, and is
    told so.
    """
    if not can_compile(device):
        print0("compile: no C++ compiler found, training eagerly (about half the speed); Debian: apt-get install g++")
        return
    model.compile_parts()


# -----------------------------------------------------------------------------
# When


def every(interval: int, step: int) -> bool:
    """True at each multiple of interval; never for -1 or 0."""
    return interval > 0 and step > 0 and step % interval == 0


# -----------------------------------------------------------------------------
# What the next step depends on


def loop_state(
    num_steps: int, position: dict[str, Any], meter: Meter, spikes: Spikes, wandb_run: Any = None
) -> dict[str, Any]:
    """What a checkpoint must know of the loop besides weights and optimizer state."""
    about = {"num_steps": num_steps, "position": position, "wandb": wandb_run.id if wandb_run else None}
    return {**about, "meter": meter.state(), "spikes": spikes.state()}


def restore_loop(checkpoint: Checkpoint, meter: Meter, spikes: Spikes) -> dict[str, Any]:
    """Take the loop's state over from a checkpoint; returns the position."""
    meter.restore(checkpoint.meta["meter"])
    spikes.restore(checkpoint.meta["spikes"])
    restore_rng(checkpoint.meta["rng"])
    print0(f"resumed from {checkpoint.path}")
    position: dict[str, Any] = checkpoint.meta["position"]
    return position


@contextmanager
def whole_steps(
    name: str,
    meter: Meter,
    model: GPT,
    optimizers: Sequence[AdamW | Muon],
    record: Record,
    compute: Compute,
    save: Callable[[], None],
) -> Iterator[None]:
    """Around a loop: what ends it early on every rank (a signal, a step that failed) leaves the weights as they were
    after the last whole step, so these are saved if they are new. What a step saw whose numbers are not finite is
    written down.
    """
    first_step = meter.steps
    try:
        yield
    except (Stopped, UserError) as end:
        everywhere = isinstance(end, Stopped | StepFailed) or end.everywhere
        if compute.world_size > 1 and not everywhere:
            raise  # the other ranks are elsewhere, and a save takes all of them
        if isinstance(end, NotFinite) and end.seen:
            seen = (end.seen.batches, end.seen.position)
            folder = write_bundle(name, meter.steps, *seen, model, optimizers, compute)
            print0(f"{end}\nbatches, position and norms of the step: {folder}")
        record.write("stopped", step=meter.steps, reason=str(end))
        if meter.steps > first_step:
            save()
        record.close()
        raise


# -----------------------------------------------------------------------------
# Budget in minutes


def steps_in(minutes: float, one_step: Callable[[], object], compute: Compute) -> int:
    """How many steps fit into `minutes`, from the pace of a few trial steps, equal on every rank. The caller throws
    away what the trial steps did, so that the run is bit for bit the one that --num-iterations with this number gives.

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
    """The number of steps and where it comes from, by timing real steps. The caller gives a stream of its own for it
    and restores the weights afterwards.
    """
    optimizers = model.setup_optimizers(dtype=compute.dtype)

    def trial_step() -> None:
        sums = accumulate(model, stream, None, batch.grad_accum_steps, compute)
        update(optimizers, sums, Rates(lr=0.1, momentum=0.9, weight_decay=0.0), compute)

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
    """Steps of a stage that trains on conversations, and where the number comes from: as given, or as many as fit into
    `minutes` (the caller restores the weights), or one epoch. Raises UserError for both.
    """
    if num_iterations is not None and minutes is not None:
        raise UserError(f"--num-iterations={num_iterations} --minutes={minutes:g}: give at most one horizon")
    if (num_iterations is not None and num_iterations < 1) or (minutes is not None and minutes <= 0):
        raise UserError(f"--num-iterations={num_iterations} --minutes={minutes}: expected more than 0, or None")
    T = batch.sequence_len
    if minutes is not None:
        stream = chat_stream(conversations, tokenizer, batch, compute, all_tokens)
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


def engine_on_master(model: GPT, tokenizer: Tokenizer | None, compute: Compute) -> Engine | None:
    """An engine with a copy of the weights on rank 0, None elsewhere; all ranks call it, for a sharded model."""
    engine = Engine(model, tokenizer, compute.dtype) if compute.is_master or is_sharded(model) else None
    return engine if compute.is_master else None


def show_chats(
    questions: Sequence[str], model: GPT, tokenizer: Tokenizer, compute: Compute, record: Record, step: int
) -> None:
    """What the model answers to a few questions, the likeliest token each time; from rank 0, called by all."""
    engine = engine_on_master(model, tokenizer, compute)
    if not engine:
        return
    prompts = [render_for_completion([{"role": "user", "content": question}], tokenizer) for question in questions]
    answers, _ = engine.generate_batch(prompts, Sampling(max_tokens=96, temperature=0))
    for question, answer in zip(questions, answers, strict=True):
        text = parts_text(decode_parts(answer, tokenizer))
        record.write("sample", step=step, prompt=question, text=text)
        print0(f"  {question!r} -> {text!r}")


def open_wandb(run: str, stage: str, settings: dict[str, Any], checkpoint: Checkpoint | None) -> Any:
    """A wandb run, continued where the checkpoint knows its id, or None for --run=dummy and on other ranks. wandb
    itself respects WANDB_MODE=offline.
    """
    if run == "dummy" or get_rank() != 0:
        return None
    try:
        import wandb
    except ImportError:
        raise UserError(f"--run={run} needs wandb: pip install wandb, or --run=dummy to do without") from None
    run_id = checkpoint.meta["wandb"] if checkpoint else None
    return wandb.init(
        project="nanochat" if stage == "base" else f"nanochat-{stage}",
        name=run,
        config=settings,
        id=run_id,
        resume="allow",
    )
