"""Tensors on the wire: a header, then chunks that any client can take."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from cutaway.v1 import tensor_pb2 as v1
from numpy.typing import NDArray

from cutaway_server.captures import Captured, Part

CHUNK_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class Axis:
    """An axis: what its places are, such as absolute positions or heads. A range is told by its first place."""

    name: str
    at: range | tuple[int, ...]


def header(name: str, dtype: str, axes: Iterable[Axis], n_bytes: int) -> v1.TensorHeader:
    """The header of a tensor; `dtype` is named as in safetensors. Its id, and what it answers, the caller sets."""
    return v1.TensorHeader(name=name, dtype=dtype, axes=[_axis(axis) for axis in axes], bytes=n_bytes)


def chunks(number: int, data: NDArray[np.generic]) -> Iterator[v1.TensorChunk]:
    """The elements of `data`, little-endian and in C order, as chunks of tensor `number`."""
    flat = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
    for offset in range(0, len(flat), CHUNK_BYTES):
        yield v1.TensorChunk(id=number, offset=offset, data=flat[offset : offset + CHUNK_BYTES].tobytes())


def _axis(axis: Axis) -> v1.Axis:
    if isinstance(axis.at, range) and axis.at.step == 1:
        return v1.Axis(name=axis.name, size=len(axis.at), first=axis.at.start if axis.at else 0)
    return v1.Axis(name=axis.name, size=len(axis.at), at=axis.at)


def tensor_header(event: Captured, part: Part, number: int) -> v1.TensorHeader:
    """The header of one part of what was captured, as tensor `number` of its stream."""
    axes = (Axis(name, at) for name, at in part.axes)
    made = header(event.name, part.dtype, axes, part.data.nbytes)
    made.id, made.part, made.capture, made.step, made.revisited = (
        number, part.name, event.number, event.step, event.revisited,
    )  # fmt: skip
    if event.index is not None:
        made.index = event.index
    return made
