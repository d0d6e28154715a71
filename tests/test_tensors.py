"""safetensors and sealed JSON: what was written comes back; a damaged or hostile file is one line, never a crash."""

import contextlib
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from nanochat.common import UserError
from nanochat.files import seal
from nanochat.tensors import (
    MAX_HEADER_BYTES,
    TensorInfo,
    check_tensors,
    open_tensors,
    read_header,
    save_tensors,
)
from nanochat.tokenizer import Tokenizer
from tests.tiny import ROOT, environment

TENSORS = {
    "blocks.0.attn.c_q.weight": torch.arange(64.0).view(8, 8),
    "blocks.0.mlp.c_fc.weight": torch.arange(96.0).view(12, 8).bfloat16(),
    "empty": torch.zeros(0, 3),
    "lm_head.weight": torch.arange(40.0).view(5, 8),
    "steps": torch.tensor(7),
}


def raw(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    """A file with this header, whatever it says."""
    return (len(header) if length is None else length).to_bytes(8, "little") + header + data


def entry(shape: Any = (2,), offsets: Any = (0, 8), dtype: Any = "F32", **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


# -----------------------------------------------------------------------------
# What is legal


def test_tensors_come_back_as_they_were_saved(tmp_path: Path) -> None:
    save_tensors(tmp_path / "x", TENSORS)
    with open_tensors(tmp_path / "x") as file:
        assert {name: file.get_tensor(name).dtype for name in TENSORS} == {n: t.dtype for n, t in TENSORS.items()}
        assert all(torch.equal(file.get_tensor(name), tensor) for name, tensor in TENSORS.items())
    header = read_header(tmp_path / "x")
    assert header["steps"] == TensorInfo("I64", (), header["steps"].begin, header["steps"].begin + 8)
    assert max(info.end for info in header.values()) == (tmp_path / "x").stat().st_size
    save_tensors(tmp_path / "none", {})
    assert read_header(tmp_path / "none") == {}


def test_every_dtype_of_torch_that_can_be_saved_can_be_read(tmp_path: Path) -> None:
    names = "bool uint8 int8 float8_e4m3fn float8_e5m2 uint16 int16 float16 bfloat16 uint32 int32 float32 uint64 int64"
    for name in (*names.split(), "float64", "complex64"):
        tensor = torch.zeros(3, dtype=torch.float32).to(getattr(torch, name))
        save_tensors(tmp_path / name, {"x": tensor})
        assert read_header(tmp_path / name)["x"].shape == (3,), name


def test_metadata_is_allowed_and_is_no_tensor(tmp_path: Path) -> None:
    header = json.dumps({"__metadata__": {"format": "pt"}, "x": entry()}).encode() + b"   "
    assert list(read_header(write(tmp_path / "x", raw(header, bytes(8))))) == ["x"]


def test_a_file_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot write .*nowhere"):
        save_tensors(tmp_path / "nowhere" / "x", TENSORS)


@pytest.mark.parametrize(
    ("name", "expected", "words"),
    [
        ("lm_head.weight", (torch.float32, (5, 9)), r"lm_head.weight has shape \(5, 8\), this model needs \(5, 9\)"),
        (
            "lm_head.weight",
            (torch.bfloat16, (5, 8)),
            "lm_head.weight is torch.float32, this model needs torch.bfloat16",
        ),
        ("wte.weight", (torch.float32, (5, 8)), "has no tensor wte.weight"),
        ("steps", None, "has a tensor 'steps' that this model does not have"),
    ],
)
def test_the_first_difference_from_a_model_is_named(tmp_path: Path, name: str, expected: Any, words: str) -> None:
    save_tensors(tmp_path / "x", TENSORS)
    wanted: dict[str, Any] = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in TENSORS.items()}
    check_tensors(read_header(tmp_path / "x"), wanted, tmp_path / "x")
    wanted[name] = expected
    if expected is None:
        del wanted[name]
    with pytest.raises(UserError, match=words):
        check_tensors(read_header(tmp_path / "x"), wanted, tmp_path / "x")


# -----------------------------------------------------------------------------
# What is not: each file with the words that must be in the message

HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", "header of 0 bytes in a file of 0"),
    "seven bytes": (b"\0" * 7, "in a file of 7"),
    "header of 2^63": (raw(b"{}", length=1 << 63), "header of 9,223,372,036,854,775,808 bytes"),
    "header of 2^64 - 1": (raw(b"{}", length=(1 << 64) - 1), "header of"),
    "header longer than the file": (raw(b"{}", length=3), "header of 3 bytes in a file of 10"),
    "header above the cap": (raw(b"{}" + b" " * MAX_HEADER_BYTES), "header of 1,048,578 bytes"),
    "no header": (raw(b""), "not an object"),
    "not UTF-8": (raw(b'{"\xff":1}'), "utf-8"),
    "UTF-16": (raw('{"x":1}'.encode("utf-16")), "utf-8"),
    "list": (raw(b"[]"), "not an object"),
    "blank before": (raw(b" {}"), "not an object"),
    "cut JSON": (raw(b'{"x":'), "no intact safetensors file"),
    "two objects": (raw(b"{}{}"), "Extra data"),
    "bytes after the tensors": (raw(b"{}", b"x"), "the tensors end at byte 10 of a file of 11"),
    "deep lists": (raw(b'{"x":' + b"[" * 1_000_000), "nested too deeply"),
    "deep objects": (raw(b'{"x":' * 200_000), "nested too deeply"),
    "many empty lists": (raw(b'{"x":[' + b"[]," * 349_000 + b"1]}"), "is not an object of dtype"),
    "many tensors of nothing": (raw(b"{" + b",".join(b'"%06d":{}' % i for i in range(87_000)) + b"}"), "000000"),
    "a number of a million digits": (raw(b'{"x":' + b"9" * 1_000_000 + b"}"), "4300 digits"),
    "metadata that is no text": (raw(b'{"__metadata__":{"a":1}}'), "__metadata__"),
    "a key twice": (raw(b'{"x":1,"y":2,"x":3}'), "key 'x' stands twice"),
    "a key of an entry twice": (raw(b'{"x":{"dtype":"F32","dtype":"F32"}}'), "key 'dtype' stands twice"),
    "an escape in a name": (raw(b'{"\\u001b[2J\\n":1}'), r"tensor '\x1b[2J\n' is not"),
}
ENTRIES: dict[str, tuple[Any, str]] = {
    "no entry": (3, "is not an object of dtype, shape and data_offsets"),
    "more keys": (entry(more=1), "is not an object of dtype, shape and data_offsets"),
    "unknown dtype": (entry(dtype="F31"), "dtype 'F31'; known: BOOL, U8"),
    "no dtype": (entry(dtype=[]), "dtype []"),
    "negative size": (entry((-2,)), "shape [-2]"),
    "two negative sizes": (entry((-2, -1)), "shape [-2, -1]"),
    "size that is no whole number": (entry((2.0,)), "shape [2.0]"),
    "size that is a bool": (entry((True, 2)), "shape [True, 2]"),
    "size that is infinite": (entry((float("inf"),)), "shape [inf]"),
    "size of 2^63": (entry((1 << 63,)), "shape"),
    "product above 2^64": (entry((1 << 40, 1 << 40)), "more than"),
    "product that wraps to 2": (entry((1 << 33, (1 << 31) + 1)), "more than"),
    "giant product times 0": (entry((1 << 40, 1 << 40, 0), (0, 0)), "more than"),
    "a million dimensions": (entry((1,) * 200_000), "expected at most 8 sizes"),
    "shape of the wrong kind": (entry("ab"), "shape 'ab'"),
    "offsets too few": (entry(offsets=(0,)), "expected begin and end"),
    "offsets backwards": (entry(offsets=(8, 0)), "does not fill"),
    "negative offset": (entry(offsets=(-8, 0)), "data_offsets [-8, 0]"),
    "shorter than its shape": (entry((3,)), "does not fill"),
    "begins late": (entry((1,), (4, 8)), "begins at byte"),
    "ends beyond the file": (entry((3,), (0, 12)), "the tensors end at byte"),
}
PAIRS: dict[str, tuple[tuple[int, int], tuple[int, int]]] = {
    "overlapping": ((0, 8), (4, 12)),
    "same bytes twice": ((0, 8), (0, 8)),
    "hole": ((0, 8), (12, 20)),
    "inside another": ((0, 16), (4, 8)),
}


def hostile() -> dict[str, tuple[bytes, str]]:
    """Every hand-made file."""
    files = dict(HOSTILE)
    for name, (value, words) in ENTRIES.items():
        files[name] = raw(json.dumps({"x": value}).encode(), bytes(8)), words
    for name, pair in PAIRS.items():
        header = {key: entry(((end - begin) // 4,), (begin, end)) for key, (begin, end) in zip("xy", pair, strict=True)}
        files[name] = raw(json.dumps(header).encode(), bytes(pair[1][1])), "begins at byte"
    return files


@pytest.mark.parametrize("name", hostile())
def test_a_hostile_header_is_named(tmp_path: Path, name: str) -> None:
    data, words = hostile()[name]
    path = write(tmp_path / "x.safetensors", data)
    for reader in (read_header, lambda path: open_tensors(path).__enter__()):
        with pytest.raises(UserError) as caught:
            reader(path)
        message = str(caught.value)
        assert words in message and str(path) in message
        assert message.isprintable() and len(message) < 600  # one line, and no terminal is driven by it


def test_what_is_no_regular_file_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for a writer for good
    (tmp_path / "link").symlink_to("/dev/zero")
    for name, words in (("pipe", "not a regular file"), ("link", "not a regular file"), (".", "not a regular file")):
        with pytest.raises(UserError, match=words):
            read_header(tmp_path / name)
    with pytest.raises(UserError, match="cannot read .*absent"):
        read_header(tmp_path / "absent")


# -----------------------------------------------------------------------------
# Mutations, in a child process with limited memory: a crash of it names the file that it was reading

SEED = 20260101
LIMIT_BYTES = 6 << 30  # of address space, of which torch alone maps some
Mutation = Callable[[bytearray, random.Random, int], None]


def flip_bits(data: bytearray, rng: random.Random, end: int) -> None:
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        data[rng.randrange(end)] ^= 1 << rng.randrange(8)


def truncate(data: bytearray, rng: random.Random, end: int) -> None:
    del data[rng.randrange(rng.choice((end, len(data)))) :]


def zero_pages(data: bytearray, rng: random.Random, end: int) -> None:
    start = rng.randrange(end)
    stop = min(len(data), start + rng.choice((8, 64, 512, 4096)))
    data[start:stop] = bytes(stop - start)


def change_numbers(data: bytearray, rng: random.Random, end: int) -> None:
    """Replace a digit of the JSON by another number: giant, negative, a fraction, or off by little."""
    digits = [i for i in range(8, end) if chr(data[i]).isdigit()]
    i = rng.choice(digits)
    data[i : i + 1] = rng.choice((b"9" * 18, b"-1", b"1e400", b"0.5", b"7", b"NaN", b"true", b"9" * 5000))


def repeat_part(data: bytearray, rng: random.Random, end: int) -> None:
    """Write a piece of the header twice: duplicate keys, broken nesting, everything behind it moved."""
    start = rng.randrange(8, end)
    piece = data[start : start + rng.choice((1, 16, 80))]
    data[start:start] = piece * rng.choice((1, 1, 5000))


def nest(data: bytearray, rng: random.Random, end: int) -> None:
    i = rng.randrange(8, end)
    data[i:i] = rng.choice((b"[", b'{"a":')) * rng.choice((10, 100_000))


MUTATIONS: list[Mutation] = [flip_bits, flip_bits, truncate, zero_pages, change_numbers, repeat_part, nest]


def mutants(original: bytes, end: int, count: int, seed: int, fix_length: bool) -> Iterator[tuple[str, bytes]]:
    """(name, file) of `count` mutations within the first `end` bytes. With fix_length every other one gets a true
    header length again, so that what is behind it is reached.
    """
    for number in range(count):
        rng = random.Random(seed * 1000 + number)
        data, mutation = bytearray(original), MUTATIONS[number % len(MUTATIONS)]
        mutation(data, rng, end)
        if fix_length and number % 2 and len(data) >= 8:
            data[:8] = max(0, end - 8 + len(data) - len(original)).to_bytes(8, "little")
        yield f"{number:03d}-{mutation.__name__}", bytes(data)


CHILD = """
import json, resource, sys, time
from nanochat.common import UserError
from nanochat.files import read_sealed

kind, limit = sys.argv[1], int(sys.argv[2])
if kind == "tokenizer":
    from nanochat.tokenizer import Tokenizer
if kind == "tensors":
    from nanochat.tensors import open_tensors, read_header

def read(path):
    if kind == "tokenizer":
        return Tokenizer.load(path).fingerprint
    if kind == "sealed":
        return read_sealed(path)
    with open_tensors(path) as file:
        for name in file.keys():
            file.get_tensor(name).clone()
    return read_header(path)

def peak():
    try:  # ru_maxrss begins at what the parent had: the growth would hide behind it
        lines = open("/proc/self/status").read().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
at_start = peak()
for line in sys.stdin:
    path = line.rstrip("\\n")
    print("reading " + path, flush=True)
    start = time.process_time()  # other processes keep the machine busy too
    try:
        result = ["read", read(path)]
    except UserError as error:
        result = ["UserError", str(error)]
    except ValueError as error:
        result = ["ValueError", str(error)]
    print(json.dumps([path, *result, time.process_time() - start, peak() - at_start]), flush=True)
"""


def read_all(kind: str, paths: list[Path]) -> list[list[Any]]:
    """[path, end, result or message, seconds, MB by which the peak memory has grown] of each file."""
    command = [sys.executable, "-c", CHILD, kind, str(LIMIT_BYTES)]
    lines = "".join(f"{path}\n" for path in paths)
    child = subprocess.run(
        command, input=lines, env=environment(ROOT), cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    output = child.stdout.splitlines()
    assert child.returncode == 0, f"exit code {child.returncode} after: {output[-1:]}\n{child.stderr[-2000:]}"
    return [json.loads(line) for line in output if not line.startswith("reading ")]


def write_mutants(folder: Path, original: bytes, end: int, count: int, fix_length: bool = False) -> list[Path]:
    folder.mkdir()
    return [write(folder / name, data) for name, data in mutants(original, end, count, SEED, fix_length)]


def check(results: list[list[Any]], refused_by: str, legal: Callable[[Any], bool]) -> int:
    """Every file is refused, or gives what is legal, in time and memory; returns how many were refused."""
    for path, end, result, seconds, grown in results:
        assert end == refused_by or (end == "read" and legal(result)), (path, end, result)
        assert seconds < 2 and grown < 300, (path, seconds, grown)
    return sum(end == refused_by for _, end, *_ in results)


def test_mutated_safetensors_are_refused_or_have_the_same_header(tmp_path: Path) -> None:
    """A mutation of the data alone is legal here. One of the header is refused, or it says the same tensors (blanks are
    blanks), or other names or shapes of the same bytes, which check_tensors compares with the model.
    """
    save_tensors(tmp_path / "original", TENSORS)
    original = (tmp_path / "original").read_bytes()
    end = 8 + int.from_bytes(original[:8], "little")
    same = json.loads(json.dumps(read_header(tmp_path / "original")))  # tuples become lists, as in the child's answer
    expected = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in TENSORS.items()}

    def legal(header: dict[str, Any]) -> bool:
        if header == same:
            return True
        infos = {name: TensorInfo(info[0], tuple(info[1]), *info[2:]) for name, info in header.items()}
        with contextlib.suppress(UserError):
            check_tensors(infos, expected, "x")
            return False  # another header passed for that of the model
        return True

    changed = write_mutants(tmp_path / "header", original, end, 200, fix_length=True)
    made = [write(tmp_path / f"hostile{i}", data) for i, (data, _) in enumerate(hostile().values())]
    in_data = [write(tmp_path / f"data{i}", flipped(original, end + 16 * i)) for i in range(20)]
    results = read_all("tensors", changed + made + in_data)
    assert check(results[:200], "UserError", legal) > 150
    assert check(results[200:-20], "UserError", legal) == len(made)
    assert check(results[-20:], "UserError", same.__eq__) == 0


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def test_mutated_sealed_json_is_refused(tmp_path: Path) -> None:
    """Whatever is changed, also in the seal; a file that ends up as it was is legal."""
    content = {"step": 5, "files": {"x": {"bytes": 3, "sha256": "ab" * 32}}, "deep": [[[1, 2.5, None]]] * 20}
    original = seal(json.dumps(content, indent=1)).encode()
    paths = write_mutants(tmp_path / "sealed", original, len(original), 200)
    assert check(read_all("sealed", paths), "ValueError", content.__eq__) >= 199


def test_sealed_json_of_an_attacker_is_refused_or_plain(tmp_path: Path) -> None:
    """Whoever writes a file can also seal it: the content is JSON, whatever it says, and never more."""
    hostile = [
        '{"a":' + "[" * 1_000_000 + "}",
        '{"a":' * 200_000 + "}",
        '{"a":' + "9" * 1_000_000 + "}",
        "{}",
        "[]",
        "}",
    ]
    paths = [write(tmp_path / str(i), seal(text).encode()) for i, text in enumerate(hostile)]
    assert check(read_all("sealed", paths), "ValueError", lambda content: False) == len(hostile)


def test_mutated_tokenizers_are_refused(tmp_path: Path) -> None:
    tokenizer = Tokenizer.train(["the cat saw the dog, the dog saw the cat. " * 9, "12 345 don't"], 275)
    tokenizer.save(tmp_path)
    original = (tmp_path / "tokenizer.json").read_bytes()
    paths = write_mutants(tmp_path / "mutants", original, len(original), 200)
    assert check(read_all("tokenizer", paths), "UserError", tokenizer.fingerprint.__eq__) >= 199
    body = tokenizer.to_json().encode()  # sealed again after the mutation: now the content must be looked at
    resealed = [
        write(path, seal(path.read_bytes().decode("utf-8", "replace")).encode())
        for path in write_mutants(tmp_path / "resealed", body, len(body), 200)
    ]
    check(read_all("tokenizer", resealed), "UserError", lambda fingerprint: isinstance(fingerprint, str))
