"""Tokenizers that others trained, from the files of a Hugging Face model or of GPT-2, with the interface of Tokenizer.

    python -m scripts.tok_train --kind=hf --path=FOLDER    # with tokenizer.json, or GPT-2's vocabulary and merges
    python -m scripts.tok_train --kind=hf --path=gpt2      # from the hub; others as OWNER/NAME

Byte-level BPE alone (GPT-2, Llama 3, Qwen, OLMo, SmolLM and most since), because its ids give every text back. GPT-2's
own pattern runs in rustbpe, the others in the package `tokenizers`. Promises: the ids of the original, but that text
never becomes a special token and is never normalised; what ends a document there is <|bos|> here.
"""

import json
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np

import rustbpe
from nanochat.common import UserError, print0
from nanochat.download import persist
from nanochat.tokenizer import SPECIAL_TOKENS, Tokenizer

GPT2_FILES = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))  # the hub's names, and OpenAI's
GPT2_SPLIT = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


class HFTokenizer(Tokenizer):
    """`spec` is the object of a tokenizer.json, `bos` the name of the special token that stands between documents, and
    `added` names special tokens that come after all others, such as those of our chats.
    """

    def __init__(self, spec: dict[str, Any], bos: str, added: Sequence[str] = ()):
        self.spec, self.bos, self.added = check_spec(spec), bos, list(added)
        special = {token["content"]: int(token["id"]) for token in spec["added_tokens"] if token["special"]}
        ordinary = {token["content"]: int(token["id"]) for token in spec["added_tokens"] if not token["special"]}
        vocab = spec["model"]["vocab"]
        size = 1 + max([*vocab.values(), *special.values(), *ordinary.values()])
        byte_of = bytes_by_character()
        tokens = {n: bytes(byte_of[c] for c in token) for token, n in vocab.items() if token not in special}
        tokens |= {number: token.encode() for token, number in ordinary.items()}
        special |= {name: size + place for place, name in enumerate(added)}
        self._special_ids = special | {"<|bos|>": special[bos]}
        self._bytes = [tokens.get(number, b"") for number in range(size + len(added))]
        self.token_bytes = np.array(list(map(len, self._bytes)), dtype=np.int32)
        for name, number in special.items():
            self._bytes[number] = name.encode()
        self._encoder: Any = LibraryEncoder(spec, len(self._bytes))
        if is_gpt2(spec):
            ranks = [tokens[number] for number in range(256 + len(spec["model"]["merges"]))]
            self._encoder = rustbpe.Encoder(ranks, "gpt2", len(self._bytes))

    def content(self) -> dict[str, Any]:
        return {"kind": "hf", "bos": self.bos, "added": self.added, "tokenizer": self.spec}


def from_content(content: dict[str, Any]) -> HFTokenizer:
    """The tokenizer that a file of ours holds."""
    return HFTokenizer(content["tokenizer"], content["bos"], content["added"])


def load_hf_tokenizer(path: Path, chat: bool = True) -> HFTokenizer:
    """The tokenizer of a model folder, or of a tokenizer.json in it; with `chat`, our special tokens that it lacks come
    after its own, which a model with its published weights has no rows for. Raises UserError for what cannot be read.
    """
    folder = path if path.is_dir() else path.parent
    try:
        spec = read_spec(path)
        config = folder / "tokenizer_config.json"
        about = json.loads(config.read_text(encoding="utf-8")) if config.exists() else {}
        special = {token["content"] for token in spec["added_tokens"] if token["special"]}
        said = [
            name["content"] if isinstance(name, dict) else name for name in map(about.get, ("bos_token", "eos_token"))
        ]
        bos = next((name for name in (*said, "<|endoftext|>", *sorted(special)) if name in special), None)
        added = [name for name in SPECIAL_TOKENS[1:] if chat and name not in special]
        if normalizer := spec.get("normalizer"):
            print0(f"{path}: its normalizer {normalizer['type']} is left out: text is encoded as it is")
        return HFTokenizer(spec, bos, added) if bos else HFTokenizer(spec, "<|bos|>", ["<|bos|>", *added])
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: cannot be read as a tokenizer ({type(error).__name__}: {error})") from None


def find_hf_folder(name: str) -> Path:
    """A folder or file on this machine, or what the hub's client fetches once of a model there; gpt2 to gpt2-xl are
    those of OpenAI. Raises UserError where it is neither.
    """
    if Path(name).expanduser().exists():
        return Path(name).expanduser()
    repository = f"openai-community/{name}" if name.startswith("gpt2") else name
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise UserError(f"{name}: no such file or folder; expected one, or OWNER/NAME on the Hugging Face hub")
    fetch = partial(huggingface_hub.snapshot_download, allow_patterns=["tokenizer.json", "tokenizer_config.json"])
    return Path(persist(lambda: fetch(repository), f"{repository}, or any folder in its place,"))


def read_spec(path: Path) -> dict[str, Any]:
    """The object of a tokenizer.json, or what it would be for GPT-2's two files."""
    file = path / "tokenizer.json" if path.is_dir() else path
    if file.is_file():
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return found
    for vocab_file, merges_file in GPT2_FILES:
        if (path / vocab_file).is_file() and (path / merges_file).is_file():
            vocab = json.loads((path / vocab_file).read_text(encoding="utf-8"))
            lines = (path / merges_file).read_text(encoding="utf-8").split("\n")
            merges = [line.split() for line in lines if line and not line.startswith("#version")]
            special = [{"id": vocab["<|endoftext|>"], "content": "<|endoftext|>", "special": True}]
            model = {"type": "BPE", "vocab": vocab, "merges": merges}
            return {"added_tokens": special, "pre_tokenizer": GPT2_SPLIT, "model": model}
    names = ", ".join(["tokenizer.json", *(" with ".join(pair) for pair in GPT2_FILES)])
    raise UserError(f"--path={path}: no tokenizer there; expected {names}")


def check_spec(spec: dict[str, Any]) -> dict[str, Any]:
    """Raises UserError unless a tokenizer gives every text back, byte for byte."""
    model, steps = spec["model"], split_steps(spec)
    kinds = [step["type"] for step in steps]
    missing = bytes_by_character().keys() - model["vocab"].keys()
    if model["type"] != "BPE" or "ByteLevel" not in kinds or missing:
        found = f"{model['type']} after {', '.join(kinds) or 'no split'}, {len(missing)} of the 256 bytes missing"
        raise UserError(f"a tokenizer of {found}: expected byte-level BPE, which gives every text back as it was")
    if any(step.get("add_prefix_space") for step in steps if step["type"] == "ByteLevel"):
        raise UserError(
            "a tokenizer that puts a space before every text (add_prefix_space): expected one that does not"
        )
    return spec


def split_steps(spec: dict[str, Any]) -> list[dict[str, Any]]:
    """What happens to a text before BPE, in order."""
    split = spec.get("pre_tokenizer") or {"type": "Sequence", "pretokenizers": []}
    steps: list[dict[str, Any]] = split["pretokenizers"] if split["type"] == "Sequence" else [split]
    return steps


def is_gpt2(spec: dict[str, Any]) -> bool:
    """Whether rustbpe gives the same ids: GPT-2's pattern, and merges in the order of their ids behind the bytes."""
    model = spec["model"]
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    ids = [model["vocab"].get("".join(pair)) for pair in pairs]
    plain = all(token["special"] for token in spec["added_tokens"]) and not model.get("ignore_merges")
    split = split_steps(spec)
    gpt2 = len(split) == 1 and split[0]["type"] == "ByteLevel" and split[0].get("use_regex", True)
    return plain and gpt2 and ids == list(range(256, 256 + len(ids)))


class LibraryEncoder:
    """Encodes with the package `tokenizers`, and has the methods of rustbpe.Encoder that Tokenizer calls."""

    def __init__(self, spec: dict[str, Any], vocab_size: int):
        self.spec, self.dtype = spec, np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)
        self.tokenizer: Any = None  # opened when the first text comes

    def encode_lists(self, texts: Any, num_threads: int = 1) -> list[list[int]]:
        """Ids of each text, on all cores; see Tokenizer.encode."""
        if self.tokenizer is None:
            self.tokenizer = open_library(self.spec)
        rows = texts.to_pylist() if hasattr(texts, "to_pylist") else list(texts)
        for number, row in enumerate(rows):
            if row is None:
                raise ValueError(f"row {number} is null")
            row.encode()  # a lone surrogate would be replaced
        return [encoding.ids for encoding in self.tokenizer.encode_batch_fast(rows, add_special_tokens=False)]

    def encode_batch(self, texts: Any, num_threads: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """Ids of all texts, one after the other, and offsets; see Tokenizer.encode_arrow."""
        rows = self.encode_lists(texts)
        offsets = np.cumsum([0, *map(len, rows)], dtype=np.int64)
        return np.concatenate([np.empty(0, self.dtype), *(np.array(row, self.dtype) for row in rows)]), offsets


def open_library(spec: dict[str, Any]) -> Any:
    """The library's tokenizer, without what changes a text or finds special tokens in it."""
    try:
        import tokenizers
    except ImportError:
        raise UserError("a tokenizer of Hugging Face needs tokenizers: pip install tokenizers") from None
    ordinary = [token for token in spec["added_tokens"] if not token["special"]]
    plain = spec | {"added_tokens": ordinary, "normalizer": None, "post_processor": None, "truncation": None}
    return tokenizers.Tokenizer.from_str(json.dumps(plain | {"padding": None}))


def bytes_by_character() -> dict[str, int]:
    """GPT-2 writes each byte as a visible character: itself where Latin-1 has one, else the next from U+0100."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + place): byte for place, byte in enumerate(hidden)}
