"""A corpus of token ids: train.bin and val.bin, headerless uint16 or uint32 as nanoGPT and nanuGPT write them, and
dev.make_bin. They are read where they lie, mapped or in memory, and cut into rows without a tokenizer.

    python -m dev.import_bin --path=FOLDER

An epoch is one true shuffle of all rows, so the rows of a batch are no neighbours and no two ranks have the same one.
Rows of a stream (--packing=flat) begin at another place in every epoch and go on at the file's start beyond its end:
every id is a target once, and none is left out. Where all documents have one length (--packing=bos) a row is a
document; only what follows its `answer` token is learnt and scored, if it has one. Promises: both ways of reading give
the same rows; files are compared with their sha256. Does not: read a pickle, such as nanoGPT's meta.pkl.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from nanochat.common import UserError
from nanochat.compute import Compute
from nanochat.corpus import Shards, check_hash
from nanochat.corpus_writer import save_manifest
from nanochat.dataloader import Block, Position, prefetch, stream, to_device
from nanochat.files import sha256_file, whole
from nanochat.loss_eval import Window, document_windows
from nanochat.schedule import BatchPlan
from nanochat.tokenizer import FILE_NAME, Tokenizer

FILES = {"train": "train.bin", "validation": "val.bin"}
CHUNK = 1 << 24  # ids looked at together

# -----------------------------------------------------------------------------
# Reading


def read_ids(path: Path, dtype: str, in_memory: bool | None = None) -> np.ndarray:
    """The ids of a file (n,), in memory or mapped; None = in memory where all ranks of this machine may have it there
    in half of what is free.
    """
    if in_memory is None:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        in_memory = path.stat().st_size * int(os.environ.get("LOCAL_WORLD_SIZE", "1")) <= free / 2
    return np.fromfile(path, dtype) if in_memory else np.memmap(path, dtype, mode="r")


def open_ids(shards: Shards, tokenizer: Tokenizer) -> np.ndarray:
    """The ids of the only file of some shards. Raises UserError where they are not the tokenizer's."""
    [path], about = shards.paths, shards.tokens
    if about["largest"] >= tokenizer.get_vocab_size():
        found = f"{path} has ids up to {about['largest']:,}, the tokenizer {tokenizer.get_vocab_size():,} tokens"
        raise UserError(f"{found}; give the one that they were made with: {path.parent / FILE_NAME}", everywhere=True)
    if shards.hashes:
        check_hash(path, shards.hashes[0])
    return read_ids(path, about["dtype"])


@dataclass(frozen=True)
class TokenPosition(Position):
    """Where a stream of rows stands: an epoch, and the rows of it that are used."""

    def describe(self) -> str:
        return f"epoch {self.epoch + 1}, {self.rows_used:,} rows of it, all in an order of its own, 0 tokens excluded"


def row_starts(n: int, length: int, document: int | None, seed: int, epoch: int) -> np.ndarray:
    """Where the rows of an epoch begin (R,), one for every document, or one for every `length` ids of a stream of n,
    from a place drawn by seed and epoch; the last may overlap the first.
    """
    if document:
        return np.arange(0, n, document)
    first = np.random.default_rng([seed, epoch]).integers(n)
    return (first + np.arange(0, n if n > length else 0, length)) % n


def token_stream(
    shards: Shards,
    tokenizer: Tokenizer,
    batch: BatchPlan,
    compute: Compute,
    packing: str,
    seed: int,
    start: Position | None,
) -> Iterator[tuple[Tensor, Tensor, Position]]:
    """dataloader.training_stream() of a corpus of ids. Raises UserError for a `packing` or a row that does not fit."""
    ids, T = open_ids(shards, tokenizer), batch.sequence_len
    document, answer = shards.tokens["document"], shards.tokens["answer"]
    check_rows(shards, T, packing)

    def blocks(position: Position) -> Iterator[Block[Position]]:
        place = TokenPosition(epoch=position.epoch)
        yield Block(row_starts(len(ids), T, document, seed, position.epoch), place, place)

    too_little = f"{shards.paths[0]}: {len(ids):,} ids are less than a row of {T + 1}; lower --max-seq-len"
    batches = stream(blocks, start or Position(), batch, compute.rank, seed, too_little)
    for rows, position in prefetch(((gather(ids, starts, T), position) for starts, position in batches), depth=4):
        tokens = to_device(rows, compute)
        targets = tokens if answer is None else tokens.masked_fill(~after(tokens, answer), -1)
        yield tokens[:, :-1], targets[:, 1:], position


def check_rows(shards: Shards, sequence_len: int, packing: str) -> None:
    document, place = shards.tokens["document"], shards.paths[0].parent
    if document and document != sequence_len + 1:
        raise UserError(f"{place}: each document is a row of {document} ids; give --max-seq-len={document - 1}")
    if packing != (needed := "bos" if document else "flat"):
        kind = "documents of one length" if document else "a stream of ids"
        raise UserError(f"--packing={packing}: {place} is {kind}; give --packing={needed}")


def gather(ids: np.ndarray, starts: np.ndarray, sequence_len: int) -> np.ndarray:
    """Rows (B, T + 1) that begin at `starts` (B,); behind the end of the ids comes their beginning."""
    return np.asarray(ids[(starts[:, None] + np.arange(sequence_len + 1)) % len(ids)])


def after(tokens: Any, answer: int) -> Any:
    """Which of some tokens (B, n) come after the first `answer` of their row."""
    found = tokens == answer
    return found.cumsum(-1) - found.int() > 0


def documents(ids: np.ndarray, bos: int) -> Iterator[np.ndarray]:
    """What stands between two BOS, in order; never an empty one."""
    begin = 0
    for chunk in range(0, len(ids), CHUNK):
        for place in (chunk + np.flatnonzero(ids[chunk : chunk + CHUNK] == bos)).tolist():
            if place > begin:
                yield ids[begin:place]
            begin = place + 1
    if begin < len(ids):
        yield ids[begin:]


def token_windows(
    shards: Shards, tokenizer: Tokenizer, sequence_len: int, stride: int, max_tokens: int | None
) -> Iterator[Window]:
    """loss_eval.validation_windows() of a corpus of ids."""
    ids, bos, answer, scored = open_ids(shards, tokenizer), tokenizer.get_bos_token_id(), shards.tokens["answer"], 0
    for number, document in enumerate(documents(ids, bos)):
        for _, tokens, first in document_windows(document, np.array([0, len(document)]), bos, sequence_len, stride):
            first = first if answer is None else int(np.argmax(tokens == answer))
            yield Window(number, tokens, first)
            scored += len(tokens) - 1 - first
            if max_tokens is not None and scored >= max_tokens:
                return


# -----------------------------------------------------------------------------
# Making one


def write_tokens(
    corpus: Path, ids: dict[str, Any], tokenizer: Tokenizer, dtype: str, about: dict[str, Any]
) -> dict[str, Any]:
    """Write a corpus of ids, files (linked to) or arrays, of the roles train and validation; its manifest. In `about`,
    "document" is the length of all documents, where they have one, and "answer" the id after which the loss begins.
    """
    entries: dict[str, list[dict[str, Any]]] = {}
    with whole(corpus) as building:
        building.mkdir()
        tokenizer.save(building)
        for role, source in ids.items():
            file = building / FILES[role]
            file.symlink_to(source) if isinstance(source, Path) else source.astype(dtype).tofile(file)
            entries[role] = [describe_ids(file, dtype, tokenizer)]
        largest = max(entry.pop("largest") for [entry] in entries.values())
        tokens = {"dtype": dtype, "largest": largest, "document": about.pop("document", None)}
        tokens["answer"] = about.pop("answer", None)
        return save_manifest(building, {"name": corpus.name, **about, "tokens": tokens}, entries)


def describe_ids(file: Path, dtype: str, tokenizer: Tokenizer) -> dict[str, Any]:
    """What the manifest says about a file of ids. Raises UserError where they are not the tokenizer's."""
    size, width = file.stat().st_size, np.dtype(dtype).itemsize
    if not size or size % width:
        way = "give the other --token-type" if size else "make the file again"
        raise UserError(f"{file.resolve()}: {size:,} bytes are no {dtype} ids; {way}")
    ids, bos, V = read_ids(file, dtype), tokenizer.get_bos_token_id(), tokenizer.get_vocab_size()
    if width == 2 and len(ids) > 64 and not ids[1 : 1 << 16 : 2].any():
        raise UserError(f"{file.resolve()}: every second id is 0; give --token-type=uint32")
    largest = documents = text_bytes = 0
    for chunk in range(0, len(ids), CHUNK):
        part = ids[chunk : chunk + CHUNK]
        if (largest := max(largest, int(part.max()))) >= V:
            raise UserError(f"{file.resolve()}: id {largest:,} is none of the tokenizer's {V:,}; is it the right one?")
        documents += int((part == bos).sum())
        text_bytes += int(tokenizer.token_bytes[part].sum(dtype=np.int64))
    about = {"file": file.name, "documents": max(1, documents), "text_bytes": text_bytes, "largest": largest}
    return about | {"ids": len(ids), "file_bytes": size, "sha256": sha256_file(file)}
