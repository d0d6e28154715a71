"""Bits per byte: how well a model compresses text, comparable across tokenizers, context lengths and with plain
compressors.

Every document is scored alone, from its BOS on, in windows of T tokens; each byte is scored exactly once. Two numbers
come of that, under two names everywhere. bpb, the honest one: stride T / 2, so each window after a document's first
scores its second half, and every token has seen at least T / 2 before it (or all there are). bpb_quick, for looking at
while training: stride T, windows that do not overlap, half the work; what stands at their start has seen little, so it
is higher.
"""

import itertools
import lzma
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import pyarrow as pa
import torch

from nanochat.compute import Compute
from nanochat.conversation import Conversations
from nanochat.dataloader import ChatPosition, chat_blocks, to_device
from nanochat.gpt import GPT
from nanochat.sharding import gathering
from nanochat.tokenizer import Tokenizer

Item = TypeVar("Item")


@dataclass(frozen=True)
class BitsPerByte:
    """The outcome of an evaluation, and over what. `stderr` is that of a ratio of two sums over documents drawn at
    random: how far the number would move with other documents (None = fewer than two). For these documents it is exact.
    """

    bpb: float
    stderr: float | None
    bytes: int
    tokens: int
    documents: int  # that have a byte


def windows(
    ids: np.ndarray, offsets: np.ndarray, bos: int, sequence_len: int, stride: int
) -> Iterator[tuple[int, np.ndarray, int]]:
    """Yield (i, tokens (up to T + 1), index of the first target that counts) for documents ids[offsets[i]:offsets[i +
    1]]. Over all windows of a document the counted targets are its tokens, each once.
    """
    for i, (start, end) in enumerate(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)):
        document = np.concatenate([np.array([bos], dtype=ids.dtype), ids[start:end]])
        scored = 0  # targets counted so far
        while scored < len(document) - 1:
            begin = 0 if scored == 0 else scored - (sequence_len - stride)
            yield i, document[begin : begin + sequence_len + 1], scored - begin
            scored = min(begin + sequence_len, len(document) - 1)


def windows_of_all(
    texts: Iterable[pa.Array], tokenizer: Tokenizer, sequence_len: int, stride: int
) -> Iterator[tuple[int, np.ndarray, int]]:
    """The windows of many arrays of documents, numbered through."""
    before = 0
    for text in texts:
        ids, offsets = tokenizer.encode_arrow(text)
        for i, window, first in windows(ids, offsets, tokenizer.get_bos_token_id(), sequence_len, stride):
            yield before + i, window, first
        before += len(text)


def up_to(
    max_tokens: int | None, windows: Iterable[tuple[int, np.ndarray, int]]
) -> Iterator[tuple[int, np.ndarray, int]]:
    """The first windows, up to the one whose counted targets make max_tokens in all; None = all of them."""
    tokens = 0
    for i, window, first in windows:
        yield i, window, first
        tokens += len(window) - 1 - first
        if max_tokens is not None and tokens >= max_tokens:
            return


@torch.no_grad()
def evaluate_bpb(
    model: GPT,
    tokenizer: Tokenizer,
    texts: Iterable[pa.Array],
    compute: Compute,
    rows: int,
    stride: int | None = None,
    max_tokens: int | None = None,
    poll: Callable[[], None] | None = None,
) -> BitsPerByte:
    """Bits per byte of the documents in `texts`, in batches of `rows` windows of the model's sequence_len over all
    ranks. Stops after the window that reaches max_tokens, whatever rows and ranks are. `poll` is called between
    batches, on all ranks; what it raises ends the evaluation. Collective: all ranks pass the same texts and get the
    same result.
    """
    T = model.config.sequence_len
    token_bytes = torch.from_numpy(tokenizer.token_bytes.astype(np.int64)).to(compute.device)
    sums = torch.zeros(0, 3, dtype=torch.float64)  # nats, bytes, tokens of each document on this rank
    scored = up_to(max_tokens, windows_of_all(texts, tokenizer, T, stride or T))
    for batch in batched(scored, rows * compute.world_size):
        if poll:
            poll()
        mine = batch[compute.rank * rows :][:rows]
        tokens, counts = window_rows([(window, first) for _, window, first in mine], rows, T)
        inputs, counted = torch.from_numpy(tokens).to(compute.device), torch.from_numpy(counts).to(compute.device)
        targets = inputs[:, 1:].masked_fill(~counted, -1)
        with gathering(model):
            losses = model(inputs[:, :-1], targets, loss_reduction="none", dtype=compute.dtype)
        of_rows = [losses.sum(1), (token_bytes[targets.clamp(min=0)] * counted).sum(1), counted.sum(1)]
        of_mine = torch.stack([column.cpu().double() for column in of_rows], dim=1)[: len(mine)]
        sums = torch.cat([sums, sums.new_zeros(max(0, batch[-1][0] + 1 - len(sums)), 3)])
        sums.index_add_(0, torch.tensor([document for document, _, _ in mine], dtype=torch.long), of_mine)
    return ratio_over_documents(compute.sum(sums).numpy())


def ratio_over_documents(sums: np.ndarray) -> BitsPerByte:
    """Bits per byte from nats, bytes and tokens of each document (n, 3). The standard error is that of a ratio
    estimator R = sum(b) / sum(y) for n clusters: sqrt(n / (n - 1) sum((b - R y)^2)) / sum(y) (Cochran, Sampling
    Techniques, 1977, section 6.4, without its correction for finite populations).
    """
    sums = sums[sums[:, 2] > 0]
    bits, lengths, n = sums[:, 0] / math.log(2), sums[:, 1], len(sums)
    total = max(1.0, lengths.sum())
    bpb = bits.sum() / total
    stderr = math.sqrt(n / (n - 1) * ((bits - bpb * lengths) ** 2).sum()) / total if n > 1 else None
    return BitsPerByte(float(bpb), stderr, int(lengths.sum()), int(sums[:, 2].sum()), n)


def window_rows(batch: Sequence[tuple[np.ndarray, int]], rows: int, sequence_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Windows padded to a fixed shape: tokens (rows, T + 1) int64, and which targets count (rows, T) bool."""
    tokens = np.zeros((rows, sequence_len + 1), dtype=np.int64)
    counts = np.zeros((rows, sequence_len), dtype=bool)
    for i, (window, first) in enumerate(batch):
        tokens[i, : len(window)] = window
        counts[i, first : len(window) - 1] = True
    return tokens, counts


def batched(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Lists of `size` items, the last one shorter (itertools.batched needs Python 3.12)."""
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, size)):
        yield batch


@torch.no_grad()
def evaluate_chats(
    model: GPT,
    conversations: Conversations,
    tokenizer: Tokenizer,
    compute: Compute,
    rows_per_rank: int,
    sequence_len: int,
    all_tokens: bool,
    poll: Callable[[], None] | None = None,
) -> float:
    """Nats per supervised token over all conversations, packed as in training, each once. The same on every rank, and
    for any number of ranks. Rows are padded to whole batches, so that a compiled model sees one shape. `poll` is called
    between batches, as in evaluate_bpb.
    """
    totals = torch.zeros(2, dtype=torch.float64)
    blocks = chat_blocks(conversations, tokenizer, sequence_len, all_tokens, ChatPosition())
    for rows, _, _ in blocks:
        for start in range(0, len(rows), rows_per_rank * compute.world_size):
            if poll:
                poll()
            mine = rows[start + compute.rank * rows_per_rank :][:rows_per_rank]
            mine = np.pad(mine, ((0, rows_per_rank - len(mine)), (0, 0), (0, 0)), constant_values=-1)
            mine[:, 0] = np.maximum(mine[:, 0], 0)
            tokens = to_device(mine, compute)
            targets = tokens[:, 1, 1:]
            with gathering(model):
                loss = model(tokens[:, 0, :-1], targets, loss_reduction="sum", dtype=compute.dtype)
            totals += torch.stack([loss, (targets >= 0).sum()]).double().cpu()
    loss_sum, count = compute.sum(totals).tolist()
    return float(loss_sum / max(1.0, count))


# -----------------------------------------------------------------------------
# What a model must beat


def byte_unigram_bpb(texts: Iterable[pa.Array]) -> float:
    """Entropy of the byte frequencies in bits per byte: what knowing nothing but letter counts achieves."""
    counts = np.zeros(256, dtype=np.int64)
    for text in texts:
        counts += np.bincount(np.frombuffer("".join(text.to_pylist()).encode(), dtype=np.uint8), minlength=256)
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log2(p)).sum())


def xz_bpb(train: Iterable[pa.Array], validation: Iterable[pa.Array]) -> float:
    """Bits per validation byte that `xz -9` adds when the validation text follows the training text: it may copy from
    everything the model was trained on, within its 64 MB dictionary. Takes about two seconds per MB of training text.
    """
    train_bytes = "".join(itertools.chain.from_iterable(text.to_pylist() for text in train)).encode()
    val_bytes = "".join(itertools.chain.from_iterable(text.to_pylist() for text in validation)).encode()
    with ThreadPoolExecutor(2) as pool:  # lzma releases the GIL
        alone, both = pool.map(lambda data: len(lzma.compress(data, preset=9)), (train_bytes, train_bytes + val_bytes))
    return 8 * (both - alone) / len(val_bytes)
