"""ReadCache: which keys and values are meant, how many bytes they are, and how they are sent."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from cutaway.v1 import machine_pb2 as v1
from cutaway.v1 import tensor_pb2
from torch import Tensor

from cutaway_server.engine.build import WIRE_DTYPES, EngineFacts
from cutaway_server.engine.stored import Stored
from cutaway_server.errors import InvalidField, OverBudget
from cutaway_server.service.selecting import indices, rows
from cutaway_server.service.tensors import CHUNK_BYTES, Axis, header

KEYS, VALUES = "blocks.*.attn.hook_rot_k", "blocks.*.attn.hook_v"
DTYPES = {name: dtype for dtype, name in WIRE_DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Reading:
    """What is read: of each layer these positions of these heads."""

    stored: Stored
    layers: tuple[int, ...]
    heads: tuple[int, ...]
    positions: tuple[int, ...]
    d_head: int
    dtype: torch.dtype

    @property
    def row_bytes(self) -> int:
        """Bytes of the keys (or the values) of one position in one layer."""
        return len(self.heads) * self.d_head * self.dtype.itemsize

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all keys, or of all values."""
        return len(self.layers) * len(self.positions) * self.row_bytes

    def headers(self) -> Iterator[tensor_pb2.TensorHeader]:
        """The headers of both tensors: keys are number 0, values 1."""
        axes = (
            Axis("layer", self.layers), Axis("pos", self.positions), Axis("kv_head", self.heads),
            Axis("d_head", range(self.d_head)),
        )  # fmt: skip
        for number, name in enumerate((KEYS, VALUES)):
            told = header(name, WIRE_DTYPES[self.dtype], axes, self.tensor_bytes)
            told.id, told.index = number, self.stored.index
            yield told

    def parts(self) -> Iterator[tuple[int, Sequence[int], int]]:
        """What is read and sent at once: a layer, positions of it, and where they are in each tensor's bytes."""
        rows = max(1, CHUNK_BYTES // self.row_bytes)
        for place, layer in enumerate(self.layers):
            for start in range(0, len(self.positions), rows):
                offset = (place * len(self.positions) + start) * self.row_bytes
                yield layer, self.positions[start : start + rows], offset

    def chunk(self, number: int, offset: int, data: Tensor) -> tensor_pb2.TensorChunk:
        """A part of tensor `number`."""
        raw = data.to(self.dtype).contiguous().view(torch.uint8).numpy().tobytes()
        return tensor_pb2.TensorChunk(id=number, offset=offset, data=raw)


def reading_of(request: v1.ReadCacheRequest, stored: Stored, facts: EngineFacts, most_bytes: int) -> Reading:
    """What `request` means.

    Raises:
        InvalidField: it names what there is not.
        OverBudget: it is too much.
    """
    config = facts.config
    if request.dtype and request.dtype not in DTYPES:
        raise InvalidField("dtype", request.dtype, f"must be one of {', '.join(DTYPES)}, or empty: as stored")
    layers, heads = tuple(range(config.n_layers)), tuple(range(config.n_kv_heads))
    if request.HasField("layers"):
        layers = indices(request.layers, config.n_layers, "layers", "layers")
    if request.HasField("heads"):
        heads = indices(request.heads, config.n_kv_heads, "heads", "heads of keys and values")
    chosen = rows(request.positions, "positions", len(stored.request.prompt), stored.stored)
    positions = tuple(chosen.within(0, stored.stored))
    reading = Reading(stored, layers, heads, positions, config.d_head, DTYPES[request.dtype or facts.dtype])
    size = 2 * reading.tensor_bytes
    if request.HasField("max_bytes") and size > request.max_bytes:
        raise OverBudget(f"keys and values asked for are {size} bytes, and max_bytes is {request.max_bytes}")
    if size > most_bytes:
        raise OverBudget(f"keys and values asked for are {size} bytes, and the server allows a request {most_bytes}")
    return reading
