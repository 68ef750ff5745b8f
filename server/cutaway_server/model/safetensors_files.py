"""Tensors of one or several memory-mapped safetensors files.

The headers are checked before anything is read, so that a damaged file is refused with what is wrong where; the bytes
are then read by the safetensors package.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from cutaway_server.errors import ModelError
from cutaway_server.model.json_file import read_object
from cutaway_server.model.safetensors_header import Entry, read_header

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
READ_BYTES = 16 << 20  # at a time, for the digest
FLOATS = ("F32", "F16", "BF16")


class SafetensorsFiles:
    """A `TensorReader` over safetensors files, which it holds open for as long as it lives."""

    def __init__(self, *paths: Path) -> None:
        """Opens `paths`, whose tensors must have different names.

        Raises:
            ModelError: a file is missing or damaged, or has a tensor that another has too.
        """
        self._entries: dict[str, Entry] = {}
        self._files: dict[Path, Any] = {}
        for path in paths:
            for name, entry in read_header(path).items():
                if name in self._entries:
                    raise ModelError(f"{path}: tensor {name} is in {self._entries[name].path.name} too")
                self._entries[name] = entry
            self._files[path] = _open(path)

    def names(self) -> frozenset[str]:
        """Every tensor's name."""
        return frozenset(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """Its shape, as stored."""
        return self._entries[name].shape

    def path(self, name: str) -> Path:
        """The file it is in."""
        return self._entries[name].path

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of its first axis, as stored.

        Raises:
            ModelError: its dtype is not one of `FLOATS`.
        """
        entry = self._entries[name]
        if entry.dtype not in FLOATS:
            raise ModelError(f"{entry.path}: tensor {name} is {entry.dtype}; weights must be {', '.join(FLOATS)}")
        rows: Tensor = self._files[entry.path].get_slice(name)[start:stop]
        return rows

    def format(self, name: str) -> str:
        """Its dtype, as safetensors names it."""
        return self._entries[name].dtype

    def blocks(self, name: str) -> Tensor:
        """Nothing is quantised here.

        Raises:
            ModelError: always.
        """
        raise ModelError(f"{self.path(name)}: tensor {name} is {self.format(name)}, not quantised")

    def digest(self) -> str:
        """Hex blake2b-128 of every tensor's name, dtype, shape and bytes, however they are spread over files."""
        digest = hashlib.blake2b(digest_size=16)
        for name, entry in sorted(self._entries.items()):
            digest.update(json.dumps([name, entry.dtype, entry.shape]).encode())
            with entry.path.open("rb") as file:
                file.seek(entry.start)
                for start in range(entry.start, entry.stop, READ_BYTES):
                    digest.update(file.read(min(READ_BYTES, entry.stop - start)))
        return digest.hexdigest()


def open_safetensors(directory: Path) -> SafetensorsFiles:
    """The safetensors of a Hugging Face directory: the single file, or those that the index names.

    Raises:
        ModelError: there are none, or one is damaged, or they disagree with the index.
    """
    if (directory / SINGLE).exists():
        return SafetensorsFiles(directory / SINGLE)
    if not (directory / INDEX).exists():
        raise ModelError(_nothing_found(directory))
    weight_map = read_object(directory / INDEX).inner("weight_map")
    files = {tensor: weight_map.text(tensor) for tensor in weight_map.values}
    for name in sorted(set(files.values())):
        if Path(name).name != name:
            raise ModelError(f"{directory / INDEX}: {name!r} is not the name of a file beside it")
        if not (directory / name).is_file():
            raise ModelError(f"{directory / INDEX}: names the file {name}, which is missing")
    reader = SafetensorsFiles(*(directory / name for name in sorted(set(files.values()))))
    found = reader.names()
    for tensor, file in files.items():
        if tensor not in found or reader.path(tensor).name != file:
            raise ModelError(f"{directory / INDEX}: says that {tensor} is in {file}, but it is not")
    return reader


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path}: {error}") from error


def _nothing_found(directory: Path) -> str:
    pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in directory.glob(pattern))
    if pickled:
        reason = f"{pickled[0]} is a pickle, which can run code and is not read; convert it to safetensors"
        return f"{directory}: no {SINGLE}: {reason}"
    return f"{directory}: neither {SINGLE} nor {INDEX}"
