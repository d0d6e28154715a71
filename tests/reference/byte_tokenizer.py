"""The simplest tokenizer that a loop can run on: one token per byte, then BOS. Stands in where BPE does not matter."""

import numpy as np
import pyarrow as pa


class ByteTokenizer:
    fingerprint = "bytes"
    token_bytes = np.array([1] * 256 + [0], dtype=np.int32)

    def get_vocab_size(self) -> int:
        return 257

    def get_bos_token_id(self) -> int:
        return 256

    def encode(self, text: str, prepend: str | None = None) -> list[int]:
        return ([256] if prepend else []) + list(text.encode())

    def decode(self, ids: list[int]) -> str:
        return bytes(i for i in ids if i < 256).decode(errors="replace")

    def encode_arrow(self, texts: pa.Array, num_threads: int = 1) -> tuple[np.ndarray, np.ndarray]:
        documents = [np.frombuffer(text.encode(), dtype=np.uint8).astype(np.uint16) for text in texts.to_pylist()]
        offsets = np.cumsum([0] + [len(document) for document in documents])
        return np.concatenate([np.empty(0, dtype=np.uint16), *documents]), offsets
