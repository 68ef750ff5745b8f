"""A single GGUF file as a checkpoint: memory-mapped, dequantised row by row."""

from __future__ import annotations

import hashlib
import mmap
import re
from pathlib import Path

import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from torch import Tensor

from cutaway_server.errors import ModelError
from cutaway_server.model.checkpoint import Checkpoint
from cutaway_server.model.gguf_ends import end_tokens
from cutaway_server.model.gguf_families import read_config
from cutaway_server.model.gguf_header import TensorInfo, parse
from cutaway_server.model.gguf_names import IGNORED, read_layout
from cutaway_server.text.tokenizer import TextModel

SPLIT_NAME = re.compile(r"-\d{5}-of-\d{5}\.gguf$")
AS_STORED = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}


def open_gguf(path: Path) -> Checkpoint:
    """Open a GGUF file.

    Raises:
        ModelError: it is missing, damaged, or of a kind that is not served.
    """
    reader = GgufReader(path)
    config = read_config(reader.metadata, reader, str(path))
    return Checkpoint(
        config=config,
        layout=read_layout(config, reader.names()),
        reader=reader,
        text=TextModel.from_gguf(reader.metadata),
        eos_token_ids=end_tokens(reader.metadata, config.d_vocab, str(path)),
        ignored=IGNORED & reader.names(),
    )


class GgufReader:
    """The metadata and tensors of a GGUF file, which stays mapped as long as this lives."""

    def __init__(self, path: Path) -> None:
        if SPLIT_NAME.search(path.name):
            raise ModelError(f"{path} is one part of a split GGUF; join the parts with llama-gguf-split --merge")
        self._path = path
        self._data = memoryview(_map(path))
        header = parse(self._data, str(path))
        self._tensors = header.tensors
        self.metadata = header.metadata

    def names(self) -> frozenset[str]:
        """Every tensor's name."""
        return frozenset(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Its shape, out-features first."""
        return self._tensor(name).shape

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of its first axis: as stored if F32, F16 or BF16, else dequantised to fp32."""
        tensor = self._tensor(name)
        length = tensor.shape[0]
        if not 0 <= start <= stop <= length:
            raise IndexError(f"rows [{start}, {stop}) of {name}, which has {length}")
        if start == stop:
            return torch.empty(0, *tensor.shape[1:], dtype=AS_STORED.get(tensor.kind, torch.float32))
        if tensor.kind not in AS_STORED and len(tensor.shape) == 1:
            return _dequantised(self._data[tensor.start : tensor.start + tensor.size], tensor)[start:stop]
        raw = self._bytes(tensor, start, stop)
        values = _as_stored(raw, tensor) if tensor.kind in AS_STORED else _dequantised(raw, tensor)
        return values.view(stop - start, *tensor.shape[1:])

    def format(self, name: str) -> str:
        """Its type, as GGUF names it."""
        return str(self._tensor(name).kind.name)

    def blocks(self, name: str) -> Tensor:
        """A quantised matrix's blocks as the file has them: uint8 [rows, bytes of a row]."""
        tensor = self._tensor(name)
        raw = np.frombuffer(self._bytes(tensor, 0, tensor.shape[0]), np.uint8)
        # Twice: the map is read-only, and only torch's own memory can be given back.
        return torch.from_numpy(raw.copy()).clone().view(tensor.shape[0], -1)

    def digest(self) -> str:
        """Hex blake2b-128 of every tensor's name, type, shape and bytes."""
        whole = hashlib.blake2b(digest_size=16)
        for name, tensor in sorted(self._tensors.items()):
            whole.update(f"{name!r} {tensor.kind.name} {tensor.shape} ".encode())
            whole.update(self._data[tensor.start : tensor.start + tensor.size])
        return whole.hexdigest()

    def _tensor(self, name: str) -> TensorInfo:
        try:
            return self._tensors[name]
        except KeyError:
            raise ModelError(f"{self._path}: there is no tensor {name!r}") from None

    def _bytes(self, tensor: TensorInfo, start: int, stop: int) -> memoryview:
        row = tensor.size // tensor.shape[0]
        return self._data[tensor.start + row * start : tensor.start + row * stop]


def _as_stored(raw: memoryview, tensor: TensorInfo) -> Tensor:
    # A copy, since the map is read-only and torch has no such tensors.
    return torch.from_numpy(np.frombuffer(raw, np.uint8).copy()).view(AS_STORED[tensor.kind])


def _dequantised(raw: memoryview, tensor: TensorInfo) -> Tensor:
    block, block_bytes = GGML_QUANT_SIZES[tensor.kind]
    # In rows as they are: `dequantize` works on 16 of them at a time, and on lone blocks would take 6 times as long.
    rows = np.frombuffer(raw, np.uint8).reshape(-1, tensor.shape[-1] // block * block_bytes)
    return torch.from_numpy(dequantize(rows, tensor.kind)).flatten()


def _map(path: Path) -> mmap.mmap:
    try:
        with path.open("rb") as file:
            if file.seek(0, 2) == 0:
                raise ModelError(f"{path} is empty")
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error}") from error
