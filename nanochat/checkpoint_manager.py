"""Checkpoints: one directory per step that exists whole or not at all.

    $NANOCHAT_BASE_DIR/base_checkpoints/d20/step_000500/
        model.safetensors    fp32 master weights
        optim.safetensors    whole-shape optimizer state, so that any number of ranks can go on
        tokenizer.json       a model is useless with another tokenizer, so they travel together
        meta.json            sizes and sha256 of the other three, model config, settings, position, loop state, versions

meta.json is sealed with its own sha256 and every other file is compared with its sha256 there before it is read, so one
wrong bit is found in any of the four. Nothing damaged is deleted: it is moved aside. One run at a time writes a tag.
"""

import fcntl
import json
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nanochat.adamw import AdamW
from nanochat.common import STAGES, NotFinite, UserError, get_base_dir, print0
from nanochat.compute import Compute
from nanochat.files import one_line, read_sealed, seal, sha256_file, whole, write_atomic
from nanochat.model import LanguageModel, build_model, load_config
from nanochat.muon import Muon
from nanochat.record import provenance
from nanochat.sharding import Place, local, own_rows, whole_weights
from nanochat.tokenizer import Tokenizer

FORMAT = 2  # 2: meta.json is sealed
ASIDE = re.compile(r"-before-\d{8}-\d{6}$")  # how set_aside() names what it moves
BEST = "best.json"


@dataclass(frozen=True)
class Checkpoint:
    """A step directory whose meta.json has been read."""

    path: Path
    meta: dict[str, Any]
    verified: set[str] = field(default_factory=set)  # files that were compared with meta.json

    @property
    def step(self) -> int:
        return int(self.meta["step"])

    @property
    def tag(self) -> str:
        return self.path.parent.name

    @property
    def name(self) -> str:
        """What identifies it below the base directory, such as base_checkpoints/d20/step_021400."""
        return "/".join(self.path.parts[-3:])

    @property
    def identity(self) -> str:
        """The name, and what tells its weights from those of another run under the same name."""
        return f"{self.name} sha256 {self.meta['files']['model.safetensors']['sha256'][:12]}"

    def damage(self, name: str, compare: bool = True) -> str | None:
        """What is wrong with one of its files: missing, its size or, if asked, its sha256. None where nothing is."""
        path, entry = self.path / name, self.meta["files"][name]
        if not path.is_file():
            return "missing"
        if path.stat().st_size != entry["bytes"]:
            return f"{path.stat().st_size:,} bytes, not {entry['bytes']:,}"
        return "sha256 differs" if compare and sha256_file(path) != entry["sha256"] else None

    def file(self, name: str) -> Path:
        """The path of one of its files, verified. Raises UserError naming it where it is damaged."""
        if name not in self.verified and (why := self.damage(name)):
            raise damaged(self.path / name, why)
        self.verified.add(name)
        return self.path / name

    def verify(self) -> None:
        """Verify all files; raises UserError naming the first that is damaged."""
        for name in self.meta["files"]:
            self.file(name)


# -----------------------------------------------------------------------------
# Finding


def checkpoints_dir(source: str, model_tag: str) -> Path:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", model_tag):
        message = f"--model-tag={model_tag}: expected letters, digits, dots, dashes and underscores"
        raise UserError(message, everywhere=True)
    return get_base_dir() / STAGES[source].folder / model_tag


def checkpoint_path(source: str, model_tag: str, step: int) -> Path:
    return step_dir(checkpoints_dir(source, model_tag), step)


def step_dir(directory: Path, step: int) -> Path:
    return directory / f"step_{step:06d}"


def saved_steps(directory: Path) -> list[int]:
    """Steps with a complete checkpoint, ascending. Temporary and foreign names do not count."""
    names = [path.parent.name for path in directory.glob("step_*/meta.json")]
    return sorted(int(name[5:]) for name in names if re.fullmatch(r"step_\d{6,}", name))


def find_tag(source: str, model_tag: str | None) -> str:
    """The tag as given, or the one saved last. Raises UserError naming the command that makes one."""
    root = get_base_dir() / STAGES[source].folder
    tags = [path for path in sorted(root.glob("*")) if saved_steps(path) and not ASIDE.search(path.name)]
    if not tags:
        raise UserError(f"no {source} checkpoint in {root}; make one with: python -m {STAGES[source].script}")
    if model_tag is None:
        return max(tags, key=lambda tag: saved_at(step_dir(tag, saved_steps(tag)[-1]))).name
    if not saved_steps(checkpoints_dir(source, model_tag)):
        raise UserError(f"no {source} checkpoint {model_tag} in {root}; there is {', '.join(tag.name for tag in tags)}")
    return model_tag


def saved_at(path: Path) -> float:
    """When a checkpoint was saved: as it says itself, because the files of a copy are as old as the copy."""
    meta = path / "meta.json"
    try:
        return float(json.loads(meta.read_bytes())["saved_at"])
    except (ValueError, KeyError, TypeError):  # damaged, or saved before it was noted
        return meta.stat().st_mtime


def find_steps(source: str, model_tag: str | None, step: int | None) -> list[Path]:
    """The step asked for, or all of the tag, the newest first. Raises UserError where there is none."""
    directory = checkpoints_dir(source, find_tag(source, model_tag))
    steps = saved_steps(directory)
    if step is not None and step not in steps:
        raise UserError(f"no step {step} in {directory}; there is {', '.join(map(str, steps))}", everywhere=True)
    return [step_dir(directory, number) for number in (steps[::-1] if step is None else [step])]


def find_checkpoint(source: str, model_tag: str | None = None, step: int | None = None) -> Checkpoint:
    """The checkpoint of a stage: by default of the tag saved last, and its last step. UserError where there is none."""
    return open_checkpoint(find_steps(source, model_tag, step)[0])


def open_checkpoint(path: Path) -> Checkpoint:
    """Read meta.json. Raises UserError where it is damaged or of another format."""
    try:
        meta = read_sealed(path / "meta.json")
    except (OSError, ValueError) as error:
        raise damaged(path / "meta.json", str(error)) from None
    if meta["format"] != FORMAT:
        raise UserError(f"{path} has checkpoint format {meta['format']}, this version reads {FORMAT}")
    return Checkpoint(path, meta)


def damaged(file: Path, why: str) -> UserError:
    """The error that names a damaged file, and the steps that may be used instead."""
    others = [step for step in saved_steps(file.parents[1]) if step_dir(file.parents[1], step) != file.parent]
    instead = " or ".join(f"--step={step}" for step in others[-3:]) or "there is none"
    return UserError(f"{file} is damaged ({why}); use another step: {instead}")


def find_resume(
    source: str, model_tag: str, settings: dict[str, Any], identity: dict[str, Any], compute: Compute
) -> Checkpoint | None:
    """The checkpoint that `settings` (resume, resume_from_step, fresh) ask to continue, all of it verified, or None for
    a run from the start. Without a step it is the newest one that is whole; damaged ones after it are named and moved
    aside. Takes the tag for this process. Collective: rank 0 looks, the others take its word.

    Raises UserError where the checkpoint differs in anything of `identity`, where no step is whole, where another
    process is writing under the tag, and for a run from the start over existing checkpoints without `fresh`, which sets
    them aside.
    """
    step, fresh = settings["resume_from_step"], settings["fresh"]
    resume = settings["resume"] or step is not None

    def look() -> Checkpoint | None:
        if fresh and resume:
            raise UserError("--fresh and --resume exclude each other; drop one")
        directory = checkpoints_dir(source, model_tag)
        take_directory(directory)
        steps = saved_steps(directory)
        if not resume:
            if steps and not fresh:
                ways = "continue with --resume, start over with --fresh, or choose another --model-tag"
                raise UserError(f"{directory} already has step {steps[-1]}: {ways}")
            set_aside(directory, steps)
            return None
        checkpoint = newest_whole(find_steps(source, model_tag, step))
        for name, value in identity.items():
            if (saved := checkpoint.meta.get(name)) != value:
                difference = f"{checkpoint.path} was made with {name} = {saved}, this run has {value}"
                raise UserError(f"{difference}; give the same settings, or start over with --fresh")
        set_aside(directory, [later for later in steps if later > checkpoint.step])
        return checkpoint

    found: Checkpoint | None = on_master(compute, look)
    return found


def on_master(compute: Compute, work: Callable[[], Any]) -> Any:
    """Do what only rank 0 may do, and give its result to every rank. A UserError of it ends all of them, told once."""
    try:
        result = work() if compute.is_master else None
    except UserError as error:
        error.everywhere = True
        result = error
    result = compute.gather(result)[0]
    if isinstance(result, UserError):
        raise result
    return result


def newest_whole(paths: Sequence[Path]) -> Checkpoint:
    """The first that is whole; says what is wrong with those passed over. Raises UserError where none is."""
    for path in paths:
        try:
            checkpoint = open_checkpoint(path)
            checkpoint.verify()
            return checkpoint
        except UserError as error:
            print0(f"warning: {error}")
    raise UserError(f"no checkpoint in {paths[0].parent} is whole; start over with --fresh")


TAKEN: dict[Path, int] = {}  # directories this process has a lock on; the end of the process gives them back


def take_directory(directory: Path) -> None:
    """Make this process the only one that writes there, as far as the file system has locks, and sweep up what killed
    ones have left. Raises UserError where another one lives.
    """
    directory.mkdir(parents=True, exist_ok=True)
    if directory not in TAKEN:
        handle = os.open(directory, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            message = f"another run is writing to {directory}; wait for it, or choose another --model-tag"
            raise UserError(message) from None
        except OSError as error:
            print0(f"warning: {directory} cannot be locked ({error.strerror}); start one run at a time with this tag")
        TAKEN[directory] = handle
    for stray in directory.glob(".*step_*.tmp"):
        shutil.rmtree(stray)


def set_aside(directory: Path, steps: list[int]) -> None:
    """Move checkpoints that this run is going to write again to `<tag>-before-<time>`, and the mark of the best if it
    is among them: it would spare, and be the mark to beat of, another run's step of that number.
    """
    if steps:
        aside = directory.with_name(f"{directory.name}-before-{time.strftime('%Y%m%d-%H%M%S')}")
        aside.mkdir(exist_ok=True)
        for step in steps:
            os.replace(step_dir(directory, step), step_dir(aside, step))
        if (directory / BEST).exists() and read_best(directory) == (-1, math.inf):
            os.replace(directory / BEST, aside / BEST)
        print0(f"set aside: steps {steps} of {directory.name} moved to {aside}")


# -----------------------------------------------------------------------------
# Saving


def save_checkpoint(
    path: Path,
    model: LanguageModel,
    optimizers: Sequence[AdamW | Muon],
    tokenizer: Tokenizer,
    meta: dict[str, Any],
    compute: Compute,
    keep_last: int = -1,
) -> None:
    """Write a checkpoint to checkpoint_path(...) and say so; then, unless keep_last is -1, delete all but the last
    keep_last steps and the best one. A whole checkpoint in the place is kept, a damaged one moved aside. Collective.

    Raises UserError when the disk is too small, NotFinite when weights or optimizer state are not: the checkpoints that
    were there stay as they are.
    """
    started = time.perf_counter()
    # All ranks gather, rank 0 keeps.
    weights = {name: tensor.cpu().contiguous() for name, tensor in whole_weights(model) if compute.is_master}
    states = (item for optimizer in optimizers for item in optimizer.full_state())
    state = {name: tensor.to("cpu", copy=True) for name, tensor in states if compute.is_master}

    def write() -> None:
        try:
            open_checkpoint(path).verify()  # then it is kept as it is
        except UserError:
            tensors = {"model.safetensors": weights, "optim.safetensors": state}
            size = write_step(path, tensors, tokenizer, meta)
            print0(f"saved {path} ({size / 1e6:,.1f} MB in {time.perf_counter() - started:.2f} s)")
        if keep_last > 0:
            delete_old(path.parent, keep_last)

    on_master(compute, write)


def write_step(path: Path, tensors: dict[str, dict[str, Tensor]], tokenizer: Tokenizer, meta: dict[str, Any]) -> int:
    """Write a step directory with these files of tensors, whole or not at all; returns the tensors' bytes."""
    step = int(path.name[5:])
    everything = [item for state in tensors.values() for item in state.items()]
    for name, tensor in everything:  # what cannot be trained on must not become the newest checkpoint
        if not tensor.isfinite().all():
            raise NotFinite(f"{name} has values that are not finite: step {step} is not saved, earlier ones stay")
    size = sum(tensor.nbytes for _, tensor in everything)
    try:
        with whole(path) as building:
            building.mkdir()
            for name, state in tensors.items():
                save_file(state, building / name)
            tokenizer.save(building)
            written = sorted(building.iterdir())
            files = {file.name: {"bytes": file.stat().st_size, "sha256": sha256_file(file)} for file in written}
            meta = {"format": FORMAT, "step": step, "saved_at": time.time(), **meta}
            meta |= {"files": files, "provenance": provenance()}
            (building / "meta.json").write_text(seal(json.dumps(meta, indent=1)))
            if path.exists():  # only reached when what stands there is damaged
                os.replace(path, path.with_name(f"{path.name}-damaged-{time.strftime('%Y%m%d-%H%M%S')}"))
    except (OSError, SafetensorError) as error:
        why, free = getattr(error, "strerror", None) or one_line(error), shutil.disk_usage(path.parent).free
        failed = f"step {path.name[5:]} could not be saved ({why})"
        needs = f"a checkpoint needs {size + 2**20:,} bytes and {path.parent} has {free:,} free"
        raise UserError(f"{failed}: {needs}; make room (--keep-last=2 keeps it), then go on with --resume") from None
    return size


def delete_old(directory: Path, keep_last: int) -> None:
    """Delete all steps but the last ones and the best one. The newest was verified as it was written."""
    best, _ = read_best(directory)
    for step in saved_steps(directory)[:-keep_last]:
        if step != best:
            doomed = directory / f".step_{step:06d}.{os.getpid()}.tmp"  # gone at once, also when killed half way
            os.replace(step_dir(directory, step), doomed)
            shutil.rmtree(doomed)


def is_best(source: str, model_tag: str, value: float) -> bool:
    """Whether a validation is better, that is lower, than that of the step marked as best."""
    return value < read_best(checkpoints_dir(source, model_tag))[1]


def mark_best(source: str, model_tag: str, step: int, value: float, compute: Compute) -> None:
    """Remember a saved step as the one with the best validation; keep_last spares it."""
    if compute.is_master:
        write_atomic(checkpoints_dir(source, model_tag) / BEST, seal(json.dumps({"step": step, "value": value})))


def read_best(directory: Path) -> tuple[int, float]:
    """(step, value) of the step marked as best; (-1, infinity) where there is none, or it is no longer there."""
    try:
        best = read_sealed(directory / BEST)
    except (OSError, ValueError):
        return -1, math.inf
    return (best["step"], best["value"]) if best["step"] in saved_steps(directory) else (-1, math.inf)


# -----------------------------------------------------------------------------
# Loading


@contextmanager
def open_tensors(path: Path) -> Iterator[Any]:
    """The safetensors handle of a file: keys(), get_tensor(name), get_slice(name). UserError where it is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is no intact safetensors file: {one_line(error)}; get it again") from None


def restore_model(model: LanguageModel, checkpoint: Checkpoint) -> None:
    """Load weights in place. Raises UserError, before any is loaded, for the first tensor that is not the model's."""
    path, weights = checkpoint.file("model.safetensors"), dict(model.named_parameters())
    with open_tensors(path) as file, torch.no_grad():
        saved = {name: file.get_slice(name) for name in sorted(file.keys())}
        stored = {name: f"{tensor.get_dtype()} {tuple(tensor.get_shape())}" for name, tensor in saved.items()}
        needed = {name: f"F32 {tuple(p.shape)}" for name, p in weights.items()}
        for name in sorted(stored | needed):
            there, wanted = stored.get(name, "not there"), needed.get(name, "no such tensor")
            if there != wanted:
                raise UserError(f"{path}: {name} is {there}, this model has {wanted}; check --depth and --model-tag")
        for name, p in weights.items():
            local(p).copy_(saved[name][own_rows(p)])  # a sharded model reads just its rows


def restore_optimizers(optimizers: Sequence[AdamW | Muon], checkpoint: Checkpoint) -> None:
    """Load the optimizer state saved by any number of ranks. Raises UserError where one is missing."""
    path = checkpoint.file("optim.safetensors")
    with open_tensors(path) as file:
        names = set(file.keys())

        def read(name: str) -> Tensor:
            if name not in names:
                mend = "base_train: the same --optimizer as before; mid_train and chat_sft: --warm-start=false"
                raise UserError(f"{path} has no tensor {name}; {mend}")
            return file.get_tensor(name)

        for optimizer in optimizers:
            optimizer.load_full_state(read)


def load_model(
    source: str, device: torch.device, phase: str = "eval", model_tag: str | None = None, step: int | None = None
) -> tuple[LanguageModel, Tokenizer, dict[str, Any]]:
    """The model, its own tokenizer and meta of a checkpoint of stage `source` (base, mid, sft, rl); `phase` is train or
    eval. Without a tag the one saved last, without a step the last. UserError where there is none or it is damaged.
    """
    if source not in STAGES:
        raise UserError(f"source={source}: expected one of {', '.join(STAGES)}")
    checkpoint = find_checkpoint(source, model_tag, step)
    return *open_model(checkpoint, device, phase), checkpoint.meta


def open_model(
    checkpoint: Checkpoint, device: torch.device, phase: str = "eval", place: Place | None = None
) -> tuple[LanguageModel, Tokenizer]:
    """The model and the tokenizer of a checkpoint; `phase` is train or eval, `place` as in build_model."""
    model = build_model(load_config(checkpoint.meta["model_config"]), device, place=place)
    restore_model(model, checkpoint)
    model.train(phase == "train")
    print0(f"model: {checkpoint.name}, {model.num_params():,} parameters")
    return model, Tokenizer.load(checkpoint.file("tokenizer.json"))
