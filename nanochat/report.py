"""
The report card of everything that ran under this base directory, from its records alone.

    python -m nanochat.report generate      # print it, and write $NANOCHAT_BASE_DIR/report/report.md
    python -m nanochat.report reset         # begin a new one: earlier records move to records/before-<time>/

The newest record of each stage counts; a run that was stopped and resumed is one run. A stage that has not run shows as
"-".
"""

from typing import Literal

from nanochat.configurator import configure

SHORT = {"": "action"}

# Action
action: Literal["generate", "reset"] = "generate"  # generate: print and write the report; reset: put the records aside
settings = configure(__name__)

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nanochat.common import UserError, get_base_dir, read_record, run_main, write_atomic

Events = list[dict[str, Any]]
BLOCKS = " ▁▂▃▄▅▆▇█"


def main() -> None:
    records = get_base_dir() / "records"
    paths = sorted(records.glob("*.jsonl"), key=lambda path: path.stat().st_mtime)
    if action == "reset":
        aside = records / f"before-{time.strftime('%Y%m%d-%H%M%S')}"
        aside.mkdir(parents=True)
        for path in paths:
            path.rename(aside / path.name)
        print(f"{len(paths)} records are now in {aside}")
        return
    if not paths:
        raise UserError(f"no records in {records}; run a stage first, such as: bash dev/runcpu.sh")
    text = render([read_record(path) for path in paths])
    target = get_base_dir() / "report" / "report.md"
    write_atomic(target, text)
    print(text)
    print(f"written to {target}")


def render(runs: Sequence[Events]) -> str:
    """The report as Markdown, of runs in the order they were started."""
    base, loss = newest(runs, "base"), newest(runs, "base_loss")
    corpus_name = next((event["name"] for event in base if event["event"] == "corpus"), None)
    corpus, tokenizer = newest(runs, "dataset", corpus_name), newest(runs, "tok_train")
    sections = [
        machine(runs[-1]),
        stages(runs),
        text_section(corpus, tokenizer),
        base_section(base, loss),
        samples(base),
    ]
    return "# Report\n\n" + "\n\n".join("\n".join(section) for section in sections if section) + "\n"


def newest(runs: Sequence[Events], stage: str, tag: str | None = None) -> Events:
    """The events of a stage's newest run (of a tag, if one is given), after those of the runs that it resumed."""
    of_stage = [run for run in runs if run and run[0]["stage"] == stage and tag in (None, run[0]["tag"])]
    if not of_stage:
        return []
    events = of_stage[-1]
    for earlier in reversed(of_stage[:-1]):
        first_step = next((event["first_step"] for event in events if event["event"] == "plan"), 0)
        if first_step == 0 or earlier[0]["tag"] != events[0]["tag"]:
            break
        events = [event for event in earlier if event.get("step", 0) < first_step] + events
    return events


def last(events: Events, kind: str, key: str, default: Any = None) -> Any:
    """The newest value of a key in events of a kind."""
    return next((event[key] for event in reversed(events) if event["event"] == kind and key in event), default)


def number(value: Any, form: str = ",") -> str:
    """A figure, or "-" where there is none."""
    return "-" if value is None else format(value, form)


# -----------------------------------------------------------------------------
# Sections


def machine(run: Events) -> list[str]:
    start = run[0]
    versions = ", ".join(f"{name} {version}" for name, version in start["versions"].items())
    lines = ["## Machine", "", f"- {start['cpu']}, {start['cpu_count']} cores, {start['platform']}"]
    return [*lines, f"- Python {start['python']}, {versions}", f"- commit {start['git']}"]


def stages(runs: Sequence[Events]) -> list[str]:
    lines = ["## Stages", "", "| stage | tag | command | seconds |", "|---|---|---|---:|"]
    total = 0.0
    for run in runs:
        start, end = run[0], run[-1]
        seconds = end.get("seconds_in_all", end["time"] - start["time"])
        total += seconds
        module = ".".join(Path(start["argv"][0]).with_suffix("").parts[-2:])
        lines.append(
            f"| {start['stage']} | {start['tag']} | `{' '.join([module, *start['argv'][1:]])}` | {seconds:,.0f} |"
        )
    return [*lines, f"| all | | | {total:,.0f} |"]


def text_section(corpus: Events, tokenizer: Events) -> list[str]:
    totals = last(corpus, "corpus", "totals", {})
    lines = ["## Text and tokenizer", ""]
    for role in ("train", "validation"):
        part = totals.get(role, {})
        lines.append(f"- {role}: {number(part.get('documents'))} documents, {number(part.get('text_bytes'))} bytes")
    bytes_per_token = last(tokenizer, "end", "bytes_per_token")
    return [
        *lines,
        f"- vocabulary: {number(last(tokenizer, 'end', 'vocab_size'))} tokens, "
        f"{number(bytes_per_token, '.2f')} bytes per token on validation text",
    ]


def base_section(base: Events, loss: Events) -> list[str]:
    steps = [event for event in base if event["event"] == "step"]
    flops, mfu, memory = (last(base, "end", key) for key in ("flops_per_second", "mfu", "peak_memory_bytes"))
    val_bpb = next((e["bpb"] for e in reversed(loss) if e["event"] == "bpb" and e["split"] == "val"), None)
    rows = [
        ("parameters", number(last(base, "plan", "parameters"))),
        ("steps", number(last(base, "plan", "num_steps"))),
        ("batch", last(base, "plan", "batch", "-")),
        ("tokens per second", number(last(base, "end", "tokens_per_second"))),
        ("MFU" if mfu else "GFLOP/s", format(mfu, ".1%") if mfu else number(flops and flops / 1e9, ",.0f")),
        ("peak memory, GB", number(memory and memory / 1e9, ".2f")),
        ("training seconds", number(last(base, "end", "train_seconds"), ",.0f")),
        ("**val bpb**, every byte scored once", number(val_bpb or last(base, "eval", "val_bpb"), ".4f")),
        ("to beat: byte frequencies, bpb", number(last(loss, "baselines", "byte_unigram"), ".4f")),
        ("to beat: xz -9 on train + val, bpb", number(last(loss, "baselines", "xz"), ".4f")),
    ]
    lines = ["## Base model", "", "| | |", "|---|---:|", *(f"| {name} | {value} |" for name, value in rows)]
    if steps:
        losses = [event["smooth_loss"] for event in steps]
        lines += [
            "",
            f"Loss, {losses[0]:.2f} at the first step to {losses[-1]:.2f} at the last:",
            "",
            f"    {sparkline(losses)}",
        ]
        quick = [(e["step"], e["val_bpb_quick"]) for e in base if "val_bpb_quick" in e]
        if quick:
            lines += ["", "Quick val bpb: " + ", ".join(f"{bpb:.3f} at step {step:,}" for step, bpb in quick)]
    return lines


def sparkline(values: Sequence[float], width: int = 72) -> str:
    """A curve in one line of text, from the lowest value to the highest."""
    picked = [values[i * (len(values) - 1) // (width - 1)] for i in range(width)] if len(values) > width else values
    low, high = min(picked), max(picked)
    return "".join(BLOCKS[1 + round((value - low) / ((high - low) or 1) * (len(BLOCKS) - 2))] for value in picked)


def samples(base: Events) -> list[str]:
    """What the model wrote at its last sampling."""
    written = [event for event in base if event["event"] == "sample"]
    final = [event for event in written if event["step"] == written[-1]["step"]]
    return (
        ["## Samples", "", *(f"- **{event['prompt']}**{event['text']}".replace("\n", " / ") for event in final)]
        if final
        else []
    )


if __name__ == "__main__":
    run_main(main)
