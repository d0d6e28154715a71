"""What the reports know of runs: their records read, a resumed run put together, scores found, figures put into words.

A run is the list of events of one record. A run that was stopped and resumed is a chain of them, and merged() makes
its events those of one run that was never stopped.
"""

import math
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from nanochat.common import UserError
from nanochat.record import read_record
from nanochat.sizing import CARDS

Event = dict[str, Any]
Events = list[Event]
Grades = dict[str, dict[str, Event]]  # task, then source
STAGES = {"base": "base", "mid": "mid", "sft": "SFT", "rl": "RL"}  # the stages that train, and what they are called
MEANS = {"core": "CORE", "chatcore": "ChatCORE", "chatcore_cat": "ChatCORE-cat"}  # events with a mean over tasks
DOLLARS = {card.name: card.dollars for card in CARDS if card.dollars}  # for an hour
PARTIAL = "partial "  # before the name of a mean where tasks, or problems of them, were not there


# -----------------------------------------------------------------------------
# Records


def read_run(path: Path) -> Events:
    """The events of one record, none for an empty one. Raises UserError for a damaged one."""
    try:
        events = read_record(path)
        if any(not isinstance(event, dict) or not {"event", "time"} <= event.keys() for event in events):
            raise ValueError("an event without a name or a time")
        if events and not {"stage", "tag", "settings", "argv"} <= events[0].keys():
            raise ValueError("it does not begin with a start event")
    except ValueError as error:
        reason = str(error).removeprefix(f"{path}:")
        raise UserError(f"damaged record {path}: {reason}; to do without it: mv {path} {path}.bad") from None
    return events


def read_runs(records: Path) -> list[Events]:
    """All runs, in the order of their starts. Raises UserError where there are none, and for a damaged record."""
    runs = []
    for path in sorted(records.glob("*.jsonl")):
        events = read_run(path)
        if events:
            runs.append(events)
        else:
            print(f"{path} is empty: left out")
    if not runs:
        raise UserError(f"no records in {records}; run a stage first, such as: bash dev/runcpu.sh")
    return sorted(runs, key=lambda run: run[0]["time"])


def chain(runs: Iterable[Events], stage: str, tag: str | None = None) -> list[Events]:
    """A stage's newest run (of a tag, if one is given), after the runs that it resumed; empty where there is none."""
    of_stage = [run for run in runs if run[0]["stage"] == stage and tag in (None, run[0]["tag"])]
    found = of_stage[-1:]
    for earlier in reversed([run for run in of_stage[:-1] if run[0]["tag"] == found[0][0]["tag"]]):
        if first_step(found[0]) == 0:
            break
        found = [earlier, *found]
    return found


def first_step(run: Events) -> int:
    """How many steps were done before this run began."""
    return next((event["first_step"] for event in run if event["event"] == "plan"), 0)


def merged(runs: Sequence[Events]) -> Events:
    """The events of a chain as those of one run, without the steps that were done again and without early ends."""
    events: Events = []
    for run in runs:
        done = first_step(run)
        # Step events are numbered from 0; evaluations and samples say how many steps were done before them.
        kept = [event for event in events if event.get("step", 0) < done + (event["event"] != "step")]
        events = [event for event in kept if event["event"] not in ("end", "stopped")] + run
    return events


def newest(runs: Iterable[Events], stage: str, tag: str | None = None) -> Events:
    """The events of a stage's newest run (of a tag, if one is given), merged with those of the runs it resumed."""
    return merged(chain(runs, stage, tag))


def last(events: Events, kind: str, key: str, default: Any = None) -> Any:
    """The newest value of a key in events of a kind."""
    return next((event[key] for event in reversed(events) if event["event"] == kind and key in event), default)


def points(events: Events, kind: str, key: str) -> list[tuple[float, float]]:
    """(steps done, value) of the events of a kind that hold a finite number under this key."""
    having = [event for event in events if event["event"] == kind and isinstance(event.get(key), int | float)]
    return [(e["step"] + (kind == "step"), e[key]) for e in having if math.isfinite(e[key])]


def seconds_of(run: Events) -> float:
    """How long a run took: as it says itself, or from its first event to its last."""
    return float(run[-1].get("seconds_in_all", run[-1]["time"] - run[0]["time"]))


# -----------------------------------------------------------------------------
# Scores


def grades(runs: Iterable[Events]) -> Grades:
    """{task, or one of MEANS, perhaps with PARTIAL before it: {stage: event}}, each event with the tag of its run and
    its samples. The newest one counts; of a stage's chat models only the one that was evaluated last. Models that are
    not ours (--hf-path) are left out.
    """
    tags = {event["source"]: run[0]["tag"] for run in runs for event in run if event["event"] == "task"}
    found: Grades = {}
    for run in runs:
        tag = run[0]["tag"]
        for event in run:
            source = event.get("source", run[0]["settings"].get("source", "base"))
            if run[0]["settings"].get("hf_path") or (run[0]["stage"] == "chat_eval" and tag != tags.get(source, tag)):
                continue
            if event["event"] in MEANS:
                name = (PARTIAL if event.get("partial") else "") + MEANS[event["event"]]
                found.setdefault(name, {})[source] = {"stderr": core_error(run), **event, "tag": tag}
            elif event["event"] == "task":
                key = (source, event["task"])
                shown = [e for e in run if e["event"] == "sample" and (e["source"], e["task"]) == key]
                found.setdefault(event["task"], {})[source] = {**event, "tag": tag, "samples": shown}
    return {name: {stage: events[stage] for stage in STAGES if stage in events} for name, events in found.items()}


def is_mean(name: str) -> bool:
    """Whether this is a mean over tasks and no task."""
    return name.removeprefix(PARTIAL) in MEANS.values()


def core_error(run: Events) -> float | None:
    """Standard error of the mean of a run's CORE tasks: theirs in quadrature, each stretched as its accuracy is when it
    is centred to (accuracy - guessing) / (1 - guessing). None without such tasks.
    """
    tasks = [event for event in run if event["event"] == "core_task"]
    errors = [e["stderr"] * (1 - e["centered"]) / (1 - e["accuracy"]) for e in tasks if e["accuracy"] < 1]
    return math.hypot(*errors) / len(tasks) if tasks else None


def val_bpb(runs: Sequence[Events], base: Events) -> Event:
    """Bits per byte of validation text as an event with the value: from base_loss if that ran after training began, or
    else from the training; {} where there is none.
    """
    loss = newest(runs, "base_loss")
    scored = [event for event in loss if event["event"] == "bpb" and event["split"] == "val"]
    if scored and loss[0]["time"] >= last(base, "start", "time", 0):
        return {**scored[-1], "value": scored[-1]["bpb"]}
    return next(({**e, "value": e["val_bpb"]} for e in reversed(base) if e["event"] == "eval" and "val_bpb" in e), {})


# -----------------------------------------------------------------------------
# Cost


def price(start: Event, dollars: float | None) -> float | None:
    """Dollars that an hour of a run costs: of all its cards. None where no price was given and none is known."""
    device = start.get("device", "cpu")
    each = dollars if dollars is not None else next((d for name, d in DOLLARS.items() if name in device), None)
    return each if each is None or device == "cpu" else each * start.get("ranks", 1)


def cost(runs: Sequence[Events], dollars: float | None) -> tuple[str, str]:
    """What the runs with a price cost together, from their first event to their last, and how that was reckoned."""
    priced = [(run, each) for run in runs if (each := price(run[0], dollars)) is not None]
    if not priced:
        return "-", "no price is known for this machine; --dollars-per-hour=PRICE sets one"
    hours = sum(seconds_of(run) for run, _ in priced) / 3600
    total = sum(seconds_of(run) / 3600 * each for run, each in priced)
    rates = " or ".join(dict.fromkeys(f"${each:,.2f}" for _, each in priced))
    left_out = len(runs) - len(priced)
    rest = f"; {left_out} of the runs {'are' if left_out > 1 else 'is'} without a known card and not in it"
    return f"${total:,.2f}", f"{duration(3600 * hours)} of runs at {rates} an hour{rest if left_out else ''}"


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
    """A mean over tasks, or an accuracy in percent, with its standard error where that is known."""
    scale, form = (1, ".4f") if "value" in event else (100, ".1f")
    value, error = event.get("value", event.get("accuracy")), event.get("stderr")
    told = number(value if value is None else scale * value, form)
    return told if error is None else f"{told} ± {scale * error:{form}}"


def share(pass_at: dict[str, float]) -> str:
    """pass@k in percent, with its standard error."""
    return score({"accuracy": pass_at["value"], "stderr": pass_at["stderr"]})


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
    kinds, told = {event["event"] for event in run}, []
    if first_step(run):
        told.append(f"resumed at step {first_step(run):,}")
    if "stopped" in kinds:
        told.append(f"after step {last(run, 'stopped', 'step', 0):,}: {last(run, 'stopped', 'reason', '')}")
    elif "plan" in kinds and "end" not in kinds:  # stages without a plan do not all say that they end
        done = max((event["step"] + 1 for event in run if event["event"] == "step"), default=first_step(run))
        told.append(f"not finished, {done:,} steps done")
    return "; ".join(told)


def hardware(start: Event) -> str:
    """What a run computed on: cards and how many ranks, where the record has them, or else the processor."""
    ranks, device = start.get("ranks", 1), start.get("device")
    if device and device != "cpu":
        return f"{ranks} x {device}"
    return f"{start['cpu']}, {start['cpu_count']} cores" + (f", {ranks} ranks" if ranks > 1 else "")
