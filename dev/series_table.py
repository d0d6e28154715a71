"""One table of several base runs, from their records: size, tokens, FLOPs, bits per byte, CORE, time.

    python -m dev.series_table --prefix=mini-

Prints it and writes report/<prefix>.csv, for dev/miniseries.sh and dev/scaling_laws.sh. A run that is not finished has
no bits per byte yet, one that was not scored has no CORE.
"""

from nanochat.configurator import configure

# Runs
prefix = ""  # tags that begin with this; empty = all
settings = configure(__name__)

import csv
import io
from typing import Any

from nanochat.common import UserError, get_base_dir, run_main
from nanochat.files import write_atomic
from nanochat.report import Event, Events, last, merged, newest, read_runs

COLUMNS = "tag depth parameters tokens tokens_per_parameter flops val_bpb core train_seconds".split()


def main() -> None:
    records = get_base_dir() / "records"
    runs = read_runs(records)
    tags = sorted({run[0]["tag"] for run in runs if run[0]["stage"] == "base" and run[0]["tag"].startswith(prefix)})
    if not tags:
        raise UserError(f"--prefix={prefix}: no base run in {records} has such a tag")
    rows = sorted((row_of(runs, tag) for tag in tags), key=lambda row: (row["flops"], row["depth"]))
    print("  ".join(f"{name:>{width_of(name)}}" for name in COLUMNS))
    for row in rows:
        print("  ".join(f"{shown(row[name]):>{width_of(name)}}" for name in COLUMNS))
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    path = get_base_dir() / "report" / f"{prefix.rstrip('-') or 'base'}.csv"
    write_atomic(path, text.getvalue())
    print(f"written to {path}")


def row_of(runs: list[Events], tag: str) -> Event:
    """The newest base run of a tag as a row; what is planned and not yet done counts in tokens and FLOPs."""
    run = newest(runs, "base", tag)
    scored = merged([r for r in runs if r[0]["stage"] == "base_eval" and r[0]["settings"].get("model_tag") == tag])
    parameters, steps = last(run, "plan", "parameters"), last(run, "plan", "num_steps")
    tokens = steps * int(last(run, "plan", "batch").split()[0].replace(",", ""))
    return {
        "tag": tag,
        "depth": run[0]["settings"]["depth"],
        "parameters": parameters,
        "tokens": tokens,
        "tokens_per_parameter": round(tokens / parameters, 2),
        "flops": tokens * last(run, "plan", "flops_per_token"),
        "val_bpb": last(run, "eval", "val_bpb"),
        "core": last(scored, "core", "value"),
        "train_seconds": last(run, "end", "train_seconds"),
    }


def width_of(name: str) -> int:
    return max(len(name), 14)


def shown(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.5g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    run_main(main)
