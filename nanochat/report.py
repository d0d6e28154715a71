"""The report card of everything that ran under this base directory, from the records alone.

    python -m nanochat.report generate                   # print it; write report/report.md and report/report.html
    python -m nanochat.report reset                      # a new one: earlier records move to records/before-<time>/

The newest run of each stage counts; a run that was stopped and resumed is one run. What has not run shows as "-".
Stages it does not know appear among runs and settings only. Runs side by side: python -m dev.compare_runs.
"""

from typing import Literal

from nanochat.configurator import Rate, configure

SHORT = {"": "action"}

# Action
action: Literal["generate", "reset"] = "generate"  # generate: print and write; reset: put the records aside
# Cost
dollars_per_hour: Rate | None = None  # of one GPU, or of a machine without (None = the list price, where it is known)

settings = configure(__name__)

import json
import math
import shlex
import textwrap
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean, linear_regression
from typing import Any

from nanochat import report_page as page
from nanochat.common import STAGES, UserError, get_base_dir, print0, run_main
from nanochat.files import write_atomic
from nanochat.report_page import Curve, Series
from nanochat.sizing import find_card

Event = dict[str, Any]
Events = list[Event]  # of one record, or of a run that was resumed, merged
Grades = dict[str, dict[str, Event]]  # task, or mean over tasks; then stage
TITLES = [stage.title for stage in STAGES.values()]
MEANS = {"core": "CORE", "chatcore": "ChatCORE", "chatcore_cat": "ChatCORE-cat"}  # events with a mean over tasks
GRADED = 2  # answers shown of each task
# What a validation of base says beside bits per byte: name, key, form.
VALIDATED = [
    ("nats per token, validation", "val_nats", ".4f"),
    ("perplexity, validation", "perplexity", ",.2f"),
    ("next token right, validation", "accuracy", ".1%"),
    ("nats above the training loss, validation", "gap", "+.4f"),
]


def main() -> None:
    records = get_base_dir() / "records"
    if action == "generate":
        write("report", *build(read_runs(records), dollars_per_hour))
        return
    paths = sorted(records.glob("*.jsonl"))
    aside = records / f"before-{time.strftime('%Y%m%d-%H%M%S')}"
    for path in paths:
        aside.mkdir(exist_ok=True)
        path.rename(aside / path.name)
    print(f"{len(paths)} records are now in {aside}" if paths else f"no records in {records}: nothing to put aside")


def write(name: str, text: str, drawn: Sequence[Curve]) -> None:
    """Print a report, and write it as name.md and name.html."""
    print0(text)
    path = get_base_dir() / "report" / name
    write_atomic(path.with_name(f"{name}.md"), text)
    write_atomic(path.with_name(f"{name}.html"), page.to_html(text, drawn))
    print0(f"written to {path}.md and {path}.html")


def build(runs: Sequence[Events], dollars: float | None = None) -> tuple[str, list[Curve]]:
    """The report on runs, which are in the order of their starts, as Markdown; and its curves."""
    found = {stage: newest(runs, stage) for stage in STAGES}
    graded, drawn = grades(runs), curves(found)
    tags = ", ".join(dict.fromkeys(events[0]["tag"] for events in found.values() if events))
    day = time.strftime("%Y-%m-%d", time.localtime(runs[-1][0]["time"]))
    sections: list[tuple[str, Iterable[str]]] = [
        ("", [summary(runs, found, graded, dollars)]),
        ("Results", [results(runs, found, graded), *result_notes(runs, graded), *parts(graded)]),
        ("Learning", [page.curves(drawn)] if drawn else []),
        ("Samples", samples(found, graded)),
        ("Training", training(found)),
        ("CORE, task by task", core_tasks(runs)),
        ("Text and tokenizer", [text_facts(runs, found["base"])]),
        ("Runs", [runs_table(runs)]),
        ("Machine", [machine(runs, dollars)]),
        ("Settings", all_settings(runs)),
    ]
    subtitle = f"model {tags or '-'} · {day} · commit {runs[-1][0].get('git', '-')}"
    return page.to_markdown("Report", subtitle, sections), drawn


# -----------------------------------------------------------------------------
# Sections


def summary(runs: Sequence[Events], found: dict[str, Events], graded: Grades, dollars: float | None) -> str:
    """What a reader looks for first: bpb, CORE, ChatCORE, the task of RL or else the first one, time, cost, size."""
    rows = [("val bpb", number(val_bpb(runs, found["base"]).get("value"), ".4f"), "bits per byte, base")]
    first = next((name for name in graded if not is_mean(graded[name])), "")
    goal = last(found["rl"], "plan", "task", first)
    for name in ["CORE", "ChatCORE", goal if goal in graded else first]:
        told = {}
        for stage, e in graded.get(name, {}).items():
            told[STAGES[stage].title] = f"{e['accuracy']:.1%}" if "accuracy" in e else f"{e['value']:.3f}"
        if told:
            title, value = told.popitem()
            rows.append((f"{name} after {title}", value, ", ".join(f"{v} after {k}" for k, v in told.items())))
    rows.append(("total time", duration(sum(map(seconds_of, runs))), f"{len(runs)} run{'s' if runs[1:] else ''}"))
    spent, _ = cost(runs, dollars)
    rows += [("cost", spent, "of the runs' time")] if spent != "-" else []
    parameters = filter(None, (last(events, "plan", "parameters") for events in found.values()))
    rows.append(("parameters", next(map(page.rounded, parameters), "-"), ""))
    return page.facts(rows)


def results(runs: Sequence[Events], found: dict[str, Events], graded: Grades) -> str:
    """All scores by stage, and what they must be held against."""
    rows, bpb, rl = [], val_bpb(runs, found["base"]), found["rl"]

    def add(name: str, values: dict[str, str], chance: str = "-", n: str = "-") -> None:
        rows.append([name, *(values.get(stage, "-") for stage in STAGES), chance, n])

    documents = f"{bpb['documents']:,} documents" if "documents" in bpb else "-"
    add("bits per byte, validation", {"base": score(bpb)}, n=documents)
    for name, key, form in VALIDATED:
        if (value := last(found["base"], "eval", key)) is not None:
            add(name, {"base": format(value, form)})
    held_out = {stage: number(last(events, "eval", "val_loss"), ".4f") for stage, events in found.items()}
    add("nats per token trained on, held-out chats", held_out)
    for name, events in graded.items():
        told = {stage: score(e) + (" †" if e["stale"] else "") for stage, e in events.items()}
        chance = next((e["baseline"] for e in events.values() if e.get("baseline") is not None), None)
        n = " / ".join(dict.fromkeys(map(counted, events.values())))
        add(name if is_mean(events) else f"{name}, %", told, number(chance and 100 * chance, ".1f"), n)
        if flexible := {stage: score(e["flexible"]) for stage, e in events.items() if "flexible" in e}:
            add(f"{name} by the last number anywhere, %", flexible, n=n)
        for k in dict.fromkeys(k for e in events.values() for k in e.get("pass_at", {})):
            at = {stage: score(e["pass_at"][k], 100) for stage, e in events.items() if k in e.get("pass_at", {})}
            add(f"{name} pass@{k}, %", at, n=n)
    task, problems = last(rl, "plan", "task", "RL"), number(last(rl, "eval", "problems"))
    for k, value in sorted(last(rl, "eval", "pass_at", {}).items(), key=lambda item: int(item[0])):
        add(f"{task} pass@{k} in training, %", {"rl": score(value, 100)}, n=problems)
    return page.table(["", *TITLES, "chance", "n"], rows, "lrrrrrr")


def result_notes(runs: Sequence[Events], graded: Grades) -> list[str]:
    """What to know beside the table: opponents, standard errors, older scores, models left out."""
    loss, each = newest(runs, "base_loss"), [event for events in graded.values() for event in events.values()]
    known = {"byte frequencies": last(loss, "baselines", "byte_unigram"), "xz -9": last(loss, "baselines", "xz")}
    opponents = [f"{name} {value:.4f}" for name, value in known.items() if value is not None]
    long = sorted({f"{event['label']} {event['too_long']:,}" for event in each if event.get("too_long")})
    evaluated = {run[0]["tag"] for run in runs if run[0]["stage"] in ("chat_eval", "base_eval")}
    others = sorted(evaluated - {event["tag"] for event in each})
    notes = [
        (opponents, f"To beat, in bits per byte of the same text: {', '.join(opponents)}."),
        (each, "± is one standard error over the items; CORE and ChatCORE are 0 for guessing and 1 at best."),
        (any(event["stale"] for event in each), "† measured before the newest training of that stage began."),
        (long, f"Prompts longer than the context, counted as wrong: {', '.join(long)}."),
        (others, f"Evaluated too, but not the newest or not trained here: {', '.join(others)}."),
    ]
    return [page.marked(note) for there, note in notes if there]


def parts(graded: Grades) -> Iterable[str]:
    """The parts of tasks that have some, such as the subjects of MMLU, folded; of the last stage that was graded."""
    for events in graded.values():
        for event in [event for event in events.values() if event.get("parts")][-1:]:
            lines = [f"{part}: {score(value)} % of {value['n']:,}" for part, value in event["parts"].items()]
            yield page.folded(f"{event['label']}, its parts", "\n".join(lines))


def core_tasks(runs: Sequence[Events]) -> list[str]:
    """The tasks of the newest run that has some of CORE."""
    found = next(filter(None, (of_kind(run, "core_task") for run in reversed(runs))), [])
    rows = [[e["task"], score(e), number(e.get("centered"), ".4f"), f"{e['n']:,}"] for e in found]
    return [page.table(["", "right, %", "centred", "n"], rows, "lrrr")] if rows else []


def learning(events: Events, title: str, unit: str, key: str = "loss", marks: Iterable[Series] = ()) -> Curve:
    """A figure of every step, as it was and smoothed (others than losses: the mean of ten); validation in its unit,
    spikes, more marks, and where the run was resumed.
    """
    each = points(events, "step", key)
    smooth = [(x, fmean(y for _, y in each[max(0, i - 9) : i + 1])) for i, (x, _) in enumerate(each)]
    series = [
        Series("smoothed", "line", points(events, "step", "smooth_loss") if key == "loss" else smooth),
        Series("each step", "faint", each),
        Series("validation", "mark", points(events, "eval", "val_loss")),
        Series("spike", "cross", points([event for event in events if event.get("spike")], "step", key)),
        *marks,
        Series("resumed", "flag", [(step, smooth[0][1]) for step in resumes(events) if smooth]),
    ]
    return Curve(title, unit, series)


def curves(found: dict[str, Events]) -> list[Curve]:
    """Loss of base, mid and SFT, bits per byte of base, reward of RL with the smallest and the largest k of its
    evaluations: those that have points.
    """
    quick, final = (points(found["base"], "eval", key) for key in ("val_bpb_quick", "val_bpb"))
    validation = [Series("quick", "line", quick), Series("", "mark", quick)]
    evals = [(event["step"], event["pass_at"]) for event in of_kind(found["rl"], "eval") if "pass_at" in event]
    ks, solved = sorted({k for _, pass_at in evals for k in pass_at}, key=int), []
    for k in dict.fromkeys([*ks[:1], *ks[-1:]]):
        at = [(step, pass_at[k]["value"]) for step, pass_at in evals if k in pass_at]
        solved.append(Series(f"pass@{k}", "mark" if k == ks[0] else "ring", at))
    drawn = [
        learning(found["base"], "Base: loss", "nats per token"),
        Curve("Base: validation", "bits per byte", [*validation, Series("final, long context", "ring", final)]),
        learning(found["mid"], "Mid: loss", "nats per token trained on"),
        learning(found["sft"], "SFT: loss", "nats per token trained on"),
        learning(found["rl"], "RL: reward", "mean reward, share solved", "reward", solved),
    ]
    drawn = [curve for curve in drawn if curve.series[0].points]
    return [curve._replace(series=[series for series in curve.series if series.points]) for curve in drawn]


def samples(found: dict[str, Events], graded: Grades) -> list[str]:
    """What each stage wrote at its last sampling, and a few graded answers of the last stage that has some."""
    blocks, answers = [], []
    for stage, events in found.items():
        if written := of_kind(events, "sample"):
            done = written[-1]["step"]
            final = [page.sample(e["prompt"], e["text"], stage != "base") for e in written if e["step"] == done]
            blocks += [f"### After {STAGES[stage].title}, {done:,} steps", "\n".join(final)]
    for grade in graded.values():
        for event in [event for event in grade.values() if event.get("samples")][-1:]:
            for e in event["samples"][:GRADED]:
                verdict = f"{event['label']}: {'right' if e['correct'] else 'wrong'}"
                answers.append(page.sample(e["prompt"], e["answer"], verdict=verdict))
    return [*blocks, "### Graded answers", "\n".join(answers)] if answers else blocks


def row(columns: Iterable[Events], name: str, kind: str, key: str, form: str = ",", scale: float = 1) -> list[str]:
    """The row of a table that says the newest value of a key in events of a kind, for each column."""
    values = [last(events, kind, key) for events in columns]
    return [name, *(number((value or None) and value * scale, form) for value in values)]


def training(found: dict[str, Events]) -> list[str]:
    """Size, speed, memory and time of each stage; plans, batches and text in words."""
    stages = list(found.values())
    if not any(stages):
        return []
    tokens = [sum(event.get("tokens", 0) for event in of_kind(events, "step")) for events in stages]
    rows = [
        row(stages, "parameters", "plan", "parameters"),
        row(stages, "steps", "plan", "num_steps"),
        ["tokens", *(number(count or None) for count in tokens)],
        row(stages, "tokens per second", "end", "tokens_per_second"),
        row(stages, "GFLOP/s", "end", "flops_per_second", ",.0f", 1e-9),
        row(stages, "share of the peak (MFU)", "end", "mfu", ".1%"),
        row(stages, "peak memory, GB", "end", "peak_memory_bytes", ",.2f", 1e-9),
        ["training time", *(duration(last(events, "end", "train_seconds")) for events in stages)],
        [*row(stages[:3], "loss at the end, smoothed", "step", "smooth_loss", ".4f"), "-"],  # RL's is no likelihood
        ["loss at the end, forecast", *map(forecast, stages[:3]), "-"],
        ["spikes", *map(spikes, stages)],
        ["resumed at step", *(", ".join(f"{at:,}" for at in resumes(events)) or "-" for events in stages)],
    ]
    facts = []
    for title, events in zip(TITLES, stages, strict=True):
        told = [last(events, "plan", key) for key in ("formula", "batch", "task")]
        told += dict.fromkeys(f"{e['name']} {e['conversations']:,} conversations" for e in of_kind(events, "data"))
        facts.append((title, "; ".join(filter(None, [*told, last(events, "end", "text")]))))
    return [page.table(["", *TITLES], rows, "lrrrr"), page.facts(fact for fact in facts if fact[1])]


def text_facts(runs: Sequence[Events], base: Events) -> str:
    """The corpus that base was trained on (or else the newest), and the tokenizer."""
    corpus, tokenizer = newest(runs, "dataset", last(base, "corpus", "name")), newest(runs, "tok_train")
    rows = [("corpus", corpus[0]["tag"] if corpus else "-")]
    for role in ("train", "validation"):
        part = last(corpus, "corpus", "totals", {}).get(role, {})
        rows.append((role, f"{number(part.get('documents'))} documents, {number(part.get('text_bytes'))} bytes"))
    rows += [("left out", f"{n:,}: {why}") for why, n in last(corpus, "corpus", "left_out", {}).items()]
    size, ratio = (last(tokenizer, "end", key) for key in ("vocab_size", "bytes_per_token"))
    rows.append(("vocabulary", f"{number(size)} tokens, {number(ratio, '.2f')} bytes per token on validation text"))
    return page.facts(rows)


def runs_table(runs: Sequence[Events]) -> str:
    """Every run: the command that made it, time, memory, where it began and how it ended if not with its end."""
    rows = []
    for run in runs:
        _, memory = row([run], "", "end", "peak_memory_bytes", ".2f", 1e-9)
        rows.append([run[0]["stage"], run[0]["tag"], command(run), duration(seconds_of(run)), memory, outcome(run)])
    return page.table(["stage", "tag", "command", "time", "peak GB", ""], rows, "llcrrl")


def machine(runs: Sequence[Events], dollars: float | None) -> str:
    """Where it ran, with what and for how much; several where they differ between runs."""
    starts = [run[0] for run in runs]
    told = {"hardware": [*map(hardware, starts)]}
    told["versions"] = [", ".join(map(" ".join, start["versions"].items())) for start in starts]
    for name, key in (("system", "platform"), ("Python", "python"), ("commit", "git")):
        told[name] = [start[key] for start in starts]
    spent, how = cost(runs, dollars)
    told["cost"] = [f"{spent}: {how}" if spent != "-" else how]
    return page.facts((name, "; ".join(dict.fromkeys(values))) for name, values in told.items())


def all_settings(runs: Sequence[Events]) -> Iterable[str]:
    """The settings of the newest run of each stage and tag, folded."""
    for name, settings in {(run[0]["stage"], run[0]["tag"]): run[0]["settings"] for run in runs}.items():
        words = " ".join(f"{name}={value!r}" for name, value in settings.items())
        text = textwrap.fill(words, 100, break_long_words=False, break_on_hyphens=False)
        yield page.folded(" ".join(name), text or "none")


# -----------------------------------------------------------------------------
# Records


def read_run(path: Path) -> Events:
    """The events of one record, none for an empty one. Raises UserError for a damaged one."""
    try:
        events = read_record(path)
        named = all(isinstance(event, dict) and {"event", "time"} <= event.keys() for event in events)
        if not named or (events and not {"stage", "tag", "settings", "argv"} <= events[0].keys()):
            raise ValueError("not events with name and time, of which the first is a start")
        return events
    except ValueError as error:
        reason = str(error).removeprefix(f"{path}:")
        raise UserError(f"damaged record {path}: {reason}; to do without it: mv {path} {path}.bad") from None


def read_record(path: Path) -> list[dict[str, Any]]:
    """All events of a record. A last line cut short by a crash is left out; damage elsewhere raises ValueError."""
    lines = path.read_text(encoding="utf-8").splitlines()
    events = []
    for number, line in enumerate(lines, 1):
        try:
            events.append(json.loads(line))
        except json.JSONDecodeError:
            if number < len(lines):
                raise ValueError(f"{path}:{number}: not a JSON object; delete the record or mend the line") from None
    return events


def read_runs(records: Path) -> list[Events]:
    """All runs, in the order of their starts. Raises UserError where there are none, and for a damaged record."""
    runs = []
    for path in sorted(records.glob("*.jsonl")):
        if events := read_run(path):
            runs.append(events)
        else:
            print(f"{path} is empty: left out")
    if not runs:
        raise UserError(f"no records in {records}; run a stage first, such as: bash dev/runcpu.sh")
    return sorted(runs, key=lambda run: run[0]["time"])


def chain(runs: Iterable[Events], stage: str, tag: str | None = None) -> list[Events]:
    """A stage's newest run (of a tag, if one is given), after the runs that it resumed; empty where there is none."""
    of_stage = [run for run in runs if run[0]["stage"] == stage and tag in (None, run[0]["tag"])]
    of_tag = [run for run in of_stage if run[0]["tag"] == of_stage[-1][0]["tag"]]
    fresh = [i for i, run in enumerate(of_tag) if not resumes(run)]
    return of_tag[max(fresh, default=0) :]


def resumes(events: Events) -> list[int]:
    """The steps at which a run took up an earlier one."""
    return [event["first_step"] for event in of_kind(events, "plan") if event["first_step"] > 0]


def merged(runs: Sequence[Events]) -> Events:
    """The events of a chain as those of one run, without the steps that were done again and without early ends."""
    events: Events = []
    for run in runs:
        done = max(resumes(run), default=0)
        # Step events are numbered from 0; evaluations and samples say how many steps were done before them.
        kept = [event for event in events if event.get("step", 0) < done + (event["event"] != "step")]
        events = [event for event in kept if event["event"] not in ("end", "stopped")] + run
    return events


def newest(runs: Iterable[Events], stage: str, tag: str | None = None) -> Events:
    """The events of a stage's newest run (of a tag, if one is given), merged with those of the runs it resumed."""
    return merged(chain(runs, stage, tag))


def of_kind(events: Events, *kinds: str) -> Events:
    return [event for event in events if event["event"] in kinds]


def last(events: Events, kind: str, key: str, default: Any = None) -> Any:
    """The newest value of a key in events of a kind."""
    return next((event[key] for event in reversed(events) if event["event"] == kind and key in event), default)


def points(events: Events, kind: str, key: str) -> list[tuple[float, float]]:
    """(steps done, value) of the events of a kind that hold a finite number under this key."""
    having = [event for event in of_kind(events, kind) if isinstance(event.get(key), int | float)]
    return [(e["step"] + (kind == "step"), e[key]) for e in having if math.isfinite(e[key])]


def seconds_of(run: Events) -> float:
    """How long a run took: as it says itself, or from its first event to its last."""
    return float(run[-1].get("seconds_in_all", run[-1]["time"] - run[0]["time"]))


# -----------------------------------------------------------------------------
# Scores, cost and words


def grades(runs: Sequence[Events]) -> Grades:
    """{task or mean over tasks: {stage: event}}, each event with the tag of its run, a label, and whether it is stale:
    older than its stage's newest training; tasks come first, with their samples. The newest event counts; of a stage's
    chat models only the one that was evaluated last. Models that are not ours (--hf-path) are left out. The name of a
    mean begins with "partial" where tasks, or problems of them, were not there.
    """
    tags = {event["source"]: run[0]["tag"] for run in runs for event in of_kind(run, "task")}
    begun = {stage: last(newest(runs, stage), "start", "time", 0) for stage in STAGES}
    found: Grades = {}
    for run in runs:
        start = run[0]
        for event in of_kind(run, "task", *MEANS):
            stage = event.get("source", start["settings"].get("source", "base"))
            other = start["stage"] == "chat_eval" and start["tag"] != tags.get(stage, start["tag"])
            if other or start["settings"].get("hf_path") or stage not in STAGES:
                continue
            name = event.get("task") or ("partial " if event.get("partial") else "") + MEANS[event["event"]]
            about = {"tag": start["tag"], "label": f"{name} after {STAGES[stage].title}"}
            about["samples"] = [e for e in of_kind(run, "sample") if (e.get("source"), e.get("task")) == (stage, name)]
            about["stale"] = event["time"] < begun[stage]
            found.setdefault(name, {})[stage] = {**event, **about}
    by_stage = {name: {stage: events[stage] for stage in STAGES if stage in events} for name, events in found.items()}
    return dict(sorted(by_stage.items(), key=lambda item: is_mean(item[1])))


def is_mean(events: dict[str, Event]) -> bool:
    """Whether these grades are of a mean over tasks and of no task."""
    return any(event["event"] in MEANS for event in events.values())


def val_bpb(runs: Sequence[Events], base: Events) -> Event:
    """Bits per byte of validation text as an event with the value: from base_loss if that ran after training began, or
    else from the training; {} where there is none.
    """
    loss = newest(runs, "base_loss")
    scored = [{**event, "value": event["bpb"]} for event in of_kind(loss, "bpb") if event["split"] == "val"]
    if not scored or loss[0]["time"] < last(base, "start", "time", 0):
        scored = [{**event, "value": event["val_bpb"]} for event in of_kind(base, "eval") if "val_bpb" in event]
    return scored[-1] if scored else {}


def cost(runs: Sequence[Events], dollars: float | None) -> tuple[str, str]:
    """What the runs with a price cost together, from their first event to their last, and how that was reckoned. A
    price is for an hour of a card and counts for each; no price is guessed. Raises UserError for one below 0.
    """
    if dollars is not None and dollars < 0:
        raise UserError(f"--dollars-per-hour={dollars}: expected a price of 0 or more")
    priced: list[tuple[float, float]] = []
    for run in runs:
        device = run[0].get("device", "cpu")
        card = find_card(device)
        price = card.dollars if card and dollars is None else dollars
        if price is not None:
            priced.append((seconds_of(run), price if device == "cpu" else price * run[0].get("ranks", 1)))
    if not priced:
        return "-", "no price is known for this machine; --dollars-per-hour=PRICE sets one"
    rates = " or ".join(dict.fromkeys(f"${price:,.2f}" for _, price in priced))
    how = f"{duration(sum(seconds for seconds, _ in priced))} of runs at {rates} an hour"
    if left_out := len(runs) - len(priced):
        how += f"; {left_out} of the runs {'are' if left_out > 1 else 'is'} without a known card and not in it"
    return f"${sum(seconds / 3600 * price for seconds, price in priced):,.2f}", how


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


def score(event: Event, scale: int = 1) -> str:
    """A value times the scale, or an accuracy in percent, with its standard error where that is known."""
    scale = 100 if "accuracy" in event else scale
    value, error, form = event.get("accuracy", event.get("value")), event.get("stderr"), ".1f" if scale > 1 else ".4f"
    told = "-" if value is None else f"{scale * value:{form}}"
    return told if error is None else f"{told} ± {scale * error:{form}}"


def forecast(events: Events) -> str:
    """What the loss of an unfinished run comes to at its end: a power law of the steps (arXiv 2001.08361) through the
    second half of those done, without what a falling learning rate will add.
    """
    done, num_steps = points(events, "step", "smooth_loss"), last(events, "plan", "num_steps", 0)
    if len(done) < 20 or done[-1][0] >= num_steps:
        return "-"
    logs = [(math.log(step), math.log(max(loss, 1e-9))) for step, loss in done[len(done) // 2 :]]
    slope, intercept = linear_regression(*zip(*logs, strict=True))
    return f"{math.exp(intercept + slope * math.log(num_steps)):.4f}"


def spikes(events: Events) -> str:
    return number(sum(event.get("spike", False) for event in events) or None)


def counted(event: Event) -> str:
    """How many problems or tasks a score is over, and of how many where these are not all."""
    if "n" not in event:
        most = event.get("max_per_task", -1)
        return f"{len(event['tasks'])} tasks" + (f" of {most:,} items at most" if most > 0 else "")
    return f"{event['n']:,} of {event['of']:,}" if event.get("partial") else f"{event['n']:,}"


def command(run: Events) -> str:
    """The command that made a run, quoted for a shell. On several ranks torchrun stood in the place of python."""
    path, *words = run[0]["argv"]
    return shlex.join(["python", "-m", ".".join(Path(path).with_suffix("").parts[-2:]), *words])


def outcome(run: Events) -> str:
    """Where a run took up another one, and how it ended if it did not reach its end."""
    kinds, done = {event["event"] for event in run}, max(resumes(run), default=0)
    told = [f"resumed at step {done:,}"] if done else []
    if "stopped" in kinds:
        told.append(f"after step {last(run, 'stopped', 'step', 0):,}: {last(run, 'stopped', 'reason', '')}")
    elif "plan" in kinds and "end" not in kinds:  # stages without a plan do not all say that they end
        told.append(f"not finished, {max((e['step'] + 1 for e in of_kind(run, 'step')), default=done):,} steps done")
    return "; ".join(told)


def hardware(start: Event) -> str:
    """What a run computed on: cards and how many ranks, where the record has them, and the processor."""
    ranks, device = start.get("ranks", 1), start.get("device", "cpu")
    cards = f"{ranks} x {device}, " if device != "cpu" or ranks > 1 else ""
    return f"{cards}{start['cpu']}, {start['cpu_count']} cores"


if __name__ == "__main__":
    run_main(main)
