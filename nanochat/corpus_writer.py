"""Documents in, a corpus out: a folder's files, say, to shuffled parquet shards and a manifest of what they hold.

Promises: the same documents give the same bytes, and a folder the same order on every machine; no text is both for
training and for validation; a corpus that is replaced stays until the new one is whole; every mistake names the file,
and the line where there is one; nothing is left out unsaid. Does not: change a character of the text (only a byte order
mark goes), guess encodings (files are UTF-8), nor take repetitions out of the training text.
"""

import hashlib
import io
import json
import os
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from itertools import chain
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
FILE = re.compile(r".*\.(parquet|(?:jsonl|txt)(\.gz|\.zst)?)")  # names that are read, in small letters
ENDINGS = ".parquet, .jsonl or .txt, the last two also with .gz or .zst"
BY_HASH = "the {:g} of the documents with the smallest sha256"
HELD_OUT = re.compile(r"(?:^|[-_.])(val|valid|validation|test)(?![a-z])")  # in names of files and folders


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
    files, also packed ones; its manifest. Validation is what lies in files or directories called val, valid or
    validation; where there are none, the `fraction` (None = 0.01, at least one) of the documents with the smallest
    sha256.
    """
    check_same_origin(corpus, str(folder))
    train, validation, left_out_files = list_folder(folder)
    if validation and fraction is not None:
        raise UserError(f"val_fraction={fraction}: {folder} names {len(validation)} validation files; leave it out")
    fraction = 0.01 if fraction is None else fraction
    by = f"{len(validation)} files named val*" if validation else BY_HASH.format(fraction)
    print0(f"{folder}: {len(train) + len(validation):,} files to read; validation: {by}")
    highest = -1 if validation else highest_validation_hash(train, fraction)
    left_out = Counter[str]()
    about: dict[str, Any] = {"source": "folder", "arguments": {"path": str(folder), "val_fraction": fraction}}
    about |= {"validation_by": by, "left_out_files": left_out_files, "left_out": left_out}
    documents = split_documents(map(read_documents, validation), map(read_documents, train), highest, left_out)
    return write_corpus(corpus, documents, about)


def split_documents(
    validation: Iterable[Iterable[str]], rest: Iterable[Iterable[str]], highest: int, left_out: Counter[str]
) -> Iterator[tuple[bool, str]]:
    """Yield (is for validation, text): what validates, then the rest, of which the texts with a hash up to `highest`
    validate, too. The same text is never on both sides; what is left out is counted by reason.
    """
    seen: set[int] = set()  # hashes of what validates
    for validates, sources in ((True, validation), (False, rest)):
        for text in chain.from_iterable(sources):
            key = hash_of(text)
            if not text.strip():
                left_out["empty"] += 1
            elif not validates and key in seen:
                left_out["in the validation text, too"] += 1
            else:
                seen |= {key} if validates else set()
                yield validates or key <= highest, text


def check_same_origin(corpus: Path, path: str) -> None:
    """Refuse to replace a corpus that came from somewhere else."""
    other = f"choose another name: --name={corpus.name}-2"
    if corpus.name in SOURCES:
        raise UserError(f"name={corpus.name}: the name of another source; {other}")
    if (corpus / MANIFEST).exists():
        origin = read_manifest(corpus)["arguments"].get("path")
        if origin != path:
            raise UserError(f"name={corpus.name}: {corpus} was made from {origin}; {other}")


def list_folder(folder: Path) -> tuple[list[Path], list[Path], dict[str, int]]:
    """(files to train on, files to validate on, {reason: number of files and folders left out}): all under a folder and
    under the folders it links to, sorted by path. What is left out is printed.
    """
    if not folder.is_dir():
        raise UserError(f"path={folder}: not a directory; give one with parquet, jsonl or txt files: --path=DIR")
    found: dict[str, list[Path]] = {"train": [], "validation": []}
    left_out = defaultdict[str, list[str]](list)
    seen = {os.path.realpath(folder)}
    for place, folders, names in os.walk(folder, followlinks=True):
        inside = sorted(folders)
        folders.clear()
        for name in inside + sorted(names):
            path = Path(place, name)
            inner = path.relative_to(folder)
            split = split_named(*inner.parts)
            if reason := why_not(path, split, seen):
                left_out[reason].append(os.fsencode(inner).decode(errors="replace"))
            elif name in inside:
                folders.append(name)
            else:
                found[split].append(path)
    for reason, paths in left_out.items():
        print0(f"left out   {len(paths):,} {reason}: {', '.join(paths[:3])}{', ...' if len(paths) > 3 else ''}")
    if not any(found.values()):
        raise UserError(f"path={folder}: no file to read, ending in {ENDINGS}; give another: --path=DIR")
    train, validation = (sorted(files, key=lambda file: file.parts) for files in found.values())
    return train, validation, {reason: len(paths) for reason, paths in left_out.items()}


def why_not(path: Path, split: str, seen: set[str]) -> str:
    """Why a file or folder is not read; "" where it is. `seen` has the real places that have been, against loops."""
    real = os.path.realpath(path)
    if path.name.startswith("."):
        return "hidden"
    if str(path).encode(errors="ignore") != os.fsencode(path):  # pyarrow opens no such path
        return "with a name that is not UTF-8"
    if not path.exists():
        return "links to nothing"
    if not os.access(path, os.R_OK | os.X_OK if path.is_dir() else os.R_OK):
        return "without the right to read"
    if real in seen:
        return "read already under another name"
    seen.add(real)
    if split == "test":
        return "named test*, kept for tests"
    if path.is_dir():
        return ""
    if not FILE.fullmatch(path.name.lower()):
        return f"of another kind, {path.suffix or 'without an ending'}"
    return "" if path.stat().st_size else "empty files"


def split_named(*names: str) -> str:
    """train, validation or test, by names as people give them: val_00000.parquet, val2.txt, corpus-valid.jsonl,
    validation, test-00000.parquet; but neither values.txt nor latest.txt.
    """
    found = {word for name in names for word in HELD_OUT.findall(name.lower())}
    return "train" if not found else "test" if found == {"test"} else "validation"


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
    """Yield the documents of one file; a null is "". UserError where it is damaged, or cannot be read."""
    found = FILE.fullmatch(file.name.lower())
    assert found
    packed = {None: None, ".gz": "gzip", ".zst": "zstd"}[found[2]]
    try:
        if found[1] == "parquet":
            for texts in iter_text(Shards((file,))):
                yield from texts.to_pylist()
            return
        with pa.input_stream(str(file), packed) as stream:
            yield from read_jsonl(file, stream) if found[1][0] == "j" else [stream.read().decode("utf-8-sig")]
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({one_line(error)}); mend it or take it away") from None
    except UnicodeDecodeError as error:
        where = f"at byte {error.start:,} ({error.reason})"
        raise UserError(f"{file}: text is not UTF-8 {where}; convert it or take it away") from None


def read_jsonl(file: Path, stream: Any) -> Iterator[str]:
    """Yield the text field of every line; blank lines are no documents."""
    for number, line in enumerate(io.BufferedReader(stream), 1):
        if line.isspace():
            continue
        try:
            text = json.loads(line)["text"]  # of bytes: in UTF-8, with a byte order mark or without
            text = "" if text is None else text
            text.encode()  # an escaped half of a surrogate pair is valid JSON and not valid text
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise UserError(f'{file}:{number}: expected one line of JSON like {{"text": "..."}} in UTF-8') from None
        yield text
