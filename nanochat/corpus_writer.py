"""Documents in, a corpus out: a folder's files, say, to shuffled parquet shards and a manifest of what they hold.

Promises: the same documents give the same bytes, and a folder the same order on every machine; validation documents are
never among the training ones; a corpus that is replaced stays until the new one is whole; every mistake names the file,
and the line where there is one; nothing is left out unseen: files with another ending are counted. Does not: change a
character of the text (only a byte order mark goes), nor guess encodings: files are UTF-8.
"""

import hashlib
import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from nanochat.common import UserError, print0
from nanochat.corpus import MANIFEST, ROW_GROUP_DOCUMENTS, SOURCES, Shards, iter_text, read_manifest
from nanochat.files import one_line, seal, sha256_file, whole, write_atomic

ROW_GROUP_BYTES = 4 << 20  # text in a row group, about: small enough to read singly, large enough for zstd
SHARD_BYTES = 100 << 20  # text in one shard; also what is shuffled together, in memory
SHUFFLE_SEED = 1337


def write_corpus(corpus: Path, documents: Iterable[tuple[bool, str]], about: dict[str, Any]) -> dict[str, Any]:
    """Write (is for validation, text) pairs as a corpus; its manifest. `about` is read when they are used up."""
    entries: dict[str, list[dict[str, Any]]] = {"train": [], "validation": []}
    waiting: dict[str, list[str]] = {"train": [], "validation": []}
    sizes = Counter[str]()
    with whole(corpus) as building:
        building.mkdir()

        def flush(role: str) -> None:
            number = sum(map(len, entries.values()))
            # Files of a folder come sorted by name, hence by kind; a model would end its training on the last kind.
            random.Random(SHUFFLE_SEED + number).shuffle(waiting[role])
            file = building / f"shard_{number:05d}.parquet"
            write_shard(file, waiting[role], len(waiting[role]) * ROW_GROUP_BYTES // (sizes[role] + 1))
            entries[role].append(describe_shard(file))
            waiting[role], sizes[role] = [], 0

        for validates, text in documents:
            role = "validation" if validates else "train"
            waiting[role].append(text)
            sizes[role] += len(text.encode())
            if sizes[role] >= SHARD_BYTES:
                flush(role)
        for role, texts in waiting.items():
            if texts:
                flush(role)
            if not entries[role]:
                what = "training" if role == "train" else role
                raise UserError(f"{corpus.name}: no document is left for {what}; give it more, or name a file val.txt")
        return save_manifest(building, {"name": corpus.name, **about}, entries)


def save_manifest(folder: Path, about: dict[str, Any], entries: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Complete a manifest with the shards of each role and totals, and write it: from here on the corpus exists."""
    totals = {
        role: {"files": len(shards)} | {key: sum(entry[key] for entry in shards) for key in ("documents", "text_bytes")}
        for role, shards in entries.items()
    }
    versions = {"pyarrow": pa.__version__, **about.pop("versions", {})}
    manifest = {**about, "versions": versions, "totals": totals, **entries}
    write_atomic(folder / MANIFEST, seal(json.dumps(manifest, indent=1)))
    return manifest


def write_shard(file: Path, texts: list[str], row_group_documents: int = ROW_GROUP_DOCUMENTS) -> None:
    """Write a parquet file in row groups of 1,024 documents or the fewer that are asked for; without dictionary and
    statistics, which long texts do not gain from.
    """
    rows = min(max(1, row_group_documents), ROW_GROUP_DOCUMENTS)
    options = {"compression": "zstd", "compression_level": 3, "use_dictionary": False, "write_statistics": False}
    pq.write_table(pa.table({"text": pa.array(texts, pa.string())}), file, row_group_size=rows, **options)


def describe_shard(file: Path) -> dict[str, Any]:
    """What the manifest says about a shard; UserError, here and not in a training run, where it is damaged."""
    documents = text_bytes = 0
    for texts in iter_text(Shards((file,))):
        try:
            texts.validate(full=True)
        except pa.ArrowInvalid as error:
            raise UserError(f"{file}: text is not UTF-8 ({one_line(error)})") from None
        documents += len(texts)
        text_bytes += pc.sum(pc.binary_length(texts)).as_py() or 0
    if not documents:
        raise UserError(f"{file}: holds no documents")
    about = {"file": file.name, "documents": documents, "text_bytes": text_bytes}
    return about | {"file_bytes": file.stat().st_size, "sha256": sha256_file(file)}


# -----------------------------------------------------------------------------
# The user's own files


def build_folder(folder: Path, corpus: Path, fraction: float | None) -> dict[str, Any]:
    """Make a corpus of all documents under `folder`: every row of its parquet files, line of its jsonl files, whole txt
    files; its manifest. Null and empty documents are counted. Validation is what lies in files or directories called
    val or validation (val_00000.parquet, val/a.txt); where there are none, the `fraction` (None = 0.01, at least one)
    of the documents with the smallest sha256.
    """
    check_same_origin(corpus, str(folder))
    files, others = list_folder(folder)
    named = {file for file in files if any(map(is_validation_name, file.relative_to(folder).parts))}
    if named and fraction is not None:
        raise UserError(f"val_fraction={fraction}: {folder} names {len(named)} validation files; leave it out")
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
    inside = [file.relative_to(folder) for file in folder.rglob("*") if file.is_file()]
    visible = [file for file in inside if not any(part.startswith(".") for part in file.parts)]
    files = sorted((file for file in visible if file.suffix in READERS), key=lambda file: file.parts)
    if not files:
        kinds = ", ".join(READERS)
        raise UserError(f"path={folder}: none of its {len(visible):,} files ends in {kinds}; give another: --path=DIR")
    return [folder / file for file in files], len(visible) - len(files)


def is_validation_name(part: str) -> bool:
    """val, val_00000.parquet, val2.txt, validation-a.jsonl; but not values.txt."""
    return re.match(r"val(id|idation)?(?![a-z])", part.lower()) is not None


def highest_validation_hash(files: Iterable[Path], fraction: float) -> int:
    """Read all once to find the hash up to which documents validate; the same text always falls on the same side."""
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
    """Yield the documents of one file; a null is "". UserError for a file that is damaged or holds none."""
    if not file.stat().st_size:
        raise UserError(f"{file}: empty file; fill it or take it away")
    empty = True
    for text in READERS[file.suffix](file):
        empty = False
        yield text
    if empty:
        raise UserError(f"{file}: holds no documents; fill it or take it away")


def read_parquet(file: Path) -> Iterator[str]:
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
    try:
        with open(file, encoding="utf-8-sig", newline="") as stream:
            yield stream.read()
    except UnicodeDecodeError as error:
        where = f"at byte {error.start:,} ({error.reason})"
        raise UserError(f"{file}: not UTF-8 {where}; convert it or take it away") from None


READERS: dict[str, Callable[[Path], Iterator[str]]] = {".parquet": read_parquet, ".jsonl": read_jsonl, ".txt": read_txt}
