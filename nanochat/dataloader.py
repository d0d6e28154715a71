"""Documents in, training batches out: one global stream, the same on every rank.

A numbered pipeline of generators, each resumable from what it yields:

    1. read      consecutive documents, about 4 MB at a time (a block)            corpus.read_blocks
    2. tokenise  the whole block in one call, on the fly: there is no token cache  tokenizer.encode_arrow
    3. pack      the block into rows of T + 1 tokens                               pack_bos or pack_flat
    4. deal      its rows, in an order drawn by seed, to batches: B rows for each rank  stream

Conversations go the same way (chat_train.py).

Promises: N ranks see together exactly what one rank sees, and a position resumes any number of them at any batch; every
token of every document is trained on once per epoch (a row cut short at the end of a block is carried into the next);
too little text is an error. Costs: every rank tokenises everything. Attention is not masked between the documents of a
row (measured as neutral by nanochat).
"""

from bisect import bisect_right, insort
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from nanochat.common import UserError
from nanochat.compute import Compute
from nanochat.corpus import DocumentIndex, Shards, read_blocks
from nanochat.schedule import BatchPlan
from nanochat.tokenizer import Tokenizer, late

Item = TypeVar("Item")
AnyPosition = TypeVar("AnyPosition", bound="StreamPosition")
BLOCK_BYTES = 4 << 20  # text packed and shuffled together: a million tokens, 430 rows of 2,048 or 3,400 of 256

# -----------------------------------------------------------------------------
# One stream


@dataclass(frozen=True)
class StreamPosition:
    """Where a stream stands: all that is needed to continue with the next row, in a few hundred numbers."""

    PLACE: ClassVar[tuple[str, ...]]  # names of the fields that say where in the epoch the current block begins
    epoch: int = 0
    rows_used: int = 0  # rows of the current block already dealt out

    @property
    def place(self) -> tuple[int, ...]:
        return tuple(getattr(self, name) for name in self.PLACE)

    def next_epoch(self: AnyPosition) -> AnyPosition:
        return replace(self, epoch=self.epoch + 1, **dict.fromkeys(self.PLACE, 0))

    @classmethod
    def from_json(cls: type[AnyPosition], values: dict[str, Any]) -> AnyPosition:
        """The position whose dataclasses.asdict() went through JSON. It lay in a sealed file and is not checked."""
        fields: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
        return cls(**fields)


class Block(NamedTuple, Generic[AnyPosition]):
    """Rows packed together, the position of the first of them, and that after the last."""

    rows: np.ndarray  # (R, ...)
    first: AnyPosition
    after: AnyPosition


def stream(
    make_blocks: Callable[[AnyPosition], Iterator[Block[AnyPosition]]],
    start: AnyPosition,
    batch: BatchPlan,
    rank: int,
    seed: int,
    too_little: str,
) -> Iterator[tuple[np.ndarray, AnyPosition]]:
    """Yield (this rank's rows of the next batch (B, ...), position after the batch) forever. `make_blocks` gives the
    block that a position stands in, whole, and the others of its epoch. Raises UserError(too_little) when there is no
    row in an epoch.
    """
    B, position, skip, left = batch.device_batch_size, start, start.rows_used, None
    while True:
        rows_found = 0
        for block in make_blocks(position):
            rows_found += len(block.rows)
            rng = np.random.default_rng([seed, block.first.epoch, *block.first.place])
            rows, skip = rng.permutation(block.rows)[skip:], 0
            left = rows if left is None else np.concatenate([left, rows])
            while len(left) >= B * batch.world_size:
                mine, left = left[rank * B : (rank + 1) * B], left[B * batch.world_size :]
                # What is left is this block's alone: of earlier ones there was less than a batch.
                yield mine, replace(block.first, rows_used=len(block.rows) - len(left))
        if not rows_found:
            raise UserError(too_little)
        position = block.after.next_epoch()


def prefetch(iterator: Iterator[Item], depth: int) -> Iterator[Item]:
    """The same items, none of them None, from a thread that is `depth` items ahead and whose exceptions come here."""
    pool = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
    ahead = deque(pool.submit(next, iterator, None) for _ in range(depth))
    try:
        while (item := ahead.popleft().result()) is not None:
            ahead.append(pool.submit(next, iterator, None))
            yield item
    finally:
        for future in ahead:  # shutdown(cancel_futures=True) fails in a process that ends
            future.cancel()
        pool.shutdown()


def to_device(rows: np.ndarray, compute: Compute) -> Tensor:
    """An array of token ids as int64 on compute.device, from pinned memory where that lets the copy overlap."""
    tokens = torch.from_numpy(rows.astype(np.int64))
    if compute.device.type == "cuda":
        tokens = tokens.pin_memory()  # compared by .type: a torch.device never equals a string
    return tokens.to(compute.device, non_blocking=True)


# -----------------------------------------------------------------------------
# Documents


@dataclass(frozen=True)
class Position(StreamPosition):
    """Where a stream of documents stands."""

    PLACE = ("shard", "row_group", "row")
    shard: int = 0  # first document of the current block, as in corpus.DocumentIndex
    row_group: int = 0
    row: int = 0
    carry: tuple[int, ...] = ()  # tokens of the unfinished row that the previous block left
    documents: int = 0  # counters over all blocks before this one: documents read,
    documents_cut: int = 0  # of these, longer than a row and therefore cut into row-sized spans,
    spans_cropped: int = 0  # and spans cut once more to fill up a row; nothing is dropped

    def describe(self) -> str:
        """One line on how the text was cut, for the log and the report."""
        share = self.documents_cut / max(1, self.documents)
        return (
            f"epoch {self.epoch + 1}, {self.documents:,} documents in finished blocks: {share:.1%} cut into row-sized "
            f"spans, {self.spans_cropped:,} spans cropped to fill a row, 0 tokens excluded"
        )


class Packed(NamedTuple):
    """A block as rows, and what is left of it."""

    rows: np.ndarray  # (R, T + 1), the tokenizer's dtype
    carry: tuple[int, ...]
    spans_cropped: int = 0


def pack_bos(ids: np.ndarray, offsets: np.ndarray, carry: Sequence[int], bos: int, sequence_len: int) -> Packed:
    """Best fit, every row starts with BOS and is full. Documents are ids[offsets[i]:offsets[i + 1]], without BOS.

    1. A document longer than a row is cut into spans of T tokens; every span gets its own BOS. (A row has T + 1
       tokens, the last only as a target: so each token of the text is a target exactly once.)
    2. A row takes the longest span that fits into what is left of it, again and again.
    3. When none fits, the longest span is cropped to fill the row and its rest, with a BOS, goes back among the spans.

    The row that the spans run out in is the carry. With T = 2,048 and web text 100 % of the tokens are used; nanochat's
    packer drops the rest of a cropped document, 35 % of them.
    """
    T = sequence_len
    carried = np.array(carry, dtype=ids.dtype)
    spans = [span[1:] for span in np.split(carried, np.flatnonzero(carried == bos))[1:]]
    for start, end in pairwise(offsets.tolist()):
        spans += [ids[a : min(a + T, end)] for a in range(start, end, T)]
    spans.sort(key=len)
    opening = np.array([bos], dtype=ids.dtype)
    packed = [ids[:0]]  # rows one after another
    filled = spans_cropped = 0  # tokens that the last row has
    while spans:
        room = T - filled  # beside a BOS
        span = spans.pop(bisect_right(spans, room, key=len) - 1)  # the longest that fits, else (-1) the longest of all
        if len(span) > room:
            insort(spans, span[room:], key=len)
            span = span[:room]
            spans_cropped += room > 0  # where only a BOS fits, nothing is cut
        packed += [opening, span]
        filled = (filled + 1 + len(span)) % (T + 1)
    tokens = np.concatenate(packed)
    rows, left = np.split(tokens, [len(tokens) - filled])
    return Packed(rows.reshape(-1, T + 1), tuple(left.tolist()), spans_cropped)


def pack_flat(ids: np.ndarray, offsets: np.ndarray, carry: Sequence[int], bos: int, sequence_len: int) -> Packed:
    """One long stream of BOS document BOS document ..., cut every T tokens; a row's last token is the next row's first.
    Rows start anywhere in a document. The GPT-2 way: best where documents are few and long.
    """
    T = sequence_len
    tokens = np.concatenate([np.asarray(carry, dtype=ids.dtype), np.insert(ids, offsets[:-1], bos)])
    starts = np.arange(0, len(tokens) - T, T)
    return Packed(tokens[starts[:, None] + np.arange(T + 1)], tuple(tokens[len(starts) * T :].tolist()))


def text_blocks(
    shards: Shards, tokenizer: Tokenizer, sequence_len: int, packing: str, start: Position
) -> Iterator[Block[Position]]:
    """Blocks of documents: rows (R, T + 1) of the tokenizer's dtype."""
    pack, after = {"bos": pack_bos, "flat": pack_flat}[packing], start
    for texts, index in read_blocks(shards, DocumentIndex(*start.place), BLOCK_BYTES):
        first = replace(after, rows_used=0, shard=index.shard, row_group=index.row_group, row=index.row)
        ids, offsets = tokenizer.encode_arrow(texts)
        packed = pack(ids, offsets, first.carry, tokenizer.get_bos_token_id(), sequence_len)
        after = replace(
            first,
            carry=packed.carry,
            documents=first.documents + len(texts),
            documents_cut=first.documents_cut + int((np.diff(offsets) > sequence_len).sum()),
            spans_cropped=first.spans_cropped + packed.spans_cropped,
        )
        yield Block(packed.rows, first, after)


def training_stream(
    shards: Shards,
    tokenizer: Tokenizer,
    batch: BatchPlan,
    compute: Compute,
    packing: str = "bos",
    seed: int = 42,
    start: Position | None = None,
) -> Iterator[tuple[Tensor, Tensor, Position]]:
    """Yield (inputs (B, T), targets (B, T), position after them) forever, int64 on compute.device, from `start` or the
    beginning. `packing` is bos or flat.
    """
    if shards.tokens:  # there is no text to pack
        yield from late("token_stream", "token_files")(shards, tokenizer, batch, compute, packing, seed, start)
    blocks = partial(text_blocks, shards, tokenizer, batch.sequence_len, packing)
    too_little = (
        f"too little text in {shards.paths[0].parent}: not one row of {batch.sequence_len} tokens; "
        "lower --max-seq-len or get more text"
    )
    batches = stream(blocks, start or Position(), batch, compute.rank, seed, too_little)
    for rows, position in prefetch(batches, depth=4):
        tokens = to_device(rows, compute)
        yield tokens[:, :-1], tokens[:, 1:], position
