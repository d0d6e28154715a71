"""Base runs side by side: curves over each other, the settings that differ, the figures, and the compute multiplier.

The compute multiplier of a run is how many times more compute the baseline, the first run, needs for the same bits per
byte: the FLOPs at which the baseline's quick validations come down to the run's last one, divided by the FLOPs that the
run had spent there. Between two validations the baseline's bits per byte are taken as linear in the logarithm of FLOPs.
FLOPs are tokens x the model's FLOPs per token, seconds those of optimizer steps alone.

Not guaranteed: that the numbers may be compared. Runs on different text, or validated on another amount of it, are
named, and that is all. A validation in the middle of a run sees a learning rate that has not come down yet.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from nanochat import report_page as page
from nanochat.common import UserError
from nanochat.report_runs import (
    Events,
    chain,
    command,
    cost,
    duration,
    first_step,
    hardware,
    last,
    merged,
    number,
    outcome,
    points,
    read_run,
    read_runs,
    rounded,
)

INVERSE = {"": "", "less than ": "more than ", "more than ": "less than "}
WANTED = "tags of base runs, or record files, the baseline first"


@dataclass(frozen=True)
class Compared:
    """One of the runs that are compared."""

    name: str
    records: list[Events]  # more than one where it was resumed
    events: Events  # of all of them
    spent: dict[int, tuple[float, float, float]]  # after so many steps: tokens, FLOPs, seconds

    def curve(self, kind: str, key: str, axis: int) -> list[tuple[float, float]]:
        """(spent, value) of the events of a kind; axis 0 is tokens, 1 FLOPs, 2 seconds."""
        found = [(self.spent[int(at)][axis], value) for at, value in points(self.events, kind, key) if at in self.spent]
        return [point for point in found if point[0] > 0]


def compare(words: Sequence[str], records: Path, dollars: float | None = None) -> tuple[str, str, list[page.Section]]:
    """Title, subtitle and sections of the comparison. Raises UserError for words that name no runs."""
    if not 2 <= len(words) <= page.HUES:
        how = "python -m nanochat.report compare TAG TAG"
        raise UserError(f"{len(words)} given to compare: expected 2 to {page.HUES} {WANTED}: {how}")
    chains = [find(word, records) for word in words]
    tags = [found[-1][0]["tag"] for found in chains]
    runs = [
        measured(tag if tags.count(tag) == 1 else Path(word).name.removesuffix(".jsonl"), found)
        for word, tag, found in zip(words, tags, chains, strict=True)
    ]
    differing, same = settings_table(runs)
    sections: list[page.Section] = [
        ("", [summary(runs)]),
        ("Results", [results(runs, dollars), *notes(runs)]),
        ("Curves", [page.Curves(curves(runs))]),
        ("Settings that differ", [*differing, same]),
        ("Runs", [runs_table(runs)]),
    ]
    return "Comparison", f"{' · '.join(run.name for run in runs)}; the baseline is {runs[0].name}", sections


# -----------------------------------------------------------------------------
# Finding runs


def find(word: str, records: Path) -> list[Events]:
    """The chain of records that a tag or a record file names."""
    if not word.endswith(".jsonl"):
        runs = read_runs(records)
        found = chain(runs, "base", word)
        if not found:
            tags = ", ".join(dict.fromkeys(run[0]["tag"] for run in runs if run[0]["stage"] == "base")) or "none"
            raise UserError(f"no base run of tag {word} in {records}; there are: {tags}")
        return found
    path = next((path for path in (Path(word), records / word) if path.is_file()), None)
    if not path:
        raise UserError(f"no record {word}; expected {WANTED}: ls {records}")
    run = read_run(path)
    if not run or run[0]["stage"] != "base":
        stage = run[0]["stage"] if run else "nothing"
        raise UserError(f"{word} is a record of {stage}; expected one of base training: ls {records}/base-*.jsonl")
    earlier = [one for one in read_runs(path.parent) if one[0]["time"] < run[0]["time"]]
    return chain([*earlier, run], "base", run[0]["tag"])


def measured(name: str, records: list[Events]) -> Compared:
    """A run with what it had spent after each of its steps. Raises UserError where its beginning is missing."""
    events = merged(records)
    if first_step(records[0]):
        raise UserError(
            f"{name} begins at step {first_step(records[0]):,}: the records of its earlier steps are not beside it; "
            "`reset` moves records to records/before-<time>/: move them back"
        )
    flops = last(events, "plan", "flops_per_token", 0)
    spent, tokens, seconds = {}, 0, 0.0
    for event in events:
        if event["event"] == "step":
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
    ours, theirs = (one.curve("eval", "val_bpb_quick", axis) for one in (run, baseline))
    if not ours or not theirs:
        return "-"
    if run is baseline:
        return "1"
    if goal is run:
        bound, x = needed(theirs, ours[-1][1])
        return f"{bound}{x / ours[-1][0]:.3g}"
    bound, x = needed(ours, theirs[-1][1])
    return f"{INVERSE[bound]}{theirs[-1][0] / x:.3g}"


# -----------------------------------------------------------------------------
# Sections


def bpb(run: Compared) -> float | None:
    """Bits per byte at the end, every byte scored once; None for a run that has not reached it."""
    value: float | None = last(run.events, "eval", "val_bpb")
    return value


def summary(runs: Sequence[Compared]) -> page.Figures:
    """Final bits per byte of each run, or else the last quick ones, and its compute multiplier."""
    rows = []
    for run in runs:
        quick = last(run.events, "eval", "val_bpb_quick")
        value = number(bpb(run) if bpb(run) is not None else quick, ".4f")
        note = "bits per byte" if bpb(run) is not None else "bits per byte, quick; not finished"
        times = multiplier(runs[0], run, 1, run)
        told = "the baseline" if run is runs[0] else f"compute multiplier {times}"
        rows.append((run.name, value, f"{note}; {told}"))
    return page.Figures(rows)


def results(runs: Sequence[Compared], dollars: float | None) -> page.Table:
    """Figures of each run, a column for each."""

    def row(name: str, kind: str, key: str, form: str = ",", scale: float = 1) -> list[str]:
        values = [last(run.events, kind, key) for run in runs]
        return [name, *(number((value or None) and value * scale, form) for value in values)]

    ends = [(max(run.spent), run.spent[max(run.spent)]) for run in runs]
    spikes = [sum(bool(event.get("spike")) for event in run.events) for run in runs]
    rows = [
        ["bits per byte, final", *(number(bpb(run), ".4f") for run in runs)],
        row("bits per byte, last quick validation", "eval", "val_bpb_quick", ".4f"),
        ["compute multiplier *", *(multiplier(runs[0], run, 1, run) for run in runs)],
        ["compute multiplier at the baseline's bpb", *(multiplier(runs[0], run, 1, runs[0]) for run in runs)],
        ["training time multiplier *", *(multiplier(runs[0], run, 2, run) for run in runs)],
        ["training time multiplier at the baseline's bpb", *(multiplier(runs[0], run, 2, runs[0]) for run in runs)],
        row("loss at the end, smoothed", "step", "smooth_loss", ".4f"),
        row("parameters", "plan", "parameters"),
        ["steps", *(f"{steps:,}" for steps, _ in ends)],
        ["tokens", *(rounded(int(tokens)) for _, (tokens, _, _) in ends)],
        ["FLOPs", *(page.scientific(flops) for _, (_, flops, _) in ends)],
        ["training time", *(duration(seconds) for _, (_, _, seconds) in ends)],
        ["cost", *(cost(run.records, dollars)[0] for run in runs)],
        row("tokens per second", "end", "tokens_per_second"),
        row("share of the peak (MFU)", "end", "mfu", ".1%"),
        row("peak memory, GB", "end", "peak_memory_bytes", ",.2f", 1e-9),
        ["spikes", *(number(count or None) for count in spikes)],
    ]
    return page.Table(["", *(run.name for run in runs)], rows, "l" + "r" * len(runs))


def notes(runs: Sequence[Compared]) -> list[page.Block]:
    """What the multiplier means, and why bits per byte may not be comparable."""
    told: list[page.Block] = [
        f"* FLOPs (or seconds) that {runs[0].name} needs for the bits per byte of the other's last quick validation, "
        "divided by the other's there, interpolated between quick validations in log FLOPs; above 1 the other is "
        "better, “more than” where the baseline never got there. At the baseline's bpb: the same for its last one."
    ]
    missing = [run.name for run in runs if not run.curve("eval", "val_bpb_quick", 1)]
    if missing:
        told.append(f"Without a quick validation, and so without a multiplier: {', '.join(missing)} (--eval-every).")
    texts = {last(run.events, "corpus", "fingerprint") for run in runs}
    amounts = {run.records[-1][0]["settings"].get("eval_tokens") for run in runs}
    if len(texts) > 1 or len(amounts) > 1:
        what = "different corpora" if len(texts) > 1 else "different amounts of validation text (--eval-tokens)"
        told.append(f"These runs were validated on {what}: their bits per byte are not of the same text.")
    return told


def curves(runs: Sequence[Compared]) -> list[page.Curve]:
    """Loss by tokens; bits per byte by tokens, FLOPs and training time; those that have points."""
    longest = max(run.spent[max(run.spent)][2] for run in runs)
    unit, name = next(
        (size, name)
        for size, name in ((3600, "hours"), (60, "minutes"), (1, "seconds"))
        if longest >= 2 * size or size == 1
    )
    found = []
    for title, key, axis, x, scale in (
        ("Loss by tokens", "smooth_loss", 0, "tokens", 1),
        ("Validation by tokens", "val_bpb_quick", 0, "tokens", 1),
        ("Validation by compute", "val_bpb_quick", 1, "FLOPs", 1),
        ("Validation by training time", "val_bpb_quick", 2, name, unit),
    ):
        kind, label = ("step", "nats per token, smoothed") if key == "smooth_loss" else ("eval", "bits per byte, quick")
        series = []
        for hue, run in enumerate(runs):
            at = [(spent / scale, value) for spent, value in run.curve(kind, key, axis)]
            series += [page.Series(run.name, "line", at, hue)] if at else []
            series += [page.Series("", "dot", at, hue)] if at and kind == "eval" else []
        if series:
            found.append(page.Curve(title, label, series, x, log=x == "FLOPs"))
    return found


def settings_table(runs: Sequence[Compared]) -> tuple[list[page.Table], str]:
    """Settings (but for the tag), texts, commits, versions, machines that differ, by run; and how many do not."""
    every: list[dict[str, Any]] = []
    for run in runs:
        start = run.records[-1][0]
        about = {name: repr(value) for name, value in start["settings"].items() if name != "model_tag"}
        about |= {f"{name} (version)": version for name, version in start["versions"].items()}
        about |= {"commit": start["git"], "Python": start["python"], "hardware": hardware(start)}
        name, digest = (last(run.events, "corpus", key, "-") for key in ("name", "fingerprint"))
        every.append({**about, "corpus text": f"{name} {digest[:12]}", "batch": last(run.events, "plan", "batch", "-")})
    names = list(dict.fromkeys(name for about in every for name in about))
    rows = [[name, *(about.get(name, "-") for about in every)] for name in names]
    differing = [row for row in rows if len(set(row[1:])) > 1]
    same = f"{len(rows) - len(differing)} others are the same in all."
    table = page.Table(["", *(run.name for run in runs)], differing, "l" + "v" * len(runs))
    return [table] if differing else [], same


def runs_table(runs: Sequence[Compared]) -> page.Table:
    """The records of each run: commands, and how they began and ended."""
    rows = [[run.name, command(record), outcome(record)] for run in runs for record in run.records]
    return page.Table(["run", "command", ""], rows, "lcl")
