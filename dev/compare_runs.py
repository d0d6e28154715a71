"""Base runs side by side: curves over each other, the settings that differ, the figures, and the compute multiplier.

    python -m dev.compare_runs d12 d16                   # the baseline first; tags of base runs, or record files

Prints it and writes report/compare.md and report/compare.html. The compute multiplier of a run is how many times more
compute the baseline, the first run, needs for the same bits per byte: the FLOPs at which the baseline's quick
validations come down to the run's last one, linear in log FLOPs between two of them, divided by the FLOPs that the run
had spent there. FLOPs are tokens x the model's FLOPs per token, seconds those of optimizer steps alone.

Not guaranteed: that the numbers may be compared. Runs on different text, or validated on another amount of it, are
named, and that is all. A validation in the middle of a run sees a learning rate that has not come down yet.
"""

from nanochat.configurator import Rate, configure

SHORT = {"": "runs"}

# Runs
runs = ""  # what to compare: tags of base runs, or record files, the baseline first
# Cost
dollars_per_hour: Rate | None = None  # of one GPU, or of a machine without (None = the list price, where it is known)
settings = configure(__name__)

import math
import shlex
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from nanochat import report
from nanochat import report_page as page
from nanochat.common import UserError, get_base_dir, run_main
from nanochat.report import Event, Events, last, number
from nanochat.report_page import Curve, Series

BOUNDS = {"": "", "less than ": "more than ", "more than ": "less than "}  # of x; then of 1 / x
WANTED = "tags of base runs, or record files, the baseline first"


class Compared(NamedTuple):
    """A run with what it had spent after each of its steps."""

    name: str
    records: list[Events]  # more than one where it was resumed
    events: Events  # of all of them
    spent: dict[int, tuple[float, float, float]]  # after so many steps: tokens, FLOPs, seconds

    @property
    def ends(self) -> tuple[float, float, float]:
        return self.spent[max(self.spent)]

    def curve(self, kind: str, key: str, axis: int) -> list[tuple[float, float]]:
        """(spent, value) of the events of a kind; axis 0 is tokens, 1 FLOPs, 2 seconds."""
        at = [(step, value) for step, value in report.points(self.events, kind, key) if step in self.spent]
        return [(self.spent[int(step)][axis], value) for step, value in at if self.spent[int(step)][axis] > 0]

    def quick(self, axis: int) -> list[tuple[float, float]]:
        return self.curve("eval", "val_bpb_quick", axis)


def main() -> None:
    try:
        names = shlex.split(runs)
    except ValueError as error:
        raise UserError(f"--runs={runs}: {error}; expected names with spaces between, quoted as for a shell") from None
    report.write("compare", *compare(names, get_base_dir() / "records", dollars_per_hour))


def compare(names: Sequence[str], records: Path, dollars: float | None = None) -> tuple[str, list[Curve]]:
    """The comparison as Markdown, and its curves. Raises UserError for names of no runs."""
    if not 2 <= len(names) <= page.HUES:
        allowed = f"expected 2 to {page.HUES} {WANTED}"
        raise UserError(f"{len(names)} given to compare: {allowed}: python -m dev.compare_runs TAG TAG")
    chains = [find(name, records) for name in names]
    tags, found = [chain[-1][0]["tag"] for chain in chains], []
    for name, tag, chain in zip(names, tags, chains, strict=True):
        found.append(measured(tag if tags.count(tag) == 1 else Path(name).name.removesuffix(".jsonl"), chain))
    drawn = curves(found)
    sections = [
        ("", [summary(found)]),
        ("Results", [results(found, dollars), *map(page.marked, notes(found))]),
        ("Curves", [page.curves(drawn)]),
        ("Settings that differ", differences(found)),
        ("Runs", [runs_table(found)]),
    ]
    subtitle = f"runs {' · '.join(run.name for run in found)}; the baseline is {found[0].name}"
    return page.to_markdown("Comparison", subtitle, sections), drawn


# -----------------------------------------------------------------------------
# Finding runs


def find(name: str, records: Path) -> list[Events]:
    """The chain of records that a tag or a record file names."""
    if not name.endswith(".jsonl"):
        every = report.read_runs(records)
        if found := report.chain(every, "base", name):
            return found
        tags = ", ".join(dict.fromkeys(run[0]["tag"] for run in every if run[0]["stage"] == "base")) or "none"
        raise UserError(f"no base run of tag {name} in {records}; there are: {tags}")
    path = next((path for path in (Path(name), records / name) if path.is_file()), None)
    if not path:
        raise UserError(f"no record {name}; expected {WANTED}: ls {records}")
    run = report.read_run(path)
    if not run or run[0]["stage"] != "base":
        stage = run[0]["stage"] if run else "nothing"
        raise UserError(f"{name} is a record of {stage}; expected one of base training: ls {records}/base-*.jsonl")
    earlier = [one for one in report.read_runs(path.parent) if one[0]["time"] < run[0]["time"]]
    return report.chain([*earlier, run], "base", run[0]["tag"])


def measured(name: str, records: list[Events]) -> Compared:
    """Raises UserError where the beginning of the run is missing."""
    events = report.merged(records)
    if first := max(report.resumes(records[0]), default=0):
        missing = f"{name} begins at step {first:,}: the records of its earlier steps are not beside it"
        raise UserError(f"{missing}; `reset` moves records to records/before-<time>/: move them back")
    flops = last(events, "plan", "flops_per_token", 0)
    spent, tokens, seconds = {}, 0, 0.0
    for event in report.of_kind(events, "step"):
        tokens, seconds = tokens + event["tokens"], seconds + event["seconds"]
        spent[event["step"] + 1] = (float(tokens), float(tokens * flops), seconds)
    if not spent:
        raise UserError(f"{name} has no step in its record: train it first, such as: python -m scripts.base_train")
    return Compared(name, records, events, spent)


# -----------------------------------------------------------------------------
# The multiplier


def needed(curve: Sequence[tuple[float, float]], value: float) -> tuple[str, float]:
    """("", x) where a falling curve of (x, y) first comes down to a value, linear in log x between points; ("less than
    ", x of its first point) where it is below from the start; ("more than ", x of its last) where it never gets there.
    """
    if curve[0][1] < value:
        return "less than ", curve[0][0]
    for (x0, y0), (x1, y1) in pairwise([curve[0], *curve]):
        if y1 <= value:
            return "", x1 if y0 == y1 else x0 * math.exp((y0 - value) / (y0 - y1) * math.log(x1 / x0))
    return "more than ", curve[-1][0]


def multiplier(baseline: Compared, run: Compared, axis: int, goal: Compared) -> str:
    """How many times what the run needs for the bpb of the goal's last quick validation the baseline needs for it; the
    goal is one of the two.
    """
    ours, theirs = run.quick(axis), baseline.quick(axis)
    if not ours or not theirs:
        return "-"
    if run is baseline:
        return "1"
    if goal is run:
        bound, x = needed(theirs, ours[-1][1])
        return f"{bound}{x / ours[-1][0]:.3g}"
    bound, x = needed(ours, theirs[-1][1])
    return f"{BOUNDS[bound]}{theirs[-1][0] / x:.3g}"


# -----------------------------------------------------------------------------
# Sections


def summary(runs: Sequence[Compared]) -> str:
    """Final bits per byte of each run, or else the last quick ones, and its compute multiplier."""
    rows = []
    for run in runs:
        final, quick = (last(run.events, "eval", key) for key in ("val_bpb", "val_bpb_quick"))
        note = "bits per byte" if final is not None else "bits per byte, quick; not finished"
        told = "the baseline" if run is runs[0] else f"compute multiplier {multiplier(runs[0], run, 1, run)}"
        rows.append((run.name, number(quick if final is None else final, ".4f"), f"{note}; {told}"))
    return page.facts(rows)


def results(runs: Sequence[Compared], dollars: float | None) -> str:
    """Figures of each run, a column for each."""
    events, baseline = [run.events for run in runs], runs[0]
    rows = [
        report.row(events, "bits per byte, final", "eval", "val_bpb", ".4f"),
        report.row(events, "bits per byte, last quick validation", "eval", "val_bpb_quick", ".4f"),
    ]
    for axis, name in ((1, "compute multiplier"), (2, "training time multiplier")):
        rows.append([f"{name} *", *(multiplier(baseline, run, axis, run) for run in runs)])
        rows.append([f"{name} at the baseline's bpb", *(multiplier(baseline, run, axis, baseline) for run in runs)])
    rows += [
        report.row(events, "loss at the end, smoothed", "step", "smooth_loss", ".4f"),
        report.row(events, "parameters", "plan", "parameters"),
        ["steps", *(f"{max(run.spent):,}" for run in runs)],
        ["tokens", *(page.rounded(run.ends[0]) for run in runs)],
        ["FLOPs", *(page.rounded(run.ends[1]) for run in runs)],
        ["training time", *(report.duration(run.ends[2]) for run in runs)],
        ["cost", *(report.cost(run.records, dollars)[0] for run in runs)],
        report.row(events, "tokens per second", "end", "tokens_per_second"),
        report.row(events, "share of the peak (MFU)", "end", "mfu", ".1%"),
        report.row(events, "peak memory, GB", "end", "peak_memory_bytes", ",.2f", 1e-9),
        ["spikes", *map(report.spikes, events)],
    ]
    return page.table(["", *(run.name for run in runs)], rows, "l" + "r" * len(runs))


def notes(runs: Sequence[Compared]) -> list[str]:
    """What the multiplier means, and why bits per byte may not be comparable."""
    told = [
        f"* FLOPs (or seconds) that {runs[0].name} needs for the bits per byte of the other's last quick validation, "
        "divided by the other's there, interpolated between quick validations in log FLOPs; above 1 the other is "
        "better, “more than” where the baseline never got there. At the baseline's bpb: the same for its last one."
    ]
    missing = [run.name for run in runs if not run.quick(1)]
    if missing:
        told.append(f"Without a quick validation, and so without a multiplier: {', '.join(missing)} (--eval-every).")
    texts = {last(run.events, "corpus", "fingerprint") for run in runs}
    amounts = {run.records[-1][0]["settings"].get("eval_tokens") for run in runs}
    if len(texts) > 1 or len(amounts) > 1:
        what = "different corpora" if len(texts) > 1 else "different amounts of validation text (--eval-tokens)"
        told.append(f"These runs were validated on {what}: their bits per byte are not of the same text.")
    return told


def curves(runs: Sequence[Compared]) -> list[Curve]:
    """Loss by tokens; bits per byte by tokens, FLOPs and training time; those that have points."""
    longest = max(run.ends[2] for run in runs)
    units = ((3600, "hours"), (60, "minutes"), (1, "seconds"))
    scale, unit = next((scale, unit) for scale, unit in units if longest >= 2 * scale or scale == 1)
    drawn = []
    for title, axis, x in (
        ("Loss by tokens", 0, "tokens"),
        ("Validation by tokens", 0, "tokens"),
        ("Validation by compute", 1, "log₁₀ of FLOPs"),
        ("Validation by training time", 2, unit),
    ):
        is_loss, series = title == "Loss by tokens", []
        for hue, run in enumerate(runs):
            at = run.curve("step", "smooth_loss", axis) if is_loss else run.quick(axis)
            if axis:
                at = [(math.log10(spent) if axis == 1 else spent / scale, value) for spent, value in at]
            series += [Series(run.name, "line", at, hue)]
            series += [] if is_loss else [Series("", "dot", at, hue)]
        label = "nats per token, smoothed" if is_loss else "bits per byte, quick"
        drawn.append(Curve(title, label, [one for one in series if one.points], x))
    return [curve for curve in drawn if curve.series]


def differences(runs: Sequence[Compared]) -> list[str]:
    """Settings (but for the tag), texts, commits, versions, machines that differ, by run; and how many do not."""
    every: list[Event] = []
    for run in runs:
        start = run.records[-1][0]
        about = {name: repr(value) for name, value in start["settings"].items() if name != "model_tag"}
        about |= {f"{name} (version)": version for name, version in start["versions"].items()}
        about |= {"commit": start["git"], "Python": start["python"], "hardware": report.hardware(start)}
        name, digest = (last(run.events, "corpus", key, "-") for key in ("name", "fingerprint"))
        every.append({**about, "corpus text": f"{name} {digest[:12]}", "batch": last(run.events, "plan", "batch", "-")})
    names = list(dict.fromkeys(name for about in every for name in about))
    rows = [[name, *(about.get(name, "-") for about in every)] for name in names]
    differing = [row for row in rows if len(set(row[1:])) > 1]
    table = page.table(["", *(run.name for run in runs)], differing, "l" + "c" * len(runs))
    return [table if differing else "", f"{len(rows) - len(differing)} others are the same in all."]


def runs_table(runs: Sequence[Compared]) -> str:
    """The records of each run: commands, and how they began and ended."""
    rows = [[run.name, report.command(record), report.outcome(record)] for run in runs for record in run.records]
    return page.table(["run", "command", ""], rows, "lcl")


if __name__ == "__main__":
    run_main(main)
