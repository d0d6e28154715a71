"""The usual way to feed a training loop, and the slow twin of nanochat/dataloader.py: documents tokenised on the fly by
tiktoken on four threads, packed best-fit in Python from a buffer of a thousand. What does not fit is cropped and lost.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor


def encoded_documents(texts: Sequence[str], encoding: Any, bos: int, threads: int = 4) -> Iterator[list[int]]:
    """BOS and the ids of each text, 128 texts to a call, over and over."""
    while True:
        for start in range(0, len(texts), 128):
            for ids in encoding.encode_ordinary_batch(texts[start : start + 128], num_threads=threads):
                yield [bos, *ids]


def best_fit_rows(documents: Iterator[list[int]], length: int, buffered: int = 1000) -> Iterator[list[int]]:
    """Rows of `length` tokens: again and again the longest document that fits, else the shortest, cropped."""
    buffer: list[list[int]] = []
    while True:
        row: list[int] = []
        while len(row) < length:
            while len(buffer) < buffered:
                buffer.append(next(documents))
            room, best = length - len(row), -1
            for i, document in enumerate(buffer):
                if len(document) <= room and (best < 0 or len(document) > len(buffer[best])):
                    best = i
            if best < 0:
                best = min(range(len(buffer)), key=lambda i: len(buffer[i]))
            row += buffer.pop(best)[:room]
        yield row


def batches(texts: Sequence[str], encoding: Any, bos: int, rows: int, sequence_len: int) -> Iterator[Tensor]:
    """(B, T + 1) int64, forever."""
    stream = best_fit_rows(encoded_documents(texts, encoding, bos), sequence_len + 1)
    while True:
        yield torch.tensor([next(stream) for _ in range(rows)])
