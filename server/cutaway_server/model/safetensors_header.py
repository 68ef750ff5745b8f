"""The header of a safetensors file, checked: what each tensor is and where its bytes lie.

Layout of a file: 8 bytes little-endian length of the header, the header (JSON: name to dtype, shape and data_offsets,
counted from the header's end), and the data, without holes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cutaway_server.errors import ModelError
from cutaway_server.model.json_file import parse_object

MAX_HEADER_BYTES = 100_000_000  # as the safetensors package has it
_ITEM_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor: its dtype as safetensors names it, and its bytes [start, stop) of the file."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def read_header(path: Path) -> Mapping[str, Entry]:
    """Every tensor of the file at `path`, by name.

    Raises:
        ModelError: the file is missing, too short, or its header breaks a rule of the format.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                limit = f"the file has {size:,} bytes, and {MAX_HEADER_BYTES:,} is the most for a header"
                raise ModelError(f"{path}: damaged: its header claims {length:,} bytes; {limit}")
            raw = file.read(length)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror})") from error
    return entries_of(raw, path, size)


def entries_of(raw: bytes, path: Path, size: int) -> Mapping[str, Entry]:
    """The tensors of a file of `size` bytes whose header is `raw`; `path` is what it is called in messages.

    Raises:
        ModelError: the header breaks a rule of the format.
    """
    header = parse_object(raw, f"{path}, header").values
    data = 8 + len(raw)
    entries = {name: _entry(path, name, item, data) for name, item in header.items() if name != "__metadata__"}
    _check_coverage(path, entries, data, size)
    return entries


def _entry(path: Path, name: str, item: object, data: int) -> Entry:
    if not isinstance(item, dict) or set(item) != {"dtype", "shape", "data_offsets"}:
        raise ModelError(f"{path}: tensor {name} must have dtype, shape and data_offsets, and nothing else")
    dtype, shape, offsets = item["dtype"], item["shape"], item["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _ITEM_BYTES:
        raise ModelError(f"{path}: tensor {name} has the unknown dtype {dtype!r}")
    if not _is_sizes(shape) or not _is_sizes(offsets) or len(offsets) != 2:
        raise ModelError(f"{path}: tensor {name} has shape {shape!r} and data_offsets {offsets!r}, not sizes")
    expected = math.prod(shape) * _ITEM_BYTES[dtype]
    if offsets[1] - offsets[0] != expected:
        found = f"data_offsets {offsets[0]} to {offsets[1]} hold {offsets[1] - offsets[0]}"
        raise ModelError(f"{path}: tensor {name} ({dtype} {shape}) needs {expected} bytes, but its {found}")
    return Entry(path, dtype, tuple(shape), data + offsets[0], data + offsets[1])


def _is_sizes(value: object) -> bool:
    return isinstance(value, list) and all(
        isinstance(item, int) and not isinstance(item, bool) and item >= 0 for item in value
    )


def _check_coverage(path: Path, entries: Mapping[str, Entry], data: int, size: int) -> None:
    """Tensors lie one after the other from the header's end to the file's, without overlap or hole."""
    end, last = data, "the header"
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.stop > size:
            raise ModelError(f"{path}: truncated: tensor {name} ends at byte {entry.stop:,}, the file at {size:,}")
        if entry.start != end:
            what = "overlaps" if entry.start < end else "leaves a hole after"
            raise ModelError(f"{path}: tensor {name} starts at byte {entry.start:,} and {what} {last}")
        end, last = entry.stop, name
    if end != size:
        raise ModelError(f"{path}: {size - end:,} bytes follow the last tensor ({last})")
