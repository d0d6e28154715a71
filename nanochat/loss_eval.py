"""Bits per byte: how well a model compresses text, comparable across tokenizers, context lengths and compressors.

Every document is scored alone, in windows of T tokens; each byte is scored exactly once. Every window begins with BOS
in place of its first token, as the rows of training do: a model that has never seen a row without scores 1 % worse in
mid-document (laptop's, 1.5425 instead of 1.5273). Two numbers: bpb, the honest one: stride T / 2, so each window after
a document's first scores its second half, and every token has seen at least T / 2 - 1 before it (or all there are).
bpb_quick, for looking at while training: stride T, windows that do not overlap, half the work; what stands at their
start has seen little, so it is higher.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from nanochat.common import UserError
from nanochat.compute import Compute, collective
from nanochat.corpus import Shards, iter_text
from nanochat.dataloader import to_device
from nanochat.model import LanguageModel
from nanochat.tokenizer import Tokenizer, late


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
    right: int = 0  # tokens that the model thought the likeliest
    exact: int = 0  # documents of which all tokens were right

    def figures(self, train_loss: float) -> dict[str, float]:
        """Also: nats per token, their exponential, shares of tokens and documents right, nats over train_loss."""
        nats = self.bpb * math.log(2) * self.bytes / self.tokens
        shares = {"accuracy": self.right / self.tokens, "exact": self.exact / self.documents}
        return {"val_nats": nats, "perplexity": math.exp(min(nats, 700.0)), **shares, "gap": nats - train_loss}


class Window(NamedTuple):
    """A part of a document to be scored."""

    document: int  # its number
    tokens: np.ndarray  # up to T + 1
    first: int  # index of the first target that counts


def validation_windows(
    shards: Shards, tokenizer: Tokenizer, sequence_len: int, stride: int, max_tokens: int | None = None
) -> Iterator[Window]:
    """The windows of all documents, up to the one whose counted targets make max_tokens in all; None = all of them."""
    if shards.tokens:
        yield from late("token_windows", "token_files")(shards, tokenizer, sequence_len, stride, max_tokens)
        return
    documents = tokens = 0
    for text in iter_text(shards):
        ids, offsets = tokenizer.encode_arrow(text)
        for window in document_windows(ids, offsets, tokenizer.get_bos_token_id(), sequence_len, stride):
            yield window._replace(document=documents + window.document)
            tokens += len(window.tokens) - 1 - window.first
            if max_tokens is not None and tokens >= max_tokens:
                return
        documents += len(text)


def document_windows(
    ids: np.ndarray, offsets: np.ndarray, bos: int, sequence_len: int, stride: int
) -> Iterator[Window]:
    """The windows of documents ids[offsets[i]:offsets[i + 1]], which have no BOS. Over all windows of a document the
    counted targets are its tokens, each once.
    """
    for i, (start, end) in enumerate(itertools.pairwise(offsets.tolist())):
        document = np.insert(ids[start:end], 0, bos)
        scored = 0  # targets counted so far
        while scored < len(document) - 1:
            begin = scored - (sequence_len - stride) if scored else 0
            window = document[begin : begin + sequence_len + 1].copy()
            window[0] = bos
            yield Window(i, window, scored - begin)
            scored = min(begin + sequence_len, len(document) - 1)


@torch.no_grad()
def evaluate_bpb(
    model: LanguageModel,
    windows: Iterable[Window],
    tokenizer: Tokenizer,
    compute: Compute,
    device_batch_size: int,
    poll: Callable[[], None] | None = None,
) -> BitsPerByte:
    """Bits per byte of what the windows count, which are as long as the model's context. Collective: all ranks pass the
    same windows and get the same result, whatever device_batch_size and ranks are. What `poll` raises, which is called
    between batches, ends it.
    """
    T, B = model.config.sequence_len, device_batch_size
    sums = torch.zeros(0, 4, dtype=torch.float64)  # nats, bytes, tokens, right ones of each document on this rank
    windows = iter(windows)
    while batch := list(itertools.islice(windows, B * compute.world_size)):
        if poll:
            poll()
        mine = batch[compute.rank * B :][:B]
        rows = to_device(window_rows(mine, B, T), compute)
        with collective():
            scores = model(rows[:, 0, :-1], rows[:, 1, 1:], loss_reduction="scores", dtype=compute.dtype)
        sums = torch.cat([sums, sums.new_zeros(max(0, batch[-1].document + 1 - len(sums)), 4)])
        for window, (nats, right) in zip(mine, scores.sum(2).t().tolist(), strict=False):
            scored = window.tokens[window.first + 1 :]
            sums[window.document] += sums.new_tensor([nats, tokenizer.token_bytes[scored].sum(), len(scored), right])
    return ratio_over_documents(compute.sum(sums).numpy())


def window_rows(windows: Sequence[Window], rows: int, sequence_len: int) -> np.ndarray:
    """Windows padded to a fixed shape (rows, 2, T + 1): tokens, and targets that are -1 where they do not count."""
    padded = np.full((rows, 2, sequence_len + 1), [[0], [-1]])
    for (tokens, targets), window in zip(padded, windows, strict=False):
        tokens[: len(window.tokens)] = window.tokens
        targets[window.first + 1 : len(window.tokens)] = window.tokens[window.first + 1 :]
    return padded


def ratio_over_documents(sums: np.ndarray) -> BitsPerByte:
    """Bits per byte from nats, bytes, tokens and perhaps right ones of each document (n, 4). The standard error is that
    of a ratio estimator R = sum(b) / sum(y) for n clusters: sqrt(n / (n - 1) sum((b - R y)^2)) / sum(y) (Cochran,
    Sampling Techniques, 1977, section 6.4, without its correction for finite populations). UserError of no bytes.
    """
    sums = sums[sums[:, 2] > 0]
    bits, lengths, n = sums[:, 0] / math.log(2), sums[:, 1], len(sums)
    total = lengths.sum()
    if not total:
        raise UserError("there is no bits per byte of nothing: the text to score has no bytes", everywhere=True)
    bpb = bits.sum() / total
    stderr = math.sqrt(n / (n - 1) * ((bits - bpb * lengths) ** 2).sum()) / total if n > 1 else None
    right = int(sums[:, 3:].sum()), int((sums[:, 3:] == sums[:, 2:3]).sum())
    return BitsPerByte(float(bpb), stderr, int(lengths.sum()), int(sums[:, 2].sum()), n, *right)
