"""A corpus on disk: parquet shards with a `text` column, read in Arrow arrays from any place on. dataset.py makes it.

It is a folder `$NANOCHAT_BASE_DIR/data/<name>/`, and exists when that has `manifest.json`: which shards train and which
validate, and the documents, bytes and sha256 of each.

Promises: the same documents from every place that reading starts at, in slices and not copies, with about a row group
in memory; a damaged file is one line, and of one that is not what its manifest says, not a document is read.
"""

import hashlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
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
    tokens: dict[str, Any] = field(default_factory=dict)  # of files with token ids and no text: see token_files.py

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
    """Find a corpus by name; None takes the only one there is. Raises UserError where that is none or several, the name
    is unknown, or a file is missing or has not its recorded size. Hashes are compared later, when a file is read.
    """
    folder = get_base_dir() / "data"
    found = sorted(manifest.parent.name for manifest in folder.glob(f"[!.]*/{MANIFEST}"))
    if not found:
        raise UserError(f"no corpus in {folder}; get one with: python -m nanochat.dataset --source=docs")
    if name is None and len(found) > 1:
        raise UserError(f"several corpora in {folder} ({', '.join(found)}); choose one: --corpus={found[0]}")
    name = name or found[0]
    if name not in found:
        raise UserError(f"corpus={name}: not among {', '.join(found)} in {folder}; get it with: {command_for(name)}")
    path = folder / name
    manifest = read_manifest(path)
    for entry in manifest["train"] + manifest["validation"]:
        file = path / entry["file"]
        size = file.stat().st_size if file.is_file() else None
        if size != entry["file_bytes"]:
            state = "missing" if size is None else f"{size:,} bytes, not the {entry['file_bytes']:,} of its manifest"
            raise UserError(f"{file}: {state}; mend it with: {command_for(name)}")
    tokens = manifest.get("tokens", {})
    train, val = (
        Shards(tuple(path / entry["file"] for entry in found), tuple(entry["sha256"] for entry in found), tokens)
        for found in (manifest["train"], manifest["validation"])
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
        flags = " ".join(f"--{name}={value}" for name, value in manifest["arguments"].items() if value is not None)
        if manifest["source"].startswith("dev."):
            return f"python -m {manifest['source']} {flags} --name={corpus}"
        source = f"hf {flags} --name={corpus}" if manifest["source"] == "hf" else source
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
    taken, first = 0, start
    for texts, index in text_arrays(shards, start):
        begin = 0
        for end, size in enumerate(pc.binary_length(texts).to_pylist(), start=1):
            taken += size
            if taken >= block_bytes or end == len(texts):
                first = first if pieces else index._replace(row=index.row + begin)
                pieces.append(texts.slice(begin, end - begin))
                begin = end
            if taken >= block_bytes:
                yield pa.chunked_array(pieces), first
                pieces, taken = [], 0
    if pieces:
        yield pa.chunked_array(pieces), first


def text_arrays(shards: Shards, start: DocumentIndex) -> Iterator[tuple[pa.Array, DocumentIndex]]:
    """Yield (string array, index of its first row) from `start` on, which is an existing place; never an empty one."""
    if shards.tokens:
        raise UserError(f"{shards.paths[0]} holds token ids, and this needs text; give another --corpus")
    first_group, skip = start.row_group, start.row
    for shard in range(start.shard, len(shards)):
        path = shards.paths[shard]
        if shards.hashes:
            check_hash(path, shards.hashes[shard])
        with open_parquet(path) as file:
            for row_group in range(first_group, file.num_row_groups):
                for row, texts in read_row_group(file, row_group, path):
                    cut = max(skip - row, 0)
                    if cut < len(texts):
                        yield texts.slice(cut), DocumentIndex(shard, row_group, row + cut)
                skip = 0
        first_group = 0


def check_hash(path: Path, expected: str) -> None:
    """UserError unless a file has this sha256: one wrong bit never becomes another text or a crash of the decoder. Once
    per opening, 100 MB take 0.07 s with the processor's SHA instructions and three times that without.
    """
    try:
        found = sha256_file(path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; get it again: {command_for(path.parent.name)}") from None
    if found != expected:
        state = f"changed since its manifest was written (sha256 {found[:12]}, not {expected[:12]})"
        raise UserError(f"{path}: {state}; get it again: rm {path}; {command_for(path.parent.name)}")


def open_parquet(path: Path) -> pq.ParquetFile:
    """Open a parquet file that has a `text` column of strings; UserError where it is damaged or has none."""
    # Nothing here asks for metadata.row_group(i).column(j): on some damaged footers pyarrow 26 ends the process there.
    try:  # buffer_size: a foreign row group of gigabytes is decoded page by page, not read whole
        file = pq.ParquetFile(path, buffer_size=1 << 20, page_checksum_verification=True)
        schema, total = file.schema_arrow, file.metadata.num_rows
        names = schema.names
        rows = sum(file.metadata.row_group(number).num_rows for number in range(file.num_row_groups))
        if rows != total:
            raise pa.ArrowInvalid(f"{total:,} rows, but {rows:,} in its row groups")
    except DAMAGE as error:
        raise UserError(f"{path}: not a whole parquet file ({one_line(error)}); get it again") from None
    if names.count("text") != 1:
        found = f"{names.count('text')} columns named text among {names}"
        raise UserError(f"{path}: {found}; rename the one that holds the text")
    kind = schema.field("text").type
    plain = kind.value_type if pa.types.is_dictionary(kind) else kind
    if plain not in (pa.string(), pa.large_string(), pa.string_view()):
        raise UserError(f"{path}: column text holds {kind}, expected string")
    return file


def read_row_group(file: pq.ParquetFile, row_group: int, path: Path) -> Iterator[tuple[int, pa.Array]]:
    """Yield one row group's text, as (number of its first row, string array of at most 1,024 rows)."""
    row, rows = 0, file.metadata.row_group(row_group).num_rows
    try:
        for batch in file.iter_batches(ROW_GROUP_DOCUMENTS, [row_group], columns=["text"], use_threads=False):
            yield row, batch.column(0).cast(pa.string()).fill_null("")
            row += len(batch)
        if row != rows:
            raise pa.ArrowInvalid(f"it lacks {rows - row:,} rows")
    except DAMAGE as error:
        raise UserError(f"{path}: damaged in row group {row_group} ({one_line(error)}); get it again") from None
