"""Tensors put together from the header and chunks they come in."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cutaway.arrays import Array, Places
from cutaway.errors import ServerError
from cutaway.v1 import tensor_pb2 as pb

DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "F64": "<f8", "I32": "<i4", "I64": "<i8", "U8": "|u1", "I8": "|i1"}


@dataclass(frozen=True, slots=True)
class Received:
    """A whole tensor, and its header."""

    header: pb.TensorHeader
    array: Array


class Receiver:
    """Takes headers and chunks of one stream, in any mixture; gives each tensor once it is whole."""

    def __init__(self, model_hash: str = "") -> None:
        self.model_hash = model_hash
        self._open: dict[int, tuple[pb.TensorHeader, bytearray, int]] = {}

    def header(self, header: pb.TensorHeader) -> Received | None:
        """Take a header; the tensor, if it has no elements."""
        if header.bytes == 0:
            return Received(header, self._array(header, bytearray()))
        self._open[header.id] = (header, bytearray(header.bytes), 0)
        return None

    def chunk(self, chunk: pb.TensorChunk) -> Received | None:
        """Take a chunk; the tensor, if it was its last.

        Raises:
            ServerError: nothing said that it would come, or there.
        """
        if chunk.id not in self._open:
            raise ServerError(f"a chunk came for tensor {chunk.id}, which was not announced")
        header, data, filled = self._open[chunk.id]
        if chunk.offset != filled or filled + len(chunk.data) > len(data):
            raise ServerError(f"tensor {chunk.id} has {len(data)} bytes, and a chunk came for byte {chunk.offset}")
        data[filled : filled + len(chunk.data)] = chunk.data
        if filled + len(chunk.data) < len(data):
            self._open[chunk.id] = (header, data, filled + len(chunk.data))
            return None
        del self._open[chunk.id]
        return Received(header, self._array(header, data))

    def _array(self, header: pb.TensorHeader, data: bytearray) -> Array:
        if header.dtype not in DTYPES:
            raise ServerError(f"tensor {header.name!r} has elements of type {header.dtype!r}, unknown to this client")
        values = np.frombuffer(data, dtype=DTYPES[header.dtype])
        if header.dtype == "BF16":
            values = (values.astype(np.uint32) << 16).view(np.float32)
        values = values.reshape([axis.size for axis in header.axes])
        axes = tuple(axis.name for axis in header.axes)
        at = {axis.name: _places(axis) for axis in header.axes}
        return Array(values, axes, header.name, at, self.model_hash, header.dtype)


def _places(axis: pb.Axis) -> Places:
    return tuple(axis.at) if axis.at else range(axis.first, axis.first + axis.size)
