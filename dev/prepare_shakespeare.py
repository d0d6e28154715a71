"""Shakespeare for small models, as nanoGPT's users know it: a corpus with its own tokenizer, of a megabyte of plays.

    python -m dev.prepare_shakespeare              # characters: 65 symbols, 1,003,854 ids and 111,540 to validate on
    python -m dev.prepare_shakespeare input.txt    # the same from a file, without a network
    python -m dev.prepare_shakespeare --kind=gpt2  # GPT-2's tokens: 301,966 and 36,059

The first 90 % of the characters train, the rest validates. The tokenizer lies in the folder of the corpus and no other
run takes it. Then: python -m scripts.base_train dev/configs/shakespeare_char.py (or shakespeare_gpt2.py)
"""

from typing import Literal

from nanochat.configurator import configure

SHORT = {"": "path"}

path: str | None = None  # the text (None = fetched once, from the repository of char-rnn)
kind: Literal["char", "gpt2"] = "char"  # what a token is
vocabulary = "gpt2"  # gpt2: folder with its tokenizer.json or two files (gpt2 = from the Hugging Face hub)
settings = configure(__name__)

from pathlib import Path

from nanochat.char_byte import SymbolTokenizer
from nanochat.common import UserError, get_base_dir, print0, run_main
from nanochat.corpus_writer import write_corpus
from nanochat.download import fetch_url
from nanochat.hf_tokenizer import find_hf_folder, load_hf_tokenizer

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
ROW = 64  # tokens of a row in dev/configs/shakespeare_char.py; the text that trains must have a target more
NAMES = {"char": "shakespeare_char", "gpt2": "shakespeare"}  # nanoGPT's


def main() -> None:
    text = read_text()
    parts = text[: int(0.9 * len(text))], text[int(0.9 * len(text)) :]
    if len(parts[0]) <= ROW:
        least = f"expected at least {ROW * 10 // 9 + 2}, nine tenths of which are a row of {ROW} and its last target"
        raise UserError(f"path={path}: {len(text):,} characters; {least}")
    tokenizer = (
        SymbolTokenizer.of_text([text]) if kind == "char" else load_hf_tokenizer(find_hf_folder(vocabulary), chat=False)
    )
    corpus = get_base_dir() / "data" / NAMES[kind]
    about = {"source": "dev.prepare_shakespeare", "arguments": {"path": path, "kind": kind, "vocabulary": vocabulary}}
    write_corpus(corpus, zip((False, True), parts, strict=True), about)
    tokenizer.save(corpus)
    train, val = (len(tokenizer.encode(part)) for part in parts)
    symbols = f"{len(set(text))} symbols, " if kind == "char" else ""
    print0(f"{corpus}: {len(text):,} characters, {symbols}{train:,} ids to train on and {val:,} to validate on")


def read_text() -> str:
    """The text, from the file given, the one fetched before, or the network."""
    file = Path(path).expanduser() if path else get_base_dir() / "downloads" / "tinyshakespeare.txt"
    if not path and not file.exists():
        try:
            fetch_url(URL, file)
        except UserError as error:
            again = "python -m dev.prepare_shakespeare FILE takes a text that is here"
            raise UserError(f"{error}; without a network, {again}") from None
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"path={file}: {error}; expected a text file in UTF-8") from None


if __name__ == "__main__":
    run_main(main)
