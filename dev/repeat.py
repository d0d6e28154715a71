"""The same base run with several seeds: mean and standard error, against which a difference between runs can be held.

    python -m dev.repeat --seeds=5 dev/configs/laptop.py --minutes=1

Takes the settings of base_train, which it runs once for each of the seeds --seed, --seed + 1, ..., one after the other,
under the tags <tag>-s42, <tag>-s43, ... Called again it goes on: finished seeds are read from their records, a stopped
one is resumed. The table says mean and standard error of the mean; the last line is one JSON object.
"""

from nanochat.configurator import Positive, Several, configure, read_block

ALSO = "scripts/base_train.py"

# Repeats
seeds: Several = 3  # runs, each with its own weights and order of rows
gpus: Positive = 1  # of each run; several are started by torchrun
settings = configure(__name__)

import json
import math
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from nanochat.common import STAGES, UserError, get_base_dir, run_main
from nanochat.report import Events, last, newest, read_run

ROOT = Path(__file__).parents[1]
FIGURES = {"val_bpb": "eval", "val_nats": "eval", "perplexity": "eval", "accuracy": "eval", "gap": "eval"}
FIGURES |= {"smooth_loss": "step", "tokens_per_second": "end", "train_seconds": "end"}  # name: event of a record
MAY_DIFFER = {"run", "resume", "resume_from_step", "fresh"}  # between a finished run and the one asked for


def main() -> None:
    tag, first = settings["model_tag"] or f"d{settings['depth']}", settings["seed"]
    found: dict[str, list[float]] = {name: [] for name in FIGURES}
    for seed in range(first, first + seeds):
        events = finished_run({**settings, "seed": seed, "model_tag": f"{tag}-s{seed}"})
        for name, kind in FIGURES.items():
            found[name] += [value for value in [last(events, kind, name)] if value is not None]
    print(f"{seeds} seeds of {tag}:")
    result: dict[str, Any] = {"tag": tag, "seeds": seeds}
    for name, values in found.items():
        if len(values) == seeds:
            mean, error = statistics.fmean(values), statistics.stdev(values) / math.sqrt(seeds)
            print(f"{name:>18} {mean:12.5g} ± {error:<10.2g} {'  '.join(f'{value:.5g}' for value in values)}")
            result |= {name: float(f"{mean:.6g}"), f"{name}_stderr": float(f"{error:.3g}")}
    print(json.dumps(result))


def finished_run(wanted: dict[str, Any]) -> Events:
    """The events of a run with these settings, which is made or continued unless its record has an end. Raises
    UserError where that one had other settings, and where the run fails.
    """
    tag, stage = wanted["model_tag"], STAGES["base"]
    if not last(find(tag), "end", "time"):
        begun = any((get_base_dir() / stage.folder / tag).glob("step_*")) and not wanted["fresh"]
        code = subprocess.run(base_command({**wanted, "resume": begun}, gpus), cwd=ROOT).returncode
        if code:
            raise UserError(f"{tag} ended with exit code {code}; the same command goes on from there")
    events = find(tag)
    for name, value in last(events, "start", "settings", {}).items():
        if name in wanted.keys() - MAY_DIFFER and value != wanted[name]:
            ways = f"choose another --model-tag, or delete its records: rm {get_base_dir()}/records/base-{tag}-2*"
            raise UserError(f"{tag} has ended with --{name.replace('_', '-')}={value}, not {wanted[name]}; {ways}")
    return events


def find(tag: str) -> Events:
    """The newest base run of a tag, from its records; empty where there is none."""
    runs = filter(None, map(read_run, (get_base_dir() / "records").glob(f"base-{tag}-*.jsonl")))
    return newest(sorted((run for run in runs if run[0]["tag"] == tag), key=lambda run: run[0]["time"]), "base", tag)


def base_command(wanted: dict[str, Any], ranks: int) -> list[str]:
    """The words that run base_train with those of the settings that are its own and not its defaults."""
    known = read_block(ROOT / "scripts" / "base_train.py").settings
    changed = {name: value for name, value in wanted.items() if name in known and value != known[name].default}
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in changed.items()]
    return [sys.executable, *launcher, "-m", "scripts.base_train", *flags]


if __name__ == "__main__":
    run_main(main)
