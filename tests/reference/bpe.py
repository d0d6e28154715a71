"""Byte-pair encoding as it is defined, one sentence per line and nothing clever. Slow: milliseconds per word."""

from collections import Counter
from collections.abc import Iterable, Sequence

import regex

Pair = tuple[int, int]


def pretokens(texts: Iterable[str], pattern: str) -> list[bytes]:
    """The pieces that a published split pattern cuts the texts into."""
    return [piece.encode() for text in texts for piece in regex.findall(pattern, text)]


def merge(ids: Sequence[int], pair: Pair, token: int) -> list[int]:
    """Replace every occurrence of the pair, from the left: [1, 1, 1, 2], (1, 1), 9 -> [9, 1, 2]."""
    merged: list[int] = []
    at = 0
    while at < len(ids):
        hit = tuple(ids[at : at + 2]) == pair
        merged.append(token if hit else ids[at])
        at += 2 if hit else 1
    return merged


def train(words: Iterable[bytes], most: int) -> list[Pair]:
    """The merges: each time the pair with the highest count, the smallest such pair where counts are equal."""
    counted = [(list(word), count) for word, count in Counter(words).items()]
    merges: list[Pair] = []
    while len(merges) < most:
        pairs: Counter[Pair] = Counter()
        for ids, count in counted:
            for pair in zip(ids, ids[1:], strict=False):
                pairs[pair] += count
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        counted = [(merge(ids, best, 256 + len(merges)), count) for ids, count in counted]
        merges.append(best)
    return merges


def encode(word: bytes, ranks: dict[bytes, int]) -> list[int]:
    """The ids of one pretoken: itself if it is a token, else join the leftmost lowest-ranked neighbours to the end."""
    if word in ranks:
        return [ranks[word]]
    parts = [bytes([byte]) for byte in word]
    while True:
        joins = [(ranks[parts[i] + parts[i + 1]], i) for i in range(len(parts) - 1) if parts[i] + parts[i + 1] in ranks]
        if not joins:
            return [ranks[part] for part in parts]
        _, at = min(joins)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
