"""Make a corpus of train.bin and val.bin: token ids as nanoGPT's prepare.py writes them, and dev.make_bin.

    python -m dev.import_bin --path=nanoGPT/data/shakespeare_char
    python -m scripts.base_train --corpus=shakespeare_char --packing=flat

The files stay where they are; the corpus links to them and knows their sha256. The folder must also have what they were
made with: a tokenizer.json, GPT-2's vocabulary and merges (vocab.bpe with encoder.json, or merges.txt with vocab.json),
or for characters the text, input.txt. A meta.pkl is never read, because a pickle can hold a program.
"""

from typing import Literal

from nanochat.configurator import configure

SHORT = {"": "path"}

path: str | None = None  # the folder with the files
name: str | None = None  # what to call the corpus (None = the last part of the path)
token_type: Literal["uint16", "uint32"] = "uint16"  # of an id
settings = configure(__name__)

import json
import re
from pathlib import Path
from typing import Any

from nanochat.char_byte import SymbolTokenizer
from nanochat.common import UserError, get_base_dir, print0, run_main
from nanochat.corpus_writer import check_same_origin
from nanochat.hf_tokenizer import load_hf_tokenizer
from nanochat.token_files import FILES, write_tokens
from nanochat.tokenizer import FILE_NAME, Tokenizer


def main() -> None:
    if path is None:
        raise UserError("the folder with train.bin and val.bin is needed: python -m dev.import_bin FOLDER")
    folder = Path(path).expanduser().resolve()
    corpus = get_base_dir() / "data" / (name or re.sub(r"[^A-Za-z0-9_-]+", "-", folder.name).strip("-") or "bin")
    check_same_origin(corpus, str(folder))
    for file in FILES.values():
        if not (folder / file).is_file():
            raise UserError(f"path={folder}: no {file} there; expected {' and '.join(FILES.values())}")
    about = {"source": "dev.import_bin", "arguments": {"path": str(folder), "token_type": token_type}}
    files = {role: folder / file for role, file in FILES.items()}
    describe(corpus, write_tokens(corpus, files, find_tokenizer(folder), token_type, about))


def find_tokenizer(folder: Path) -> Tokenizer:
    """What the ids in a folder were made with; nanoGPT numbers characters as we do, by their code points."""
    file = folder / FILE_NAME
    try:
        ours = file.is_file() and "model" not in json.loads(file.read_bytes())  # theirs has one
    except ValueError as error:
        raise UserError(f"{file}: {error}; expected the tokenizer of these ids") from None
    if ours:
        return Tokenizer.load(file)
    if (folder / "meta.pkl").exists() and (folder / "input.txt").exists():
        print0(f"{folder}: meta.pkl is not read, a pickle can hold a program; the characters are those of input.txt")
        return SymbolTokenizer.of_text([(folder / "input.txt").read_text(encoding="utf-8")])
    return load_hf_tokenizer(folder)


def describe(corpus: Path, manifest: dict[str, Any]) -> None:
    """Print what a corpus of ids holds."""
    for role in FILES:
        [entry] = manifest[role]
        figures = f"{entry['ids']:,} ids, {entry['documents']:,} documents, {entry['text_bytes']:,} bytes of text"
        print0(f"{role:<10} {figures}")
    print0(corpus)


if __name__ == "__main__":
    run_main(main)
