"""
Bits per byte: how well a model compresses text, comparable across tokenizers, context lengths and with plain
compressors.

Every document is scored alone, from its BOS on, in windows of T tokens; each byte is scored exactly once. With stride T
the windows do not overlap (quick, little context at their start); with stride T / 2 each window scores its second half
(the honest number).
"""

import itertools
import lzma
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch

from nanochat.compute import Compute
from nanochat.conversation import Conversations
from nanochat.dataloader import ChatPosition, chat_blocks, to_device
from nanochat.gpt import GPT
from nanochat.tokenizer import Tokenizer


@dataclass(frozen=True)
class BitsPerByte:
    """The outcome of an evaluation, and over what."""

    bpb: float
    bytes: int
    tokens: int


def windows(
    ids: np.ndarray, offsets: np.ndarray, bos: int, sequence_len: int, stride: int
) -> Iterator[tuple[np.ndarray, int]]:
    """
    Yield (tokens (up to T + 1), index of the first target that counts) for documents ids[offsets[i]:offsets[i + 1]].
    Over all windows of a document the counted targets are its tokens, each once.
    """
    for start, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        document = np.concatenate([np.array([bos], dtype=ids.dtype), ids[start:end]])
        scored = 0  # targets counted so far
        while scored < len(document) - 1:
            begin = 0 if scored == 0 else scored - (sequence_len - stride)
            yield document[begin : begin + sequence_len + 1], scored - begin
            scored = min(begin + sequence_len, len(document) - 1)


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
    """
    Bits per byte of the documents in `texts`, in batches of `rows` windows of the model's sequence_len over all ranks.
    Stops after the first batch that reaches max_tokens. `poll` is called between batches, on all ranks; what it
    raises ends the evaluation. Collective: all ranks pass the same texts and get the same result.
    """
    T = model.config.sequence_len
    bos = tokenizer.get_bos_token_id()
    token_bytes = torch.from_numpy(tokenizer.token_bytes.astype(np.int64)).to(compute.device)
    totals = torch.zeros(3, dtype=torch.float64)  # nats, bytes, tokens of this rank
    tokens_seen = 0  # of all ranks
    encoded = map(tokenizer.encode_arrow, texts)
    every_window = (window for ids, offsets in encoded for window in windows(ids, offsets, bos, T, stride or T))
    for batch in batched(every_window, rows * compute.world_size):
        if poll:
            poll()
        tokens, counts = window_rows(batch[compute.rank * rows :][:rows], rows, T)
        inputs, counted = torch.from_numpy(tokens).to(compute.device), torch.from_numpy(counts).to(compute.device)
        targets = inputs[:, 1:].masked_fill(~counted, -1)
        losses = model(inputs[:, :-1], targets, loss_reduction="none", dtype=compute.dtype)
        scored_bytes = token_bytes[targets[counted]].sum()
        totals += torch.stack([losses.sum().cpu().double(), scored_bytes.cpu().double(), counted.sum().cpu().double()])
        tokens_seen += sum(len(window) - 1 - first for window, first in batch)
        if max_tokens is not None and tokens_seen >= max_tokens:
            break
    nats, byte_count, token_count = compute.sum(totals).tolist()
    return BitsPerByte(nats / (math.log(2) * max(1, byte_count)), int(byte_count), int(token_count))


def window_rows(batch: Sequence[tuple[np.ndarray, int]], rows: int, sequence_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Windows padded to a fixed shape: tokens (rows, T + 1) int64, and which targets count (rows, T) bool."""
    tokens = np.zeros((rows, sequence_len + 1), dtype=np.int64)
    counts = np.zeros((rows, sequence_len), dtype=bool)
    for i, (window, first) in enumerate(batch):
        tokens[i, : len(window)] = window
        counts[i, first : len(window) - 1] = True
    return tokens, counts


def batched(items: Iterable[tuple[np.ndarray, int]], size: int) -> Iterator[list[tuple[np.ndarray, int]]]:
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
    """
    Nats per supervised token over all conversations, packed as in training, each once. The same on every rank, and for
    any number of ranks. Rows are padded to whole batches, so that a compiled model sees one shape. `poll` is called
    between batches, as in evaluate_bpb.
    """
    totals = torch.zeros(2, dtype=torch.float64)
    blocks = chat_blocks(conversations, tokenizer, sequence_len, 0, all_tokens, ChatPosition(), epochs=1)
    for rows, _ in blocks:
        for start in range(0, len(rows), rows_per_rank * compute.world_size):
            if poll:
                poll()
            mine = rows[start + compute.rank * rows_per_rank :][:rows_per_rank]
            mine = np.pad(mine, ((0, rows_per_rank - len(mine)), (0, 0), (0, 0)), constant_values=-1)
            mine[:, 0] = np.maximum(mine[:, 0], 0)
            tokens = to_device(mine, compute)
            targets = tokens[:, 1, 1:]
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
    """
    Bits per validation byte that `xz -9` adds when the validation text follows the training text: it may copy from
    everything the model was trained on, within its 64 MB dictionary. Takes about two seconds per MB of training text.
    """
    train_bytes = "".join(itertools.chain.from_iterable(text.to_pylist() for text in train)).encode()
    val_bytes = "".join(itertools.chain.from_iterable(text.to_pylist() for text in validation)).encode()
    with ThreadPoolExecutor(2) as pool:  # lzma releases the GIL
        alone, both = pool.map(lambda data: len(lzma.compress(data, preset=9)), (train_bytes, train_bytes + val_bytes))
    return 8 * (both - alone) / len(val_bytes)
