"""Quantised matrices as the native products read them: see native/quantized.h."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from cutaway_server.kernels.memory import CHUNK_BYTES, trim
from cutaway_server.kernels.quantized import GROUP, Integers, Kind, Source
from cutaway_server.kernels.weight_memory import WeightMemory

BLOCK = 16  # columns side by side
TILE = 32  # columns of a product's tile
DEEPEST = 65536  # of ROW8: deeper sums would not fit 32 bits


@dataclass(frozen=True, slots=True)
class PackedQuantized:
    """A matrix [columns, depth] in blocks of 16 columns.

    `data` uint8 [blocks, depth / 4, 16, 4], or two integers a byte [blocks, groups, 4, 16, 4]; `scales` and `parts` as
    in `Integers`, with 16 columns side by side last: [blocks, groups, 16], [blocks, groups, 2, 16].
    """

    kind: Kind
    data: Tensor
    scales: Tensor
    parts: Tensor | None
    bias: Tensor | None  # fp32, as long as the columns with their padding
    columns: int
    depth: int

    @property
    def tiles(self) -> int:
        """Tiles of 32 columns, padding included."""
        return self.data.shape[0] * BLOCK // TILE

    @property
    def padded_depth(self) -> int:
        """Depth with its padding."""
        return self.data.shape[1] * (GROUP if self.kind.four_bit else 4)

    def rows(self, numbers: Tensor) -> Tensor:
        """Weights fp32 [n, depth] of some rows of the matrix."""
        block, place = numbers // BLOCK, numbers % BLOCK
        found = self.data[block, ..., place, :]
        if self.kind.four_bit:
            found = torch.cat([(found & 15).flatten(2), (found >> 4).flatten(2)], 2)
        parts = None if self.parts is None else self.parts[block, ..., place]
        integers = Integers(self.kind, found.flatten(1), self.scales[block, ..., place], parts)
        return integers.values()[:, : self.depth]


@dataclass(frozen=True, slots=True)
class PackedStack:
    """Matrices of several kinds one below the other, all but the last of whole tiles."""

    stacked: tuple[PackedQuantized, ...]
    bias: Tensor | None  # fp32, as long as all columns with their padding

    @property
    def columns(self) -> int:
        """Columns of all."""
        return sum(part.columns for part in self.stacked)

    @property
    def tiles(self) -> int:
        """Tiles of all."""
        return sum(part.tiles for part in self.stacked)


def pack_quantized(
    sources: Sequence[Source], bias: Tensor | None, memory: WeightMemory, *, consume: bool
) -> PackedQuantized:
    """Pack matrices of one shape and kind, in turn by blocks of 16 columns, or one alone.

    To `consume` them they give their memory back, chunk by chunk.
    """
    (rows, depth), kind = sources[0].shape, sources[0].kind
    assert all(source.kind == kind and source.shape == (rows, depth) for source in sources)
    assert kind != Kind.ROW8 or depth <= DEEPEST
    out: PackedQuantized | None = None
    step = BLOCK * max(1, CHUNK_BYTES // (BLOCK * depth * 8))
    for start in range(0, rows, step):
        for place, source in enumerate(sources):
            stop = min(start + step, rows)
            part = _blocks(source.integers(start, stop))
            if out is None:
                columns = rows if len(sources) == 1 else -(-rows // BLOCK) * BLOCK * len(sources)
                out = _empty(part, len(sources) * -(-rows // BLOCK), bias, columns, depth, memory)
            _put(part, out, start // BLOCK * len(sources) + place, len(sources))
            if consume:
                source.give_back(start, stop)
    assert out is not None
    if consume:
        for source in sources:
            source.free()
        trim()
    return out


@dataclass(frozen=True, slots=True)
class _Blocks:
    kind: Kind
    data: Tensor
    scales: Tensor
    parts: Tensor | None


def _blocks(rows: Integers) -> _Blocks:
    """Blocks of 16 rows, transposed; the last is filled with zeros."""
    kind, stored = rows.kind, rows.stored
    whole = 2 * GROUP if kind == Kind.ROW8 else GROUP
    pad = (0, -stored.shape[1] % whole, 0, -len(stored) % BLOCK)
    stored = torch.unflatten(F.pad(stored, pad, value=kind.stored_above), 0, (-1, BLOCK))
    if kind.four_bit:
        groups = torch.unflatten(stored, 2, (-1, 2, 4, 4))  # [blocks, 16, groups, halves, vectors, 4]
        data = (groups[:, :, :, 0] | groups[:, :, :, 1] << 4).permute(0, 2, 3, 1, 4)
    else:
        data = torch.unflatten(stored, 2, (-1, 4)).transpose(1, 2)
    return _Blocks(kind, data, _side_by_side(rows.scales), None if rows.parts is None else _side_by_side(rows.parts))


def _side_by_side(fields: Tensor) -> Tensor:
    """[n, ...] to [blocks, ..., 16]."""
    padded = torch.cat([fields, fields.new_zeros(-len(fields) % BLOCK, *fields.shape[1:])])
    return torch.unflatten(padded, 0, (-1, BLOCK)).movedim(1, -1)


def _empty(
    like: _Blocks, n_blocks: int, bias: Tensor | None, columns: int, depth: int, memory: WeightMemory
) -> PackedQuantized:
    def room(tensor: Tensor) -> Tensor:
        made = memory.empty((n_blocks + n_blocks % 2, *tensor.shape[1:]), tensor.dtype)
        made[n_blocks:] = 0
        return made

    parts = None if like.parts is None else room(like.parts)
    return PackedQuantized(like.kind, room(like.data), room(like.scales), parts, bias, columns, depth)


def _put(part: _Blocks, out: PackedQuantized, first: int, apart: int) -> None:
    places = slice(first, first + len(part.data) * apart, apart)
    out.data[places] = part.data
    out.scales[places] = part.scales
    if out.parts is not None and part.parts is not None:
        out.parts[places] = part.parts
