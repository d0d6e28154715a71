"""Train the tokenizer on a corpus's training text and save it in $NANOCHAT_BASE_DIR/tokenizer.

    python -m scripts.tok_train --vocab-size=4096
    python -m scripts.tok_train --kind=char --corpus-own    # or byte: nothing is learnt but which characters exist
    python -m scripts.tok_train --kind=hf --path=FOLDER     # the tokenizer of a Hugging Face model, or GPT-2's files

The same text and settings give the same tokenizer, byte for byte, on any machine and any number of cores.
"""

from typing import Literal

from nanochat.configurator import Natural, Positive, configure

# Kind
kind: Literal["bpe", "char", "byte", "hf"] = "bpe"  # learn merges; characters of the whole corpus; bytes; take a file
path: str | None = None  # hf: a model's folder or tokenizer.json, GPT-2's two files, or OWNER/NAME on the hub
chat_tokens = True  # hf: our special tokens come after its own; false for --init-from: weights have no rows for them
corpus_own = False  # save it in the folder of the corpus, which base_train then takes it from, and leave the other one
# Text
corpus: str | None = None  # directory name in $NANOCHAT_BASE_DIR/data (None = the only one there)
max_chars: Positive = 2_000_000_000  # bpe: stop after this many characters (the document that reaches it still counts)
doc_cap: Natural = 10_000  # bpe: characters taken of each document, so that no long one dominates (0 = all)
# Vocabulary
pattern: Literal["nanochat", "gpt2", "rustbpe"] = "nanochat"  # bpe: where text is split; llama.cpp has the last two
vocab_size: Positive = 65_536  # bpe: tokens in all: 256 bytes, merges, 9 special tokens
settings = configure(__name__)

import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from tqdm import tqdm

from nanochat.char_byte import SymbolTokenizer, byte_tokenizer
from nanochat.common import UserError, get_base_dir, print0, run_main
from nanochat.corpus import Corpus, iter_text, load_corpus
from nanochat.hf_export import open_tokenizer
from nanochat.hf_tokenizer import find_hf_folder
from nanochat.record import open_record
from nanochat.tokenizer import Tokenizer


def main() -> None:
    if (kind == "hf") != (path is not None):
        raise UserError(f"kind={kind}, path={path}: --kind=hf and --path=FOLDER go together")
    text = load_corpus(corpus)
    record = open_record("tok_train", text.name, settings)
    if kind == "bpe":
        tokenizer, about = train(text)
    else:
        tokenizer, about = take(text), {}
    place = text.path if corpus_own else get_base_dir() / "tokenizer"
    tokenizer.save(place)
    lengths = tokenizer.token_bytes[tokenizer.token_bytes > 0]
    spread = {
        "min": int(lengths.min()),
        "max": int(lengths.max()),
        "mean": round(float(lengths.mean()), 3),
        "std": round(float(lengths.std()), 3),
    }
    print0("bytes of a token: " + ", ".join(f"{name} {value:g}" for name, value in spread.items()))
    bytes_per_token = compression(tokenizer, iter_text(text.val))
    print0(f"validation text: {bytes_per_token:.3f} bytes per token")
    print0(f"{tokenizer.get_vocab_size():,} tokens, saved in {place}")
    about |= {"vocab_size": tokenizer.get_vocab_size(), "bytes_per_token": bytes_per_token, "token_bytes": spread}
    record.write("end", **about, fingerprint=tokenizer.fingerprint)
    record.close()


def take(text: Corpus) -> Tokenizer:
    """A tokenizer in which nothing is learnt."""
    if path is not None:
        return open_tokenizer(find_hf_folder(path), chat_tokens)
    if kind == "byte":
        return byte_tokenizer()
    return SymbolTokenizer.of_text(chain(iter_text(text.train), iter_text(text.val)))


def train(text: Corpus) -> tuple[Tokenizer, dict[str, Any]]:
    """Byte-pair encoding of the training text, and the figures of its training."""
    taken = {"documents": 0, "text_bytes": 0}
    start = time.perf_counter()
    with tqdm(disable=None, unit_scale=True) as bar:  # disable=None: no bar where nobody watches

        def show(what: str, count: int) -> None:
            bar.set_description(what, refresh=False)
            bar.n = count
            bar.refresh()

        documents = counted(capped(iter_text(text.train)), taken, show)
        tokenizer = Tokenizer.train(documents, vocab_size, pattern, progress=partial(show, "merges"))
    seconds = time.perf_counter() - start
    megabytes = taken["text_bytes"] / 1e6
    print0(
        f"trained {vocab_size:,} tokens on {taken['documents']:,} documents, {megabytes:,.1f} MB, "
        f"in {seconds:.2f} s ({megabytes / seconds:.0f} MB/s)"
    )
    share = taken["text_bytes"] / text.manifest["totals"]["train"]["text_bytes"]
    if share < 1:
        limits = f"at most {doc_cap or max_chars:,} characters of a document, {max_chars:,} in all"
        print0(f"that is {share:.2%} of the training text: {limits}")
    figures = {"train_seconds": round(seconds, 3), "mb_per_second": round(megabytes / seconds, 1)}
    return tokenizer, {**figures, "share_of_text": round(share, 4), **taken}


def capped(texts: Iterable[pa.Array]) -> Iterator[pa.Array]:
    """Cut documents to doc_cap characters and stop once max_chars have been yielded."""
    left = max_chars
    for documents in texts:
        if doc_cap and pc.max(pc.binary_length(documents)).as_py() > doc_cap:  # no longer in bytes: none in characters
            documents = pc.utf8_slice_codeunits(documents, 0, doc_cap)
        lengths = pc.utf8_length(documents)
        chars = pc.sum(lengths).as_py()
        if chars >= left:
            ends = pc.cumulative_sum(pc.cast(lengths, pa.int64()))
            yield documents[: pc.sum(pc.less(ends, left)).as_py() + 1]
            return
        left -= chars
        yield documents


def counted(texts: Iterable[pa.Array], taken: dict[str, int], show: Callable[[str, int], None]) -> Iterator[pa.Array]:
    """Add up what passes."""
    for documents in texts:
        taken["documents"] += len(documents)
        taken["text_bytes"] += pc.sum(pc.binary_length(documents)).as_py()
        show("bytes", taken["text_bytes"])
        yield documents


def compression(tokenizer: Tokenizer, texts: Iterable[pa.Array]) -> float:
    """Bytes per token, all documents together."""
    text_bytes, tokens = 0, 0
    for documents in texts:
        text_bytes += pc.sum(pc.binary_length(documents)).as_py()
        tokens += len(tokenizer.encode_arrow(documents)[0])
    if not tokens:
        raise UserError("the validation text has no bytes: there is no compression of nothing")
    return text_bytes / tokens


if __name__ == "__main__":
    run_main(main)
