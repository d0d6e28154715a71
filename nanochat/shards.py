"""Text in parquet shards: reading documents from any place on, and writing shards that can be read so.

Promises: reading never decodes more than about a row group ahead, hands out slices and not copies, and gives the same
documents from every place it is started at; the same documents give the same bytes; a damaged file is one line, and
where its hash is known, nothing of it is read. Corpora and where text comes from are dataset.py.
"""

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nanochat.common import UserError
from nanochat.files import sha256_file

ROW_GROUP_DOCUMENTS = 1024  # a row group ends at this many documents or bytes, whichever comes first:
ROW_GROUP_BYTES = 4 << 20  # small enough to read singly, large enough for zstd to compress well
SHARD_BYTES = 100 << 20  # text in one shard; also what is shuffled together, in memory
SHUFFLE_SEED = 1337
SOURCES = ("docs", "climbmix", "fineweb-edu")  # corpora that nanochat.dataset makes without being given a folder

# -----------------------------------------------------------------------------
# Reading

# What pyarrow raises for damaged files: names and paths that are not UTF-8, lengths of gigabytes.
DAMAGE = (pa.ArrowException, OSError, UnicodeDecodeError, MemoryError)
ELSEWHERE = "resume from another checkpoint: --resume-from-step=N"  # only a checkpoint names a place to start at


class DocumentIndex(NamedTuple):
    """Where a document stands in a list of files; (0, 0, 0) is the first."""

    shard: int
    row_group: int
    row: int


def iter_text(files: Iterable[Path], hashes: Mapping[Path, str] | None = None) -> Iterator[pa.Array]:
    """Yield the text of the files as string arrays, one per row group (several where a foreign row group has more than
    1,024 rows).

    The arrays are never empty, have type string (32-bit offsets) and no nulls: a null comes out as an empty document.
    With `hashes`, the sha256 of each file, a file that has another raises UserError before its first document.
    """
    return (texts for texts, _ in text_arrays(tuple(files), DocumentIndex(0, 0, 0), hashes))


def read_blocks(
    files: Sequence[Path], start: DocumentIndex, block_bytes: int, hashes: Mapping[Path, str] | None = None
) -> Iterator[tuple[pa.ChunkedArray, DocumentIndex]]:
    """Yield (documents, index of the first of them): consecutive documents from `start` until they have `block_bytes`
    bytes of UTF-8.

    A block has at least one document, and only the last of the stream may have fewer bytes. The stream ends with the
    files. Starting again at a yielded index gives the same blocks; starting anywhere gives the same documents. Chunks
    are slices of what iter_text yields, not copies. Raises UserError when `start` is not an existing place, and for a
    file whose sha256 is not the one in `hashes`.
    """
    pieces: list[pa.Array] = []
    taken = 0
    first = start
    for texts, index in text_arrays(files, start, hashes):
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


def text_arrays(
    files: Sequence[Path], start: DocumentIndex, hashes: Mapping[Path, str] | None = None
) -> Iterator[tuple[pa.Array, DocumentIndex]]:
    """Yield (string array, index of its first row) from `start` on. Never an empty array."""
    if start.shard >= len(files):
        raise UserError(f"{start} is beyond the {len(files):,} files; {ELSEWHERE}")
    for shard in range(start.shard, len(files)):
        if hashes is not None:
            check_hash(files[shard], hashes[files[shard]])
        with open_parquet(files[shard]) as file:
            groups = file.num_row_groups
            first = start.row_group if shard == start.shard else 0
            skip = start.row if shard == start.shard else 0
            if (first or skip) and (first >= groups or skip >= file.metadata.row_group(first).num_rows):
                raise UserError(f"{start} is beyond the end of {files[shard]}; {ELSEWHERE}")
            for row_group in range(first, groups):
                row = 0
                for texts in read_row_group(file, row_group, files[shard]):
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


def command_for(corpus: str) -> str:
    """The command that makes a corpus of this name. A folder's corpus never has the name of another source."""
    known = corpus in SOURCES
    return "python -m nanochat.dataset " + (
        f"--source={corpus}" if known else f"--source=folder --path=DIR --name={corpus}"
    )


def open_parquet(path: Path) -> pq.ParquetFile:
    """Open a parquet file that has a `text` column of strings; UserError in one line where it is damaged or
    has none.
    """
    try:
        # buffer_size: a foreign row group of gigabytes is decoded page by page, not read whole.
        file = pq.ParquetFile(path, buffer_size=1 << 20, page_checksum_verification=True)
        schema = file.schema_arrow
        names = schema.names
    except DAMAGE as error:
        raise UserError(f"{path}: not a whole parquet file ({first_line(error)}); get it again") from None
    if names.count("text") != 1:
        state = "several columns" if "text" in names else "no column"
        found = ", ".join(repr(name)[1:-1] for name in names) or "none at all"
        raise UserError(f"{path}: {state} named text, only {found}; rename the one that holds the text")
    kind = schema.field("text").type
    plain = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (pa.types.is_string(plain) or pa.types.is_large_string(plain) or pa.types.is_string_view(plain)):
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
        for batch in file.iter_batches(
            ROW_GROUP_DOCUMENTS, row_groups=[row_group], columns=["text"], use_threads=False
        ):
            texts = batch.column(0)
            texts = texts if pa.types.is_string(texts.type) else texts.cast(pa.string())
            texts = texts.fill_null("") if texts.null_count else texts
            missing -= len(texts)
            if len(texts):
                yield texts
    except DAMAGE as error:
        raise UserError(f"{path}: damaged in row group {row_group} ({first_line(error)}); get it again") from None
    if missing:
        raise UserError(f"{path}: damaged in row group {row_group} (it lacks {missing:,} rows); get it again")


def first_line(error: Exception) -> str:
    """An exception's message without the lines after its first."""
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")


# -----------------------------------------------------------------------------
# Writing


class ShardWriter:
    """Collects documents and writes them, shuffled, to parquet shards of about 100 MB of text with row groups of at
    most 1,024 documents. `numbers` gives the next shard's number; `entries` is what the manifest says about the
    finished ones.
    """

    def __init__(self, folder: Path, numbers: Iterator[int]):
        self.folder = folder
        self.numbers = numbers
        self.entries: list[dict[str, Any]] = []
        self.texts: list[str] = []
        self.size = 0

    def add(self, text: str) -> None:
        """Take one document."""
        self.texts.append(text)
        self.size += len(text.encode())
        if self.size >= SHARD_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write what has been collected as one shard; nothing if there is nothing."""
        if not self.texts:
            return
        number = next(self.numbers)
        file = self.folder / f"shard_{number:05d}.parquet"
        # Files of a folder come sorted by name, hence by kind; a model would end its training on the last kind.
        random.Random(SHUFFLE_SEED + number).shuffle(self.texts)
        schema = pa.schema([pa.field("text", pa.string(), nullable=False)])
        options = {"compression": "zstd", "compression_level": 3, "use_dictionary": False, "write_statistics": False}
        with pq.ParquetWriter(file, schema, **options) as writer:
            for group in row_groups(self.texts):
                writer.write_table(pa.table([pa.array(group, pa.string())], schema=schema))
        self.entries.append(describe_shard(file))
        self.texts, self.size = [], 0


def row_groups(texts: list[str]) -> Iterator[list[str]]:
    """Cut documents into consecutive groups of at most 1,024 documents, ended early by the document that fills 4 MB."""
    group: list[str] = []
    size = 0
    for text in texts:
        group.append(text)
        size += len(text.encode())
        if len(group) == ROW_GROUP_DOCUMENTS or size >= ROW_GROUP_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def describe_shard(file: Path) -> dict[str, Any]:
    """What the manifest says about a shard. Decodes all of it, so a damaged one raises UserError here and not in a
    training run.
    """
    documents = text_bytes = 0
    for texts in iter_text([file]):
        try:
            texts.validate(full=True)
        except pa.ArrowInvalid as error:
            raise UserError(f"{file}: text is not UTF-8 ({first_line(error)})") from None
        documents += len(texts)
        text_bytes += text_size(texts)
    if not documents:
        raise UserError(f"{file}: holds no documents")
    return {
        "file": file.name,
        "documents": documents,
        "text_bytes": text_bytes,
        "file_bytes": file.stat().st_size,
        "sha256": sha256_file(file),
    }


def text_size(texts: pa.Array) -> int:
    """Bytes of UTF-8 in a string array or a slice of one."""
    offsets = np.frombuffer(texts.buffers()[1], dtype=np.int32)
    return int(offsets[texts.offset + len(texts)]) - int(offsets[texts.offset])
