"""Captured values gathered from a stream of messages, for calls that compute something of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import numpy as np
from cutaway.v1 import inference_pb2 as v1
from cutaway.v1 import tensor_pb2
from numpy.typing import NDArray


class Gathered:
    """Whole arrays F32 by the number of their capture, rows one after the other; no reductions but projections."""

    def __init__(self) -> None:
        self._open: dict[int, tuple[tensor_pb2.TensorHeader, bytearray]] = {}
        self._pieces: defaultdict[int, list[NDArray[np.float32]]] = defaultdict(list)
        self._rows: dict[int, int] = {}  # which axis they are along
        self._positions: defaultdict[int, list[int]] = defaultdict(list)
        self._names: dict[int, tuple[str, tuple[int, ...] | None]] = {}  # and layers, where they are an axis
        self.step = 0  # the last that anything was captured in

    def take(self, message: v1.GenerateResponse) -> None:
        """Take a header or a chunk."""
        if message.WhichOneof("event") == "tensor":
            self._open[message.tensor.id] = (message.tensor, bytearray())
            self.step = message.tensor.step
            return
        header, data = self._open[message.chunk.id]
        data += message.chunk.data
        if len(data) == header.bytes:
            del self._open[message.chunk.id]
            self._whole(header, data)

    def _whole(self, header: tensor_pb2.TensorHeader, data: bytearray) -> None:
        number = header.capture
        rows = next(i for i, axis in enumerate(header.axes) if axis.name == "pos")
        axis = header.axes[rows]
        self._rows[number] = rows
        first = header.axes[0]
        layers = tuple(first.at or range(first.first, first.first + first.size)) if first.name == "layer" else None
        self._names[number] = (header.name, layers)
        self._positions[number] += axis.at or range(axis.first, axis.first + axis.size)
        self._pieces[number].append(np.frombuffer(data, "<f4").reshape([axis.size for axis in header.axes]))

    def values(self, number: int) -> NDArray[np.float32]:
        """What a capture brought."""
        return np.concatenate(self._pieces[number], self._rows[number])

    def positions(self, number: int) -> tuple[int, ...]:
        """Absolute positions of its rows."""
        return tuple(self._positions[number])

    def by_layer(self, number: int) -> Iterator[tuple[str, NDArray[np.float32]]]:
        """What a capture brought, each layer [pos, ...] under its own name."""
        (name, layers), values = self._names[number], self.values(number)
        if layers is None:
            yield name, values
            return
        for layer, part in zip(layers, values, strict=True):
            yield name.replace("*", str(layer)), part
