"""A corpus from a folder of the user's own: every row of its parquet files, line of its jsonl files, whole txt files.

Promises: the same order on every machine; every mistake names the file, and the line where there is one; nothing is
left out unseen: what has another ending is counted. Does not: change a character of the text (only a byte order mark
goes), nor guess encodings: files are UTF-8.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from nanochat.common import UserError, print0
from nanochat.corpus import MANIFEST, SOURCES, Shards, iter_text, read_manifest
from nanochat.corpus_writer import write_corpus


def build_folder(folder: Path, corpus: Path, fraction: float | None) -> dict[str, Any]:
    """Make a corpus of all documents under `folder`, and return its manifest.

    Validation is what lies in files or directories called val or validation (val_00000.parquet, val/a.txt); where there
    are none, the `fraction` (None = 0.01, at least one) of the documents with the smallest sha256. Null and empty
    documents are counted.
    """
    check_same_origin(corpus, str(folder))
    files, others = list_folder(folder)
    named = {file for file in files if any(map(is_validation_name, file.relative_to(folder).parts))}
    if named and fraction is not None:
        raise UserError(
            f"val_fraction={fraction}: {folder} names its validation files ({len(named)} of them); leave it out"
        )
    fraction = 0.01 if fraction is None else fraction
    by = f"{len(named)} files named val*" if named else f"the {fraction:g} of the documents with the smallest sha256"
    print0(f"{folder}: {len(files):,} files to read, {others:,} of other kinds left out; validation: {by}")
    highest = 0 if named else highest_validation_hash(files, fraction)
    left_out: Counter[str] = Counter()

    def documents() -> Iterator[tuple[bool, str]]:
        for file in files:
            for text in read_documents(file):
                if text.strip():
                    yield (file in named if named else hash_of(text) <= highest), text
                else:
                    left_out["empty"] += 1

    about: dict[str, Any] = {"source": "folder", "arguments": {"path": str(folder), "val_fraction": fraction}}
    about |= {"validation_by": by, "other_files": others, "left_out": left_out}
    return write_corpus(corpus, documents(), about)


def check_same_origin(corpus: Path, path: str) -> None:
    """Refuse to replace a corpus that came from somewhere else."""
    other = f"choose another name: --name={corpus.name}-2"
    if corpus.name in SOURCES:
        raise UserError(f"name={corpus.name}: the name of another source; {other}")
    if (corpus / MANIFEST).exists():
        origin = read_manifest(corpus)["arguments"].get("path")
        if origin != path:
            raise UserError(f"name={corpus.name}: {corpus} was made from {origin}; {other}")


def list_folder(folder: Path) -> tuple[list[Path], int]:
    """The files to read, sorted by path, and the number of others. Names that begin with a dot are not looked at."""
    if not folder.is_dir():
        raise UserError(f"path={folder}: not a directory; give one with parquet, jsonl or txt files: --path=DIR")
    visible = [
        file
        for file in folder.rglob("*")
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    ]
    files = sorted(
        (file for file in visible if file.suffix in READERS), key=lambda file: file.relative_to(folder).parts
    )
    if not files:
        kinds = ", ".join(READERS)
        raise UserError(f"path={folder}: none of its {len(visible):,} files ends in {kinds}; give another: --path=DIR")
    return files, len(visible) - len(files)


def is_validation_name(part: str) -> bool:
    """val, val_00000.parquet, val2.txt, validation-a.jsonl; but not values.txt."""
    return re.match(r"val(id|idation)?(?![a-z])", part.lower()) is not None


def highest_validation_hash(files: Iterable[Path], fraction: float) -> int:
    """Read everything once to find the hash up to which documents validate; the same text always falls on the same
    side.
    """
    hashes = np.fromiter((hash_of(text) for file in files for text in read_documents(file) if text.strip()), np.uint64)
    count = max(1, round(fraction * len(hashes)))
    if count >= len(hashes):
        more = "give it more, or put what validates in a file named val.txt"
        raise UserError(f"{len(hashes)} documents are too few to keep {count} for validation; {more}")
    return int(np.partition(hashes, count - 1)[count - 1])


def hash_of(text: str) -> int:
    """The first 64 bits of a text's sha256."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def read_documents(file: Path) -> Iterator[str]:
    """Yield the documents of one file; a null is "". UserError, in one line, for a file that is damaged or
    holds none.
    """
    if not file.stat().st_size:
        raise UserError(f"{file}: empty file; fill it or take it away")
    empty = True
    for text in READERS[file.suffix](file):
        empty = False
        yield text
    if empty:
        raise UserError(f"{file}: holds no documents; fill it or take it away")


def read_parquet(file: Path) -> Iterator[str]:
    """Yield the text column of a parquet file."""
    for texts in iter_text(Shards((file,))):
        try:
            yield from texts.to_pylist()
        except UnicodeDecodeError as error:
            raise UserError(f"{file}: text is not UTF-8 ({error.reason}); convert it or take it away") from None


def read_jsonl(file: Path) -> Iterator[str]:
    """Yield the text field of every line; blank lines are no documents."""
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.isspace():
                continue
            try:
                text = json.loads(line.decode())["text"]
                text = "" if text is None else text
                text.encode()  # an escaped half of a surrogate pair is valid JSON and not valid text
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                raise UserError(f'{file}:{number}: expected one line of JSON like {{"text": "..."}} in UTF-8') from None
            yield text


def read_txt(file: Path) -> Iterator[str]:
    """Yield a text file as one document."""
    try:
        with open(file, encoding="utf-8-sig", newline="") as stream:
            yield stream.read()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file}: not UTF-8 at byte {error.start:,} ({error.reason}); convert it or take it away"
        ) from None


READERS: dict[str, Callable[[Path], Iterator[str]]] = {".parquet": read_parquet, ".jsonl": read_jsonl, ".txt": read_txt}
