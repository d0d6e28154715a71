"""Show what a checkpoint is: where it comes from, its model, settings, position and tensors, and whether it is whole.

    python -m scripts.inspect_checkpoint                           # the base checkpoint saved last
    python -m scripts.inspect_checkpoint -i sft -g d20 --keys=false
    python -m scripts.inspect_checkpoint -g d20 --all-steps        # one line per step

Nothing is built or changed. Ends with 2 and the reason where a file is not as it was written.
"""

from typing import Literal

from nanochat.configurator import configure

SHORT = {"i": "source", "g": "model_tag", "s": "step"}

# Checkpoint
source: Literal["base", "mid", "sft", "rl"] = "base"  # stage of the checkpoint
model_tag: str | None = None  # name of the checkpoint directory (None = the one saved last)
step: int | None = None  # checkpoint step (None = the last)
all_steps = False  # list all steps of the tag instead
# What to look at
verify = True  # compare the sha256 of every file; without it only their sizes are compared
keys = True  # list the tensors
values = False  # with the smallest, largest and root mean square value of each
settings = configure(__name__)

import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nanochat.checkpoint_manager import (
    Checkpoint,
    checkpoints_dir,
    find_checkpoint,
    find_tag,
    open_checkpoint,
    read_best,
    saved_steps,
    step_dir,
)
from nanochat.common import UserError, get_base_dir, print0, run_main
from nanochat.files import sha256_file
from nanochat.record import read_record
from nanochat.tensors import TensorInfo, open_tensors, read_header

SHOWN = ("format", "step", "model_config", "files", "provenance", "settings")  # in sections of their own


def written(path: Path) -> str:
    """When a file was written, local time. A copy that does not keep times has its own."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(path.stat().st_mtime))


def find_evals(tag: str) -> dict[int, str]:
    """{step: "val_bpb 1.4351"}, what the records of this stage and tag say was measured at each step; the last word."""
    found = {}
    for path in sorted((get_base_dir() / "records").glob(f"{source}-{tag}-*.jsonl")):
        try:
            events = read_record(path)
        except (OSError, ValueError) as error:
            print0(f"warning: left out a record: {error}")
            continue
        if events and events[0].get("tag") == tag:  # not of a tag that begins like this one
            for event in events:
                figures = [f"{k} {v:.4f}" for k, v in event.items() if k not in ("time", "step") and type(v) is float]
                if event["event"] == "eval" and figures:
                    found[event["step"]] = ", ".join(figures)
    return found


# -----------------------------------------------------------------------------
# One step


def show(title: str, content: dict[str, Any]) -> None:
    """A section of `name = value` lines; long values are cut and say how long they are."""
    print0(f"\n{title}" + ("" if content else ": none"))
    for name, value in content.items():
        text = json.dumps(value)
        print0(f"  {name} = {text if len(text) <= 200 else f'{text[:180]}... ({len(text):,} characters)'}")


def show_origin(checkpoint: Checkpoint) -> None:
    meta = checkpoint.meta
    made = meta.get("provenance", {})
    when = written(checkpoint.path / "meta.json")
    print0(f"{checkpoint.path}\n  stage {source}, tag {checkpoint.tag}, step {checkpoint.step:,}, written {when}")
    measured = find_evals(checkpoint.tag).get(checkpoint.step)
    print0(f"  measured at this step: {measured or 'no record says'}")
    show("made by", {"format": meta["format"], **made})
    show("model", meta.get("model_config", {}))


def show_files(checkpoint: Checkpoint) -> list[str]:
    """The files with their sizes and sha256; returns what is wrong."""
    damage = []
    print0("\nfiles")
    for name, entry in checkpoint.meta["files"].items():
        state = "not compared"
        if verify:
            whole = sha256_file(checkpoint.path / name) == entry["sha256"]
            state = "as written" if whole else "DAMAGED"
            damage += [] if whole else [f"{checkpoint.path / name} is damaged (sha256 differs)"]
        print0(f"  {name:20} {entry['bytes']:>15,} bytes  sha256 {entry['sha256']}  {state}")
    return damage


def describe(tensors: Any, name: str) -> str:
    """The values of one tensor in figures."""
    tensor = tensors.get_tensor(name).double()
    if tensor.numel() == 0:
        return "empty"
    broken = tensor.numel() - int(tensor.isfinite().sum())
    rms = tensor.square().mean().sqrt()
    return f"min {tensor.min():.4g}  max {tensor.max():.4g}  rms {rms:.4g}" + (f"  {broken:,} NaN/inf" * bool(broken))


def tensor_lines(path: Path, header: dict[str, TensorInfo]) -> Iterator[str]:
    """One line per tensor: name, dtype, shape, and its values if asked."""
    width = max(map(len, header), default=0)
    with open_tensors(path) as tensors:
        for name, info in sorted(header.items()):
            what = f"  {describe(tensors, name)}" if values else ""
            yield f"  {ascii(name)[1:-1]:{width}}  {info.dtype:5} {str(info.shape):16}{what}".rstrip()


def show_tensors(path: Path) -> None:
    header = read_header(path)
    numbers = sum(math.prod(info.shape) for info in header.values())
    print0(f"\n{path.name}: {len(header):,} tensors, {numbers:,} numbers")
    if keys or values:
        for line in tensor_lines(path, header):
            print0(line)


def show_checkpoint(checkpoint: Checkpoint) -> None:
    """Everything about one step. Raises UserError, at the end, for a file that is not as it was written."""
    show_origin(checkpoint)
    show("settings", checkpoint.meta.get("settings", {}))
    show("position, loop state and the rest", {k: v for k, v in checkpoint.meta.items() if k not in SHOWN})
    damage = show_files(checkpoint)
    if not damage:  # the tensors of a damaged file would not be those that were saved
        for name in checkpoint.meta["files"]:
            if name.endswith(".safetensors"):
                show_tensors(checkpoint.path / name)
    if damage:
        raise UserError(f"{'; '.join(damage)}; list the other steps with --model-tag={checkpoint.tag} --all-steps")


# -----------------------------------------------------------------------------
# All steps


def state_of(path: Path) -> str:
    """`whole`, or what is wrong with a step."""
    try:
        checkpoint = open_checkpoint(path)
        if verify:
            checkpoint.verify()
    except UserError as error:
        return str(error)
    return "whole" if verify else "sizes as written"


def show_steps(tag: str) -> None:
    """One line per step. Raises UserError, at the end, where one is damaged."""
    directory = checkpoints_dir(source, tag)
    evals, best, steps = find_evals(tag), read_best(directory), saved_steps(directory)
    print0(f"{directory}\n{'step':>10} {'bytes':>15}  written")
    damaged = []
    for number in steps:
        path = step_dir(directory, number)
        state = state_of(path)
        damaged += [number] if state not in ("whole", "sizes as written") else []
        size = sum(file.stat().st_size for file in path.iterdir())
        remarks = [state, *filter(None, [evals.get(number)]), *(["best"] if best and best[0] == number else [])]
        print0(f"{number:>10,} {size:>15,}  {written(path / 'meta.json')}  {', '.join(remarks)}")
    if damaged:
        raise UserError(f"{len(damaged)} of {len(steps)} steps of {directory} are damaged: {damaged}")


def main() -> None:
    if all_steps:
        show_steps(find_tag(source, model_tag))
    else:
        show_checkpoint(find_checkpoint(source, model_tag, step))


if __name__ == "__main__":
    run_main(main)
