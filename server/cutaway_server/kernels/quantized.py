"""Quantised matrices: integers, the scales of groups of them, and the values they stand for.

A matrix comes as GGUF's own blocks (`Quantized`) or is rounded from floats (`Rounded`, in rounding.py). Both give some
rows' `Integers`, which are what the native library computes with once packed.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from itertools import groupby
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from cutaway_server.kernels.gguf_blocks import BLOCKS
from cutaway_server.kernels.memory import CHUNK_BYTES, give_back

GROUP = 32  # of the depth, which has one scale
SUPER = 256  # eight groups, whose scales are parts of one


class Kind(IntEnum):
    """How integers become weights; numbered as in native/quantized.h."""

    PLAIN = 0
    ROW8 = 1
    GROUP8 = 2
    GROUP4 = 3
    MIN8 = 4
    MIN4 = 5
    SUPER8 = 6
    SUPER4 = 7
    HALVES8 = 8

    @property
    def four_bit(self) -> bool:
        """Two integers a byte."""
        return self in (Kind.GROUP4, Kind.MIN4, Kind.SUPER4)

    @property
    def stored_above(self) -> int:
        """What an integer is stored with: 0 to 15, or 0 to 255, stand for what is this much less."""
        if not self.four_bit:
            return 128
        return 8 if self == Kind.GROUP4 else 0


KINDS = {
    "Q4_0": Kind.GROUP4,
    "Q4_1": Kind.MIN4,
    "Q5_0": Kind.GROUP8,
    "Q5_1": Kind.MIN8,
    "Q8_0": Kind.GROUP8,
    "Q4_K": Kind.SUPER4,
    "Q5_K": Kind.SUPER8,
    "Q6_K": Kind.HALVES8,
}  # GGUF's types that are served as they are


@dataclass(frozen=True, slots=True)
class Integers:
    """Some rows of a quantised matrix.

    `stored` uint8 [n, depth]. `scales`: fp32 [n] of ROW8; fp16 [n, groups] of GROUP8 and GROUP4; [n, groups, 2] (scale,
    minimum) of MIN8 and MIN4; [n, supers, 2] of SUPER8 and SUPER4; [n, supers] of HALVES8. `parts` uint8 [n, groups,
    2]: of scale and minimum, or (signed) of both halves of the group.
    """

    kind: Kind
    stored: Tensor
    scales: Tensor
    parts: Tensor | None = None

    def values(self) -> Tensor:
        """The weights fp32 [n, depth], to the bit as the gguf package dequantises them."""
        centred = (self.stored.to(torch.int16) - self.kind.stored_above).float()
        if self.kind == Kind.ROW8:
            return centred * self.scales[:, None]
        depth = centred.shape[1]
        grouped = torch.unflatten(F.pad(centred, (0, -depth % GROUP)), 1, (-1, GROUP))
        return self._scaled(grouped).flatten(1)[:, :depth]

    def _scaled(self, grouped: Tensor) -> Tensor:
        scales = self.scales.float()[..., None]
        if self.kind in (Kind.GROUP8, Kind.GROUP4):
            return grouped * scales
        if self.kind in (Kind.MIN8, Kind.MIN4):
            return grouped * scales[:, :, 0] + scales[:, :, 1]
        assert self.parts is not None
        each = scales.repeat_interleave(SUPER // GROUP, 1)
        if self.kind == Kind.HALVES8:
            halves = torch.unflatten(grouped, 2, (2, GROUP // 2))
            return (halves * (each * self.parts.view(torch.int8).float())[..., None]).flatten(2)
        parts = self.parts.float()[..., None]
        return grouped * (each[:, :, 0] * parts[:, :, 0]) - each[:, :, 1] * parts[:, :, 1]


class Source(Protocol):
    """A matrix of one kind that can say its integers, some rows at a time."""

    @property
    def kind(self) -> Kind:
        """How its integers become weights."""

    @property
    def shape(self) -> tuple[int, int]:
        """[columns, depth], as the matrix multiplies."""

    def integers(self, start: int, stop: int) -> Integers:
        """Those of rows [start, stop)."""

    def give_back(self, start: int, stop: int) -> None:
        """Return the memory of rows [start, stop), which are never read again."""

    def free(self) -> None:
        """Return what memory is left."""


@dataclass(frozen=True, slots=True)
class Blocks:
    """Rows of GGUF's blocks of one type, a key of KINDS: uint8 [columns, bytes of a row]."""

    raw: Tensor
    format: str

    @property
    def depth(self) -> int:
        """Weights in a row."""
        block = BLOCKS[self.format]
        return self.raw.shape[1] // block.n_bytes * block.n_weights

    def scales(self) -> Tensor:
        """Every fp16 scale and minimum."""
        block = BLOCKS[self.format]
        return torch.unflatten(self.raw, 1, (-1, block.n_bytes))[..., block.scales].contiguous().view(torch.float16)

    def integers(self, rows: slice | Tensor) -> Integers:
        """Those of some rows."""
        block, kind = BLOCKS[self.format], KINDS[self.format]
        fields = block.split(torch.unflatten(self.raw[rows], 1, (-1, block.n_bytes)))
        stored = fields.integers.add_(kind.stored_above - block.stored_above).flatten(1)
        return Integers(kind, stored, fields.scales, None if fields.parts is None else fields.parts.flatten(1, 2))


@dataclass(frozen=True, slots=True)
class Quantized:
    """A matrix [columns, depth] as a GGUF file has it: blocks of one type, or of several one below the other."""

    parts: tuple[Blocks, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """[columns, depth]."""
        return sum(len(part.raw) for part in self.parts), self.parts[0].depth

    @property
    def kind(self) -> Kind:
        """How its integers become weights, where that is one way."""
        kinds = {KINDS[part.format] for part in self.parts}
        assert len(kinds) == 1
        return kinds.pop()

    @property
    def formats(self) -> tuple[str, ...]:
        """GGUF's names of the types, top to bottom."""
        return tuple(part.format for part in self.parts)

    def cut(self, start: int, stop: int) -> Quantized:
        """Rows [start, stop); the memory is shared."""
        parts, offset = [], 0
        for part in self.parts:
            here = part.raw[max(start - offset, 0) : max(stop - offset, 0)]
            offset += len(part.raw)
            if len(here):
                parts.append(Blocks(here, part.format))
        return Quantized(tuple(parts))

    def runs(self) -> tuple[Quantized, ...]:
        """Neighbouring parts of one kind together, top to bottom."""
        return tuple(Quantized(tuple(run)) for _, run in groupby(self.parts, lambda part: KINDS[part.format]))

    def integers(self, start: int, stop: int) -> Integers:
        """Those of rows [start, stop), of one kind."""
        found = [part.integers(slice(None)) for part in self.cut(start, stop).parts]
        if len(found) == 1:
            return found[0]
        parts = [rows.parts for rows in found if rows.parts is not None]
        return Integers(
            self.kind, torch.cat([rows.stored for rows in found]), torch.cat([rows.scales for rows in found]),
            torch.cat(parts) if parts else None,
        )  # fmt: skip

    def give_back(self, start: int, stop: int) -> None:
        """Return the memory of rows [start, stop), which are never read again."""
        for part in self.cut(start, stop).parts:
            give_back(part.raw)

    def free(self) -> None:
        """Return what memory is left."""
        for part in self.parts:
            part.raw.untyped_storage().resize_(0)

    def rows(self, numbers: Tensor) -> Tensor:
        """Weights fp32 [n, depth] of some rows, where there is one part."""
        (only,) = self.parts
        return only.integers(numbers).values()

    def values(self, dtype: torch.dtype) -> Tensor:
        """The weights [columns, depth], a few rows at a time."""
        out = torch.empty(self.shape, dtype=dtype)
        step, offset = max(1, CHUNK_BYTES // (8 * self.shape[1])), 0
        for part in self.parts:
            for start in range(0, len(part.raw), step):
                some = part.integers(slice(start, start + step)).values()
                out[offset + start : offset + start + len(some)] = some
            offset += len(part.raw)
        return out
