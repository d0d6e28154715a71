"""Tokenizers that learn nothing: one token per character, per byte, or per symbol of a list, as the numbers below 97.

    python -m scripts.tok_train --kind=char     # the characters of a corpus, 65 for tinyshakespeare
    python -m scripts.tok_train --kind=byte     # 265 ids: 256 bytes and our 9 special tokens

They are what nanoGPT (characters) and nanuGPT (bytes, numbers) train small models with, and have the interface of
Tokenizer. Bytes are that class without a merge. Promises: decode(encode(text)) == text; a text with anything else in it
is refused, with what and where.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from nanochat.common import UserError
from nanochat.tokenizer import SPECIAL_TOKENS, Tokenizer


def byte_tokenizer() -> Tokenizer:
    """Ids 0 to 255 are the bytes; the special tokens come after them."""
    return Tokenizer(np.empty((0, 2), dtype=np.uint32))


class SymbolTokenizer(Tokenizer):
    """One id per symbol, in the order given; then the special tokens. Where one symbol begins another, as 1 does 12,
    the longest that fits is taken.
    """

    def __init__(self, symbols: Sequence[str], special_tokens: Sequence[str] = SPECIAL_TOKENS):
        if not symbols or "" in symbols or len(set(symbols)) < len(symbols):
            raise UserError(f"a tokenizer of {len(symbols)} symbols: expected at least one, no two alike, none empty")
        self.symbols = list(symbols)
        encoder = SymbolEncoder(self.symbols, len(symbols) + len(special_tokens))
        self._set([symbol.encode() for symbol in symbols], special_tokens, encoder)

    @staticmethod
    def of_text(texts: Iterable[Any]) -> "SymbolTokenizer":
        """The characters of some texts (str, or Arrow arrays of them), sorted by code point."""
        found: set[str] = set()
        for text in texts:
            found.update(*([text] if isinstance(text, str) else text.to_pylist()))
        return SymbolTokenizer(sorted(found))

    def content(self) -> dict[str, Any]:
        return {"kind": "char", "symbols": self.symbols, "special_tokens": self.get_special_tokens()}


def from_content(content: dict[str, Any]) -> SymbolTokenizer:
    """The tokenizer that a file holds."""
    return SymbolTokenizer(content["symbols"], content["special_tokens"])


class SymbolEncoder:
    """What SymbolTokenizer has where the others have rustbpe.Encoder."""

    def __init__(self, symbols: Sequence[str], vocab_size: int):
        self.ids = {symbol: number for number, symbol in enumerate(symbols)}
        self.dtype = np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)
        self.pattern = re.compile("|".join(map(re.escape, sorted(symbols, key=len, reverse=True))))

    def encode_text(self, text: str) -> list[int]:
        """The ids of a text. Raises ValueError naming the first character that begins no symbol, and where."""
        found = self.pattern.findall(text)  # 9 MB/s on one core
        if sum(map(len, found)) < len(text):
            place = 0
            while match := self.pattern.match(text, place):
                place = match.end()
            line = text.count("\n", 0, place) + 1
            known = f"this tokenizer knows {len(self.ids)} symbols, such as {', '.join(map(repr, list(self.ids)[-3:]))}"
            raise ValueError(f"character {text[place]!r} at {place:,} (line {line:,}); {known}")
        return [self.ids[symbol] for symbol in found]

    def encode_lists(self, texts: Any, num_threads: int = 1) -> list[list[int]]:
        """Ids of each text; see Tokenizer.encode."""
        rows = texts.to_pylist() if hasattr(texts, "to_pylist") else texts
        if None in rows:
            raise ValueError(f"row {rows.index(None)} is null")
        return [self.encode_text(text) for text in rows]

    def encode_batch(self, texts: Any, num_threads: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """Ids of all texts, one after the other, and offsets; see Tokenizer.encode_arrow."""
        rows = [np.array(row, dtype=self.dtype) for row in self.encode_lists(texts)]
        offsets = np.cumsum([0, *map(len, rows)], dtype=np.int64)
        return np.concatenate([np.empty(0, dtype=self.dtype), *rows]), offsets
