"""Fill $NANOCHAT_BASE_DIR/task_data from the original published files of the tasks, for machines without a hub.

    python -m dev.import_task_data FOLDER

Files are known by their names, at any depth below FOLDER, and by what is in them. Written are the rows that the Hugging
Face data set of that name has. Promises: a split that is there already is kept, unless --overwrite; what is left out
is said and why, also where a split has fewer rows than were published.
"""

import csv
import gzip
import io
import json
import re
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from nanochat.common import UserError, print0, run_main
from nanochat.configurator import configure

SHORT = {"": "folder"}

folder: str | None = None  # where the published files are
overwrite = False  # replace splits that are there already
settings = configure(__name__)

import pyarrow as pa
import pyarrow.parquet as pq

from tasks.common import PUBLISHED_ROWS, rows_path, write_rows

Row = dict[str, Any]
STRINGS = pa.list_(pa.string())
GSM8K = pa.schema({"question": pa.string(), "answer": pa.string()})
MMLU = pa.schema({"question": pa.string(), "subject": pa.string(), "choices": STRINGS, "answer": pa.int64()})
ARC = pa.schema(
    {
        "id": pa.string(),
        "question": pa.string(),
        "choices": pa.struct({"text": STRINGS, "label": STRINGS}),
        "answerKey": pa.string(),
    }
)
HUMANEVAL = pa.schema(
    {name: pa.string() for name in ("task_id", "prompt", "canonical_solution", "test", "entry_point")}
)
SMOLTALK = pa.schema({"messages": pa.list_(pa.struct({"content": pa.string(), "role": pa.string()}))})
WORDS = pa.schema({"word": pa.string()})
ANSWERS = {"0": 0, "1": 1, "2": 2, "3": 3, "A": 0, "B": 1, "C": 2, "D": 3}


class Place(NamedTuple):
    """Where rows go: task_data/<dataset>/<subset>/<split>.parquet."""

    dataset: str
    subset: str
    split: str


class Kind(NamedTuple):
    """A published file: its name, to be read by people; the end of its path, in lower case; where its rows go."""

    name: str
    path: str
    place: Callable[[re.Match[str]], Place]
    read: Callable[[Path], pa.Table]
    many: bool = False  # a split is made of several files


# -----------------------------------------------------------------------------
# Reading

UNREADABLE = (  # what a file raises that is not what its name says
    *(ValueError, LookupError, TypeError, OSError, EOFError, pa.ArrowException),
    *(csv.Error, zlib.error, zipfile.BadZipFile),
)


def to_table(rows: Iterable[Row], schema: pa.Schema) -> pa.Table:
    """Rows as a table of exactly the columns of the schema; KeyError where one is missing."""
    return pa.Table.from_pylist([{name: row[name] for name in schema.names} for row in rows], schema)


def read_bytes(path: Path) -> bytes:
    """A file's bytes, unpacked: of a zip the one file in it."""
    if path.suffix == ".gz":
        return gzip.decompress(path.read_bytes())
    if path.suffix == ".zip":
        with zipfile.ZipFile(path) as archive:
            return archive.read(archive.namelist()[0])
    return path.read_bytes()


def read_json(path: Path) -> Iterator[Row]:
    """The objects of a JSON list, or of one JSON object per line."""
    text = read_bytes(path).decode("utf-8-sig")
    if text.lstrip().startswith("["):
        yield from json.loads(text)
    else:
        yield from (json.loads(line) for line in text.split("\n") if line.strip())


def read_gsm8k(path: Path) -> pa.Table:
    table = to_table(read_json(path), GSM8K)
    if not all("####" in answer for answer in table["answer"].to_pylist()):
        raise ValueError("answers without ####")
    return table


def read_mmlu(path: Path) -> pa.Table:
    """Question, four choices, answer per line: with a header and 0 to 3, or, as first published, without and A to D."""
    is_train = path.parent.name.lower() == "auxiliary_train"  # of no subject, as in the Hugging Face data set
    subject = "" if is_train else path.stem.rpartition("_")[0]
    lines = list(csv.reader(io.StringIO(path.read_text(encoding="utf-8-sig"), newline="")))
    rows = []
    for line in lines[1:] if lines and lines[0][-1] == "answer" else lines:
        if len(line) != 6:
            raise ValueError(f"a row of {len(line)} columns, not 6")
        question, *choices, answer = line
        rows.append({"question": question, "subject": subject, "choices": choices, "answer": ANSWERS[answer]})
    return to_table(rows, MMLU)


def read_arc(path: Path) -> pa.Table:
    """The rows of the Hugging Face data set, or as first published, with question.stem and question.choices."""
    rows = []
    for row in read_json(path):
        if isinstance(row["question"], dict):
            choices = row["question"]["choices"]
            columns = {key: [choice[key] for choice in choices] for key in ("text", "label")}
            row = {**row, "question": row["question"]["stem"], "choices": columns}
        rows.append(row)
    return to_table(rows, ARC)


def read_humaneval(path: Path) -> pa.Table:
    return to_table(read_json(path), HUMANEVAL)


def read_smoltalk(path: Path) -> pa.Table:
    if path.suffix == ".parquet":
        return pq.read_table(path, columns=["messages"]).cast(SMOLTALK)
    return to_table(read_json(path), SMOLTALK)


def read_words(path: Path) -> pa.Table:
    return to_table(({"word": word} for word in read_bytes(path).decode().split()), WORDS)


# -----------------------------------------------------------------------------
# What is known

SPLITS = {"train": "train", "dev": "validation", "val": "validation", "validation": "validation", "test": "test"}
KINDS = (
    Kind(
        "gsm8k/{train,test}.jsonl",
        r"(train|test)\.jsonl",
        lambda match: Place("openai/gsm8k", "main", match[1]),
        read_gsm8k,
    ),
    Kind(
        "mmlu/*_{dev,val,test}.csv",
        r"\w+_(dev|val|test)\.csv",
        lambda match: Place("cais/mmlu", "all", {"val": "validation"}.get(match[1], match[1])),
        read_mmlu,
        many=True,
    ),
    Kind(
        "mmlu/auxiliary_train/*.csv",
        r"auxiliary_train/[^/]+\.csv",
        lambda match: Place("cais/mmlu", "auxiliary_train", "train"),
        read_mmlu,
        many=True,
    ),
    Kind(
        "ARC-{Easy,Challenge}-{Train,Dev,Test}.{jsonl,json}",
        r"arc[-_](easy|challenge)[-_](train|dev|val|validation|test)(?:_\d+)?\.jsonl?",
        lambda match: Place("allenai/ai2_arc", f"ARC-{match[1].title()}", SPLITS[match[2]]),
        read_arc,
    ),
    Kind(
        "HumanEval.jsonl{,.gz}",
        r"humaneval\.jsonl(?:\.gz)?",
        lambda match: Place("openai/openai_humaneval", "openai_humaneval", "test"),
        read_humaneval,
    ),
    Kind(
        "smol-smoltalk/{train,test}-*.{parquet,jsonl}",
        r"[^/]*smoltalk(?:/data/|[-_/])(train|test)(?:-\d+-of-\d+)?\.(?:parquet|jsonl)",
        lambda match: Place("HuggingFaceTB/smol-smoltalk", "default", match[1]),
        read_smoltalk,
        many=True,
    ),
    Kind(
        "words_alpha.{txt,zip}", r"words_alpha\.(?:txt|zip)", lambda match: Place("words", "default", "all"), read_words
    ),
)


def recognise(path: str) -> tuple[Kind, Place] | None:
    """What a file is by its path, if anything. Later kinds first: smoltalk/train.jsonl is none of GSM8K's."""
    for kind in reversed(KINDS):
        if match := re.search(rf"(?:^|/){kind.path}$", path.lower()):
            return kind, kind.place(match)
    return None


def find_files(root: Path) -> tuple[dict[Place, list[tuple[Kind, Path]]], int]:
    """The known files below a folder by where their rows go, in the order of their paths; and how many others."""
    found: dict[Place, list[tuple[Kind, Path]]] = defaultdict(list)
    others = 0
    for path in sorted(path for path in root.rglob("*") if path.is_file()):
        known = recognise(path.relative_to(root).as_posix())
        if known:
            found[known[1]].append((known[0], path))
        else:
            others += 1
    return found, others


# -----------------------------------------------------------------------------
# Importing


def read_split(files: list[tuple[Kind, Path]]) -> tuple[list[pa.Table], list[Path]]:
    """The tables of the files that make up a split, and these files. What is left out is printed."""
    tables: list[pa.Table] = []
    used: list[Path] = []
    for kind, path in files:
        twin = next((other for other in used if other.name == path.name or not kind.many), None)
        if twin:
            print0(f"  left out {path}: taken from {twin}")
            continue
        try:
            table = kind.read(path)
            if not table.num_rows:
                raise ValueError("no rows")
        except UNREADABLE as error:
            reason = (str(error).splitlines() or [""])[0]
            print0(f"  left out {path}: not as {kind.name} ({type(error).__name__}: {reason})")
            continue
        tables.append(table)
        used.append(path)
    return tables, used


def import_split(place: Place, files: list[tuple[Kind, Path]]) -> bool:
    """Write one split and say so; False where no file could be read."""
    target = rows_path(*place)
    if target.exists() and not overwrite:
        print0(f"{target}: kept, it is there already; replace it with --overwrite")
        return True
    tables, used = read_split(files)
    if not tables:
        return False
    table = pa.concat_tables(tables)
    write_rows(*place, table, "original files " + " ".join(path.name for path in used))
    published = PUBLISHED_ROWS.get(place, 0)
    missing = f", {published - len(table):,} fewer than published" if len(table) < published else ""
    origin = str(used[0]) if len(used) == 1 else f"{len(used)} files such as {used[0]}"
    print0(f"{target}: {len(table):,} rows{missing}, from {origin}")
    return True


def main() -> None:
    if folder is None or not Path(folder).is_dir():
        raise UserError(f"folder={folder}: no such directory; give one: python -m dev.import_task_data FOLDER")
    found, others = find_files(Path(folder))
    done = [import_split(place, files) for place, files in sorted(found.items())]
    if others:
        print0(f"not looked at: {others:,} files with other names")
    if not any(done):
        raise UserError(f"folder={folder}: none of the files known here: {', '.join(kind.name for kind in KINDS)}")


if __name__ == "__main__":
    run_main(main)
