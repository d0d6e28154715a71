"""Checkpoints: one directory per step that exists whole or not at all.

    $NANOCHAT_BASE_DIR/base_checkpoints/d20/step_000500/
        model.safetensors    fp32 master weights
        optim.safetensors    whole-shape optimizer state, so that any number of ranks can go on
        tokenizer.json       a model is useless with another tokenizer, so they travel together
        meta.json            written last: sizes and sha256 of the other three, model config, settings, position,
                             loop state, versions

A save is written beside its place and renamed into it, every byte flushed to the disk first. meta.json is sealed with
its own sha256, so one wrong bit in any of the four files is found, and the newest checkpoint that is whole is the one
that a run continues from. Nothing damaged is deleted: it is moved aside. One run at a time writes under a tag.
"""

import base64
import errno
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanochat.adamw import AdamW
from nanochat.common import NotFinite, UserError, get_base_dir, print0
from nanochat.compute import Compute
from nanochat.files import flush, read_sealed, seal, sha256_file, write_atomic
from nanochat.gpt import GPT, GPTConfig, build_model
from nanochat.muon import Muon
from nanochat.record import provenance
from nanochat.sharding import Place, local, own_rows, whole_weights
from nanochat.tensors import check_tensors, open_tensors, read_header, save_tensors
from nanochat.tokenizer import Tokenizer

# Stage as the user says it -> directory, and the script that makes it.
STAGES = {
    "base": ("base_checkpoints", "scripts.base_train"),
    "mid": ("mid_checkpoints", "scripts.mid_train"),
    "sft": ("chatsft_checkpoints", "scripts.chat_sft"),
    "rl": ("chatrl_checkpoints", "scripts.chat_rl"),
}
FORMAT = 2  # 2: meta.json is sealed
ASIDE = re.compile(r"-before-\d{8}-\d{6}$")  # how set_aside() names what it moves
BEST = "best.json"


@dataclass(frozen=True)
class Checkpoint:
    """A step directory whose meta.json has been read and whose files have their recorded sizes."""

    path: Path
    meta: dict[str, Any]

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

    def verify(self) -> None:
        """Compare sha256 of all files; raises UserError naming the first that differs."""
        for name, entry in self.meta["files"].items():
            if sha256_file(self.path / name) != entry["sha256"]:
                raise UserError(
                    f"{self.path / name} is damaged (sha256 differs); use another step: {other_steps(self.path)}"
                )


# -----------------------------------------------------------------------------
# Finding


def checkpoints_dir(source: str, model_tag: str) -> Path:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", model_tag):
        raise UserError(
            f"--model-tag={model_tag}: expected letters, digits, dots, dashes and underscores", everywhere=True
        )
    return get_base_dir() / STAGES[source][0] / model_tag


def saved_steps(directory: Path) -> list[int]:
    """Steps with a complete checkpoint, ascending. Temporary and foreign names do not count."""
    names = [path.parent.name for path in directory.glob("step_*/meta.json")]
    return sorted(int(name[5:]) for name in names if re.fullmatch(r"step_\d{6,}", name))


def find_tag(source: str, model_tag: str | None) -> str:
    """The tag as given, or the one saved last. Raises UserError naming the command that makes one."""
    folder, script = STAGES[source]
    root = get_base_dir() / folder
    tags = [path for path in sorted(root.glob("*")) if saved_steps(path) and not ASIDE.search(path.name)]
    if not tags:
        raise UserError(f"no {source} checkpoint in {root}; make one with: python -m {script}")
    if model_tag is None:
        return max(tags, key=lambda tag: max(path.stat().st_mtime for path in tag.glob("step_*/meta.json"))).name
    if not saved_steps(checkpoints_dir(source, model_tag)):
        raise UserError(
            f"no {source} checkpoint {model_tag} in {root}; there is {', '.join(path.name for path in tags)}"
        )
    return model_tag


def find_checkpoint(source: str, model_tag: str | None = None, step: int | None = None) -> Checkpoint:
    """The checkpoint of a stage: by default of the tag saved last, and its last step. Raises UserError where there is
    none.
    """
    directory = checkpoints_dir(source, find_tag(source, model_tag))
    steps = saved_steps(directory)
    if step is not None and step not in steps:
        raise UserError(f"no step {step} in {directory}; there is {', '.join(map(str, steps))}")
    return open_checkpoint(step_dir(directory, steps[-1] if step is None else step))


def step_dir(directory: Path, step: int) -> Path:
    return directory / f"step_{step:06d}"


def open_checkpoint(path: Path) -> Checkpoint:
    """Read meta.json and check the files' sizes; their bytes are checked by Checkpoint.verify()."""
    try:
        meta = read_sealed(path / "meta.json")
        sizes = {name: entry["bytes"] for name, entry in meta["files"].items()}
        version = meta["format"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}/meta.json is damaged ({error}); use another step: {other_steps(path)}") from None
    if version != FORMAT:
        raise UserError(f"{path} has checkpoint format {version}, this version reads {FORMAT}")
    for name, size in sizes.items():
        file = path / name
        found = file.stat().st_size if file.is_file() else None
        if found != size:
            state = "missing" if found is None else f"{found:,} bytes, not {size:,}"
            raise UserError(f"{file} is damaged ({state}); use another step: {other_steps(path)}")
    return Checkpoint(path, meta)


def other_steps(path: Path) -> str:
    """What a user whose checkpoint is damaged may load instead."""
    others = [step for step in saved_steps(path.parent) if step_dir(path.parent, step) != path]
    return " or ".join(f"--step={step}" for step in others[-3:]) or "there is none"


def find_resume(
    source: str,
    model_tag: str,
    identity: dict[str, Any],
    resume: bool,
    resume_from_step: int | None,
    fresh: bool,
    compute: Compute,
) -> Checkpoint | None:
    """The checkpoint that a run asked to continue, verified, or None for a run from the start. Without a step it is the
    newest one that is whole; damaged ones after it are named and moved aside. Takes the tag for this process, and
    sweeps up what a killed save has left.

    Raises UserError where the checkpoint differs in anything of `identity`, where no step is whole, where another
    process is writing under the tag, and for a run from the start over existing checkpoints without `fresh`, which sets
    them aside. Collective: rank 0 looks, the others take its word.
    """
    if fresh and (resume or resume_from_step is not None):
        raise UserError("--fresh and --resume exclude each other; drop one", everywhere=True)
    directory = checkpoints_dir(source, model_tag)
    on_master(compute, lambda: take_directory(directory))
    steps = saved_steps(directory)
    if not resume and resume_from_step is None:
        if steps and not fresh:
            raise UserError(
                f"{directory} already has step {steps[-1]}: continue with --resume, start over with --fresh, or choose "
                "another --model-tag",
                everywhere=True,
            )
        set_aside(directory, steps, compute)
        return None
    find_tag(source, model_tag)
    if resume_from_step is not None and resume_from_step not in steps:
        there = ", ".join(map(str, steps))
        raise UserError(f"no step {resume_from_step} in {directory}; there is {there}", everywhere=True)
    candidates = steps[::-1] if resume_from_step is None else [resume_from_step]
    step = on_master(compute, lambda: newest_whole(directory, candidates))
    checkpoint = open_checkpoint(step_dir(directory, step))
    for name, value in identity.items():
        if checkpoint.meta.get(name) != value:
            raise UserError(
                f"{checkpoint.path} was made with {name} = {checkpoint.meta.get(name)}, this run has {value}; "
                "give the same settings, or start over with --fresh",
                everywhere=True,
            )
    set_aside(directory, [later for later in steps if later > step], compute)
    return checkpoint


def on_master(compute: Compute, work: Callable[[], int | None]) -> int:
    """Do what only rank 0 may do, and give its number to every rank. A UserError of it ends all of them, told once."""
    result, error = 0, None
    if compute.is_master:
        try:
            result = work() or 0
        except UserError as problem:
            error = problem
            error.everywhere = True
    exit_code = int(compute.sum(torch.tensor(error.exit_code if error else 0, dtype=torch.int32)))
    if exit_code:
        kind = NotFinite if exit_code == NotFinite.exit_code else UserError
        raise error or kind("rank 0 said why", everywhere=True)
    return int(compute.sum(torch.tensor(result, dtype=torch.float64)))


def newest_whole(directory: Path, candidates: Sequence[int]) -> int:
    """The first of the steps that verifies; says what is wrong with those passed over. UserError where none does."""
    for step in candidates:
        try:
            open_checkpoint(step_dir(directory, step)).verify()
            return step
        except UserError as error:
            print0(f"warning: {error}")
    raise UserError(f"no checkpoint in {directory} is whole; start over with --fresh")


TAKEN: dict[Path, int] = {}  # directories this process has a lock on; the end of the process gives them back


def take_directory(directory: Path) -> None:
    """Make this process the only one that writes there, and sweep up what killed ones have left. Raises UserError where
    another one lives. Not held on Windows, nor on file systems without locks.
    """
    directory.mkdir(parents=True, exist_ok=True)
    if directory not in TAKEN and sys.platform != "win32":
        import fcntl

        handle = os.open(directory, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another run is writing to {directory}; wait for it, or choose another --model-tag"
            ) from None
        except OSError as error:
            print0(f"warning: {directory} cannot be locked ({error.strerror}); start one run at a time with this tag")
        TAKEN[directory] = handle
    for stray in directory.glob(".step_*.tmp"):
        shutil.rmtree(stray)


def set_aside(directory: Path, steps: list[int], compute: Compute) -> None:
    """Move checkpoints that this run is going to write again to `<tag>-before-<time>`: never deleted, never mistaken
    for new ones.
    """
    if steps and compute.is_master:
        aside = directory.with_name(f"{directory.name}-before-{time.strftime('%Y%m%d-%H%M%S')}")
        aside.mkdir(exist_ok=True)
        for step in steps:
            os.replace(step_dir(directory, step), step_dir(aside, step))
        print0(
            f"set aside: checkpoint{'s' if len(steps) > 1 else ''} {', '.join(map(str, steps))} of {directory.name} "
            f"moved to {aside}"
        )
    compute.barrier()


# -----------------------------------------------------------------------------
# Saving


def save_checkpoint(
    source: str,
    model_tag: str,
    step: int,
    model: GPT,
    optimizers: Sequence[AdamW | Muon],
    tokenizer: Tokenizer,
    meta: dict[str, Any],
    compute: Compute,
    keep_last: int = -1,
) -> Path:
    """Write a checkpoint, say so, and return its directory; then, unless keep_last is -1, delete all but the last
    keep_last steps and the best one. Collective: every rank calls it, rank 0 writes. A verified checkpoint already in
    the place is kept as it is.

    Raises UserError when the disk is too small, NotFinite when weights or optimizer state are not: the checkpoints that
    were there stay as they are.
    """
    started = time.perf_counter()
    path = step_dir(checkpoints_dir(source, model_tag), step)
    model_state, optim_state = {}, {}  # on rank 0; the others only take part in gathering
    for name, tensor in whole_weights(model):
        if compute.is_master:
            model_state[name] = tensor.cpu().contiguous()
    for name, tensor in (item for optimizer in optimizers for item in optimizer.full_state()):
        if compute.is_master:
            optim_state[name] = tensor.detach().cpu().clone()

    def write() -> None:
        if not is_verified(path):
            check_finite(step, model_state, optim_state)
            write_step_directory(path, model_state, optim_state, tokenizer, {"step": step, **meta, "rng": rng_state()})
            size = sum(tensor.nbytes for state in (model_state, optim_state) for tensor in state.values())
            print0(f"saved {path} ({size / 1e6:,.1f} MB in {time.perf_counter() - started:.2f} s)")
        if keep_last > 0:
            delete_old(path.parent, keep_last)

    on_master(compute, write)
    return path


def is_verified(path: Path) -> bool:
    try:
        open_checkpoint(path).verify()
        return True
    except UserError:
        return False


def check_finite(step: int, *states: dict[str, Tensor]) -> None:
    """A checkpoint that cannot be trained on must not become the newest one."""
    for name, tensor in ((name, tensor) for state in states for name, tensor in state.items()):
        if not tensor.isfinite().all():
            raise NotFinite(f"{name} has values that are not finite: step {step} is not saved, earlier ones stay")


def write_step_directory(
    path: Path,
    model_state: dict[str, Tensor],
    optim_state: dict[str, Tensor],
    tokenizer: Tokenizer,
    meta: dict[str, Any],
) -> None:
    """Write the four files beside `path`, flush them to the disk, and rename the whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    need = sum(tensor.nbytes for state in (model_state, optim_state) for tensor in state.values()) + 2**20
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(path.parent).free < need:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        temporary.mkdir()
        save_tensors(temporary / "model.safetensors", model_state)
        save_tensors(temporary / "optim.safetensors", optim_state)
        tokenizer.save(temporary)
        files = {}
        for file in sorted(temporary.iterdir()):
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
            files[file.name] = {"bytes": file.stat().st_size, "sha256": sha256_file(file)}
        meta = {"format": FORMAT, **meta, "files": files, "provenance": provenance()}
        write_atomic(temporary / "meta.json", seal(json.dumps(meta, indent=1)))
        if path.exists():  # only reached when what stands there is damaged
            os.replace(path, path.with_name(f"{path.name}-damaged-{time.strftime('%Y%m%d-%H%M%S')}"))
        os.replace(temporary, path)
        flush(path.parent)
    except (OSError, UserError) as error:  # save_tensors raises UserError
        why, free = getattr(error, "strerror", None) or error, shutil.disk_usage(path.parent).free
        raise UserError(
            f"step {path.name[5:]} could not be saved ({why}): a checkpoint needs {need:,} bytes and {path.parent} has "
            f"{free:,} free; make room (--keep-last=2 keeps it), then go on with --resume"
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def delete_old(directory: Path, keep_last: int) -> None:
    """Delete all steps but the last ones and the best one. The newest was verified as it was written."""
    best = read_best(directory)
    for step in saved_steps(directory)[:-keep_last]:
        if best is None or step != best[0]:
            doomed = directory / f".step_{step:06d}.{os.getpid()}.tmp"  # gone at once, also when killed half way
            os.replace(step_dir(directory, step), doomed)
            shutil.rmtree(doomed)


def is_best(source: str, model_tag: str, value: float) -> bool:
    """Whether a validation is better, that is lower, than that of the step marked as best."""
    best = read_best(checkpoints_dir(source, model_tag))
    return best is None or value < best[1]


def mark_best(source: str, model_tag: str, step: int, value: float, compute: Compute) -> None:
    """Remember a saved step as the one with the best validation; keep_last spares it."""
    if compute.is_master:
        content = seal(json.dumps({"step": step, "value": value}))
        write_atomic(checkpoints_dir(source, model_tag) / BEST, content)


def read_best(directory: Path) -> tuple[int, float] | None:
    """(step, value) of the step marked as best; None where there is none, or it is no longer there."""
    try:
        content = read_sealed(directory / BEST)
    except (OSError, ValueError):
        return None
    step = int(content["step"])
    return (step, float(content["value"])) if step in saved_steps(directory) else None


def rng_state() -> dict[str, str]:
    """torch's default generators. No stage draws from them (all randomness comes from the seed and a step's number),
    but an experiment that adds dropout does. The same on every rank, so rank 0's stand for all.
    """
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    return {device: base64.b64encode(state.numpy().tobytes()).decode() for device, state in states.items()}


def restore_rng(states: dict[str, str]) -> None:
    """Take over the generators of a checkpoint, as far as this machine has them."""
    for device, text in states.items():
        state = torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
        if device == "cpu":
            torch.set_rng_state(state)
        elif torch.cuda.is_available():
            torch.cuda.set_rng_state(state)


# -----------------------------------------------------------------------------
# Loading


def restore_model(model: GPT, checkpoint: Checkpoint) -> None:
    """Load weights in place; names, shapes and dtypes must match exactly. Raises UserError naming the first difference,
    before anything is read.
    """
    path, state = checkpoint.path / "model.safetensors", dict(model.named_parameters())
    check_tensors(read_header(path), {name: (t.dtype, tuple(t.shape)) for name, t in state.items()}, path)
    with open_tensors(path) as tensors, torch.no_grad():
        for name, p in state.items():
            local(p).copy_(tensors.get_slice(name)[own_rows(p)])  # a sharded model reads just its rows


def restore_optimizers(optimizers: Sequence[AdamW | Muon], checkpoint: Checkpoint) -> None:
    """Load the optimizer state saved by any number of ranks. Raises UserError where one is missing."""
    path = checkpoint.path / "optim.safetensors"
    header = read_header(path)

    def read(name: str) -> Tensor:
        if name not in header:
            raise UserError(
                f"{path} has no tensor {name}; mid_train and chat_sft begin without with --warm-start=false"
            )
        return tensors.get_tensor(name)

    with open_tensors(path) as tensors:
        for optimizer in optimizers:
            optimizer.load_full_state(read)


def load_model(
    source: str,
    device: torch.device,
    phase: str = "eval",
    model_tag: str | None = None,
    step: int | None = None,
) -> tuple[GPT, Tokenizer, dict[str, Any]]:
    """The model, its own tokenizer and meta of a checkpoint of stage `source` (base, mid, sft, rl), verified by sha256;
    `phase` is train or eval. Without a tag the one saved last, without a step the last. Raises UserError where there is
    none or it is damaged.
    """
    if source not in STAGES:
        raise UserError(f"source={source}: expected one of {', '.join(STAGES)}")
    checkpoint = find_checkpoint(source, model_tag, step)
    return *open_model(checkpoint, device, phase), checkpoint.meta


def open_model(
    checkpoint: Checkpoint, device: torch.device, phase: str = "eval", place: Place | None = None
) -> tuple[GPT, Tokenizer]:
    """The model and the tokenizer of a checkpoint, verified by sha256; `phase` is train or eval, `place` as in
    build_model. What meta.json says of the model is compared with the file of weights before memory is taken for it.
    """
    checkpoint.verify()
    path = checkpoint.path / "model.safetensors"
    header = read_header(path)
    try:
        config = GPTConfig(**checkpoint.meta["model_config"])
        if config.n_layer > len(header):
            raise ValueError(f"{config.n_layer} layers in {len(header)} tensors")
        with torch.device("meta"):
            expected = {name: (t.dtype, tuple(t.shape)) for name, t in GPT(config).state_dict().items()}
    except (TypeError, ValueError, KeyError) as error:
        raise UserError(f"{checkpoint.path}/meta.json: model_config is none of a model's ({error})") from None
    check_tensors(header, expected, path)
    model = build_model(config, device, place=place)
    restore_model(model, checkpoint)
    model.train(phase == "train")
    print0(f"model: {checkpoint.name}, {model.num_params():,} parameters")
    return model, Tokenizer.load(checkpoint.path)
