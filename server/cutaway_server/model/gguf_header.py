"""What a GGUF file says of itself: metadata, and where each tensor lies, believed only after it is checked.

The format (github.com/ggml-org/ggml/blob/master/docs/gguf.md): magic, version, two counts, key-value pairs, tensor
descriptions, padding, data. We read it here in one pass instead of with `gguf.GGUFReader`, which trusts every length
in the file and keeps an array for each number: 690 MB and seconds for a vocabulary of 262,144.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import prod

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from cutaway_server.errors import ModelError

VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_PAIRS = 1 << 16
MAX_TENSORS = 1 << 17
MAX_ELEMENTS = 1 << 23  # of all arrays together; a vocabulary has up to three of some 2**18
MAX_TEXT = 1 << 24
MAX_DIMS = 4

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
FLOAT32, TEXT, ARRAY = 6, 8, 9
SMALLEST_PAIR = 8 + 4 + 1  # an empty key, a type, a byte
SMALLEST_TENSOR = 8 + 4 + 8 + 4 + 8

SUPPORTED = frozenset(
    GGMLQuantizationType[name]
    for name in ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K")
)

Scalar = bool | int | float | str
Value = Scalar | list[Scalar]  # of one kind


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor: its shape, out-features first as torch has it, and its bytes [start, start + size) of the file."""

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    start: int
    size: int


@dataclass(frozen=True, slots=True)
class Header:
    """Everything before the data."""

    metadata: Mapping[str, Value]
    tensors: Mapping[str, TensorInfo]


def parse(data: memoryview, file: str) -> Header:
    """The header of the GGUF file whose bytes are `data`; `file` is its name, for messages.

    Raises ModelError if the file is cut short, damaged or of a kind that is not supported.
    """
    cursor = _Cursor(data, file)
    _check_format(cursor)
    tensor_count = cursor.count("tensors", SMALLEST_TENSOR, MAX_TENSORS)
    pair_count = cursor.count("metadata pairs", SMALLEST_PAIR, MAX_PAIRS)
    metadata = _metadata(cursor, pair_count)
    described = [_describe(cursor) for _ in range(tensor_count)]
    start = _aligned(cursor.offset, _alignment(metadata, file))
    tensors: dict[str, TensorInfo] = {}
    for tensor in described:
        if tensor.name in tensors:
            raise ModelError(f"{file}: there are two tensors {tensor.name!r}")
        tensors[tensor.name] = _placed(tensor, start, len(data), _alignment(metadata, file), file)
    _check_overlaps(tensors, file)
    return Header(metadata, tensors)


class _Cursor:
    """Reads forward, never past the end. `elements` counts array elements, which cost memory we have to bound."""

    def __init__(self, data: memoryview, file: str) -> None:
        self.data = data
        self.file = file
        self.offset = 0
        self.elements = 0

    def fail(self, what: str) -> ModelError:
        return ModelError(f"{self.file}: at byte {self.offset}: {what}")

    def take(self, size: int, what: str) -> memoryview:
        left = len(self.data) - self.offset
        if size > left:
            raise self.fail(f"{what} needs {size} bytes and the file has {left} left: it is cut short or damaged")
        self.offset += size
        return self.data[self.offset - size : self.offset]

    def integer(self, kind: str, what: str) -> int:
        value = struct.unpack("<" + kind, self.take(struct.calcsize("<" + kind), what))[0]
        return int(value)

    def count(self, what: str, smallest: int, most: int) -> int:
        count = self.integer("Q", f"the number of {what}")
        if count > most:
            raise self.fail(f"{count} {what} are said to follow; at most {most} are believed")
        if count * smallest > len(self.data) - self.offset:
            raise self.fail(f"{count} {what} are said to follow and the file is too short: cut short or damaged")
        return count

    def text(self, what: str) -> str:
        length = self.integer("Q", f"the length of {what}")
        if length > MAX_TEXT:
            raise self.fail(f"{what} is said to have {length} bytes; at most {MAX_TEXT} are believed")
        raw = self.take(length, what)
        try:
            return str(raw, "utf-8")
        except UnicodeDecodeError as error:
            raise self.fail(f"{what} is not UTF-8: {error.reason}") from error


def _check_format(cursor: _Cursor) -> None:
    magic = bytes(cursor.take(4, "the magic"))
    if magic != b"GGUF":
        raise ModelError(f"{cursor.file}: is no GGUF file: it starts with {magic!r}, not b'GGUF'")
    version = cursor.integer("I", "the version")
    if version & 0xFFFF == 0:
        raise ModelError(f"{cursor.file}: is big-endian, which is not supported")
    if version not in VERSIONS:
        raise ModelError(f"{cursor.file}: is GGUF version {version}; versions 2 and 3 are supported")


def _metadata(cursor: _Cursor, count: int) -> dict[str, Value]:
    metadata: dict[str, Value] = {}
    for n in range(count):
        key = cursor.text(f"metadata key {n}")
        if key in metadata:
            raise cursor.fail(f"metadata key {key!r} comes twice")
        kind = cursor.integer("I", f"the type of {key!r}")
        metadata[key] = _array(cursor, key) if kind == ARRAY else _single(cursor, key, kind)
    return metadata


def _single(cursor: _Cursor, key: str, kind: int) -> Scalar:
    value = _values(cursor, key, kind, 1)[0]
    return float(str(np.float32(value))) if kind == FLOAT32 else value  # 1e-05, as was meant, not 9.999999747e-06


def _array(cursor: _Cursor, key: str) -> Value:
    kind = cursor.integer("I", f"the element type of {key!r}")
    count = cursor.count(f"elements of {key!r}", _smallest(kind), MAX_ELEMENTS)
    cursor.elements += count
    if cursor.elements > MAX_ELEMENTS:
        raise cursor.fail(f"the metadata has over {MAX_ELEMENTS} array elements, which is not believed")
    return _values(cursor, key, kind, count)


def _smallest(kind: int) -> int:
    return struct.calcsize("<" + SCALARS[kind]) if kind in SCALARS else 8


def _values(cursor: _Cursor, key: str, kind: int, count: int) -> list[Scalar]:
    if kind == TEXT:
        return [cursor.text(f"text {n} of {key!r}") for n in range(count)]
    if kind == ARRAY:
        raise cursor.fail(f"{key!r} is an array of arrays, which is not supported")
    if kind not in SCALARS:
        raise cursor.fail(f"{key!r} is of type {kind}, which GGUF does not have")
    form = f"<{count}{SCALARS[kind]}"
    return list(struct.unpack(form, cursor.take(struct.calcsize(form), repr(key))))


def _describe(cursor: _Cursor) -> TensorInfo:
    """A tensor as the header has it: `start` is still counted from where the data begins."""
    name = cursor.text("a tensor's name")
    dims = cursor.integer("I", f"the number of dimensions of {name!r}")
    if not 1 <= dims <= MAX_DIMS:
        raise cursor.fail(f"tensor {name!r} has {dims} dimensions; 1 to {MAX_DIMS} are possible")
    shape = tuple(cursor.integer("Q", f"the shape of {name!r}") for _ in range(dims))[::-1]
    kind = _kind(cursor, name)
    if 0 in shape or prod(shape) >= 1 << 63:
        raise cursor.fail(f"tensor {name!r} has the impossible shape {shape}")
    block, block_bytes = GGML_QUANT_SIZES[kind]
    if shape[-1] % block:
        raise cursor.fail(f"tensor {name!r} has rows of {shape[-1]}, no multiple of the {block} of {kind.name}")
    start = cursor.integer("Q", f"the offset of {name!r}")
    return TensorInfo(name, shape, kind, start, prod(shape) // block * block_bytes)


def _kind(cursor: _Cursor, name: str) -> GGMLQuantizationType:
    number = cursor.integer("I", f"the type of {name!r}")
    names = ", ".join(sorted(kind.name for kind in SUPPORTED))
    try:
        kind = GGMLQuantizationType(number)
    except ValueError:
        raise cursor.fail(f"tensor {name!r} is of the unknown type {number}; supported are {names}") from None
    if kind not in SUPPORTED:
        raise cursor.fail(f"tensor {name!r} is stored as {kind.name}, which is not supported; supported are {names}")
    return kind


def _alignment(metadata: Mapping[str, Value], file: str) -> int:
    value = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if type(value) is not int or value < 1 or value & (value - 1) or value > 1 << 20:
        raise ModelError(f"{file}: general.alignment is {value!r}, and must be a power of two up to 2**20")
    return value


def _aligned(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment


def _placed(tensor: TensorInfo, start: int, end: int, alignment: int, file: str) -> TensorInfo:
    if tensor.start % alignment:
        raise ModelError(f"{file}: tensor {tensor.name!r} is at {tensor.start}, not aligned to {alignment}")
    if start + tensor.start + tensor.size > end:
        raise ModelError(
            f"{file}: tensor {tensor.name!r} of {tensor.size} bytes at {start + tensor.start} "
            f"goes past the end of the file at {end}: it is cut short or damaged"
        )
    return TensorInfo(tensor.name, tensor.shape, tensor.kind, start + tensor.start, tensor.size)


def _check_overlaps(tensors: Mapping[str, TensorInfo], file: str) -> None:
    ordered = sorted(tensors.values(), key=lambda tensor: tensor.start)
    for before, after in pairwise(ordered):
        if before.start + before.size > after.start:
            raise ModelError(f"{file}: tensors {before.name!r} and {after.name!r} overlap at byte {after.start}")
