"""A learning rate range test: how large may the rates of a base run be?

    python -m dev.lr_range dev/configs/laptop.py

Takes the settings of base_train and runs it for a hundred steps, in which the rates rise exponentially from e^-2.5
times those given to e^2.5 times (Smith, arXiv 1506.01186, section 3.3; nanuGPT's figures). At first the loss falls, at
some rate it stops falling, and above that it rises. Suggested is half of that rate, where the mean of nine neighbouring
losses is lowest: between what was best in whole runs with Muon (all of it) and with AdamW (a third), measured in
docs/how-to/experiments.md.

Writes report/lr-range-<tag>.csv and .svg; no checkpoint, and no record that a report would count. The last line is one
JSON object.
"""

from nanochat.configurator import Positive, Several, configure

ALSO = "scripts/base_train.py"

# Range test
steps: Several = 100  # of the test
gpus: Positive = 1  # of the run; several are started by torchrun
settings = configure(__name__)

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from dev.plot import svg_file
from dev.repeat import ROOT, base_command
from nanochat.common import UserError, get_base_dir, run_main
from nanochat.files import write_atomic
from nanochat.report import points, read_run
from nanochat.report_page import Curve, Series

REACH, DIVISOR = 4, 2.0  # neighbours on each side of a mean; what the rate of the lowest one is divided by
HORIZONS = dict.fromkeys(["minutes", "target_flops", "target_param_data_ratio"])
QUIET = {"eval_every": -1, "sample_every": -1, "core_metric_every": -1, "save_every": -1, "eval_tokens": 1}


def main() -> None:
    tag = settings["model_tag"] or f"d{settings['depth']}"
    losses = test_rates(tag)
    multipliers = [math.exp(5 * i / (steps - 1) - 2.5) for i in range(len(losses))]
    means = smoothed(losses)
    suggested, at = suggest(multipliers, means)
    path = get_base_dir() / "report" / f"lr-range-{tag}"
    rows = [f"{m:.6g},{loss:.6g},{mean:.6g}" for m, loss, mean in zip(multipliers, losses, means, strict=True)]
    write_atomic(path.with_suffix(".csv"), "\n".join(["multiplier,loss,smoothed", *rows]) + "\n")
    write_atomic(path.with_suffix(".svg"), svg_file(draw(tag, multipliers, losses, means, suggested)))
    print(f"written to {path}.csv and {path}.svg")
    still = at >= len(losses) - 1 - 2 * REACH
    where = "one of the last: it was still falling, try again with higher rates" if still else f"step {at}"
    print(f"the loss, mean of {2 * REACH + 1}, is lowest at {multipliers[at]:.3g} times the rates given ({where})")
    names = ["lr"] if settings["optimizer"] == "adamw" else ["matrix_lr", "embedding_lr", "unembedding_lr"]
    flags = [f"--{name.replace('_', '-')}={settings[name] * suggested:.3g}" for name in names]
    print(f"suggested, half of that: {' '.join(flags)}")
    print(json.dumps({"steps": len(losses), "lowest_at": multipliers[at], "suggested": suggested}))


def test_rates(tag: str) -> list[float]:
    """The losses of the run, up to where it ends, be that because they are not finite any more. It happens in a base
    directory of its own that has all of ours but records and checkpoints. Raises UserError where it fails otherwise.
    """
    test = {"schedule": "range", "num_iterations": steps, "dry_run": True, "model_tag": tag, **HORIZONS, **QUIET}
    with tempfile.TemporaryDirectory() as folder:
        for path in get_base_dir().iterdir():
            if path.name != "records" and not path.name.endswith("_checkpoints"):
                (Path(folder) / path.name).symlink_to(path)
        environment = os.environ | {"NANOCHAT_BASE_DIR": folder}
        command = base_command({**settings, **test}, gpus)
        run = subprocess.run(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
        sys.stderr.write(run.stderr.replace(folder, str(get_base_dir())))  # a folder that the user knows
        records = list((Path(folder) / "records").glob("base-*.jsonl"))
        losses = [loss for _, loss in points(read_run(records[0]), "step", "loss")] if records else []
    if run.returncode == 2:
        sys.exit(2)  # the run has said why
    if run.returncode not in (0, 3) or len(losses) < 2:
        ended = f"the run ended with exit code {run.returncode} after {len(losses)} steps"
        raise UserError(f"{ended}, before there was much to see")
    return losses


def smoothed(losses: Sequence[float]) -> list[float]:
    """The mean of each and its neighbours, as many on either side."""
    reaches = [min(i, len(losses) - 1 - i, REACH) for i in range(len(losses))]
    return [statistics.fmean(losses[i - reach : i + reach + 1]) for i, reach in enumerate(reaches)]


def suggest(multipliers: Sequence[float], means: Sequence[float]) -> tuple[float, int]:
    """The multiplier to take, and the step with the lowest mean, which is what it comes from."""
    whole = range(REACH, len(means) - REACH) or range(len(means))  # at the ends a mean is that of few, or of one
    at = min(whole, key=means.__getitem__)
    return multipliers[at] / DIVISOR, at


def draw(tag: str, multipliers: Sequence[float], losses: Sequence[float], means: Sequence[float], best: float) -> Curve:
    """The loss over the logarithm of the multiplier."""
    x = [math.log(multiplier) for multiplier in multipliers]
    series = [
        Series("each step", "faint", [*zip(x, losses, strict=True)]),
        Series("mean of nine", "line", [*zip(x, means, strict=True)]),
        Series(f"suggested: {best:.3g} times the rates given", "flag", [(math.log(best), means[0])]),
    ]
    return Curve(f"Range test of {tag}: loss", "nats per token", series, "ln(multiplier)")


if __name__ == "__main__":
    run_main(main)
