"""Show what a checkpoint is: where it comes from, its model, settings, position and tensors, and whether it is whole.

    python -m scripts.inspect_checkpoint                           # the base checkpoint saved last
    python -m scripts.inspect_checkpoint -i sft -g d20 --keys=false
    python -m scripts.inspect_checkpoint -g d20 --all-steps        # one line per step

Nothing is built or changed. Ends with 2 and the reason where a file is not as it was written.
"""

from typing import Literal

from nanochat.configurator import Natural, configure

SHORT = {"i": "source", "g": "model_tag", "s": "step"}

# Checkpoint
source: Literal["base", "mid", "sft", "rl"] = "base"  # stage of the checkpoint
model_tag: str | None = None  # name of the checkpoint directory (None = the one saved last)
step: Natural | None = None  # checkpoint step (None = the last)
all_steps = False  # list all steps of the tag instead
# What to look at
verify = True  # compare the sha256 of every file; without it only their sizes are compared
keys = True  # list the tensors
values = False  # with the smallest, largest and root mean square value of each
settings = configure(__name__)

import json
import math
import time
from pathlib import Path
from typing import Any

from nanochat.checkpoint_manager import (
    Checkpoint,
    checkpoints_dir,
    find_checkpoint,
    find_tag,
    open_checkpoint,
    open_tensors,
    read_best,
    saved_at,
    saved_steps,
    step_dir,
)
from nanochat.common import UserError, get_base_dir, print0, run_main
from nanochat.report import read_record

SHOWN = ("format", "step", "model_config", "files", "provenance", "settings")  # in sections of their own


def written(path: Path) -> str:
    """When a checkpoint was saved, local time."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(saved_at(path)))


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


def damage_of(checkpoint: Checkpoint) -> dict[str, str]:
    """{file: message} of the files that are not as they were written."""
    found = {name: checkpoint.damage(name, verify) for name in checkpoint.meta["files"]}
    return {name: f"{checkpoint.path / name} is damaged ({why})" for name, why in found.items() if why}


def show(title: str, content: dict[str, Any]) -> None:
    """A section of `name = value` lines; long values are cut and say how long they are."""
    print0(f"\n{title}" + ("" if content else ": none"))
    for name, value in content.items():
        text = json.dumps(value)
        print0(f"  {name} = {text if len(text) <= 200 else f'{text[:180]}... ({len(text):,} characters)'}")


def describe(tensor: Any) -> str:
    """The values of a tensor in figures."""
    if tensor.numel() == 0:
        return "empty"
    broken, rms = tensor.numel() - int(tensor.isfinite().sum()), tensor.square().mean().sqrt()
    return f"min {tensor.min():.4g}  max {tensor.max():.4g}  rms {rms:.4g}" + (f"  {broken:,} NaN/inf" * bool(broken))


def show_tensors(path: Path) -> None:
    """How many there are, and a line for each: name, dtype, shape, and its values if asked."""
    with open_tensors(path) as file:
        tensors = {name: file.get_slice(name) for name in sorted(file.keys())}
        numbers = sum(math.prod(tensor.get_shape()) for tensor in tensors.values())
        print0(f"\n{path.name}: {len(tensors):,} tensors, {numbers:,} numbers")
        width = max(map(len, tensors), default=0)
        for name, tensor in tensors.items() if keys or values else ():
            what = f"  {describe(file.get_tensor(name).double())}" if values else ""
            shape = str(tuple(tensor.get_shape()))
            print0(f"  {name:{width}}  {tensor.get_dtype():5} {shape:16}{what}".rstrip())


def show_checkpoint(checkpoint: Checkpoint) -> None:
    """Everything about one step. Raises UserError, at the end, for a file that is not as it was written."""
    meta, when = checkpoint.meta, written(checkpoint.path)
    print0(f"{checkpoint.path}\n  stage {source}, tag {checkpoint.tag}, step {checkpoint.step:,}, written {when}")
    print0(f"  measured at this step: {find_evals(checkpoint.tag).get(checkpoint.step, 'no record says')}")
    show("made by", {"format": meta["format"], **meta["provenance"]})
    show("model", meta["model_config"])
    show("settings", meta.get("settings", {}))
    show("position, loop state and the rest", {k: v for k, v in meta.items() if k not in SHOWN})
    damage = damage_of(checkpoint)
    print0("\nfiles")
    for name, entry in meta["files"].items():
        state = "DAMAGED" if name in damage else "as written" if verify else "not compared"
        print0(f"  {name:20} {entry['bytes']:>15,} bytes  sha256 {entry['sha256']}  {state}")
    if damage:  # the tensors of a damaged file would not be those that were saved
        other = f"list the other steps with --model-tag={checkpoint.tag} --all-steps"
        raise UserError("; ".join([*damage.values(), other]))
    for name in meta["files"]:
        if name.endswith(".safetensors"):
            show_tensors(checkpoint.path / name)


def show_steps(tag: str) -> None:
    """One line per step. Raises UserError, at the end, where one is damaged."""
    directory = checkpoints_dir(source, tag)
    evals, (best, _), steps = find_evals(tag), read_best(directory), saved_steps(directory)
    print0(f"{directory}\n{'step':>10} {'bytes':>15}  written")
    damaged = []
    for number in steps:
        path = step_dir(directory, number)
        try:
            wrong = [*damage_of(open_checkpoint(path)).values()]
        except UserError as error:
            wrong = [str(error)]
        damaged += [number] if wrong else []
        remarks = wrong or ["whole" if verify else "sizes as written"]
        remarks += [*filter(None, [evals.get(number)]), *(["best"] if number == best else [])]
        size = sum(file.stat().st_size for file in path.iterdir())
        print0(f"{number:>10,} {size:>15,}  {written(path)}  {', '.join(remarks)}")
    if damaged:
        raise UserError(f"{len(damaged)} of {len(steps)} steps of {directory} are damaged: {damaged}")


def main() -> None:
    if all_steps:
        show_steps(find_tag(source, model_tag))
    else:
        show_checkpoint(find_checkpoint(source, model_tag, step))


if __name__ == "__main__":
    run_main(main)
