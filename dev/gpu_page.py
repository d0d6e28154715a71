"""The page of dev/gpu_day.sh: a section for each group of parts with their commands, and a table of their figures.

Of a part there is NAME.log, with figures in a last line that is a JSON object, and NAME.end, its exit code and command;
NAME.json is a trace of torch.profiler. One that failed stands there with its last words.
"""

from nanochat.configurator import configure

folder = ""  # with the files of the parts
parts = ""  # their names, GROUP or GROUP-NAME, in the order of the page
about = ""  # card, versions
page = ""  # the file to write
settings = configure(__name__)

import json
from itertools import groupby
from pathlib import Path
from typing import Any

from nanochat.common import run_main
from nanochat.files import write_atomic

HEAD = """# What was measured on a GPU

{about}. Made by `bash dev/gpu_day.sh`, which says what each part is.
"""


def main() -> None:
    write_atomic(Path(page), make(Path(folder), parts.split(), about))


def make(folder: Path, names: list[str], about: str) -> str:
    """The page, of those parts that have ended."""
    ended = [name for name in names if (folder / f"{name}.end").exists()]
    groups = groupby(ended, key=lambda name: name.partition("-")[0])
    return "\n".join([HEAD.format(about=about), *(section(group, folder, list(own)) for group, own in groups)])


def section(group: str, folder: Path, names: list[str]) -> str:
    commands, columns, words = [], {}, []
    for name in names:
        code, command = (folder / f"{name}.end").read_text().strip().split(" ", 1)
        log = (folder / f"{name}.log").read_text(errors="replace").replace("```", "").strip().splitlines()
        commands.append(command)
        figures = read_figures(log[-1]) if log and code == "0" else None
        if figures and (trace := folder / f"{name}.json").exists():
            figures = costliest(json.loads(trace.read_text()))
        if figures:
            columns[name.partition("-")[2] or group] = figures
        else:
            how = "" if code == "0" else f"{name} failed with exit code {code}:\n\n"
            words.append(f"{how}```\n" + "\n".join(log[-5:] or ["it printed nothing"]) + "\n```\n")
    text = ["```bash", *commands, "```", ""]
    return "\n".join([f"## {group.capitalize()}", "", *text, *([table(columns), ""] if columns else []), *words])


def read_figures(line: str) -> dict[str, Any] | None:
    try:
        figures = json.loads(line)
    except ValueError:
        return None
    return figures if isinstance(figures, dict) else None


def costliest(trace: dict[str, Any], most: int = 8) -> dict[str, float]:
    """Milliseconds of the kernels that take most of the step; where there is no GPU, of torch's operators."""
    spent: dict[str, dict[str, float]] = {"kernel": {}, "cpu_op": {}}
    for event in trace["traceEvents"]:
        if event.get("cat") in spent:
            sums, name = spent[event["cat"]], event["name"].removeprefix("void ").partition("<")[0][:60]
            sums[f"{name} ms"] = sums.get(f"{name} ms", 0) + event["dur"] / 1000
    sums = spent["kernel"] or spent["cpu_op"]
    return dict(sorted(sums.items(), key=lambda item: -item[1])[:most])


def table(columns: dict[str, dict[str, Any]]) -> str:
    """A row for each figure that any column has, a column for each part."""
    rows = list(dict.fromkeys(key for figures in columns.values() for key in figures))
    lines = [["what", *columns], ["---", *("---:" for _ in columns)]]
    lines += [[key.replace("_", " "), *(cell(figures.get(key)) for figures in columns.values())] for key in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(value: object) -> str:
    if isinstance(value, float) and not value.is_integer():
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return "-" if value is None else f"{value:,.0f}" if type(value) in (int, float) else str(value).replace("|", "/")


if __name__ == "__main__":
    run_main(main)
