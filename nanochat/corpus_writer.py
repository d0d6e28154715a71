"""Documents in, a corpus out: shuffled parquet shards and the manifest that says what they hold.

Promises: the same documents give the same bytes; validation documents are never among the training ones; a corpus that
is replaced stays until the new one is whole.
"""

import itertools
import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nanochat.common import UserError
from nanochat.corpus import MANIFEST, ROW_GROUP_DOCUMENTS, Shards, iter_text
from nanochat.files import one_line, seal, sha256_file, whole, write_atomic

ROW_GROUP_BYTES = 4 << 20  # a row group ends with this much text: small enough to read singly, large enough for zstd
SHARD_BYTES = 100 << 20  # text in one shard; also what is shuffled together, in memory
SHUFFLE_SEED = 1337


def write_corpus(corpus: Path, documents: Iterable[tuple[bool, str]], about: dict[str, Any]) -> dict[str, Any]:
    """Write (is for validation, text) pairs as a corpus and return its manifest; `about` is read when they are used
    up.
    """
    with whole(corpus) as building:
        building.mkdir()
        numbers = itertools.count()
        train, validation = ShardWriter(building, numbers), ShardWriter(building, numbers)
        for for_validation, text in documents:
            (validation if for_validation else train).add(text)
        for role, writer in (("training", train), ("validation", validation)):
            writer.flush()
            if not writer.entries:
                raise UserError(
                    f"{corpus.name}: no document is left for {role}; give it more text, or name a file val.txt"
                )
        return save_manifest(building, {"name": corpus.name, **about}, train.entries, validation.entries)


def save_manifest(
    folder: Path, about: dict[str, Any], train: list[dict[str, Any]], validation: list[dict[str, Any]]
) -> dict[str, Any]:
    """Complete a manifest with files and totals, and write it: from here on the corpus exists."""
    totals = {
        role: {
            "files": len(entries),
            "documents": sum(entry["documents"] for entry in entries),
            "text_bytes": sum(entry["text_bytes"] for entry in entries),
        }
        for role, entries in (("train", train), ("validation", validation))
    }
    versions = {"pyarrow": pa.__version__, **about.pop("versions", {})}
    manifest = {**about, "versions": versions, "totals": totals, "train": train, "validation": validation}
    write_atomic(folder / MANIFEST, seal(json.dumps(manifest, indent=1)))
    return manifest


class ShardWriter:
    """Collects documents and writes them, shuffled, to parquet shards of about 100 MB of text. `numbers` gives the next
    shard's number; `entries` is what the manifest says about the finished ones.
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
    for texts in iter_text(Shards((file,))):
        try:
            texts.validate(full=True)
        except pa.ArrowInvalid as error:
            raise UserError(f"{file}: text is not UTF-8 ({one_line(error)})") from None
        documents += len(texts)
        offsets = np.frombuffer(texts.buffers()[1], dtype=np.int32)
        text_bytes += int(offsets[texts.offset + len(texts)]) - int(offsets[texts.offset])
    if not documents:
        raise UserError(f"{file}: holds no documents")
    return {
        "file": file.name,
        "documents": documents,
        "text_bytes": text_bytes,
        "file_bytes": file.stat().st_size,
        "sha256": sha256_file(file),
    }
