"""Parquet files and corpora for tests, and the command that makes corpora, in this process."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat import dataset
from nanochat.common import get_base_dir
from nanochat.corpus import Corpus, Shards, iter_text, load_corpus
from nanochat.files import sha256_file


def words(prefix: str, count: int) -> list[str]:
    """Different documents of different lengths."""
    return [f"{prefix} document {number} " + "wörd " * (number % 7) for number in range(count)]


def write_parquet(file: Path, texts: list[Any], row_group_size: int = 3, type: Any = None) -> Path:
    """A parquet file with a text column and one that must be ignored."""
    table = pa.table({"id": range(len(texts)), "text": pa.array(texts, type or pa.string())})
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, file, row_group_size=row_group_size)
    return file


def sealed(*paths: Path) -> Shards:
    """Shards that know their sha256."""
    return Shards(paths, tuple(map(sha256_file, paths)))


def texts_of(shards: Shards) -> list[str]:
    return [text for texts in iter_text(shards) for text in texts.to_pylist()]


def flip_bit(path: Path, place: float) -> None:
    """Change a file by one bit, at a place between 0, its first byte, and 1."""
    data = bytearray(path.read_bytes())
    data[int(place * len(data))] ^= 8
    path.write_bytes(data)


def run_dataset(monkeypatch: pytest.MonkeyPatch, **values: Any) -> Corpus:
    """`python -m nanochat.dataset` with these settings and otherwise the defaults; the corpus that it made last."""
    assert values.keys() <= dataset.settings.keys()
    for setting, value in (dataset.settings | values).items():
        monkeypatch.setattr(dataset, setting, value)
    dataset.main()
    manifests = (get_base_dir() / "data").glob("[!.]*/manifest.json")
    return load_corpus(max(manifests, key=lambda file: file.stat().st_mtime_ns).parent.name)
