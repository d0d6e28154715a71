"""
Checkpoints: one directory per step that exists whole or not at all.

    $NANOCHAT_BASE_DIR/base_checkpoints/d20/step_000500/
        model.safetensors    fp32 master weights
        optim.safetensors    whole-shape optimizer state, so that any number of ranks can go on
        tokenizer.json       a model is useless with another tokenizer, so they travel together
        meta.json            written last: sizes and sha256 of the other three, model config, settings, position,
                             loop state, versions

A save is written beside its place and renamed into it. Loading verifies sizes always and sha256 unless told not to.
Not covered: two runs that save under the same tag at the same time.
"""

import json
import os
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nanochat.adamw import AdamW
from nanochat.common import UserError, fsync_dir, get_base_dir, print0, provenance, sha256_file, write_atomic
from nanochat.compute import Compute
from nanochat.gpt import GPT, GPTConfig, build_model
from nanochat.muon import Muon
from nanochat.tokenizer import Tokenizer

# Stage as the user says it -> directory, and the script that makes it.
STAGES = {
    "base": ("base_checkpoints", "scripts.base_train"),
    "mid": ("mid_checkpoints", "scripts.mid_train"),
    "sft": ("chatsft_checkpoints", "scripts.chat_sft"),
    "rl": ("chatrl_checkpoints", "scripts.chat_rl"),
}
FORMAT = 1


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

    def read_model_state(self) -> dict[str, Tensor]:
        with self.open("model.safetensors") as tensors:
            return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118  # not a dict

    @contextmanager
    def open(self, name: str) -> Iterator[Any]:
        """A safetensors file for reading single tensors. Raises UserError where it is not one."""
        try:
            with safe_open(self.path / name, framework="pt") as tensors:
                yield tensors
        except SafetensorError as error:
            raise UserError(
                f"{self.path / name} is damaged ({error}); delete {self.path} and resume from an earlier step"
            ) from None

    def verify(self) -> None:
        """Compare sha256 of all files; raises UserError naming the first that differs."""
        for name, entry in self.meta["files"].items():
            if sha256_file(self.path / name) != entry["sha256"]:
                raise UserError(
                    f"{self.path / name} is damaged (sha256 differs); delete {self.path}, resume from an earlier step"
                )


# -----------------------------------------------------------------------------
# Finding


def checkpoints_dir(source: str, model_tag: str) -> Path:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", model_tag):
        raise UserError(f"--model-tag={model_tag}: expected letters, digits, dots, dashes and underscores")
    return get_base_dir() / STAGES[source][0] / model_tag


def saved_steps(directory: Path) -> list[int]:
    """Steps with a complete checkpoint, ascending. Temporary and foreign names do not count."""
    names = [path.parent.name for path in directory.glob("step_*/meta.json")]
    return sorted(int(name[5:]) for name in names if re.fullmatch(r"step_\d{6,}", name))


def find_tag(source: str, model_tag: str | None) -> str:
    """The tag as given, or the one saved last. Raises UserError naming the command that makes one."""
    folder, script = STAGES[source]
    root = get_base_dir() / folder
    if model_tag is not None:
        if saved_steps(checkpoints_dir(source, model_tag)):
            return model_tag
        tags = [path.name for path in sorted(root.glob("*")) if saved_steps(path)]
        hint = f"there is {', '.join(tags)}" if tags else f"make one with: python -m {script}"
        raise UserError(f"no {source} checkpoint {model_tag} in {root}; {hint}")
    newest = max(root.glob("*/step_*/meta.json"), key=lambda path: path.stat().st_mtime, default=None)
    if newest is None:
        raise UserError(f"no {source} checkpoint in {root}; make one with: python -m {script}")
    return newest.parent.parent.name


def find_checkpoint(source: str, model_tag: str | None = None, step: int | None = None) -> Checkpoint:
    """
    The checkpoint of a stage: by default of the tag saved last, and its last step. Raises UserError where there is
    none.
    """
    directory = checkpoints_dir(source, find_tag(source, model_tag))
    steps = saved_steps(directory)
    if step is not None and step not in steps:
        raise UserError(f"no step {step} in {directory}; there is {', '.join(map(str, steps))}")
    return open_checkpoint(directory / f"step_{steps[-1] if step is None else step:06d}")


def open_checkpoint(path: Path) -> Checkpoint:
    """Read meta.json and check the files' sizes."""
    try:
        meta = json.loads((path / "meta.json").read_text(encoding="utf-8"))
        sizes = {name: entry["bytes"] for name, entry in meta["files"].items()}
        version = meta["format"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}/meta.json cannot be read ({error}); delete {path} and use an earlier step") from None
    if version != FORMAT:
        raise UserError(f"{path} has checkpoint format {version}, this version reads {FORMAT}")
    for name, size in sizes.items():
        file = path / name
        found = file.stat().st_size if file.is_file() else None
        if found != size:
            state = "missing" if found is None else f"{found:,} bytes, not {size:,}"
            raise UserError(f"{file} is damaged ({state}); delete {path} and use an earlier step")
    return Checkpoint(path, meta)


def find_resume(
    source: str,
    model_tag: str,
    identity: dict[str, Any],
    resume: bool,
    resume_from_step: int | None,
    fresh: bool,
    compute: Compute,
) -> Checkpoint | None:
    """
    The checkpoint that a run asked to continue, verified, or None for a run from the start. Raises UserError where it
    differs in anything of `identity`, and for a run from the start over existing checkpoints without `fresh`, which
    sets them aside.
    """
    directory = checkpoints_dir(source, model_tag)
    steps = saved_steps(directory)
    if not resume and resume_from_step is None:
        if steps and not fresh:
            raise UserError(
                f"{directory} already has step {steps[-1]}: continue with --resume, start over with --fresh, or choose "
                "another --model-tag"
            )
        set_aside(directory, steps, compute)
        return None
    if fresh:
        raise UserError("--fresh and --resume exclude each other; drop one")
    checkpoint = find_checkpoint(source, model_tag, resume_from_step)
    checkpoint.verify()
    for name, value in identity.items():
        if checkpoint.meta.get(name) != value:
            raise UserError(
                f"{checkpoint.path} was made with {name} = {checkpoint.meta.get(name)}, this run has {value}; "
                "give the same settings, or start over with --fresh"
            )
    set_aside(directory, [step for step in steps if step > checkpoint.step], compute)
    return checkpoint


def set_aside(directory: Path, steps: list[int], compute: Compute) -> None:
    """
    Move checkpoints that this run is going to write again to `<tag>-before-<time>`: never deleted, never mistaken for
    new ones.
    """
    if steps and compute.is_master:
        aside = directory.with_name(f"{directory.name}-before-{time.strftime('%Y%m%d-%H%M%S')}")
        aside.mkdir()
        for step in steps:
            os.replace(directory / f"step_{step:06d}", aside / f"step_{step:06d}")
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
) -> Path:
    """
    Write a checkpoint and return its directory. Collective: every rank calls it, rank 0 writes. A verified checkpoint
    already in the place is kept as it is. Raises UserError when the disk is too small, before anything is written.
    """
    path = checkpoints_dir(source, model_tag) / f"step_{step:06d}"
    optim_state = {}
    for optimizer in optimizers:
        for name, tensor in optimizer.full_state():
            if compute.is_master:  # the others only take part in gathering
                optim_state[name] = tensor.detach().cpu().clone()
    if compute.is_master and not is_verified(path):
        model_state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
        check_space(path.parent, [model_state, optim_state])
        write_step_directory(path, model_state, optim_state, tokenizer, {"step": step, **meta})
    compute.barrier()
    return path


def is_verified(path: Path) -> bool:
    try:
        open_checkpoint(path).verify()
        return True
    except UserError:
        return False


def check_space(directory: Path, states: list[dict[str, Tensor]]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    need = sum(tensor.nbytes for state in states for tensor in state.values()) + 2**20
    free = shutil.disk_usage(directory).free
    if free < need:
        raise UserError(
            f"a checkpoint needs {need:,} bytes and {directory} has {free:,} free; make room or set NANOCHAT_BASE_DIR"
        )


def write_step_directory(
    path: Path,
    model_state: dict[str, Tensor],
    optim_state: dict[str, Tensor],
    tokenizer: Tokenizer,
    meta: dict[str, Any],
) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        save_file(model_state, temporary / "model.safetensors")
        save_file(optim_state, temporary / "optim.safetensors")
        tokenizer.save(temporary)
        files = {}
        for file in sorted(temporary.iterdir()):
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
            files[file.name] = {"bytes": file.stat().st_size, "sha256": sha256_file(file)}
        meta = {"format": FORMAT, **meta, "files": files, "provenance": provenance()}
        write_atomic(temporary / "meta.json", json.dumps(meta, indent=1))
        shutil.rmtree(path, ignore_errors=True)  # only reached when what stands there is damaged
        os.replace(temporary, path)
        fsync_dir(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


# -----------------------------------------------------------------------------
# Loading


def restore_model(model: GPT, checkpoint: Checkpoint) -> None:
    """Load weights in place; names and shapes must match exactly. Raises UserError naming the first difference."""
    state, expected = checkpoint.read_model_state(), model.state_dict()
    for name in sorted(state.keys() | expected.keys()):
        found, wanted = (tuple(s[name].shape) if name in s else None for s in (state, expected))
        if found != wanted:
            raise UserError(f"{checkpoint.path}: {name} has shape {found}, this model needs {wanted}; check --depth")
    model.load_state_dict(state)


def restore_optimizers(optimizers: Sequence[AdamW | Muon], checkpoint: Checkpoint) -> None:
    """Load the optimizer state saved by any number of ranks."""
    with checkpoint.open("optim.safetensors") as tensors:
        for optimizer in optimizers:
            optimizer.load_full_state(tensors.get_tensor)


def load_model(
    source: str,
    device: torch.device,
    phase: str = "eval",
    model_tag: str | None = None,
    step: int | None = None,
) -> tuple[GPT, Tokenizer, dict[str, Any]]:
    """
    The model, its own tokenizer and meta of a checkpoint of stage `source` (base, mid, sft, rl), verified by sha256;
    `phase` is train or eval. Without a tag the one saved last, without a step the last. Raises UserError where there is
    none or it is damaged.
    """
    if source not in STAGES:
        raise UserError(f"source={source}: expected one of {', '.join(STAGES)}")
    checkpoint = find_checkpoint(source, model_tag, step)
    return *open_model(checkpoint, device, phase), checkpoint.meta


def open_model(checkpoint: Checkpoint, device: torch.device, phase: str = "eval") -> tuple[GPT, Tokenizer]:
    """The model and the tokenizer of a checkpoint, verified by sha256; `phase` is train or eval."""
    checkpoint.verify()
    model = build_model(GPTConfig(**checkpoint.meta["model_config"]), device)
    restore_model(model, checkpoint)
    model.train(phase == "train")
    print0(f"model: {checkpoint.name}, {model.num_params():,} parameters")
    return model, Tokenizer.load(checkpoint.path)
