"""The tokenizer: text <-> token ids, trained and run by `rustbpe`, in one sealed JSON file; other kinds are subclasses.

Promises: decode(encode(text)) == text; ordinary text never becomes a special token, whatever it says; equal tokenizers
make equal files; a file in which a bit has changed is refused. Does not: normalise text, or read pickles.
"""

import hashlib
import importlib
import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import numpy as np

import rustbpe
from nanochat.common import UserError, get_base_dir
from nanochat.files import read_sealed, seal, write_atomic

FILE_NAME = "tokenizer.json"
VERSION = 1  # of the file format
SPECIAL_TOKENS = (
    "<|bos|>",  # starts every document
    "<|user_start|>",  # the rest is for chats: who speaks,
    "<|user_end|>",
    "<|assistant_start|>",
    "<|assistant_end|>",
    "<|python_start|>",  # what the assistant asks the tool,
    "<|python_end|>",
    "<|output_start|>",  # and what the tool answers
    "<|output_end|>",
)
MAX_VOCAB_SIZE = 1 << 24  # a hundred times the largest that anybody uses
OTHER_KINDS = {"char": "char_byte", "hf": "hf_tokenizer"}  # the files that know them, loaded where a tokenizer is one


def late(name: str, module: str = "names") -> Any:
    """A function of a file that is loaded when it is called: most trainings do without."""
    return lambda *values, **named: getattr(importlib.import_module(f"nanochat.{module}"), name)(*values, **named)


class Tokenizer:
    """Byte-pair encoding. Ids: 0 to 255 the bytes, then one per merge, then the special tokens. `token_bytes` is an
    int32 array with each id's length in bytes (0 for special tokens).
    """

    def __init__(self, merges: np.ndarray, special_tokens: Sequence[str] = SPECIAL_TOKENS, pattern: str = "nanochat"):
        """`merges` is (n, 2): row i is the pair that becomes token 256 + i."""
        self.pattern = pattern
        self.merges = np.ascontiguousarray(merges, dtype=np.uint32)
        tokens = expand_merges(self.merges)
        self._set(tokens, special_tokens, rustbpe.Encoder(tokens, pattern, len(tokens) + len(special_tokens)))

    def _set(self, tokens: list[bytes], special_tokens: Sequence[str], encoder: Any) -> None:
        """The bytes of each token, what comes after them, and an encoder with the methods of rustbpe.Encoder."""
        self._encoder = encoder
        self._special_ids = {name: len(tokens) + i for i, name in enumerate(special_tokens)}
        self._bytes = tokens + [name.encode() for name in special_tokens]
        self.token_bytes = np.array([len(token) for token in tokens] + [0] * len(special_tokens), dtype=np.int32)

    @staticmethod
    def train(
        texts: Iterable[Any], vocab_size: int, pattern: str = "nanochat", progress: rustbpe.Progress | None = None
    ) -> "Tokenizer":
        """Learn `vocab_size` tokens (the 256 bytes and the special tokens among them) from texts.

        A text is a str; an Arrow array of strings counts as many, and is not copied. `progress` is called now and then
        with the merges learnt so far. The same texts give the same tokenizer on any number of cores. Raises UserError
        where vocab_size is too small, or larger than the texts can give.
        """
        smallest = 256 + len(SPECIAL_TOKENS)
        if not smallest <= vocab_size <= MAX_VOCAB_SIZE:
            needed = f"bytes and special tokens need --vocab-size={smallest} or more"
            raise UserError(f"vocab_size {vocab_size}: {needed}, and at most {MAX_VOCAB_SIZE}")
        trainer = rustbpe.Trainer(pattern)
        for batch in batches(texts):
            trainer.feed(batch)
        merges = trainer.train(vocab_size - smallest, progress)
        if (most := smallest + len(merges)) < vocab_size:
            gives = f"this text gives {len(merges)} merges"
            raise UserError(f"vocab_size {vocab_size}: {gives}, so at most --vocab-size={most}")
        return Tokenizer(merges, pattern=pattern)

    def content(self) -> dict[str, Any]:
        """What its file says beside the version."""
        content = {"pattern": self.pattern, "merges": self.merges.tolist(), "special_tokens": list(self._special_ids)}
        return content | {"token_bytes": self.token_bytes.tolist()}

    def to_json(self) -> str:
        """The file's content: one line per key, the same for equal tokenizers."""
        content = {"version": VERSION, **self.content()}
        lines = [f'"{key}":{json.dumps(value, separators=(",", ":"))}' for key, value in content.items()]
        return "{\n" + ",\n".join(lines) + "\n}\n"

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) of the file's content without its seal."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def save(self, directory: Path | str) -> None:
        """Write `directory`/tokenizer.json, whole or not at all."""
        write_atomic(Path(directory) / FILE_NAME, seal(self.to_json()))

    @staticmethod
    def load(path: Path | str) -> "Tokenizer":
        """Read a tokenizer.json, or the one in a directory. Raises UserError with the file and what is wrong in it."""
        path = Path(path)
        path = path / FILE_NAME if path.is_dir() else path
        try:
            content = read_sealed(path)
            if content.get("version") != VERSION:
                raise ValueError(f"version {content.get('version')!r} of the format; this program reads {VERSION}")
        except OSError as error:
            train = "train one with: python -m scripts.tok_train"
            raise UserError(f"no tokenizer at {path} ({error.strerror}); {train}") from None
        except ValueError as error:
            raise UserError(f"{path}: {error}; make it again with: python -m scripts.tok_train") from None
        if kind := content.get("kind"):
            return late("from_content", OTHER_KINDS[kind])(content)
        merges = np.array(content["merges"], dtype=np.uint32).reshape(-1, 2)
        return Tokenizer(merges, content["special_tokens"], content["pattern"])

    def encode(
        self,
        text: str | Sequence[str],
        prepend: int | str | None = None,
        append: int | str | None = None,
        num_threads: int = 1,
    ) -> Any:
        """Ids of a text as a list, or of a list of texts as a list of lists. `prepend` and `append` are special tokens,
        by name or id. Raises UserError for a text that cannot be UTF-8 (a lone surrogate).
        """
        before = [] if prepend is None else [self.encode_special(prepend) if isinstance(prepend, str) else prepend]
        after = [] if append is None else [self.encode_special(append) if isinstance(append, str) else append]
        try:
            rows = self._encoder.encode_lists([text] if isinstance(text, str) else text, num_threads)
        except ValueError as error:
            raise UserError(f"cannot encode: {error}") from None
        rows = [before + row + after for row in rows] if before or after else rows
        return rows[0] if isinstance(text, str) else rows

    def encode_arrow(self, texts: Any, num_threads: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """Ids of an Arrow string array (chunked or not, or a list of str), without copying the text, as (ids, offsets):
        document i is ids[offsets[i]:offsets[i + 1]]. ids are uint16 when the vocabulary has at most 65,536 tokens, else
        uint32; offsets are int64. Raises UserError with the row for nulls and for text that is not UTF-8.
        """
        try:
            return self._encoder.encode_batch(texts, num_threads)
        except ValueError as error:
            raise UserError(f"cannot encode: {error}") from None

    def encode_special(self, name: str) -> int:
        if name not in self._special_ids:
            raise UserError(f"no special token {name!r}; there are: {' '.join(self._special_ids)}")
        return self._special_ids[name]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of some ids, special tokens by name. Raises ValueError for an id that is none."""
        chosen = [int(token) for token in ids]
        for token in chosen:
            if not 0 <= token < len(self._bytes):
                raise ValueError(f"token id {token}: the vocabulary has 0 to {len(self._bytes) - 1}")
        return b"".join(map(self._bytes.__getitem__, chosen))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of some ids. Bytes that are no UTF-8, as a cut character leaves them, become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def get_vocab_size(self) -> int:
        return len(self._bytes)

    def get_bos_token_id(self) -> int:
        return self.encode_special("<|bos|>")

    def get_special_tokens(self) -> list[str]:
        return list(self._special_ids)

    # For scripts written for nanochat
    train_from_iterator, from_directory, __call__ = train, load, encode
    render_conversation = late("render_conversation")
    render_for_completion = late("render_for_completion")
    visualize_tokenization = late("visualize_tokenization")
    decode_single_token_bytes = late("decode_single_token_bytes")


RustBPETokenizer, get_token_bytes = Tokenizer, late("get_token_bytes")


def get_tokenizer(corpus: Path | None = None) -> Tokenizer:
    """The tokenizer that tok_train saved in the base directory, unless the folder of a corpus has one of its own."""
    own = corpus if corpus and (corpus / FILE_NAME).exists() else get_base_dir() / "tokenizer"
    return Tokenizer.load(own / FILE_NAME)


def expand_merges(merges: np.ndarray) -> list[bytes]:
    """The bytes of the 256 byte tokens and of one token per merge, which joins two earlier ones."""
    tokens = [bytes([value]) for value in range(256)]
    for left, right in merges.tolist():
        tokens.append(tokens[left] + tokens[right])
    return tokens


def batches(texts: Iterable[Any]) -> Iterator[Any]:
    """Arrow arrays as they come; single strings in lots, as each call of Rust costs 65 us."""
    for single, group in groupby(texts, lambda text: isinstance(text, str)):
        while lot := list(islice(group, 1024 if single else 1)):
            yield lot if single else lot[0]
