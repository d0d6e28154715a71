"""Byte-pair encoding in Rust: train merges, encode text into ids, split text into pretokens.

    merges = Trainer("nanochat"); merges.feed(["some text"]); merges.train(100)
    ids, offsets = Encoder(tokens, "nanochat").encode_batch(["some text", "more"], threads=2)
    tokenizer = Tokenizer(); tokenizer.train_from_iterator(["some text"], 300)   # as the published package has it

Texts are an Arrow string or large_string array, chunked or sliced as it may be (its buffers are read in place), or a
sequence of str. Promises: merges of the naive algorithm (highest count, ties to the smallest pair), ids of tiktoken
with the same ranks, the same answers for any number of threads. The interpreter is free while Rust works; Ctrl-C ends a
long call within a moment and leaves nothing half done. Nulls, lone surrogates and broken UTF-8 are refused with their
row (ValueError). Does not: know special tokens, or keep files.
"""

import gc
import os
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np

from rustbpe._native import ffi, lib

__all__ = ["PATTERNS", "Encoder", "Tokenizer", "Trainer", "split"]

# The split patterns that the scanner follows, as the regexes they were published as. tiktoken and rustbpe 0.1.0 take
# these strings; "rustbpe" is what the latter takes when given none.
PATTERNS = {
    "nanochat": r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
    "rustbpe": r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
    "gpt4": r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s",
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
    "whole": r"[\s\S]+",  # for texts that are pretokens already
}

INTERNAL, STOPPED = -1, -3  # statuses of the C functions; every other one below zero is the caller's mistake
WATCHED_BYTES = 1 << 22  # shorter calls end within about 50 ms and are not worth a thread
OFFSET_WIDTH = {"string": 4, "large_string": 8}

Texts = Any  # an Arrow array or chunked array of strings, or a sequence of str
Progress = Callable[[int], None]


class Trainer:
    """Learns merges: feed() any number of batches, then train() once. Memory follows the distinct pretokens."""

    def __init__(self, pattern: str = "nanochat", threads: int | None = None):
        holder, name = ffi.new("Trainer **"), pattern.encode()
        _run(lib.rustbpe_trainer_new, name, len(name), threads or _cores(), holder)
        self._trainer = _owned(self, holder[0], lib.rustbpe_trainer_free)

    def feed(self, texts: Texts) -> None:
        """Count the pretokens of some texts. After an exception the counts hold a part of them."""
        for batch in _batches(texts):
            _run(lib.rustbpe_trainer_feed, self._trainer, batch.struct, keep=batch, watched=batch.size > WATCHED_BYTES)

    def train(self, most: int, progress: Progress | None = None) -> np.ndarray:
        """Learn up to `most` merges and forget the counts.

        Returns (n, 2) uint32: row i is the pair that becomes token 256 + i, where tokens 0 to 255 are the bytes. n <
        most when no pair is left. `progress` is called now and then with the merges learnt so far.
        """
        merges = np.empty((most, 2), dtype=np.uint32)
        found = _run(
            lib.rustbpe_trainer_train,
            self._trainer,
            _address("uint32_t *", merges),
            most,
            keep=merges,
            watched=True,
            progress=progress,
        )
        return merges[:found].copy()


class Encoder:
    """Encodes text with a vocabulary; `tokens[id]` is the bytes of token id.

    All 256 single bytes must be among the tokens and no two may be equal (ValueError). Ids come out as uint16 when
    `vocab_size`, the number of ids the caller uses in all (default: those of `tokens`), allows it, else as uint32.
    Threads may share an encoder.
    """

    def __init__(self, tokens: Sequence[bytes], pattern: str = "nanochat", vocab_size: int | None = None):
        self.pattern = pattern
        self.tokens = list(tokens)
        self.dtype = np.dtype(np.uint16 if (vocab_size or len(tokens)) <= 1 << 16 else np.uint32)
        holder, name = ffi.new("Encoder **"), pattern.encode()
        batch = _Batch.of_bytes(self.tokens)
        _run(lib.rustbpe_encoder_new, name, len(name), batch.struct, holder)
        self._ints: np.ndarray | None = None  # id -> int, made when lists are asked for
        self._encoder = _owned(self, holder[0], lib.rustbpe_encoder_free)

    def encode(self, text: str) -> np.ndarray:
        """Ids of one text."""
        return self.encode_batch([text])[0]

    def encode_batch(
        self, texts: Texts, threads: int = 1, progress: Progress | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Ids of all texts, one after the other, and int64 offsets: text i is ids[offsets[i]:offsets[i + 1]].

        `progress` is called now and then, during long calls, with the bytes of the current chunk encoded so far.
        """
        encoded = [self._encode(batch, threads, progress) for batch in _batches(texts)]
        if len(encoded) == 1:
            return encoded[0]
        ids, offsets = [np.empty(0, dtype=self.dtype)], [np.zeros(1, dtype=np.int64)]
        count = 0
        for chunk_ids, chunk_offsets in encoded:
            ids.append(chunk_ids)
            offsets.append(chunk_offsets[1:] + count)
            count += len(chunk_ids)
        return np.concatenate(ids), np.concatenate(offsets)

    def encode_lists(self, texts: Texts, threads: int = 1) -> list[list[int]]:
        """Ids of each text as a list. Equal ids are the same int object, from a table: half the time of making new ones
        (0.23 s instead of 0.44 for 17.7 M ids).
        """
        ids, offsets = self.encode_batch(texts, threads)
        if self._ints is None:
            self._ints = np.empty(max(len(self.tokens), 1), dtype=object)
            self._ints[:] = range(len(self._ints))
        bounds = offsets.tolist()
        # The garbage collector would look at every entry of the new lists, two times or more: a tenth of the time.
        collecting = gc.isenabled()
        gc.disable()
        try:
            return [self._ints[ids[start:end]].tolist() for start, end in zip(bounds[:-1], bounds[1:], strict=True)]
        finally:
            if collecting:
                gc.enable()

    def _encode(self, batch: "_Batch", threads: int, progress: Progress | None) -> tuple[np.ndarray, np.ndarray]:
        room = lib.rustbpe_room(batch.size, batch.rows)
        ids = np.empty(room, dtype=self.dtype)  # pages that stay untouched take no memory
        offsets = np.zeros(batch.rows + 1, dtype=np.int64)
        found = _run(
            lib.rustbpe_encode,
            self._encoder,
            batch.struct,
            threads,
            _address("uint8_t *", ids),
            self.dtype.itemsize,
            room,
            _address("int64_t *", offsets[1:]),
            keep=(batch, ids, offsets),
            watched=batch.size > WATCHED_BYTES,
            progress=progress,
        )
        ids.resize(found, refcheck=False)  # gives the rest back without a copy; nobody else knows the array yet
        return ids, offsets

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        """The bytes of some ids. Raises IndexError where an id is none of `tokens`."""
        if min(ids, default=0) < 0:
            raise IndexError(f"token id {min(ids)}: the vocabulary has 0 to {len(self.tokens) - 1}")
        return b"".join(map(self.tokens.__getitem__, ids))


class Tokenizer:
    """The class of the published package, rustbpe 0.1.0, over ours: same methods, merges and ids, for any `pattern`.

    Those of PATTERNS are split in Rust, others by the package `regex`, in Python, which is much slower and takes
    [[:alpha:]] for more than ASCII. Mistakes that are panics there are ValueErrors here.
    """

    def __init__(self) -> None:
        self._pattern, self._regex = "", None
        self._encoder = Encoder([bytes([value]) for value in range(256)], "whole")

    def train_from_iterator(
        self, iterator: Iterable[str], vocab_size: int, buffer_size: int = 8192, pattern: str | None = None
    ) -> None:
        """Learn `vocab_size` tokens, the 256 bytes among them, or as many as the texts give; forget the old ones."""
        if vocab_size < 256:
            raise ValueError(f"vocab_size {vocab_size}: the 256 bytes are among them, so at least 256")
        pattern = PATTERNS["rustbpe"] if pattern is None else pattern
        name = next((name for name, known in PATTERNS.items() if known == pattern), None)
        regex = None if name else _compiled(pattern)
        trainer, texts = Trainer(name or "whole"), iter(iterator)
        while batch := list(islice(texts, max(1, buffer_size))):
            trainer.feed(_pieces(batch, regex))
        tokens = [bytes([value]) for value in range(256)]
        for left, right in trainer.train(vocab_size - 256).tolist():
            tokens.append(tokens[left] + tokens[right])
        self._encoder, self._pattern, self._regex = Encoder(tokens, name or "whole"), pattern, regex

    @property
    def vocab_size(self) -> int:
        return len(self._encoder.tokens)

    def get_pattern(self) -> str:
        return self._pattern

    def get_mergeable_ranks(self) -> list[tuple[bytes, int]]:
        """(bytes, id) of every token, as tiktoken takes them when made a dict."""
        return [(token, rank) for rank, token in enumerate(self._encoder.tokens)]

    def encode(self, text: str) -> list[int]:
        return self._encoder.encode_batch(_pieces([text], self._regex))[0].tolist()

    def batch_encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, on all cores where the pattern is one of PATTERNS."""
        return [self.encode(text) for text in texts] if self._regex else self._encoder.encode_lists(texts, _cores())

    def decode(self, ids: Sequence[int]) -> str:
        """Raises ValueError for an id that is none, and for bytes that are no UTF-8."""
        for token in ids:
            if not 0 <= token < self.vocab_size:
                raise ValueError(f"Unknown token id: {token}; the vocabulary has 0 to {self.vocab_size - 1}")
        return self._encoder.decode_bytes(ids).decode()


def _pieces(texts: Sequence[str], regex: Any) -> Sequence[str]:
    """What the Rust side is given: texts, or pretokens where it does not know the pattern."""
    return [match[0] for text in texts for match in regex.finditer(text)] if regex else texts


def _compiled(pattern: str) -> Any:
    import regex  # comes with tiktoken; not needed for PATTERNS

    try:
        return regex.compile(pattern)
    except regex.error as error:
        raise ValueError(f"pattern {pattern!r}: {error}") from None


def _owned(owner: object, pointer: Any, free: Callable[[Any], None]) -> Any:
    """`pointer`, freed with its owner, or at the latest before the interpreter takes itself apart: ffi.gc may come
    after the library was unloaded, which is a segmentation fault at exit.
    """
    weakref.finalize(owner, free, pointer)
    return pointer


def split(text: str, pattern: str = "nanochat") -> list[str]:
    """The pretokens of a text, exactly as the regex PATTERNS[pattern] finds them."""
    data, name = text.encode(), pattern.encode()
    ends = np.empty(len(data), dtype=np.uint64)
    found = _run(lib.rustbpe_split, name, len(name), data, len(data), _address("uint64_t *", ends))
    bounds = [0, *ends[:found].tolist()]
    return [data[start:end].decode() for start, end in zip(bounds[:-1], bounds[1:], strict=True)]


# -----------------------------------------------------------------------------
# Texts as the C functions take them


class _Batch:
    """A `Texts` struct and the Python objects whose memory it points into."""

    def __init__(
        self, owner: object, data: object, data_bytes: int, offsets: object, width: int, rows: int, first: int
    ):
        self.struct = ffi.new("Texts *", [data, data_bytes, offsets, width, rows, first])
        self.owner = owner
        self.size = data_bytes
        self.rows = rows

    @staticmethod
    def of_bytes(rows: Sequence[bytes]) -> "_Batch":
        data = b"".join(rows)
        offsets = np.zeros(len(rows) + 1, dtype=np.int64)
        np.cumsum([len(row) for row in rows], out=offsets[1:])
        view = ffi.from_buffer("uint8_t[]", data)
        return _Batch((view, offsets), view, len(data), _address("uint8_t *", offsets), 8, len(rows), 0)

    @staticmethod
    def of_strings(rows: Sequence[str]) -> "_Batch":
        try:
            return _Batch.of_bytes([row.encode() for row in rows])
        except UnicodeEncodeError:
            for number, row in enumerate(rows):
                for place, character in enumerate(row):
                    if 0xD800 <= ord(character) < 0xE000:
                        problem = f"row {number}: lone surrogate U+{ord(character):04X} at character {place}"
                        raise ValueError(f"{problem}; replace it first, it is no text") from None
            raise

    @staticmethod
    def of_arrow(array: Any, first: int) -> "_Batch":
        width = OFFSET_WIDTH.get(str(array.type))
        if width is None:
            raise ValueError(f"texts of Arrow type {array.type}; string and large_string are known, cast it first")
        if array.null_count:
            raise ValueError(f"row {first + array.is_null().index(True).as_py()} is null; drop or fill nulls first")
        _, offsets, data = array.buffers()
        start, end = 0, 0
        if len(array):
            bounds = np.frombuffer(offsets, dtype=f"i{width}")
            start, end = int(bounds[array.offset]), int(bounds[array.offset + len(array)])
        if start == end:
            return _Batch.of_bytes([b""] * len(array))
        # The data buffer stays whole, as the offsets count from its start; only the size is that of the rows.
        pointer = ffi.cast("uint8_t *", offsets.address + array.offset * width)
        batch = _Batch(array, ffi.cast("uint8_t *", data.address), data.size, pointer, width, len(array), first)
        batch.size = end - start
        return batch


def _batches(texts: Texts) -> Iterator[_Batch]:
    """One batch for each chunk; plain strings are one batch."""
    if isinstance(texts, str | bytes):
        raise ValueError("texts is one text; give a list of texts, or an Arrow array")
    if not hasattr(texts, "type"):
        yield _Batch.of_strings(texts)
        return
    first = 0
    for chunk in getattr(texts, "chunks", [texts]):
        yield _Batch.of_arrow(chunk, first)
        first += len(chunk)


def _address(kind: str, array: np.ndarray) -> Any:
    return ffi.cast(kind, array.__array_interface__["data"][0])


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# -----------------------------------------------------------------------------
# Calls


def _run(
    function: Any, *arguments: Any, keep: object = None, watched: bool = False, progress: Progress | None = None
) -> int:
    """Call a C function and raise what went wrong.

    `watched`: on a worker thread, so that signals and progress get through. `keep` is what owns the memory that the
    arguments point into: it lives as long as the call, even where the caller has been interrupted and is gone.
    """
    call = ffi.new("Call *")
    status = _watch(function, arguments, keep, call, progress) if watched else function(*arguments, call)
    if status >= 0:
        return int(status)
    message = ffi.string(call.message).decode(errors="replace")
    if status == STOPPED:
        raise KeyboardInterrupt
    raise RuntimeError(f"rustbpe: {message}") if status == INTERNAL else ValueError(message)


def _watch(function: Any, arguments: tuple[Any, ...], keep: object, call: Any, progress: Progress | None) -> int:
    statuses: list[int] = []
    done = threading.Event()  # not Thread.join: until Python 3.13 an interrupted join takes a running thread for ended

    def work(owner: object = keep) -> None:
        statuses.append(function(*arguments, call))
        done.set()

    try:
        threading.Thread(target=work, daemon=True).start()
        while True:
            if progress:
                progress(call.done)
            if done.wait(0.05):
                return statuses[0]
    except BaseException:
        call.stop = 1
        done.wait(10)  # Rust looks every few milliseconds, except while it lays out a row of hundreds of megabytes
        raise
