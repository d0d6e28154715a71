"""Repackage text for publishing: shards of about 250M characters, shuffled as a whole, in the form that the known
corpora have. Row groups of 1,024 documents, zstd level 3, one `text` column, shard_00000.parquet and so on.

    python -m dev.repackage_data --path=DIR --out=DIR

What lies in files named val* (or is validation by a corpus's manifest) is kept apart, in val_00000.parquet and so on,
which `python -m nanochat.dataset --source=folder` knows. To train here, that command alone is enough: it takes a folder
as it is. Promises: the same input and seed give the same bytes; memory for one shard, however much text there is; disk
for all of the text once more while it runs. Documents without text are left out and counted.
"""

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from nanochat.common import UserError, get_base_dir, print0, run_main
from nanochat.configurator import Positive, Seed, configure

# Text
path: str | None = None  # a folder of parquet, jsonl and txt files, or the name of a corpus in $NANOCHAT_BASE_DIR/data
# Shards
out: str | None = None  # the directory to make
shard_chars: Positive = 250_000_000  # characters in a shard, about; whole multiples of 1,024 documents but in the last
seed: Seed = 42  # of the shuffle
settings = configure(__name__)

from nanochat.corpus import MANIFEST, ROW_GROUP_DOCUMENTS, read_manifest
from nanochat.corpus_writer import list_folder, read_documents, write_shard
from nanochat.files import whole

BUFFER_BYTES = 256 << 20  # text held before it is dealt out to the piles on disk
LENGTH_BYTES = 8  # before each document in a pile


def find_files(path: str) -> tuple[list[Path], list[Path]]:
    """(training files, validation files) of a folder, or of a corpus by its manifest."""
    folder = Path(path) if Path(path).is_dir() else get_base_dir() / "data" / path
    if (folder / MANIFEST).exists():
        manifest = read_manifest(folder)
        train, validation = ([folder / entry["file"] for entry in manifest[role]] for role in ("train", "validation"))
        return train, validation
    train, validation, _ = list_folder(folder)
    return train, validation


def read_text(files: Sequence[Path]) -> Iterator[str]:
    """Every document of the files that has text."""
    return (text for file in files for text in read_documents(file) if text.strip())


def measure(files: Sequence[Path]) -> Counter[str]:
    """Read all once: how many documents there are, how many characters, and how many were left out."""
    totals: Counter[str] = Counter()
    for file in files:
        for text in read_documents(file):
            if text.strip():
                totals.update(documents=1, characters=len(text))
            else:
                totals["empty"] += 1
    return totals


def deal(files: Sequence[Path], piles: Sequence[Path], rng: random.Random) -> None:
    """Append each document to a pile drawn at random: with the shuffle of each pile, a shuffle of the whole."""
    buffers: dict[Path, bytearray] = {pile: bytearray() for pile in piles}

    def empty_buffers() -> None:
        for pile, buffer in buffers.items():
            with open(pile, "ab") as file:
                file.write(buffer)
            buffer.clear()

    held = 0
    for text in read_text(files):
        data = text.encode()
        buffers[rng.choice(piles)].extend(len(data).to_bytes(LENGTH_BYTES, "little") + data)
        held += len(data)
        if held >= BUFFER_BYTES:
            empty_buffers()
            held = 0
    empty_buffers()


def read_pile(pile: Path) -> list[str]:
    """The documents of a pile; the file is deleted, to give its room to the shard."""
    texts = []
    with open(pile, "rb") as file:
        while length := file.read(LENGTH_BYTES):
            texts.append(file.read(int.from_bytes(length, "little")).decode())
    pile.unlink()
    return texts


def repackage(files: Sequence[Path], folder: Path, prefix: str) -> None:
    """Write the shards <prefix>_00000.parquet ... of the files' documents, and print what there was."""
    totals = measure(files)
    if not totals["documents"]:
        raise UserError(f"path={path}: {len(files)} {prefix} files hold no text; give another: --path=DIR")
    rng = random.Random(seed)
    piles = [folder / f"pile_{number}" for number in range(max(1, round(totals["characters"] / shard_chars)))]
    deal(files, piles, rng)
    rest: list[str] = []
    number = 0
    for pile in piles:
        texts = rest + read_pile(pile)
        rng.shuffle(texts)
        whole = len(texts) if pile == piles[-1] else len(texts) // ROW_GROUP_DOCUMENTS * ROW_GROUP_DOCUMENTS
        texts, rest = texts[:whole], texts[whole:]
        if texts:
            write_shard(folder / f"{prefix}_{number:05d}.parquet", texts)
            number += 1
    empty = f", {totals['empty']:,} documents without text left out" if totals["empty"] else ""
    print0(f"{prefix}: {number:,} files, {totals['documents']:,} documents, {totals['characters']:,} characters{empty}")


def main() -> None:
    if path is None or out is None:
        raise UserError("expected --path=DIR, which has the text, and --out=DIR, which is made")
    target = Path(out).expanduser().absolute()
    if target.exists():
        raise UserError(f"out={out}: exists; name a directory that does not, or delete it: rm -r {out}")
    train, validation = find_files(path)
    with whole(target) as building:
        building.mkdir()
        repackage(train, building, "shard")
        if validation:
            repackage(validation, building, "val")
    print0(f"{target} is made; to train on it: python -m nanochat.dataset --source=folder --path={target}")


if __name__ == "__main__":
    run_main(main)
