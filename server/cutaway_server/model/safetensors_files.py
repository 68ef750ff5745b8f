"""Tensors of one or several memory-mapped safetensors files.

The headers are checked here, before anything is read, so that a damaged file is refused with what is wrong where; the
bytes are then read by the safetensors package. Format: 8 bytes length, JSON header, data.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cutaway_server.errors import ModelError
from cutaway_server.model.json_file import parse_object, read_object
from cutaway_server.model.safetensors_header import Entry, read_header

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
READ_BYTES = 16 << 20  # at a time, for the digest
FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class SafetensorsFiles:
    """A `TensorReader` over safetensors files, which it holds open for as long as it lives."""

    def __init__(self, paths: tuple[Path, ...]) -> None:
        """Opens `paths`, whose tensors must have different names.

        Raises:
            ModelError: a file is missing, damaged, or names a tensor that another has too.
        """
        self._entries: dict[str, Entry] = {}
        self._files: dict[str, Any] = {}  # by tensor
        for path in paths:
            entries = read_header(path)
            file = _open(path)
            for name, entry in entries.items():
                if name in self._entries:
                    raise ModelError(f"{path}: tensor {name} is in another file too")
                self._entries[name] = entry
                self._files[name] = file

    def names(self) -> frozenset[str]:
        """Every tensor's name."""
        return frozenset(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """Its shape, as stored."""
        return self._entries[name].shape

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of its first axis, as stored.

        Raises:
            ModelError: its dtype is not F32, F16 or BF16.
        """
        dtype = self._entries[name].dtype
        if dtype not in FLOATS:
            raise ModelError(f"tensor {name} has dtype {dtype}; weights must be {', '.join(FLOATS)}")
        rows: Tensor = self._files[name].get_slice(name)[start:stop]
        return rows

    def digest(self) -> str:
        """Hex blake2b-128 of every tensor's name, dtype, shape and bytes, however they are spread over files."""
        digest = hashlib.blake2b(digest_size=16)
        for name in sorted(self._entries):
            entry = self._entries[name]
            digest.update(json.dumps([name, entry.dtype, entry.shape]).encode())
            with entry.path.open("rb") as file:
                file.seek(entry.start)
                for start in range(entry.start, entry.stop, READ_BYTES):
                    digest.update(file.read(min(READ_BYTES, entry.stop - start)))
        return digest.hexdigest()
