"""
The report card of everything that ran under this base directory, from its records alone.

    python -m nanochat.report generate      # print it; write $NANOCHAT_BASE_DIR/report/report.md and report.html
    python -m nanochat.report reset         # begin a new one: earlier records move to records/before-<time>/

The newest run of each stage counts; a run that was stopped and resumed is one run. What has not run shows as "-".
Stages it does not know appear among runs and settings only. How it all looks is the business of report_page.py.
"""

from typing import Literal

from nanochat.configurator import configure

SHORT = {"": "action"}

# Action
action: Literal["generate", "reset"] = "generate"  # generate: print and write the report; reset: put the records aside
settings = configure(__name__)

import math
import shlex
import textwrap
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from nanochat import report_page as page
from nanochat.common import UserError, get_base_dir, read_record, run_main, write_atomic

Event = dict[str, Any]
Events = list[Event]
Grades = dict[str, dict[str, Event]]  # task, then source
STAGES = {"base": "base", "mid": "mid", "sft": "SFT", "rl": "RL"}  # the columns, and what they are called
GRADED = 2  # answers shown of each task
STALE = "†"


def main() -> None:
    records = get_base_dir() / "records"
    if action == "reset":
        paths = sorted(records.glob("*.jsonl"))
        aside = records / f"before-{time.strftime('%Y%m%d-%H%M%S')}"
        for path in paths:
            aside.mkdir(exist_ok=True)
            path.rename(aside / path.name)
        print(f"{len(paths)} records are now in {aside}" if paths else f"no records in {records}: nothing to put aside")
        return
    report = build(read_runs(records))
    text = page.to_markdown(*report)
    folder = get_base_dir() / "report"
    write_atomic(folder / "report.md", text)
    write_atomic(folder / "report.html", page.to_html(*report))
    print(text)
    print(f"written to {folder / 'report.md'} and {folder / 'report.html'}")


def build(runs: Sequence[Events]) -> tuple[str, str, list[page.Section]]:
    """Title, subtitle and sections of the report on runs, which are in the order of their starts."""
    found = {stage: newest(runs, stage) for stage in STAGES}
    graded = grades(runs)
    tags = ", ".join(dict.fromkeys(events[0]["tag"] for events in found.values() if events))
    day = time.strftime("%Y-%m-%d", time.localtime(runs[-1][0]["time"]))
    sections: list[page.Section] = [
        ("", [summary(runs, found, graded)]),
        ("Results", results(runs, found, graded)),
        ("Learning", curves(found)),
        ("Samples", samples(found, graded)),
        ("Training", training(found)),
        ("Text and tokenizer", [text_facts(runs, found["base"])]),
        ("Runs", [runs_table(runs)]),
        ("Machine", [machine(runs)]),
        ("Settings", all_settings(runs)),
    ]
    return "Report", f"model {tags or '-'} · {day} · commit {runs[-1][0].get('git', '-')}", sections


# -----------------------------------------------------------------------------
# Records


def read_runs(records: Path) -> list[Events]:
    """All runs, in the order of their starts. Raises UserError where there are none, and for a damaged record."""
    runs = []
    for path in sorted(records.glob("*.jsonl")):
        try:
            events = read_record(path)
            if any(not isinstance(event, dict) or not {"event", "time"} <= event.keys() for event in events):
                raise ValueError("an event without a name or a time")
            if events and not {"stage", "tag", "settings", "argv"} <= events[0].keys():
                raise ValueError("it does not begin with a start event")
        except ValueError as error:
            reason = str(error).removeprefix(f"{path}:")
            raise UserError(f"damaged record {path}: {reason}; to do without it: mv {path} {path}.bad") from None
        if events:
            runs.append(events)
        else:
            print(f"{path} is empty: left out")
    if not runs:
        raise UserError(f"no records in {records}; run a stage first, such as: bash dev/runcpu.sh")
    return sorted(runs, key=lambda run: run[0]["time"])


def newest(runs: Iterable[Events], stage: str, tag: str | None = None) -> Events:
    """The events of a stage's newest run (of a tag, if one is given), after those of the runs that it resumed."""
    of_stage = [run for run in runs if run[0]["stage"] == stage and tag in (None, run[0]["tag"])]
    if not of_stage:
        return []
    events = of_stage[-1]
    for earlier in reversed([run for run in of_stage[:-1] if run[0]["tag"] == events[0]["tag"]]):
        first_step = next((event["first_step"] for event in events if event["event"] == "plan"), 0)
        if first_step == 0:
            break
        # Step events are numbered from 0; evaluations and samples say how many steps were done before them.
        kept = [event for event in earlier if event.get("step", 0) < first_step + (event["event"] != "step")]
        events = [event for event in kept if event["event"] not in ("end", "stopped")] + events
    return events


def grades(runs: Iterable[Events]) -> Grades:
    """
    {task or "ChatCORE": {stage: event}}, each event with the tag of its run and its samples. The newest one counts; of
    a stage's models only the one that was evaluated last.
    """
    evals = [run for run in runs if run[0]["stage"] == "chat_eval"]
    tags = {event["source"]: run[0]["tag"] for run in evals for event in run if "source" in event}
    found: Grades = {}
    for run in evals:
        for event in run:
            if event["event"] in ("task", "chatcore") and run[0]["tag"] == tags[event["source"]]:
                key = (event["source"], event.get("task", "ChatCORE"))
                shown = [e for e in run if e["event"] == "sample" and (e["source"], e["task"]) == key]
                found.setdefault(key[1], {})[key[0]] = {**event, "tag": run[0]["tag"], "samples": shown}
    return {name: {stage: events[stage] for stage in STAGES if stage in events} for name, events in found.items()}


def last(events: Events, kind: str, key: str, default: Any = None) -> Any:
    """The newest value of a key in events of a kind."""
    return next((event[key] for event in reversed(events) if event["event"] == kind and key in event), default)


def val_bpb(runs: Sequence[Events], base: Events) -> float | None:
    """Bits per byte of validation text: from base_loss if that ran after training began, or else from the training."""
    loss = newest(runs, "base_loss")
    scored = [event["bpb"] for event in loss if event["event"] == "bpb" and event["split"] == "val"]
    is_newer = bool(scored) and loss[0]["time"] >= last(base, "start", "time", 0)
    value: float | None = scored[-1] if is_newer else last(base, "eval", "val_bpb")
    return value


def seconds_of(run: Events) -> float:
    """How long a run took: as it says itself, or from its first event to its last."""
    return float(run[-1].get("seconds_in_all", run[-1]["time"] - run[0]["time"]))


# -----------------------------------------------------------------------------
# Words


def number(value: Any, form: str = ",") -> str:
    """A figure, or "-" where there is none."""
    return "-" if value is None else format(value, form)


def duration(seconds: float | None) -> str:
    """Seconds as a person would say them: 8.2 s, 5 min 12 s, 3 h 51 min."""
    if seconds is None:
        return "-"
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{whole} s"
    return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60} min"


def rounded(count: int | None) -> str:
    """A large count as a person would say it: 3.34 M, 561 M, 1.88 B."""
    if count is None or count < 1e6:
        return number(count)
    return f"{count / 1e6:.3g} M" if count < 1e9 else f"{count / 1e9:.3g} B"


def score(event: Event) -> str:
    """ChatCORE, or an accuracy in percent with its standard error."""
    if "value" in event:
        return f"{event['value']:.4f}"
    return f"{100 * event['accuracy']:.1f} ± {100 * event['stderr']:.1f}"


# -----------------------------------------------------------------------------
# Sections


def summary(runs: Sequence[Events], found: dict[str, Events], graded: Grades) -> page.Figures:
    """What a reader looks for first: val bpb, ChatCORE, the task that RL trains (or else the first), time and size."""
    rows = [("val bpb", number(val_bpb(runs, found["base"]), ".4f"), "bits per byte, base")]
    goal, tasks = last(found["rl"], "plan", "task"), [name for name in graded if name != "ChatCORE"]
    for name in ["ChatCORE", goal if goal in graded else (tasks or [""])[0]]:
        told = [
            (STAGES[stage], f"{event['value']:.3f}" if "value" in event else f"{event['accuracy']:.1%}")
            for stage, event in graded.get(name, {}).items()
        ]
        if told:
            before = ", ".join(f"{value} after {stage}" for stage, value in told[:-1])
            rows.append((f"{name} after {told[-1][0]}", told[-1][1], before))
    parameters = [last(events, "plan", "parameters") for events in found.values()]
    rows.append(("total time", duration(sum(map(seconds_of, runs))), f"{len(runs)} run{'s' if runs[1:] else ''}"))
    rows.append(("parameters", rounded(next(filter(None, parameters), None)), ""))
    return page.Figures(rows)


def results(runs: Sequence[Events], found: dict[str, Events], graded: Grades) -> list[page.Block]:
    """All scores by stage, and what they must be held against."""

    def cells(values: dict[str, str]) -> list[str]:
        return [values.get(stage, "-") for stage in STAGES]

    def old(stage: str, event: Event) -> str:
        return f" {STALE}" if event["time"] < last(found[stage], "start", "time", 0) else ""

    bpb, losses = val_bpb(runs, found["base"]), {stage: last(found[stage], "eval", "val_loss") for stage in STAGES}
    rows = [
        ["bits per byte, validation", *cells({"base": number(bpb, ".4f")}), "-", "-"],
        [
            "nats per token trained on, held-out chats",
            *cells({k: number(v, ".4f") for k, v in losses.items()}),
            "-",
            "-",
        ],
    ]
    for name, events in sorted(graded.items(), key=lambda item: item[0] == "ChatCORE"):
        told = {stage: score(event) + old(stage, event) for stage, event in events.items()}
        counts = [f"{event['n']:,}" if "n" in event else f"{len(event['tasks'])} tasks" for event in events.values()]
        chance = next((e["baseline"] for e in events.values() if e.get("baseline") is not None), None)
        label = name if name == "ChatCORE" else f"{name}, %"
        n = counts[0] if len(set(counts)) == 1 else " / ".join(counts)
        rows.append([label, *cells(told), number(chance and 100 * chance, ".1f"), n])
    task, problems = last(found["rl"], "plan", "task", "RL"), number(last(found["rl"], "eval", "problems"))
    for k, share in sorted(last(found["rl"], "eval", "pass_at", {}).items(), key=lambda item: int(item[0])):
        rows.append([f"{task} pass@{k}, %", *cells({"rl": f"{100 * share:.1f}"}), "-", problems])
    head = ["", *STAGES.values(), "chance", "n"]
    return [page.Table(head, rows, "lrrrrrr"), *result_notes(runs, graded, rows)]


def result_notes(runs: Sequence[Events], graded: Grades, rows: list[list[str]]) -> list[page.Block]:
    """What to know beside the table: opponents, scores older than the model, models left out."""
    notes = []
    loss = newest(runs, "base_loss")
    opponents = {"byte frequencies": last(loss, "baselines", "byte_unigram"), "xz -9": last(loss, "baselines", "xz")}
    told = [f"{name} {value:.4f}" for name, value in opponents.items() if value is not None]
    if told:
        notes.append(f"To beat, in bits per byte of the same text: {', '.join(told)}.")
    if any(STALE in cell for row in rows for cell in row):
        notes.append(f"{STALE} measured before the newest training of that stage began.")
    cut = {
        f"{name} after {STAGES[k]} {e['too_long']:,}"
        for name in graded
        for k, e in graded[name].items()
        if e.get("too_long")
    }
    if cut:
        notes.append(f"Prompts longer than the context, counted as wrong: {', '.join(sorted(cut))}.")
    used = {event["tag"] for events in graded.values() for event in events.values()}
    others = sorted({run[0]["tag"] for run in runs if run[0]["stage"] == "chat_eval"} - used)
    if others:
        notes.append(f"Evaluated earlier and not shown: {', '.join(others)}.")
    return list(notes)


def points(events: Events, kind: str, key: str) -> list[tuple[float, float]]:
    """(steps done, value) of the events of a kind that hold a finite number under this key."""
    having = [event for event in events if event["event"] == kind and isinstance(event.get(key), int | float)]
    return [(e["step"] + (kind == "step"), e[key]) for e in having if math.isfinite(e[key])]


def smoothed(values: Sequence[tuple[float, float]], beta: float = 0.9) -> list[tuple[float, float]]:
    """Exponential mean of the values, its start-up bias removed: as training smooths its losses."""
    mean, result = 0.0, []
    for count, (x, y) in enumerate(values, 1):
        mean = beta * mean + (1 - beta) * y
        result.append((x, mean / (1 - beta**count)))
    return result


def loss_series(events: Events) -> list[page.Series]:
    """Loss of every step, and validation where it is in the same unit."""
    return [
        page.Series("smoothed", "line", points(events, "step", "smooth_loss")),
        page.Series("each step", "faint", points(events, "step", "loss")),
        page.Series("validation", "mark", points(events, "eval", "val_loss")),
    ]


def bpb_series(base: Events) -> list[page.Series]:
    """Validations of the base model, the last of which scores every byte with half a context before it."""
    quick = points(base, "eval", "val_bpb_quick")
    whole = page.Series("final, long context", "ring", points(base, "eval", "val_bpb"))
    return [page.Series("", "line", quick), page.Series("quick", "mark", quick), whole]


def reward_series(rl: Events) -> list[page.Series]:
    """Reward of every step; evaluations at the smallest and at the largest k."""
    reward = points(rl, "step", "reward")
    series = [page.Series("smoothed", "line", smoothed(reward)), page.Series("each step", "faint", reward)]
    evals = [event for event in rl if event["event"] == "eval" and "pass_at" in event]
    ks = sorted({k for event in evals for k in event["pass_at"]}, key=int)
    for k in dict.fromkeys([*ks[:1], *ks[-1:]]):
        at = [(event["step"], event["pass_at"][k]) for event in evals if k in event["pass_at"]]
        series.append(page.Series(f"pass@{k}", "mark" if k == ks[0] else "ring", at))
    return series


def curves(found: dict[str, Events]) -> list[page.Block]:
    """Loss of base, mid and SFT, bits per byte of base, reward of RL: those that have points."""
    all_curves = [
        page.Curve("Base: loss", "nats per token", loss_series(found["base"])),
        page.Curve("Base: validation", "bits per byte", bpb_series(found["base"])),
        page.Curve("Mid: loss", "nats per token trained on", loss_series(found["mid"])),
        page.Curve("SFT: loss", "nats per token trained on", loss_series(found["sft"])),
        page.Curve("RL: reward", "mean reward, share solved", reward_series(found["rl"])),
    ]
    drawn = [curve for curve in all_curves if curve.series[0].points]  # a series without points is not drawn
    return [page.Curves(drawn)] if drawn else []


def samples(found: dict[str, Events], graded: Grades) -> list[page.Block]:
    """What each stage wrote at its last sampling, and a few graded answers of the last stage that has some."""
    blocks: list[page.Block] = []
    for stage, name in STAGES.items():
        written = [event for event in found[stage] if event["event"] == "sample"]
        final = [event for event in written if event["step"] == written[-1]["step"]]
        items = [page.Sample(event["prompt"], event["text"], stage != "base") for event in final]
        if items:
            blocks.append(page.Samples(f"After {name}, {final[0]['step']:,} steps", items))
    items = []
    for task, events in graded.items():
        source = [stage for stage in STAGES if events.get(stage, {}).get("samples")][-1:]
        for event in [event for stage in source for event in events[stage]["samples"][:GRADED]]:
            verdict = f"{task} after {STAGES[event['source']]}: {'right' if event['correct'] else 'wrong'}"
            items.append(page.Sample(event["prompt"], event["answer"], verdict=verdict))
    return [*blocks, page.Samples("Graded answers", items)] if items else blocks


def training(found: dict[str, Events]) -> list[page.Block]:
    """Size, speed, memory and time of each stage; plans, batches and text in words."""
    if not any(found.values()):
        return []

    def row(name: str, kind: str, key: str, form: str = ",", scale: float = 1) -> list[str]:
        values = [last(events, kind, key) for events in found.values()]
        return [name, *(number((value or None) and value * scale, form) for value in values)]

    tokens = [sum(event.get("tokens", 0) for event in events if event["event"] == "step") for events in found.values()]
    rows = [
        row("parameters", "plan", "parameters"),
        row("steps", "plan", "num_steps"),
        ["tokens", *(number(count or None) for count in tokens)],
        row("tokens per second", "end", "tokens_per_second"),
        row("GFLOP/s", "end", "flops_per_second", ",.0f", 1e-9),
        row("share of the peak (MFU)", "end", "mfu", ".1%"),
        row("peak memory, GB", "end", "peak_memory_bytes", ",.2f", 1e-9),
        ["training time", *(duration(last(events, "end", "train_seconds")) for events in found.values())],
        [*row("loss at the end, smoothed", "step", "smooth_loss", ".4f")[:4], "-"],  # RL's is no likelihood
    ]
    facts = []
    for stage, name in STAGES.items():
        data = {event["name"]: event["conversations"] for event in found[stage] if event["event"] == "data"}
        told = [last(found[stage], "plan", key) for key in ("formula", "batch", "task")]
        told += [f"{source} {count:,} conversations" for source, count in data.items()]
        told = [text for text in (*told, last(found[stage], "end", "text")) if text]
        if told:
            facts.append((name, "; ".join(told)))
    return [page.Table(["", *STAGES.values()], rows, "lrrrr"), page.Facts(facts)]


def text_facts(runs: Sequence[Events], base: Events) -> page.Facts:
    """The corpus that base was trained on (or else the newest), and the tokenizer."""
    corpus = newest(runs, "dataset", last(base, "corpus", "name"))
    tokenizer = newest(runs, "tok_train")
    totals = last(corpus, "corpus", "totals", {})
    rows = [("corpus", corpus[0]["tag"] if corpus else "-")]
    for role in ("train", "validation"):
        part = totals.get(role, {})
        rows.append((role, f"{number(part.get('documents'))} documents, {number(part.get('text_bytes'))} bytes"))
    rows += [("left out", f"{n:,}: {why}") for why, n in last(corpus, "corpus", "left_out", {}).items()]
    size, ratio = (last(tokenizer, "end", key) for key in ("vocab_size", "bytes_per_token"))
    rows.append(("vocabulary", f"{number(size)} tokens, {number(ratio, '.2f')} bytes per token on validation text"))
    return page.Facts(rows)


def runs_table(runs: Sequence[Events]) -> page.Table:
    """Every run: its command as typed, time, memory and how it ended."""
    rows = []
    for run in runs:
        start, kinds = run[0], {event["event"] for event in run}
        module = ".".join(Path(start["argv"][0]).with_suffix("").parts[-2:])
        unfinished = "plan" in kinds and "end" not in kinds  # stages without a plan do not all say that they end
        ended = "stopped" if "stopped" in kinds else "not finished" if unfinished else ""
        memory = last(run, "end", "peak_memory_bytes")
        command = shlex.join([module, *start["argv"][1:]])
        figures = [duration(seconds_of(run)), number(memory and memory / 1e9, ".2f"), ended]
        rows.append([start["stage"], start["tag"], command, *figures])
    # Some write their record when the work is done, so a run's start is reckoned from its end.
    span = max(run[-1]["time"] for run in runs) - min(run[-1]["time"] - seconds_of(run) for run in runs)
    rows.append(["all", "", "", duration(sum(map(seconds_of, runs))), "", f"{duration(span)} from start to end"])
    return page.Table(["stage", "tag", "command", "time", "peak GB", ""], rows, "llcrrl")


def machine(runs: Sequence[Events]) -> page.Facts:
    """Where it ran, with what; several where they differ between runs."""
    starts = [run[0] for run in runs]
    told = {
        "machine": [f"{start['cpu']}, {start['cpu_count']} cores, {start['platform']}" for start in starts],
        "Python": [start["python"] for start in starts],
        "versions": [", ".join(f"{name} {version}" for name, version in start["versions"].items()) for start in starts],
        "commit": [start["git"] for start in starts],
    }
    return page.Facts([(name, "; ".join(dict.fromkeys(values))) for name, values in told.items()])


def all_settings(runs: Sequence[Events]) -> list[page.Block]:
    """The settings of the newest run of each stage and tag, folded."""
    newest_starts = {(run[0]["stage"], run[0]["tag"]): run[0] for run in runs}
    blocks: list[page.Block] = []
    for (stage, tag), start in newest_starts.items():
        words = " ".join(f"{name}={value!r}" for name, value in start["settings"].items())
        text = textwrap.fill(words, 100, break_long_words=False, break_on_hyphens=False)
        blocks.append(page.Folded(f"{stage} {tag}", text or "none"))
    return blocks


if __name__ == "__main__":
    run_main(main)
