"""The report card of everything that ran under this base directory, and comparisons of runs, from their records alone.

    python -m nanochat.report generate                   # print it; write report/report.md and report/report.html
    python -m nanochat.report compare --runs="d12 d16"   # or: compare d12 d16; base runs side by side, baseline first
    python -m nanochat.report reset                      # a new one: earlier records move to records/before-<time>/

The newest run of each stage counts; a run that was stopped and resumed is one run. What has not run shows as "-".
Stages it does not know appear among runs and settings only. A comparison (report_compare.py) takes tags, or the files
of records, and writes report/compare.md and report/compare.html. How it all looks is the business of report_page.py.
"""

import shlex
import sys
from typing import Literal

from nanochat.configurator import configure

SHORT = {"": "action"}

# Action
action: Literal["generate", "compare", "reset"] = "generate"  # generate, compare: print and write; reset: put aside
runs = ""  # what to compare: tags of base runs or record files, the baseline first; the words after `compare`
# Cost
dollars_per_hour: float | None = None  # of one GPU, or of a machine without (None = known for H100, A100 and V100)


def join_runs(words: list[str]) -> list[str]:
    """The command line with the words that follow `compare` as one setting: compare a b -> compare '--runs=a b'."""
    first = words.index("compare") + 1 if "compare" in words else len(words)
    end = next((i for i in range(first, len(words)) if words[i].startswith("-")), len(words))
    return [*words[:first], *(["--runs=" + shlex.join(words[first:end])] if end > first else []), *words[end:]]


if __name__ == "__main__":
    sys.argv[1:] = join_runs(sys.argv[1:])
settings = configure(__name__)

import textwrap
import time
from collections.abc import Sequence

from nanochat import report_page as page
from nanochat.common import UserError, get_base_dir, run_main
from nanochat.files import write_atomic
from nanochat.report_compare import compare
from nanochat.report_runs import (
    STAGES,
    Event,
    Events,
    Grades,
    command,
    cost,
    counted,
    duration,
    grades,
    hardware,
    is_mean,
    last,
    newest,
    number,
    outcome,
    points,
    read_runs,
    rounded,
    score,
    seconds_of,
    share,
    val_bpb,
)

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
    if dollars_per_hour is not None and dollars_per_hour < 0:
        raise UserError(f"--dollars-per-hour={dollars_per_hour}: expected a price of 0 or more")
    if action == "compare":
        try:
            names = shlex.split(runs)
        except ValueError as error:
            raise UserError(
                f"--runs={runs}: {error}; expected names with spaces between, quoted as for a shell"
            ) from None
        write("compare", *compare(names, records, dollars_per_hour))
    else:
        write("report", *build(read_runs(records), dollars_per_hour))


def write(name: str, title: str, subtitle: str, sections: list[page.Section]) -> None:
    """Print a report, and write it as name.md and name.html."""
    text = page.to_markdown(title, subtitle, sections)
    folder = get_base_dir() / "report"
    write_atomic(folder / f"{name}.md", text)
    write_atomic(folder / f"{name}.html", page.to_html(title, subtitle, sections))
    print(text)
    print(f"written to {folder / name}.md and {folder / name}.html")


def build(runs: Sequence[Events], dollars: float | None = None) -> tuple[str, str, list[page.Section]]:
    """Title, subtitle and sections of the report on runs, which are in the order of their starts."""
    found = {stage: newest(runs, stage) for stage in STAGES}
    graded = grades(runs)
    tags = ", ".join(dict.fromkeys(events[0]["tag"] for events in found.values() if events))
    day = time.strftime("%Y-%m-%d", time.localtime(runs[-1][0]["time"]))
    sections: list[page.Section] = [
        ("", [summary(runs, found, graded, dollars)]),
        ("Results", results(runs, found, graded)),
        ("Learning", curves(found)),
        ("Samples", samples(found, graded)),
        ("Training", training(found)),
        ("CORE, task by task", core_tasks(runs)),
        ("Text and tokenizer", [text_facts(runs, found["base"])]),
        ("Runs", [runs_table(runs)]),
        ("Machine", [machine(runs, dollars)]),
        ("Settings", all_settings(runs)),
    ]
    return "Report", f"model {tags or '-'} · {day} · commit {runs[-1][0].get('git', '-')}", sections


# -----------------------------------------------------------------------------
# Sections


def summary(runs: Sequence[Events], found: dict[str, Events], graded: Grades, dollars: float | None) -> page.Figures:
    """What a reader looks for first: bpb, CORE, ChatCORE, the task of RL or else the first one, time, cost, size."""
    rows = [("val bpb", number(val_bpb(runs, found["base"]).get("value"), ".4f"), "bits per byte, base")]
    goal, tasks = last(found["rl"], "plan", "task"), [name for name in graded if not is_mean(name)]
    for name in ["CORE", "ChatCORE", goal if goal in graded else (tasks or [""])[0]]:
        told = [
            (STAGES[stage], f"{event['value']:.3f}" if "value" in event else f"{event['accuracy']:.1%}")
            for stage, event in graded.get(name, {}).items()
        ]
        if told:
            before = ", ".join(f"{value} after {stage}" for stage, value in told[:-1])
            rows.append((f"{name} after {told[-1][0]}", told[-1][1], before))
    parameters = [last(events, "plan", "parameters") for events in found.values()]
    rows.append(("total time", duration(sum(map(seconds_of, runs))), f"{len(runs)} run{'s' if runs[1:] else ''}"))
    spent, _ = cost(runs, dollars)
    rows += [("cost", spent, "of the runs' time")] if spent != "-" else []
    rows.append(("parameters", rounded(next(filter(None, parameters), None)), ""))
    return page.Figures(rows)


def results(runs: Sequence[Events], found: dict[str, Events], graded: Grades) -> list[page.Block]:
    """All scores by stage, and what they must be held against."""

    def cells(values: dict[str, str]) -> list[str]:
        return [values.get(stage, "-") for stage in STAGES]

    def old(stage: str, event: Event) -> str:
        return f" {STALE}" if event["time"] < last(found[stage], "start", "time", 0) else ""

    bpb, losses = val_bpb(runs, found["base"]), {stage: last(found[stage], "eval", "val_loss") for stage in STAGES}
    documents = f"{bpb['documents']:,} documents" if "documents" in bpb else "-"
    held_out = cells({stage: number(loss, ".4f") for stage, loss in losses.items()})
    rows = [
        ["bits per byte, validation", *cells({"base": score(bpb)}), "-", documents],
        ["nats per token trained on, held-out chats", *held_out, "-", "-"],
    ]
    for name, events in sorted(graded.items(), key=lambda item: is_mean(item[0])):
        told = {stage: score(event) + old(stage, event) for stage, event in events.items()}
        chance = next((e["baseline"] for e in events.values() if e.get("baseline") is not None), None)
        label = name if is_mean(name) else f"{name}, %"
        n = " / ".join(dict.fromkeys(map(counted, events.values())))
        rows.append([label, *cells(told), number(chance and 100 * chance, ".1f"), n])
        for k in dict.fromkeys(k for event in events.values() for k in event.get("pass_at", {})):
            at = {stage: share(event["pass_at"][k]) for stage, event in events.items() if k in event.get("pass_at", {})}
            rows.append([f"{name} pass@{k}, %", *cells(at), "-", n])
    task, problems = last(found["rl"], "plan", "task", "RL"), number(last(found["rl"], "eval", "problems"))
    for k, value in sorted(last(found["rl"], "eval", "pass_at", {}).items(), key=lambda item: int(item[0])):
        rows.append([f"{task} pass@{k} in training, %", *cells({"rl": share(value)}), "-", problems])
    head = ["", *STAGES.values(), "chance", "n"]
    return [page.Table(head, rows, "lrrrrrr"), *result_notes(runs, graded, rows), *parts(graded)]


def parts(graded: Grades) -> list[page.Block]:
    """The parts of tasks that have some, such as the subjects of MMLU, folded; of the last stage that was graded."""
    blocks: list[page.Block] = []
    for name, events in graded.items():
        stage = [stage for stage in events if events[stage].get("parts")][-1:]
        for event in [events[stage] for stage in stage]:
            lines = [f"{part}: {score(about)} % of {about['n']:,}" for part, about in event["parts"].items()]
            blocks.append(page.Folded(f"{name} after {STAGES[stage[0]]}, its parts", "\n".join(lines)))
    return blocks


def result_notes(runs: Sequence[Events], graded: Grades, rows: list[list[str]]) -> list[page.Block]:
    """What to know beside the table: opponents, standard errors, older scores, models left out."""
    notes = []
    loss = newest(runs, "base_loss")
    opponents = {"byte frequencies": last(loss, "baselines", "byte_unigram"), "xz -9": last(loss, "baselines", "xz")}
    told = [f"{name} {value:.4f}" for name, value in opponents.items() if value is not None]
    if told:
        notes.append(f"To beat, in bits per byte of the same text: {', '.join(told)}.")
    if graded:
        notes.append("± is one standard error over the items; CORE and ChatCORE are 0 for guessing and 1 at best.")
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
    others = sorted({run[0]["tag"] for run in runs if run[0]["stage"] in ("chat_eval", "base_eval")} - used)
    if others:
        notes.append(f"Evaluated too, but not the newest or not trained here: {', '.join(others)}.")
    return list(notes)


def core_tasks(runs: Sequence[Events]) -> list[page.Block]:
    """The tasks of the newest run that has some of CORE."""
    found = [events for run in runs if (events := [event for event in run if event["event"] == "core_task"])]
    rows = [
        [event["task"], score(event), number(event.get("centered"), ".4f"), f"{event['n']:,}"]
        for event in (found[-1] if found else [])
    ]
    return [page.Table(["", "right, %", "centred", "n"], rows, "lrrr")] if rows else []


def smoothed(values: Sequence[tuple[float, float]], beta: float = 0.9) -> list[tuple[float, float]]:
    """Exponential mean of the values, its start-up bias removed: as training smooths its losses."""
    mean, result = 0.0, []
    for count, (x, y) in enumerate(values, 1):
        mean = beta * mean + (1 - beta) * y
        result.append((x, mean / (1 - beta**count)))
    return result


def resumes(events: Events) -> list[int]:
    """The steps at which a run took up an earlier one."""
    return [event["first_step"] for event in events if event["event"] == "plan" and event["first_step"] > 0]


def loss_series(events: Events) -> list[page.Series]:
    """Loss of every step, validation where it is in the same unit, spikes and resumptions."""
    smooth = points(events, "step", "smooth_loss")
    return [
        page.Series("smoothed", "line", smooth),
        page.Series("each step", "faint", points(events, "step", "loss")),
        page.Series("validation", "mark", points(events, "eval", "val_loss")),
        page.Series("spike", "cross", points([event for event in events if event.get("spike")], "step", "loss")),
        page.Series("resumed", "flag", [(step, smooth[0][1]) for step in resumes(events) if smooth]),
    ]


def bpb_series(base: Events) -> list[page.Series]:
    """Validations of the base model, the last of which scores every byte with half a context before it."""
    quick = points(base, "eval", "val_bpb_quick")
    whole = page.Series("final, long context", "ring", points(base, "eval", "val_bpb"))
    return [page.Series("", "line", quick), page.Series("quick", "mark", quick), whole]


def reward_series(rl: Events) -> list[page.Series]:
    """Reward of every step; evaluations at the smallest and at the largest k; resumptions."""
    reward = points(rl, "step", "reward")
    series = [page.Series("smoothed", "line", smoothed(reward)), page.Series("each step", "faint", reward)]
    evals = [event for event in rl if event["event"] == "eval" and "pass_at" in event]
    ks = sorted({k for event in evals for k in event["pass_at"]}, key=int)
    for k in dict.fromkeys([*ks[:1], *ks[-1:]]):
        at = [(event["step"], event["pass_at"][k]["value"]) for event in evals if k in event["pass_at"]]
        series.append(page.Series(f"pass@{k}", "mark" if k == ks[0] else "ring", at))
    flags = [(step, reward[0][1]) for step in resumes(rl) if reward]
    return [*series, page.Series("resumed", "flag", flags)] if flags else series


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
        ["spikes", *(number(sum(bool(event.get("spike")) for event in events) or None) for events in found.values())],
        ["resumed at step", *(", ".join(f"{at:,}" for at in resumes(events)) or "-" for events in found.values())],
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
    """Every run: the command that made it, time, memory, where it began and how it ended if not with its end."""
    rows = []
    for run in runs:
        memory = last(run, "end", "peak_memory_bytes")
        figures = [duration(seconds_of(run)), number(memory and memory / 1e9, ".2f"), outcome(run)]
        rows.append([run[0]["stage"], run[0]["tag"], command(run), *figures])
    # Some write their record when the work is done, so a run's start is reckoned from its end.
    span = max(run[-1]["time"] for run in runs) - min(run[-1]["time"] - seconds_of(run) for run in runs)
    rows.append(["all", "", "", duration(sum(map(seconds_of, runs))), "", f"{duration(span)} from start to end"])
    return page.Table(["stage", "tag", "command", "time", "peak GB", ""], rows, "llcrrl")


def machine(runs: Sequence[Events], dollars: float | None) -> page.Facts:
    """Where it ran, with what and for how much; several where they differ between runs."""
    starts = [run[0] for run in runs]
    spent, how = cost(runs, dollars)
    told = {
        "hardware": [hardware(start) for start in starts],
        "processor": [f"{start['cpu']}, {start['cpu_count']} cores" for start in starts],
        "system": [start["platform"] for start in starts],
        "Python": [start["python"] for start in starts],
        "versions": [", ".join(f"{name} {version}" for name, version in start["versions"].items()) for start in starts],
        "commit": [start["git"] for start in starts],
        "cost": [f"{spent}: {how}" if spent != "-" else how],
    }
    if told["hardware"] == told["processor"]:
        del told["hardware"]
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
