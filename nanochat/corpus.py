"""A corpus on disk: parquet shards with a `text` column, read in Arrow arrays from any place on. How one gets here is
dataset.py.

A corpus is `$NANOCHAT_BASE_DIR/data/<name>/`, and exists when it has `manifest.json`: which shards train and which
validate, and the documents, bytes and sha256 of each.

Promises: the same documents from every place that reading starts at, in slices and not copies, with about a row group
in memory; a damaged file is one line, and of one that is not what its manifest says, not a document is read.
"""

import hashlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nanochat.common import UserError, get_base_dir
from nanochat.files import one_line, read_sealed, sha256_file

MANIFEST = "manifest.json"
ROW_GROUP_DOCUMENTS = 1024  # most documents in a row group of ours, and in an array of anybody's
SOURCES = ("docs", "climbmix", "fineweb-edu")  # corpora that nanochat.dataset makes by their name alone
# What pyarrow raises for damaged files: names and paths that are not UTF-8, lengths of gigabytes.
DAMAGE = (pa.ArrowException, OSError, UnicodeDecodeError, MemoryError)


@dataclass(frozen=True)
class Shards:
    """Parquet files to be read one after another. Where their sha256 are known, each is compared when it is opened."""

    paths: tuple[Path, ...]
    hashes: tuple[str, ...] | None = None

    def __iter__(self) -> Iterator[Path]:
        return iter(self.paths)

    def __len__(self) -> int:
        return len(self.paths)


@dataclass(frozen=True)
class Corpus:
    """A corpus whose files are all there. The fingerprint changes when any byte of text does."""

    name: str
    path: Path
    train: Shards
    val: Shards
    manifest: dict[str, Any]
    fingerprint: str


def load_corpus(name: str | None = None) -> Corpus:
    """Find a corpus by name; None takes the only one there is. All of its files exist and have their recorded size.
    Raises UserError where that is not so, none or several are found, or the name is unknown. Hashes are not computed
    here, which would read everything.
    """
    folder = get_base_dir() / "data"
    found = sorted(manifest.parent.name for manifest in folder.glob(f"[!.]*/{MANIFEST}"))
    if not found:
        raise UserError(f"no corpus in {folder}; get one with: python -m nanochat.dataset --source=docs")
    if name is None and len(found) > 1:
        raise UserError(f"several corpora in {folder} ({', '.join(found)}); choose one: --corpus={found[0]}")
    name = name or found[0]
    if name not in found:
        raise UserError(
            f"corpus={name}: not in {folder}, which has {', '.join(found)}; get it with: {command_for(name)}"
        )
    path = folder / name
    manifest = read_manifest(path)
    for entry in manifest["train"] + manifest["validation"]:
        file = path / entry["file"]
        size = file.stat().st_size if file.is_file() else None
        if size != entry["file_bytes"]:
            state = "missing" if size is None else f"{size:,} bytes, not the {entry['file_bytes']:,} of its manifest"
            raise UserError(f"{file}: {state}; mend it with: {command_for(name)}")
    train, val = (
        Shards(tuple(path / entry["file"] for entry in entries), tuple(entry["sha256"] for entry in entries))
        for entries in (manifest["train"], manifest["validation"])
    )
    return Corpus(name, path, train, val, manifest, fingerprint_of(manifest))


def read_manifest(corpus: Path) -> dict[str, Any]:
    """The manifest of a corpus directory; UserError where it is not whole."""
    try:
        return read_sealed(corpus / MANIFEST)
    except ValueError:
        again = f"rm {corpus / MANIFEST}; {command_for(corpus.name)}"
        raise UserError(f"{corpus / MANIFEST}: damaged; make the corpus again: {again}") from None


def fingerprint_of(manifest: dict[str, Any]) -> str:
    """sha256 over the role and sha256 of every shard, in order."""
    lines = [f"{role} {entry['sha256']}\n" for role in ("train", "validation") for entry in manifest[role]]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def command_for(corpus: str) -> str:
    """The command that makes a corpus of this name. A folder's corpus never has the name of another source."""
    source = corpus if corpus in SOURCES else f"folder --path=DIR --name={corpus}"
    with suppress(OSError, ValueError):  # a damaged manifest cannot say that it was a data set of the hub
        manifest = read_sealed(get_base_dir() / "data" / corpus / MANIFEST)
        if manifest["source"] == "hf":
            flags = [f"--{name}={value}" for name, value in manifest["arguments"].items() if value is not None]
            source = f"hf {' '.join(flags)} --name={corpus}"
    return f"python -m nanochat.dataset --source={source}"


# -----------------------------------------------------------------------------
# Reading


class DocumentIndex(NamedTuple):
    """Where a document stands in a list of shards; (0, 0, 0) is the first."""

    shard: int
    row_group: int
    row: int


def iter_text(shards: Shards) -> Iterator[pa.Array]:
    """Yield the text of the shards as string arrays, never empty, of at most 1,024 rows and one row group each. They
    have type string (32-bit offsets) and no nulls: a null comes out as an empty document. UserError for a damaged file.
    """
    return (texts for texts, _ in text_arrays(shards, DocumentIndex(0, 0, 0)))


def read_blocks(
    shards: Shards, start: DocumentIndex, block_bytes: int
) -> Iterator[tuple[pa.ChunkedArray, DocumentIndex]]:
    """Yield (documents, index of the first of them): consecutive documents from `start` until they have `block_bytes`
    bytes of UTF-8. Only the last block of the stream, which ends with the shards, may have fewer. Starting again at a
    yielded index gives the same blocks; starting anywhere gives the same documents, in slices of iter_text's arrays.
    """
    pieces: list[pa.Array] = []
    taken = 0
    first = start
    for texts, index in text_arrays(shards, start):
        # A slice shares its parent's buffers, so the offsets of its own rows begin at texts.offset.
        offsets = np.frombuffer(texts.buffers()[1], dtype=np.int32)[texts.offset : texts.offset + len(texts) + 1]
        begin = 0
        while begin < len(texts):
            if not pieces:
                first = index._replace(row=index.row + begin)
            # The smallest end with enough bytes; int() because int32 offsets near 2 GB plus the block would overflow.
            wanted = int(offsets[begin]) + block_bytes - taken
            end = min(max(int(np.searchsorted(offsets, wanted)), begin + 1), len(texts))
            pieces.append(texts.slice(begin, end - begin))
            taken += int(offsets[end]) - int(offsets[begin])
            if taken >= block_bytes:
                yield pa.chunked_array(pieces), first
                pieces, taken = [], 0
            begin = end
    if pieces:
        yield pa.chunked_array(pieces), first


def text_arrays(shards: Shards, start: DocumentIndex) -> Iterator[tuple[pa.Array, DocumentIndex]]:
    """Yield (string array, index of its first row) from `start` on, which is an existing place; never an empty one."""
    for shard in range(start.shard, len(shards)):
        if shards.hashes:
            check_hash(shards.paths[shard], shards.hashes[shard])
        with open_parquet(shards.paths[shard]) as file:
            first, skip = start[1:] if shard == start.shard else (0, 0)
            for row_group in range(first, file.num_row_groups):
                row = 0
                for texts in read_row_group(file, row_group, shards.paths[shard]):
                    if row + len(texts) > skip:
                        cut = max(skip - row, 0)
                        yield texts.slice(cut), DocumentIndex(shard, row_group, row + cut)
                    row += len(texts)
                skip = 0


def check_hash(path: Path, expected: str) -> None:
    """Raise UserError unless a file has this sha256. 100 MB take 0.07 s with the processor's SHA instructions, three
    times that without, once per opening: so one wrong bit never becomes another text or a crash of the decoder.
    """
    try:
        found = sha256_file(path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; get it again: {command_for(path.parent.name)}") from None
    if found != expected:
        raise UserError(
            f"{path}: changed since its manifest was written (sha256 {found[:12]}, not {expected[:12]}); "
            f"get it again: rm {path}; {command_for(path.parent.name)}"
        )


def open_parquet(path: Path) -> pq.ParquetFile:
    """Open a parquet file that has a `text` column of strings; UserError where it is damaged or has none."""
    try:  # buffer_size: a foreign row group of gigabytes is decoded page by page, not read whole
        file = pq.ParquetFile(path, buffer_size=1 << 20, page_checksum_verification=True)
        schema = file.schema_arrow
        names = schema.names
    except DAMAGE as error:
        raise UserError(f"{path}: not a whole parquet file ({one_line(error)}); get it again") from None
    if names.count("text") != 1:
        state = "several columns" if "text" in names else "no column"
        found = ", ".join(repr(name)[1:-1] for name in names) or "none at all"
        raise UserError(f"{path}: {state} named text, only {found}; rename the one that holds the text")
    kind = schema.field("text").type
    plain = kind.value_type if pa.types.is_dictionary(kind) else kind
    if plain not in (pa.string(), pa.large_string(), pa.string_view()):
        raise UserError(f"{path}: column text holds {kind}, expected string")
    # Nothing here asks for metadata.row_group(i).column(j): on some damaged footers pyarrow 26 ends the process there.
    rows = sum(file.metadata.row_group(number).num_rows for number in range(file.num_row_groups))
    if rows != file.metadata.num_rows:
        reason = f"{file.metadata.num_rows:,} rows, but {rows:,} in its row groups"
        raise UserError(f"{path}: not a whole parquet file ({reason}); get it again")
    return file


def read_row_group(file: pq.ParquetFile, row_group: int, path: Path) -> Iterator[pa.Array]:
    """Yield one row group's text in string arrays of at most 1,024 rows."""
    missing = file.metadata.row_group(row_group).num_rows
    try:
        batches = file.iter_batches(ROW_GROUP_DOCUMENTS, row_groups=[row_group], columns=["text"], use_threads=False)
        for batch in batches:
            texts = batch.column(0)
            texts = texts if pa.types.is_string(texts.type) else texts.cast(pa.string())
            texts = texts.fill_null("") if texts.null_count else texts
            missing -= len(texts)
            if len(texts):
                yield texts
    except DAMAGE as error:
        raise UserError(f"{path}: damaged in row group {row_group} ({one_line(error)}); get it again") from None
    if missing:
        raise UserError(f"{path}: damaged in row group {row_group} (it lacks {missing:,} rows); get it again")
