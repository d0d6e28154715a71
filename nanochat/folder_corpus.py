"""Text from a folder of the user's own: every row of its parquet files, line of its jsonl files, and whole txt files.

Promises: the same order on every machine; every mistake names the file, and the line where there is one; nothing is
left out unseen: what has another ending is counted. Does not: change a character of the text (only a byte order mark
goes), nor guess encodings: files are UTF-8.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from nanochat.common import UserError
from nanochat.shards import iter_text


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
    for texts in iter_text([file]):
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
