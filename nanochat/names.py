"""What scripts written for nanochat call or import that has another form here. They find it where they look for it: the
first five through tokenizer.py, as methods and as a function, the others in dataset.py.
"""

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from nanochat import conversation as chats
from nanochat.corpus import iter_text, load_corpus
from nanochat.tokenizer import Tokenizer, get_tokenizer


def render_conversation(
    tokenizer: Tokenizer, conversation: dict[str, Any], max_tokens: int = 2048
) -> tuple[list[int], list[int]]:
    """Ids of {"messages": [...]}, cut off after max_tokens, and for each 1 where it is trained, else 0."""
    chats.check_messages(conversation["messages"])
    rendered = chats.render_conversation(conversation["messages"], tokenizer, max_tokens)
    return rendered.ids.tolist(), rendered.mask.astype(int).tolist()


def render_for_completion(tokenizer: Tokenizer, conversation: dict[str, Any]) -> list[int]:
    """Ids up to <|assistant_start|>; an answer at the end is left off."""
    chats.check_messages(conversation["messages"])
    return chats.render_for_completion(conversation["messages"], tokenizer)


def visualize_tokenization(
    tokenizer: Tokenizer, ids: Iterable[int], mask: Iterable[int], with_token_id: bool = False
) -> str:
    """The tokens between bars for a terminal: green where trained, else red; their ids in grey."""
    grey = "\033[90m({})\033[0m" if with_token_id else ""
    pairs = zip(ids, mask, strict=True)
    return "|".join(f"\033[{92 if on else 91}m{tokenizer.decode([id])}\033[0m{grey.format(id)}" for id, on in pairs)


def decode_single_token_bytes(tokenizer: Tokenizer, token_id: int) -> bytes:
    return tokenizer.decode_bytes([token_id])


def get_token_bytes(device: Any = "cpu") -> Any:
    """How many bytes each token of the tokenizer in the base directory has: an int32 tensor on a device."""
    import torch

    return torch.from_numpy(get_tokenizer().token_bytes).to(device)


def list_parquet_files(data_dir: Path | str | None = None) -> list[str]:
    """Paths of the parquet files of a folder by name, or of the only corpus, those to validate on last."""
    if data_dir is not None:
        return sorted(map(str, Path(data_dir).glob("*.parquet")))
    corpus = load_corpus()
    return [str(file) for shards in (corpus.train, corpus.val) for file in shards]


def parquets_iter_batched(
    split: Literal["train", "val"], start: int = 0, step: int = 1, corpus: str | None = None
) -> Iterator[list[str]]:
    """Yield the documents of a corpus (None = the only one) in lists, at most a row group each. It takes every `step`th
    list from number `start` on: with a rank and the number of ranks, each rank gets other documents.
    """
    found = load_corpus(corpus)
    shards = {"train": found.train, "val": found.val}[split]
    return (texts.to_pylist() for texts in islice(iter_text(shards), start, None, step))
