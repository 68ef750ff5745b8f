"""ReadCache: which keys and values are meant, how many bytes they are, and how they are sent."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from cutaway.v1 import capture_pb2, tensor_pb2
from cutaway.v1 import machine_pb2 as v1
from torch import Tensor

from cutaway_server.engine.build import WIRE_DTYPES, EngineFacts
from cutaway_server.engine.stored import Stored
from cutaway_server.errors import InvalidField
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
        InvalidField: it names what there is not, or is too much.
    """
    config = facts.config
    if request.dtype and request.dtype not in DTYPES:
        raise InvalidField("dtype", request.dtype, f"must be one of {', '.join(DTYPES)}, or empty: as stored")
    reading = Reading(
        stored,
        _indices("layers", request.layers, config.n_layers),
        _indices("heads", request.heads, config.n_kv_heads),
        _positions(request.positions, len(stored.request.prompt), stored.stored),
        config.d_head,
        DTYPES[request.dtype or facts.dtype],
    )
    size = 2 * reading.tensor_bytes
    if request.HasField("max_bytes") and size > request.max_bytes:
        raise InvalidField("max_bytes", request.max_bytes, f"keys and values asked for are {size} bytes")
    if size > most_bytes:
        rule = f"keys and values asked for are {size} bytes, and the server sends at most {most_bytes} at a time"
        raise InvalidField("positions", f"{len(reading.positions)} positions", rule)
    return reading


def _indices(field: str, message: capture_pb2.Indices, size: int) -> tuple[int, ...]:
    for place, index in enumerate(message.list):
        if not -size <= index < size:
            raise InvalidField(f"{field}.list[{place}]", index, f"must be in [{-size}, {size})")
    return tuple(sorted({index % size for index in message.list})) or tuple(range(size))


def _positions(message: capture_pb2.Positions, prompt: int, stored: int) -> tuple[int, ...]:
    """Positions meant, ascending."""
    if not message.spans and not message.list:
        return tuple(range(stored))
    chosen: set[int] = set()
    for place, span in enumerate(message.spans):
        start, stop = _region(span.region, prompt, stored)
        first = start + span.start if span.region in FROM_START else max(start, span.start)
        last = start + span.stop if span.region in FROM_START else span.stop
        last = min(stop, last) if span.HasField("stop") else stop
        if span.HasField("stop") and span.stop < span.start:
            raise InvalidField(f"positions.spans[{place}].stop", span.stop, f"must not be below start ({span.start})")
        chosen.update(range(first, last, span.step or 1))
    for place, position in enumerate(message.list):
        if not -prompt <= position < stored:
            rule = f"must be in [{-prompt}, {stored}): the request has keys and values of so many positions now"
            raise InvalidField(f"positions.list[{place}]", position, rule)
        chosen.add(position + prompt if position < 0 else position)
    return tuple(sorted(position for position in chosen if position < stored))


FROM_START = (capture_pb2.REGION_GENERATED, capture_pb2.REGION_STEPS)  # whose spans count from the region's first


def _region(region: int, prompt: int, stored: int) -> tuple[int, int]:
    match region:
        case capture_pb2.REGION_PROMPT:
            return 0, min(prompt, stored)
        case capture_pb2.REGION_GENERATED:
            return prompt, stored
        case capture_pb2.REGION_STEPS:
            return prompt - 1, stored
        case capture_pb2.REGION_LAST:
            return prompt - 1, min(prompt, stored)
        case _:
            return 0, stored
