"""Documents or conversations in, training batches out: one global stream, the same on every rank.

A numbered pipeline of generators, each resumable from what it yields:

    1. read      consecutive documents, about 4 MB at a time (a block)            corpus.read_blocks
    2. tokenise  the whole block in one call, on the fly: there is no token cache  tokenizer.encode_arrow
    3. pack      the block into rows of T + 1 tokens, in an order shuffled by seed  pack_bos or pack_flat
    4. deal      rows to batches: a batch is B rows for each rank, a rank takes its own

Conversations go the same way, 2,048 to a block, rendered with their loss mask and packed whole (pack_chats).

Promises: N ranks see together exactly what one rank sees; `Position` resumes any number of ranks at any batch; every
token of every document is trained on once per epoch (a row cut short at the end of a block is carried into the next);
too little text is an error. Costs: every rank tokenises everything. Attention is not masked between the documents of a
row (measured as neutral by nanochat).
"""

import queue
import threading
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from nanochat.common import UserError
from nanochat.compute import Compute
from nanochat.conversation import Conversations, Rendered, render_conversations
from nanochat.corpus import DocumentIndex, Shards, read_blocks
from nanochat.tokenizer import Tokenizer

ELSEWHERE = "resume from another checkpoint: --resume-from-step=N"
Item = TypeVar("Item")
AnyPosition = TypeVar("AnyPosition", "Position", "ChatPosition")
BLOCK_BYTES = 4 << 20  # text tokenised and packed together: a million tokens, thousands of rows to pack and shuffle


@dataclass(frozen=True)
class Position:
    """Where the stream stands: everything needed to continue with the next row. JSON-friendly; a few hundred numbers at
    most.
    """

    epoch: int = 0
    shard: int = 0  # first document of the current block, as in corpus.DocumentIndex
    row_group: int = 0
    row: int = 0
    rows_used: int = 0  # rows of the current block already dealt out
    carry: tuple[int, ...] = ()  # tokens of the unfinished row that the previous block left
    documents: int = 0  # counters over all blocks before this one: documents read,
    documents_cut: int = 0  # of these, longer than a row and therefore cut into row-sized spans,
    spans_cropped: int = 0  # and spans cut once more to fill up a row; nothing is dropped

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(values: object) -> "Position":
        """The position that to_json() gave; UserError for anything else."""
        return checked_position(Position, values)

    @property
    def index(self) -> DocumentIndex:
        return DocumentIndex(self.shard, self.row_group, self.row)

    def describe(self) -> str:
        """One line on how the text was cut, for the log and the report."""
        share = self.documents_cut / max(1, self.documents)
        return (
            f"epoch {self.epoch + 1}, {self.documents:,} documents in finished blocks: {share:.1%} cut into row-sized "
            f"spans, {self.spans_cropped:,} spans cropped to fill a row, 0 tokens excluded"
        )


def checked_position(kind: type[AnyPosition], values: object) -> AnyPosition:
    """A position from JSON; UserError unless it has exactly the fields of its kind, with whole numbers from 0 on."""
    names = [field.name for field in fields(kind)]
    if not isinstance(values, dict) or sorted(values) != sorted(names):
        found = ", ".join(map(str, values)) if isinstance(values, dict) else f"{values!r:.60}"
        raise UserError(f"a position in the data has {', '.join(names)}, this one: {found}; {ELSEWHERE}")
    for name, value in values.items():
        numbers = value if name == "carry" else [value]
        if not isinstance(numbers, list | tuple) or not all(type(number) is int and number >= 0 for number in numbers):
            expected = f"expected whole numbers from 0 on; {ELSEWHERE}"
            raise UserError(f"position in the data: {name} is {value!r:.60}, {expected}")
    fitting: dict[str, Any] = {name: tuple(value) if name == "carry" else value for name, value in values.items()}
    return kind(**fitting)


def misplaced(position: object, reason: str) -> UserError:
    """The error for a position that does not fit the data: another checkpoint's, or the data is not what it was."""
    return UserError(f"{position!r:.160} does not fit the data: {reason}; {ELSEWHERE}")


@dataclass
class Packed:
    """A block as rows, and what is left of it."""

    rows: np.ndarray  # (R, T + 1), the tokenizer's dtype
    carry: tuple[int, ...]
    documents_cut: int = 0
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
    carried = np.asarray(carry, dtype=ids.dtype)
    pieces = [span[1:] for span in np.split(carried, np.flatnonzero(carried == bos))[1:]]
    documents_cut = 0
    for start, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        documents_cut += end - start > T
        pieces += [ids[a : min(a + T, end)] for a in range(start, end, T)]
    spans: dict[int, list[np.ndarray]] = {}  # by length, BOS included
    for piece in pieces:
        spans.setdefault(len(piece) + 1, []).append(piece)
    lengths = sorted(spans)

    rows: list[np.ndarray] = []
    row, filled, spans_cropped = np.empty(T + 1, dtype=ids.dtype), 0, 0
    while lengths:
        room = T + 1 - filled
        fit = bisect_right(lengths, room) - 1
        length = lengths[fit]  # the longest that fits, or with fit == -1 the longest of all
        piece = spans[length].pop()
        if not spans[length]:
            del spans[length], lengths[fit]
        if length > room:
            spans_cropped += 1
            rest = piece[room - 1 :]
            piece = piece[: room - 1]
            if len(rest) + 1 not in spans:
                spans[len(rest) + 1] = []
                lengths.insert(bisect_right(lengths, len(rest) + 1), len(rest) + 1)
            spans[len(rest) + 1].append(rest)
        row[filled] = bos
        row[filled + 1 : filled + 1 + len(piece)] = piece
        filled += 1 + len(piece)
        if filled == T + 1:
            rows.append(row)
            row, filled = np.empty(T + 1, dtype=ids.dtype), 0
    stacked = np.stack(rows) if rows else np.empty((0, T + 1), dtype=ids.dtype)
    return Packed(stacked, tuple(row[:filled].tolist()), documents_cut, spans_cropped)


def pack_flat(ids: np.ndarray, offsets: np.ndarray, carry: Sequence[int], bos: int, sequence_len: int) -> Packed:
    """One long stream of BOS document BOS document ..., cut every T tokens; a row's last token is the next row's first.
    Rows start anywhere in a document. The GPT-2 way: best where documents are few and long.
    """
    T = sequence_len
    stream = np.concatenate([np.asarray(carry, dtype=ids.dtype), np.insert(ids, offsets[:-1], bos)])
    count = max(0, (len(stream) - 1) // T)
    rows = (
        np.lib.stride_tricks.sliding_window_view(stream, T + 1)[::T][:count]
        if count
        else np.empty((0, T + 1), ids.dtype)
    )
    return Packed(rows, tuple(stream[count * T :].tolist()), int((np.diff(offsets) > T).sum()))


PACKERS = {"bos": pack_bos, "flat": pack_flat}


def packed_blocks(
    shards: Shards,
    tokenizer: Tokenizer,
    sequence_len: int,
    packing: str,
    seed: int,
    start: Position,
) -> Iterator[tuple[np.ndarray, Position]]:
    """Yield (rows (R, T + 1), position of the block's first row), epoch after epoch, forever. The first block is the
    one that `start` stands in, whole. Raises UserError when a whole epoch does not fill one row.
    """
    position, rows_in_epoch = replace(start, rows_used=0), 1
    bos = tokenizer.get_bos_token_id()
    check_carry(start, tokenizer, sequence_len, packing)
    while True:
        for texts, index in read_blocks(shards, position.index, BLOCK_BYTES):
            position = replace(position, shard=index.shard, row_group=index.row_group, row=index.row)
            ids, offsets = tokenizer.encode_arrow(texts)
            packed = PACKERS[packing](ids, offsets, position.carry, bos, sequence_len)
            order = np.random.default_rng([seed, position.epoch, *index]).permutation(len(packed.rows))
            yield packed.rows[order], position
            rows_in_epoch += len(packed.rows)
            position = replace(
                position,
                carry=packed.carry,
                documents=position.documents + len(texts),
                documents_cut=position.documents_cut + packed.documents_cut,
                spans_cropped=position.spans_cropped + packed.spans_cropped,
            )
        if rows_in_epoch == 0:
            raise UserError(
                f"too little text in {shards.paths[0].parent}: not one row of {sequence_len} tokens; "
                "lower --max-seq-len or get more text"
            )
        position, rows_in_epoch = replace(position, epoch=position.epoch + 1, shard=0, row_group=0, row=0), 0


def check_carry(start: Position, tokenizer: Tokenizer, sequence_len: int, packing: str) -> None:
    """Raise UserError for an unfinished row that these settings never leave: its tokens would be lost or exchanged."""
    if len(start.carry) > sequence_len:
        raise misplaced(start, f"its unfinished row has {len(start.carry):,} of {sequence_len:,} tokens")
    if max(start.carry, default=0) >= tokenizer.get_vocab_size():
        raise misplaced(start, f"token {max(start.carry):,} of {tokenizer.get_vocab_size():,}")
    if packing == "bos" and start.carry and start.carry[0] != tokenizer.get_bos_token_id():
        raise misplaced(start, "its unfinished row does not begin with BOS")


def deal_rows(
    blocks: Iterator[tuple[np.ndarray, AnyPosition]], start: AnyPosition, rows_per_rank: int, rank: int, world_size: int
) -> Iterator[tuple[np.ndarray, AnyPosition]]:
    """Yield (this rank's rows of the next global batch (B, ...), the position after that batch)."""
    need = rows_per_rank * world_size
    rows, position = next(blocks)
    used = start.rows_used
    if used > len(rows):
        raise misplaced(start, f"row {used:,} of a block of {len(rows):,}")
    while True:
        parts, missing = [], need
        while missing:
            if used == len(rows):
                rows, position = next(blocks)
                used = 0
            parts.append(rows[used : used + missing])
            missing -= len(parts[-1])
            used += len(parts[-1])
        batch = np.concatenate(parts) if len(parts) > 1 else parts[0]
        yield batch[rank * rows_per_rank :][:rows_per_rank], replace(position, rows_used=used)


def training_stream(
    shards: Shards,
    tokenizer: Tokenizer,
    rows_per_rank: int,
    sequence_len: int,
    compute: Compute,
    packing: str = "bos",
    seed: int = 42,
    start: Position | None = None,
) -> Iterator[tuple[Tensor, Tensor, Position]]:
    """Yield (inputs (B, T), targets (B, T), position after them) forever, int64 on compute.device, from `start` or the
    beginning. A thread reads, tokenises and packs ahead, so that a training step never waits for text.
    """
    if packing not in PACKERS:
        raise UserError(f"--packing={packing}: expected {' or '.join(PACKERS)}")
    start = start or Position()
    blocks = packed_blocks(shards, tokenizer, sequence_len, packing, seed, start)
    batches = prefetch(deal_rows(blocks, start, rows_per_rank, compute.rank, compute.world_size), depth=4)
    for rows, position in batches:
        tokens = to_device(rows, compute)
        yield tokens[:, :-1], tokens[:, 1:], position


def to_device(rows: np.ndarray, compute: Compute) -> Tensor:
    """An array of token ids as int64 on compute.device, from pinned memory where that lets the copy overlap."""
    tokens = torch.from_numpy(rows.astype(np.int64))
    if compute.device.type == "cuda":
        tokens = tokens.pin_memory()  # compared by .type: a torch.device never equals a string
    return tokens.to(compute.device, non_blocking=True)


# -----------------------------------------------------------------------------
# Conversations

CHAT_BLOCK = 2048  # conversations rendered and packed together


@dataclass(frozen=True)
class ChatPosition:
    """Where a stream of conversations stands, with counters over all blocks before this one."""

    epoch: int = 0
    conversation: int = 0  # first one of the current block
    rows_used: int = 0  # rows of the current block already dealt out
    conversations: int = 0  # read,
    conversations_cut: int = 0  # of these, longer than a row and therefore cut at its end,
    tokens_cut: int = 0  # and the tokens that this cost;
    left_out: int = 0  # without a supervised token, such as a question that fills the row
    tokens_padded: int = 0  # places at the ends of rows where nothing fitted

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(values: object) -> "ChatPosition":
        """The position that to_json() gave; UserError for anything else."""
        return checked_position(ChatPosition, values)

    def describe(self) -> str:
        """One line on how conversations were cut, for the log and the report."""
        return (
            f"epoch {self.epoch + 1}, {self.conversations:,} conversations in finished blocks: "
            f"{self.conversations_cut:,} cut ({self.tokens_cut:,} tokens), {self.left_out:,} left out for want of a "
            f"supervised token, {self.tokens_padded:,} places padded"
        )


def pack_chats(rendered: Sequence[Rendered], sequence_len: int, pad: int, all_tokens: bool) -> np.ndarray:
    """Best fit, whole conversations only: (R, 2, T + 1), the ids and the targets of each row. The longest conversation
    that fits into what is left of a row comes next; what nothing fits into is padding. Targets are the ids where they
    are trained and -1 elsewhere. Conversations must have at most T + 1 tokens.
    """
    T = sequence_len
    by_length: dict[int, list[Rendered]] = {}
    for item in rendered:
        by_length.setdefault(len(item.ids), []).append(item)
    lengths = sorted(by_length)
    rows: list[np.ndarray] = []
    row, filled = np.empty((2, 0)), T + 1
    while lengths:
        fit = bisect_right(lengths, T + 1 - filled) - 1
        if fit < 0:
            row, filled = np.full((2, T + 1), -1, dtype=np.int32), 0
            row[0] = pad
            rows.append(row)
            continue
        item = by_length[lengths[fit]].pop()
        if not by_length[lengths[fit]]:
            del by_length[lengths[fit]], lengths[fit]
        end = filled + len(item.ids)
        row[0, filled:end] = item.ids
        row[1, filled:end] = item.ids if all_tokens else np.where(item.mask, item.ids.astype(np.int32), -1)
        filled = end
    return np.stack(rows) if rows else np.empty((0, 2, T + 1), dtype=np.int32)


def chat_blocks(
    conversations: Conversations,
    tokenizer: Tokenizer,
    sequence_len: int,
    seed: int,
    all_tokens: bool,
    start: ChatPosition,
    epochs: int | None = None,
) -> Iterator[tuple[np.ndarray, ChatPosition]]:
    """Yield (rows (R, 2, T + 1), position of the block's first row), epoch after epoch, forever or for some epochs. The
    first block is the one that `start` stands in, whole. Raises UserError when a whole epoch gives no row, or `start`
    is not the beginning of a block.
    """
    if start.conversation and (start.conversation >= len(conversations) or start.conversation % CHAT_BLOCK):
        raise misplaced(start, f"no block of {CHAT_BLOCK:,} of the {len(conversations):,} conversations begins there")
    position, rows_in_epoch = replace(start, rows_used=0), 1
    while epochs is None or position.epoch < epochs:
        for first in range(position.conversation, len(conversations), CHAT_BLOCK):
            position = replace(position, conversation=first)
            numbers = range(first, min(first + CHAT_BLOCK, len(conversations)))
            messages = [conversations[number]["messages"] for number in numbers]
            rendered = render_conversations(messages, tokenizer, sequence_len + 1)
            kept = [item for item in rendered if all_tokens or item.has_target]
            rows = pack_chats(kept, sequence_len, tokenizer.get_bos_token_id(), all_tokens)
            yield rows[np.random.default_rng([seed, position.epoch, first]).permutation(len(rows))], position
            rows_in_epoch += len(rows)
            position = replace(
                position,
                conversations=position.conversations + len(rendered),
                conversations_cut=position.conversations_cut + sum(item.tokens_cut > 0 for item in rendered),
                tokens_cut=position.tokens_cut + sum(item.tokens_cut for item in rendered),
                left_out=position.left_out + len(rendered) - len(kept),
                tokens_padded=position.tokens_padded + rows[:, 0].size - sum(len(item.ids) for item in kept),
            )
        if rows_in_epoch == 0:
            raise UserError(
                f"no conversation of {len(conversations)} has a supervised token within {sequence_len} tokens; "
                "raise --max-seq-len or choose another mixture"
            )
        position, rows_in_epoch = replace(position, epoch=position.epoch + 1, conversation=0), 0


def chat_stream(
    conversations: Conversations,
    tokenizer: Tokenizer,
    rows_per_rank: int,
    sequence_len: int,
    compute: Compute,
    all_tokens: bool,
    seed: int = 42,
    start: ChatPosition | None = None,
) -> Iterator[tuple[Tensor, Tensor, ChatPosition]]:
    """Yield (inputs (B, T), targets (B, T), position after them) forever, like training_stream, from conversations:
    anything with len() and [i] that gives {"messages": [...]}. Targets are -1 where nothing is learned: everywhere but
    in what the assistant says, or with all_tokens only in the padding.
    """
    start = start or ChatPosition()
    blocks = chat_blocks(conversations, tokenizer, sequence_len, seed, all_tokens, start)
    for rows, position in prefetch(deal_rows(blocks, start, rows_per_rank, compute.rank, compute.world_size), depth=4):
        tokens = to_device(rows, compute)
        yield tokens[:, 0, :-1], tokens[:, 1, 1:], position


def rows_in_epoch(conversations: Conversations, tokenizer: Tokenizer, sequence_len: int, all_tokens: bool) -> int:
    """How many rows one epoch has: counted where it is a single block, else estimated from the first one."""
    rows, _ = next(chat_blocks(conversations, tokenizer, sequence_len, 0, all_tokens, ChatPosition()))
    return max(1, round(len(rows) * max(1.0, len(conversations) / CHAT_BLOCK)))


def prefetch(iterator: Iterator[Item], depth: int) -> Iterator[Item]:
    """The same items, made by a thread that runs up to `depth` items ahead; its exceptions are raised here."""
    items: queue.Queue[tuple[Item | None, BaseException | None]] = queue.Queue(maxsize=depth)
    closed = threading.Event()

    def work() -> None:
        try:
            for item in iterator:
                put((item, None))
                if closed.is_set():
                    return
            put((None, StopIteration()))
        except BaseException as error:  # handed over, not swallowed
            put((None, error))

    def put(item: tuple[Item | None, BaseException | None]) -> None:
        while not closed.is_set():
            try:
                return items.put(item, timeout=0.1)
            except queue.Full:
                continue

    thread = threading.Thread(target=work, daemon=True, name="prefetch")
    thread.start()
    try:
        while True:
            item, error = items.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item  # type: ignore[misc]  # an item that comes without an error is an Item
    finally:
        closed.set()
        thread.join()
