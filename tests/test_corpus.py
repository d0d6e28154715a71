"""Parquet files as they come: one wrong bit is one line, never another text, a crash or gigabytes of memory."""

import hashlib
import json
import os
import random
import struct
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat import corpus, corpus_writer, dataset
from nanochat.common import UserError
from nanochat.corpus import DocumentIndex, Shards, iter_text, read_blocks
from nanochat.files import sha256_file
from nanochat.folder_corpus import read_documents

TEXTS = [f"document {number} " + "wörd " * (number % 40) for number in range(300)]


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    path = tmp_path / "docs" / "shard_00000.parquet"
    path.parent.mkdir()
    pq.write_table(pa.table({"text": TEXTS, "id": range(300)}), path, row_group_size=100, compression="zstd")
    return path


def flip_bit(path: Path, byte: int, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[byte] ^= 1 << bit
    path.write_bytes(data)


# -----------------------------------------------------------------------------
# A file with a known hash


@pytest.mark.parametrize("place", [0.0, 0.001, 0.2, 0.5, 0.9, 0.97, 0.999999])
def test_one_wrong_bit_and_nothing_of_the_file_is_read(shard: Path, place: float) -> None:
    """Only the sizes of files were checked: a flipped bit in a page was trained on, or came up in the middle."""
    first = shard.with_name("shard_00001.parquet")
    pq.write_table(pa.table({"text": ["a", "b"]}), first)
    shards = Shards((first, shard), (sha256_file(first), sha256_file(shard)))
    flip_bit(shard, int(place * shard.stat().st_size), bit=3)
    line = rf"^{shard}: changed since .*rm {shard}; python -m nanochat\.dataset --source=docs$"
    texts = iter_text(shards)
    assert next(texts).to_pylist() == ["a", "b"]
    with pytest.raises(UserError, match=line):
        next(texts)
    for start in (DocumentIndex(1, 0, 0), DocumentIndex(1, 1, 17)):
        with pytest.raises(UserError, match=line):
            next(read_blocks(shards, start, 1000))


def test_the_hash_is_checked_at_every_opening(shard: Path) -> None:
    """A shard that changes during the first epoch is not read in the second."""
    shards = Shards((shard,), (sha256_file(shard),))
    assert sum(map(len, iter_text(shards))) == 300
    flip_bit(shard, 1000, bit=0)
    with pytest.raises(UserError, match="changed since"):
        next(iter_text(shards))
    shard.unlink()
    with pytest.raises(UserError, match=r"No such file.*get it again: python -m nanochat\.dataset --source=docs"):
        next(iter_text(shards))


def test_the_command_is_that_of_the_source() -> None:
    assert set(corpus.SOURCES) == {"docs", *dataset.HUBS}
    assert corpus.command_for("books") == "python -m nanochat.dataset --source=folder --path=DIR --name=books"


# -----------------------------------------------------------------------------
# Files of unknown origin


def table(**columns: object) -> pa.Table:
    return pa.table(columns)


UNUSABLE = {
    "0 bytes": (None, "empty file"),
    "0 rows": (table(text=pa.array([], pa.string())), "holds no documents"),
    "no column": (pa.table({}), "no column named text, only none at all"),
    "another column": (table(content=["a"]), "no column named text, only content"),
    "column twice": (pa.Table.from_arrays([pa.array(["a"])] * 2, ["text", "text"]), "several columns named text"),
    "numbers": (table(text=[1, 2]), "column text holds int64, expected string"),
    "lists": (table(text=[["a"]]), "column text holds list.*, expected string"),
    "bytes": (table(text=[b"a"]), "column text holds binary, expected string"),
    "not UTF-8": (table(text=pa.array([b"ok", b"\xff\xfe"]).view(pa.string())), "text is not UTF-8"),
}


@pytest.mark.parametrize("kind", UNUSABLE)
def test_an_unusable_file_is_one_line(tmp_path: Path, kind: str) -> None:
    contents, line = UNUSABLE[kind]
    path = tmp_path / "a.parquet"
    path.touch()
    if contents is not None:
        pq.write_table(contents, path)
    with pytest.raises(UserError, match=rf"^{path}: {line}[^\n]*$"):
        list(read_documents(path))


def test_no_row_group_is_no_document(tmp_path: Path) -> None:
    with pq.ParquetWriter(tmp_path / "a.parquet", pa.schema([("text", pa.string())])):
        pass
    assert pq.ParquetFile(tmp_path / "a.parquet").num_row_groups == 0
    with pytest.raises(UserError, match="holds no documents"):
        list(read_documents(tmp_path / "a.parquet"))
    with pytest.raises(UserError, match="holds no documents"):
        corpus_writer.describe_shard(tmp_path / "a.parquet")


@pytest.mark.parametrize("length", [1, 3, 4, 8, 12, 1000, -9, -1])
def test_a_file_cut_short_is_one_line(shard: Path, length: int) -> None:
    os.truncate(shard, length if length > 0 else shard.stat().st_size + length)
    with pytest.raises(UserError, match=rf"^{shard}: not a whole parquet file \([^\n]*\); get it again$"):
        list(read_documents(shard))


# Reads the files named on stdin as the folder source does; a line of JSON each: result, CPU seconds, peak MB so far.
READER = """
import hashlib, json, resource, sys, time
from pathlib import Path
from nanochat.common import UserError
from nanochat.folder_corpus import read_documents

with open("/proc/self/statm") as file:
    mapped = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (mapped + 300_000_000,) * 2)
for name in sys.stdin.read().splitlines():
    started = time.process_time()
    try:
        digest = hashlib.sha256()
        for text in read_documents(Path(name)):
            digest.update(text.encode() + b"\\0")
        result = digest.hexdigest()
    except UserError as error:
        result = f"UserError {error}"
    seconds = time.process_time() - started
    status = Path("/proc/self/status").read_text()  # ru_maxrss would begin with the parent's
    print(json.dumps([name, result, seconds, int(status.split("VmHWM:")[1].split()[0]) / 1024]), flush=True)
"""


def damage(data: bytes, kind: int, rng: random.Random) -> bytes:
    """A parquet file with something wrong in it."""
    footer = struct.unpack("<I", data[-8:-4])[0]
    pages, tail = bytearray(data[: -8 - footer]), bytearray(data[-8 - footer : -8])
    length = len(tail)
    huge = rng.choice(
        [b"\xff\xff\xff\xff\x0f", b"\xfe\xff\xff\xff\x0f", b"\x80\x80\x80\x80\x08", b"\xff" * 9 + b"\x01"]
    )
    if kind == 0:  # a bit of a page
        pages[rng.randrange(len(pages))] ^= 1 << rng.randrange(8)
    elif kind == 1:  # a bit of the footer
        tail[rng.randrange(length)] ^= 1 << rng.randrange(8)
    elif kind == 2:  # cut short
        return data[: rng.randrange(len(data))]
    elif kind == 3:  # zeros, as after a lost write
        begin = rng.randrange(len(pages))
        pages[begin : begin + 512] = bytes(len(pages[begin : begin + 512]))
    elif kind == 4:  # the length of the footer
        length = rng.choice([0, 1, length - 1, length + 1, 2**31 - 1, 2**31, 2**32 - 1])
    elif kind == 5:  # huge numbers in the footer: rows, sizes, offsets
        begin = rng.randrange(length)
        tail[begin : begin + rng.choice([1, 2, 5])] = huge
        length = len(tail)
    else:  # huge numbers in the header of the first page
        begin = rng.randrange(4, 40)
        pages[begin : begin + rng.choice([1, 2, 5])] = huge
    return bytes(pages + tail + struct.pack("<I", length) + b"PAR1")


def check_damaged_files(folder: Path, count: int, seed: int) -> None:
    """Read `count` damaged files in a process of 300 MB: each gives its text or a UserError within 2 s."""
    rng = random.Random(seed)
    originals = []
    for version, compression in (("1.0", "zstd"), ("2.0", "snappy"), ("1.0", "none")):
        for encoding in ({"use_dictionary": True}, {"use_dictionary": False}):
            options = {"compression": compression, "data_page_version": version, "write_page_checksum": True}
            pq.write_table(
                pa.table({"text": TEXTS}), folder / "whole.parquet", row_group_size=100, **options, **encoding
            )
            originals.append((folder / "whole.parquet").read_bytes())
    for number in range(count):
        (folder / f"{number}.parquet").write_bytes(damage(rng.choice(originals), number % 7, rng))
    names = [str(folder / "whole.parquet"), *(str(folder / f"{number}.parquet") for number in range(count))]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", READER], input="\n".join(names), capture_output=True, text=True, env=environment
    )
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0 and len(results) == len(names), (names[len(results)], done.stderr[-1000:])
    whole = hashlib.sha256(b"".join(text.encode() + b"\0" for text in TEXTS)).hexdigest()
    assert results[0][1] == whole
    for name, result, seconds, megabytes in results:
        assert result == whole or result.startswith(f"UserError {name}: "), (name, result)
        assert "\n" not in result and seconds < 2 and megabytes < 300, (name, result, seconds, megabytes)
    refused = sum(result != whole for _, result, _, _ in results)
    assert refused > count // 2, "the damage should matter"


def test_damaged_files_of_unknown_origin_end_in_one_line(tmp_path: Path) -> None:
    """A check that asked for row_group(i).column(j) let pyarrow end the process where size statistics were wrong."""
    check_damaged_files(tmp_path, count=210, seed=0)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(1, 11))
def test_many_damaged_files_end_in_one_line(tmp_path: Path, seed: int) -> None:
    check_damaged_files(tmp_path, count=3500, seed=seed)
