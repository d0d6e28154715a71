"""Reading a corpus: from any place the same; one wrong bit is one line, never another text, a crash or gigabytes."""

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
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat import corpus, corpus_writer, dataset
from nanochat.common import UserError
from nanochat.corpus import DocumentIndex, Shards, iter_text, load_corpus, read_blocks
from nanochat.corpus_writer import read_documents
from tests.corpora import flip_bit, run_dataset, sealed, texts_of, words, write_parquet
from tests.tiny import environment

TEXTS = [f"document {number} " + "wörd " * (number % 40) for number in range(300)]


# -----------------------------------------------------------------------------
# From any place


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    """Row groups of 3, one of 2,500 rows, large strings, a dictionary, nulls, empty and non-ASCII documents."""
    folder = tmp_path_factory.mktemp("mixed")
    return sealed(
        write_parquet(folder / "0.parquet", [*words("äöü ☃", 10), "", None, "x"]),
        write_parquet(folder / "1.parquet", words("huge", 2500), row_group_size=10_000),
        write_parquet(folder / "2.parquet", words("large", 5), type=pa.large_string()),
        write_parquet(folder / "3.parquet", ["word", "again", "word"] * 4, type=pa.dictionary(pa.int32(), pa.string())),
    )


def every_index(shards: Shards) -> list[DocumentIndex]:
    metadata = [pq.ParquetFile(file).metadata for file in shards]
    return [
        DocumentIndex(shard, group, row)
        for shard, about in enumerate(metadata)
        for group in range(about.num_row_groups)
        for row in range(about.row_group(group).num_rows)
    ]


@settings(deadline=None, max_examples=60)
@given(place=st.floats(0, 1, exclude_max=True), block_bytes=st.sampled_from([1, 30, 500, 20_000, 10**9]))
def test_stream_continues_from_any_document(mixed, place, block_bytes):
    """A run resumed in the middle of a row group repeated or skipped documents."""
    indices = every_index(mixed)
    number = int(place * len(indices))
    documents = texts_of(mixed)
    assert len(documents) == len(indices)
    blocks = list(read_blocks(mixed, indices[number], block_bytes))
    assert [text for block, _ in blocks for text in block.to_pylist()] == documents[number:]
    taken = number
    for position, (block, first) in enumerate(blocks):
        assert first == indices[taken]
        assert block.type == pa.string() and block.null_count == 0 and len(block) > 0
        sizes = [len(text.encode()) for text in block.to_pylist()]
        assert sum(sizes[:-1]) < block_bytes, "a document more than needed"
        assert sum(sizes) >= block_bytes or position == len(blocks) - 1
        taken += len(block)


def test_blocks_are_slices_not_copies(tmp_path):
    """Copying every block costs as much as encoding it."""
    write_parquet(tmp_path / "a.parquet", words("a", 100), row_group_size=100)
    shards = Shards((tmp_path / "a.parquet",))
    chunks = [block.chunk(0) for block, _ in read_blocks(shards, DocumentIndex(0, 0, 0), 200)]
    assert len(chunks) > 5
    assert len({chunk.buffers()[2].address for chunk in chunks}) == 1


# -----------------------------------------------------------------------------
# load_corpus


def test_corpus_is_found_when_it_is_the_only_one(base_dir, tmp_path, monkeypatch):
    write_parquet(tmp_path / "in" / "a.parquet", words("a", 50))
    made = run_dataset(monkeypatch, source="folder", path=str(tmp_path / "in"), name="one")
    assert load_corpus() == load_corpus("one") == made
    run_dataset(monkeypatch, source="folder", path=str(tmp_path / "in"), name="two")
    with pytest.raises(UserError, match=r"several corpora .*\(one, two\).*--corpus=one"):
        load_corpus()
    with pytest.raises(UserError, match=r"corpus=three: .*--source=folder --path=DIR --name=three"):
        load_corpus("three")
    with pytest.raises(UserError, match=r"corpus=climbmix: .*--source=climbmix"):
        load_corpus("climbmix")


def test_no_corpus_names_the_command(base_dir):
    with pytest.raises(UserError, match=r"python -m nanochat\.dataset --source=docs"):
        load_corpus()
    (base_dir / "data" / ".half.building").mkdir(parents=True)
    (base_dir / "data" / ".half.building" / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match="no corpus"):
        load_corpus()


def test_changed_files_are_noticed(base_dir, tmp_path, monkeypatch):
    write_parquet(tmp_path / "in" / "a.parquet", words("a", 50))
    corpus = run_dataset(monkeypatch, source="folder", path=str(tmp_path / "in"))
    shard = corpus.train.paths[0]
    os.truncate(shard, shard.stat().st_size - 1)
    with pytest.raises(UserError, match=r"shard_00000.parquet: \d+ bytes, not the"):
        load_corpus()
    shard.unlink()
    with pytest.raises(UserError, match=r"shard_00000.parquet: missing"):
        load_corpus()
    (corpus.path / "manifest.json").write_text('{"train": []')
    with pytest.raises(UserError, match=r"manifest.json: damaged"):
        load_corpus()


# -----------------------------------------------------------------------------
# A file with a known hash


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    return write_parquet(tmp_path / "docs" / "shard_00000.parquet", TEXTS, row_group_size=100)


@pytest.mark.parametrize("place", [0.0, 0.001, 0.2, 0.5, 0.9, 0.97, 0.999999])
def test_one_wrong_bit_and_nothing_of_the_file_is_read(shard, place):
    """Only the sizes of files were checked: a flipped bit in a page was trained on, or came up in the middle. A shard
    that changes during the first epoch is not read in the second.
    """
    shards = sealed(write_parquet(shard.with_name("shard_00001.parquet"), ["a", "b"]), shard)
    assert sum(map(len, iter_text(shards))) == 302
    flip_bit(shard, place)
    line = rf"^{shard}: changed since .*rm {shard}; python -m nanochat\.dataset --source=docs$"
    texts = iter_text(shards)
    assert next(texts).to_pylist() == ["a", "b"]
    with pytest.raises(UserError, match=line):
        next(texts)
    for start in (DocumentIndex(1, 0, 0), DocumentIndex(1, 1, 17)):
        with pytest.raises(UserError, match=line):
            next(read_blocks(shards, start, 1000))
    shard.unlink()
    with pytest.raises(UserError, match=r"No such file.*get it again: python -m nanochat\.dataset --source=docs"):
        list(iter_text(shards))


def test_the_command_is_that_of_the_source():
    assert set(corpus.SOURCES) == {"docs", *dataset.HUBS}
    assert corpus.command_for("books") == "python -m nanochat.dataset --source=folder --path=DIR --name=books"


# -----------------------------------------------------------------------------
# Files of unknown origin


UNUSABLE: dict[str, tuple[object, str]] = {
    "0 bytes": (None, "not a whole parquet file"),
    "no column": ({}, r"0 columns named text among \[\]"),
    "a column twice": (
        pa.Table.from_arrays([pa.array(["a"])] * 2, ["text", "text"]),
        r"2 columns named text among \[.text., .text.\]",
    ),
    "another column": ({"content": ["a"]}, r"0 columns named text among \[.content.\]"),
    "numbers": ({"text": [1, 2]}, "column text holds int64, expected string"),
    "lists": ({"text": [["a"]]}, "column text holds list.*, expected string"),
    "bytes": ({"text": [b"a"]}, "column text holds binary, expected string"),
    "not UTF-8": ({"text": pa.array([b"ok", b"\xff\xfe"]).view(pa.string())}, "text is not UTF-8"),
}


@pytest.mark.parametrize("kind", UNUSABLE)
def test_an_unusable_file_is_one_line(tmp_path, kind):
    contents, line = UNUSABLE[kind]
    path = tmp_path / "a.parquet"
    path.touch()
    if contents is not None:
        pq.write_table(pa.table(contents), path)
    with pytest.raises(UserError, match=rf"^{path}: {line}[^\n]*$"):
        list(read_documents(path))


def test_a_file_without_row_groups_is_one_line(tmp_path):
    path = tmp_path / "a.parquet"
    pq.ParquetWriter(path, pa.schema([("text", pa.string())])).close()
    assert pq.ParquetFile(path).num_row_groups == 0
    with pytest.raises(UserError, match="holds no documents"):
        corpus_writer.describe_shard(path)


# Reads the files named on stdin as the folder source does; a line of JSON each: result, CPU seconds, peak MB so far.
READER = """
import hashlib, json, resource, sys, time
from pathlib import Path
from nanochat.common import UserError
from nanochat.corpus_writer import read_documents

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
    huge = rng.choice([b"\xff" * 4 + b"\x0f", b"\xfe\xff\xff\xff\x0f", b"\x80" * 4 + b"\x08", b"\xff" * 9 + b"\x01"])
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
        for dictionary in (True, False):
            options = {"compression": compression, "data_page_version": version, "use_dictionary": dictionary}
            options |= {"write_page_checksum": True, "row_group_size": 100}
            pq.write_table(pa.table({"text": TEXTS}), folder / "whole.parquet", **options)
            originals.append((folder / "whole.parquet").read_bytes())
    for number in range(count):
        (folder / f"{number}.parquet").write_bytes(damage(rng.choice(originals), number % 7, rng))
    names = [str(folder / "whole.parquet"), *(str(folder / f"{number}.parquet") for number in range(count))]
    command = [sys.executable, "-c", READER]
    done = subprocess.run(command, input="\n".join(names), capture_output=True, text=True, env=environment(folder))
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0 and len(results) == len(names), (names[len(results)], done.stderr[-1000:])
    whole = hashlib.sha256(b"".join(text.encode() + b"\0" for text in TEXTS)).hexdigest()
    assert results[0][1] == whole
    for name, result, seconds, megabytes in results:
        assert result == whole or result.startswith(f"UserError {name}: "), (name, result)
        assert "\n" not in result and seconds < 2 and megabytes < 300, (name, result, seconds, megabytes)
    refused = sum(result != whole for _, result, _, _ in results)
    assert refused > count // 2, "the damage should matter"


def test_damaged_files_of_unknown_origin_end_in_one_line(tmp_path):
    """A check that asked for row_group(i).column(j) let pyarrow end the process where size statistics were wrong."""
    check_damaged_files(tmp_path, count=210, seed=0)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(1, 11))
def test_many_damaged_files_end_in_one_line(tmp_path, seed):
    check_damaged_files(tmp_path, count=3500, seed=seed)
