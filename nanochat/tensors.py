"""safetensors files: written through the safetensors library, read with suspicion.

    8 bytes     length of the header, little-endian
    header      JSON: {name: {"dtype": "F32", "shape": [2, 3], "data_offsets": [begin, end]}, ...}, offsets counted
                from the start of the data; "__metadata__" may hold strings
    data        the tensors' bytes, without holes

(https://huggingface.co/docs/safetensors). The header is checked here, against the size of the file, before anything is
allocated or mapped. Does not: notice a bit that flipped in the data (a sha256 kept elsewhere does), or protect from a
file that another process cuts short while it is open (mapped memory that is gone kills the process).
"""

import json
import os
import stat
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nanochat.common import UserError

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
}
MAX_HEADER_BYTES = 1 << 20  # about 10,000 tensors; whatever is in it, parsing takes at most 30 MB and 0.3 s
MAX_RANK = 8
MAX_ELEMENTS = 1 << 48


class TensorInfo(NamedTuple):
    """What the header says of one tensor; its bytes are [begin, end) of the file."""

    dtype: str  # a key of DTYPES
    shape: tuple[int, ...]
    begin: int
    end: int


def save_tensors(path: Path | str, tensors: dict[str, Tensor]) -> None:
    """Write contiguous tensors that share no memory. Not atomic and not flushed to the disk: the caller writes beside
    the place and renames. Raises UserError where the file cannot be written.
    """
    try:
        save_file(tensors, path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"cannot write {path} ({one_line(error)}); make room or choose another directory") from None


@contextmanager
def open_tensors(path: Path | str) -> Iterator[Any]:
    """The safetensors handle of a file whose header has been checked: keys(), get_tensor(name), get_slice(name). Raises
    UserError naming the file and what is wrong with it.
    """
    read_header(path)
    try:
        with safe_open(path, framework="pt") as tensors:
            yield tensors
    except SafetensorError as error:
        raise damaged(path, one_line(error)) from None


def read_header(path: Path | str) -> dict[str, TensorInfo]:
    """{name: info} in the order of the data. Raises UserError naming the file and what is wrong, in time and memory
    that the file's content cannot drive up (less than a second, 300 MB).
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would wait for its other end
            raise ValueError("not a regular file")
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                raise ValueError(f"header of {length:,} bytes in a file of {size:,} (at most {MAX_HEADER_BYTES:,})")
            text = file.read(length).decode("utf-8")
        if not text.startswith("{"):  # json would also take blanks before it, which safetensors does not
            raise ValueError("the header is not an object")
        content = json.loads(text, object_pairs_hook=unique_keys)
        return check_header(content, 8 + length, size)
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror})") from None
    except RecursionError:
        raise damaged(path, "header nested too deeply") from None
    except ValueError as error:
        raise damaged(path, one_line(error)) from None


def check_tensors(
    header: Mapping[str, TensorInfo],
    expected: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    path: Path | str,
) -> None:
    """Raise UserError naming the first tensor, by name, that is missing, not expected, or of another shape or dtype."""
    for name in sorted(header.keys() | expected.keys()):
        if name not in header:
            raise UserError(f"{path} has no tensor {name}, which this model needs; is it of another model?")
        info = header[name]
        if name not in expected:
            raise UserError(f"{path} has a tensor {shown(name)} that this model does not have; is it of another model?")
        dtype, shape = expected[name]
        if info.shape != tuple(shape):
            raise UserError(f"{path}: {name} has shape {info.shape}, this model needs {tuple(shape)}; check --depth")
        if DTYPES[info.dtype] != dtype:
            raise UserError(f"{path}: {name} is {DTYPES[info.dtype]}, this model needs {dtype}")


# -----------------------------------------------------------------------------
# The header


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; ValueError where a key stands twice, of which readers may take either."""
    content = dict(pairs)
    if len(content) < len(pairs):
        twice = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
        raise ValueError(f"key {shown(twice[0])} stands twice in the header")
    return content


def check_header(content: dict[str, Any], data_start: int, file_size: int) -> dict[str, TensorInfo]:
    """The parsed header as {name: info}. Raises ValueError unless the tensors cover the rest of the file exactly."""
    metadata = content.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("__metadata__ is not an object of strings")
    tensors = [(name, check_entry(name, entry, data_start)) for name, entry in content.items()]
    tensors.sort(key=lambda tensor: (tensor[1].begin, tensor[1].end))
    position = data_start
    for name, info in tensors:
        if info.begin != position:
            raise ValueError(f"tensor {shown(name)} begins at byte {info.begin:,}, the one before ends at {position:,}")
        position = info.end
    if position != file_size:
        raise ValueError(f"the tensors end at byte {position:,} of a file of {file_size:,}")
    return dict(tensors)


def check_entry(name: str, entry: object, data_start: int) -> TensorInfo:
    """One tensor's entry, its offsets counted from the start of the file. Raises ValueError with what is wrong."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor {shown(name)} is not an object of dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"tensor {shown(name)} has dtype {shown(dtype)}; known: {', '.join(DTYPES)}")
    if not are_sizes(shape) or len(shape) > MAX_RANK:
        raise ValueError(f"tensor {shown(name)} has shape {shown(shape)}; expected at most {MAX_RANK} sizes")
    if not are_sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"tensor {shown(name)} has data_offsets {shown(offsets)}; expected begin and end")
    elements = 1
    for length in shape:
        elements *= length
        if elements > MAX_ELEMENTS:  # also where a 0 follows: the product must fit wherever it is computed
            raise ValueError(f"tensor {shown(name)} of shape {shown(shape)} has more than {MAX_ELEMENTS:,} elements")
    begin, end = offsets
    if end - begin != elements * DTYPES[dtype].itemsize:
        raise ValueError(f"tensor {shown(name)}, {dtype} {shown(shape)}, does not fill data_offsets {shown(offsets)}")
    return TensorInfo(dtype, tuple(shape), data_start + begin, data_start + end)


def are_sizes(values: Any) -> bool:
    """Whether these are ints that a file or a tensor can have as sizes (a bool is none, though Python says so)."""
    return isinstance(values, list) and all(type(value) is int and 0 <= value <= MAX_ELEMENTS for value in values)


# -----------------------------------------------------------------------------
# Messages


def damaged(path: Path | str, reason: str) -> UserError:
    return UserError(f"{path} is no intact safetensors file: {reason}; get it again")


def shown(value: object) -> str:
    """A foreign value as a message can hold it: on one line, escaped, at most 80 characters."""
    text = ascii(value[:80] if isinstance(value, str | list) else value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())
