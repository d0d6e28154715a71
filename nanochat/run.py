"""What every stage does around its loop: identity and resume, record, wandb, signals, saving, progress, the last line.

    with open_run("base", tag, settings, identity, compute) as run:
        ...                                            # model, horizon, optimizers
        run.begin(model, optimizers, tokenizer, num_steps, spikes)
        for step in run.steps():
            ...                                        # the stage's own: gradients, rates, update
            run.end_step(result, position, lr=rates.lr)
        run.finish()

A step is finished whole or not at all. What ends a run early is an exception that every rank raises at the same place,
Stopped or StepFailed, while the weights are those of the last whole step: these are saved if they are new, and the
exception passes on. The run never touches a loss, a gradient or a rate, and calls nothing back.
"""

import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any, Self

from tqdm import tqdm

from nanochat.adamw import AdamW
from nanochat.checkpoint_manager import (
    Checkpoint,
    checkpoint_path,
    find_resume,
    is_best,
    mark_best,
    restore_model,
    restore_optimizers,
    save_checkpoint,
)
from nanochat.common import NotFinite, StepFailed, Stopped, UserError, get_base_dir, get_rank, print0
from nanochat.compute import Compute, compute_cleanup, device_name, peak_memory_bytes, synchronize
from nanochat.files import write_atomic
from nanochat.model import LanguageModel
from nanochat.muon import Muon
from nanochat.record import Meter, Record, StepResult, open_record, open_wandb
from nanochat.sharding import held_bytes, local
from nanochat.signals import SaveClock, SignalWatch
from nanochat.sizing import find_card
from nanochat.tokenizer import Tokenizer


def open_run(stage: str, tag: str, settings: dict[str, Any], identity: dict[str, Any], compute: Compute) -> "Run":
    """Find the checkpoint that `settings` ask to continue, and take the tag for this process; `identity` is what a
    checkpoint and the run that continues it must agree on. Collective. Raises UserError as find_resume() does.
    """
    run = Run(stage, tag, settings, identity, compute)
    if not run.dry:
        run.checkpoint = find_resume(stage, tag, settings, identity, compute)
        run.position = run.checkpoint.meta["position"] if run.checkpoint else {}
    return run


class Run:
    """A stage's bookkeeping on one rank, as in the example above."""

    def __init__(self, stage: str, tag: str, settings: dict[str, Any], identity: dict[str, Any], compute: Compute):
        self.stage, self.tag, self.settings, self.identity, self.compute = stage, tag, settings, identity, compute
        self.dry = settings.get("dry_run", False)  # writes no checkpoint
        self.checkpoint: Checkpoint | None = None  # that is continued; None for a run from the start
        self.position: Any = {}  # where the data stand after the last whole step; {} = at their beginning
        self.record = Record(None)  # of events; writes nothing before begin(), nor on other ranks than 0
        self.begun = False
        self.watch = SignalWatch(compute)
        self.clock = SaveClock(settings["save_every"], settings["save_minutes"], compute)

    def __enter__(self) -> Self:
        return self

    @property
    def horizon(self) -> tuple[int, str] | None:
        """The steps that a continued run was planned with, unless --num-iterations gives it another number."""
        if self.checkpoint is None or self.settings["num_iterations"] is not None:
            return None
        return self.checkpoint.meta["num_steps"], "as planned at the start"

    def begin(
        self,
        model: LanguageModel,
        optimizers: Sequence[AdamW | Muon],
        tokenizer: Tokenizer,
        num_steps: int,
        spikes: Any,
        tokens_per_step: int | None = None,
        **plan: Any,
    ) -> None:
        """Take over weights, optimizers, spikes and figures of the checkpoint that is continued; watch for signals;
        open the record, unless no step is left, and tell it the `plan`. tokens_per_step is Meter's.
        """
        self.model, self.optimizers, self.tokenizer, self.spikes = model, optimizers, tokenizer, spikes
        card = find_card(device_name(self.compute.device))
        peak = card and card.tflops * 1e12 * self.compute.world_size
        self.meter = Meter(model.estimate_flops(), num_steps, peak, tokens_per_step)
        if self.checkpoint:
            restore_model(model, self.checkpoint)
            restore_optimizers(optimizers, self.checkpoint)
            self.meter.restore(self.checkpoint.meta["meter"])
            spikes.restore(self.checkpoint.meta["spikes"])
            print0(f"resumed from {self.checkpoint.path}")
        self.first_step = self.saved_at = self.meter.steps
        if self.is_finished:
            print0(f"this run is finished; more steps: --resume --num-iterations={2 * num_steps}")
            return
        self.begun = True
        self.record = open_record(self.stage, self.tag, self.settings, **self.compute.about())
        plan |= {"parameters": model.num_params(), "matmul_parameters": model.num_matmul_params()}
        plan |= {"flops_per_token": model.estimate_flops(), "parameter_bytes": held_bytes(model)}
        plan |= {"optimizer_state_bytes": sum(optimizer.state_bytes() for optimizer in optimizers)}
        self.record.write("plan", first_step=self.first_step, num_steps=num_steps, **plan)
        self.wandb = open_wandb(self.stage, self.settings, self.checkpoint.meta["wandb"] if self.checkpoint else None)
        self.watch.__enter__()

    @property
    def is_finished(self) -> bool:
        """Whether no step is left, as for a run that is called again when it has ended."""
        return self.meter.steps >= self.meter.num_steps

    @property
    def done(self) -> int:
        """Whole steps, of this process and those before it."""
        return self.meter.steps

    def steps(self) -> Iterator[int]:
        """The steps that are left, each timed until its end_step(). After the last a signal ends the process again."""
        first, num_steps = self.first_step, self.meter.num_steps
        hidden = get_rank() != 0 or not sys.stderr.isatty()
        with tqdm(total=num_steps, initial=first, unit="step", disable=hidden) as self.bar:
            for step in range(first, num_steps):
                self.meter.start()
                self.compute.seed_step(self.settings["seed"], step)
                yield step
        self.watch.__exit__()

    def end_step(self, result: StepResult, position: Any, line: str = "", **figures: Any) -> None:
        """Account for a step that is done: record, progress, and a checkpoint when one is due, before anything else can
        fail. `position` is where the data stand now; `line` is printed instead of 20 lines a run. Raises Stopped, on
        every rank, when any was asked to stop.
        """
        synchronize(self.compute.device)
        logged = {**self.meter.tick(result), **figures}
        self.position, done = position, self.done
        self.record.write("step", step=done - 1, **logged)
        self.show(logged, line)
        if self.wandb:
            self.wandb.log({"step": done - 1, **logged, **self.meter.summary()})
        if result.stop_signal:
            raise Stopped(result.stop_signal)
        if self.clock.due(done) or done == self.meter.num_steps:
            self.save()

    def show(self, logged: dict[str, Any], line: str) -> None:
        """Move the bar; without a terminal print 20 lines per run, which a log can hold."""
        meter, of = self.meter, f"step {self.meter.steps:,}/{self.meter.num_steps:,}: "
        self.bar.update()
        self.bar.set_postfix_str(f"loss {meter.smooth_loss:.4f}, {meter.describe()}")
        if line:
            print0(of + line)
        elif self.bar.disable and (meter.steps % max(1, meter.num_steps // 20) == 0 or meter.steps == 1):
            left = f", {meter.eta_seconds / 60:.1f} min left" if meter.timed_steps else ""
            figures = f"gradient norm {logged['grad_norm']:.3f}, {1000 * logged['seconds']:.0f} ms"
            print0(f"{of}loss {meter.smooth_loss:.4f}, {figures}, {meter.describe()}{left}")

    def evaluated(self, score: float, **figures: Any) -> None:
        """Record an evaluation of the weights as they are. With --save-best they are saved and marked when the score,
        of which less is better, is the best so far.
        """
        self.record.write("eval", step=self.done, **figures)
        if self.settings["save_best"] and self.done and not self.dry and is_best(self.stage, self.tag, score):
            self.save()
            mark_best(self.stage, self.tag, self.done, score, self.compute)

    def save(self) -> None:
        """A checkpoint of the last whole step, whatever has happened since, unless there is one. Collective."""
        if self.dry or self.saved_at == self.done:
            return
        position = asdict(self.position) if is_dataclass(self.position) else self.position  # type: ignore[arg-type]
        loop = {"meter": self.meter.state(), "spikes": self.spikes.state(), "wandb": self.wandb and self.wandb.id}
        meta = {"step": self.done, **self.identity, "num_steps": self.meter.num_steps, "position": position}
        meta |= {**loop, "settings": self.settings}
        keep_last = self.settings["keep_last"]
        path = checkpoint_path(self.stage, self.tag, self.done)
        save_checkpoint(path, self.model, self.optimizers, self.tokenizer, meta, self.compute, keep_last)
        self.saved_at = self.done

    def finish(self, data: str | None = None, **figures: Any) -> None:
        """The last words of a run that came to its end: `data` says how text was cut, `figures` go to wandb."""
        memory = peak_memory_bytes(self.compute.device)
        about = {"peak_memory_bytes": memory, **({"text": data} if data else {})}
        self.record.write("end", **self.meter.summary(), **self.spikes.summary(), **about)
        if data:
            print0(f"data: {data}")
        of = f"{self.meter.train_seconds:,.0f} s of training, {memory / 1e9:.1f} GB at most"
        print0(f"speed: {self.meter.describe()}, {of}")
        if self.wandb:
            self.wandb.log({"step": self.meter.num_steps, **figures})
            self.wandb.finish()

    def __exit__(self, kind: type[BaseException] | None, end: BaseException | None, trace: object) -> None:
        """Save what is new where every rank ends at this place, and write down what a step saw whose numbers are not
        finite. The exception passes on.
        """
        everywhere = isinstance(end, Stopped | StepFailed) or (isinstance(end, UserError) and end.everywhere)
        alone = isinstance(end, UserError) and self.compute.world_size == 1
        if self.begun and (everywhere or alone):  # else the other ranks are elsewhere, and a save takes all of them
            if isinstance(end, NotFinite) and end.seen:
                print0(f"{end}\nbatches, position and norms of the step: {write_bundle(self, end.seen)}")
            self.record.write("stopped", step=self.done, reason=str(end))
            self.save()
        if everywhere or alone or end is None:
            self.record.close()
        self.watch.__exit__()  # a second signal must not end a save
        if end is None:
            compute_cleanup()


def write_bundle(run: Run, seen: Any) -> Path:
    """Write down what a step saw (train.Sums) whose numbers were not finite, and what this rank has of the norms: one
    JSON file per rank in $NANOCHAT_BASE_DIR/failed/<stage>-<tag>-step_<step>/, which is returned.
    """
    gradients = {name: grad.norm().item() for optimizer in run.optimizers for name, grad in optimizer.own_gradients()}
    parameters = {name: local(p.detach()).norm().item() for name, p in run.model.named_parameters()}
    suspects = {name for norms in (gradients, parameters) for name, norm in norms.items() if not math.isfinite(norm)}
    content = {
        "step": run.done,
        "rank": run.compute.rank,
        "not_finite": sorted(suspects),
        "position_after": seen.position,
        "gradient_norms": {name: str(norm) for name, norm in gradients.items()},  # str: JSON has no NaN
        "parameter_norms": {name: str(norm) for name, norm in parameters.items()},
        "batches": [{"inputs": inputs.tolist(), "targets": targets.tolist()} for inputs, targets in seen.batches],
    }
    folder = get_base_dir() / "failed" / f"{run.stage}-{run.tag}-step_{run.done:06d}"
    write_atomic(folder / f"rank{run.compute.rank}.json", json.dumps(content, default=asdict) + "\n")
    return folder
