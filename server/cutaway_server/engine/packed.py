"""All that steers a recorded step, in one buffer, so that one copy brings it to the device."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from cutaway_server.engine.draws import FIELDS

ALIGNMENT = 16  # bytes: Triton compiles a kernel anew for pointers that are not
Place = tuple[int, int, tuple[int, ...]]


class Size(NamedTuple):
    """What one graph is recorded for."""

    rows: int
    items: int
    width: int  # of the block table
    drawing: str  # "no": residuals only; "greedy"; "plain": greedy or from the whole vocabulary


@dataclass(frozen=True, slots=True)
class Packed:
    """Views of a buffer int64 [elements], on the host or on the device; the last three are int32."""

    token_ids: Tensor  # [rows]
    previous: Tensor  # [rows]: the row of the step before that drew the token id; -1: it is in `token_ids`
    positions: Tensor  # [rows]
    slots: Tensor  # [rows]
    draws: Tensor  # [5, rows]: `Draws.numbers`
    block_table: Tensor  # [rows, width]
    tiles: Tensor  # [4, rows]: as in `Splits`
    items: Tensor  # [2, items]
    rows: Tensor  # [3, rows]

    @classmethod
    def of(cls, buffer: Tensor, size: Size) -> Packed:
        """What a buffer laid out for `size` holds."""
        wide, narrow = _places(size)
        parts = [buffer[start:stop].view(shape) for start, stop, shape in wide]
        lists = [buffer.view(torch.int32)[start:stop].view(shape) for start, stop, shape in narrow]
        return cls(*parts, *lists)


def elements(size: Size) -> int:
    """int64s of the whole buffer."""
    _, narrow = _places(size)
    return -(-narrow[-1][1] // 2)


def _places(size: Size) -> tuple[list[Place], list[Place]]:
    """Where each part is, and its shape: of int64s, and, counted in int32s, of the lists."""
    n = size.rows
    wide = _successive(0, [(n,), (n,), (n,), (n,), (FIELDS, n), (n, size.width)], ALIGNMENT // 8)
    return wide, _successive(2 * wide[-1][1], [(4, n), (2, size.items), (3, n)], ALIGNMENT // 4)


def _successive(start: int, shapes: list[tuple[int, ...]], alignment: int) -> list[Place]:
    places = []
    for shape in shapes:
        start = -(-start // alignment) * alignment
        stop = start + prod(shape)
        places.append((start, stop, shape))
        start = stop
    return places
