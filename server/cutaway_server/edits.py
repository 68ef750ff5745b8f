"""What to change of a request's inner values: selected and checked already."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cutaway_server.captures import EVERYWHERE, Spans
from cutaway_server.positions import Rows

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class Add:
    """Values + `vector` [heads or 1, elements], scaled already."""

    vector: Floats


@dataclass(frozen=True, slots=True, eq=False)
class Scale:
    """Values * factor."""

    factor: float


@dataclass(frozen=True, slots=True, eq=False)
class Set:
    """Values [rows or 1, heads or 1, elements] in their place; `places` finds the row of a position."""

    values: Floats
    places: tuple[int, ...]  # ascending positions, one for each row; empty: one for all rows


@dataclass(frozen=True, slots=True, eq=False)
class ProjectOut:
    """Values without their components along an orthonormal `basis` [n, elements]."""

    basis: Floats


@dataclass(frozen=True, slots=True, eq=False)
class Clamp:
    """The component along a `direction` [elements] of length 1 brought within [least, most]."""

    direction: Floats
    least: float
    most: float


Change = Add | Scale | Set | ProjectOut | Clamp


@dataclass(frozen=True, slots=True, eq=False)
class Edit:
    """A change of one point. `template` has {i} for the layer; `layers` is empty where it has none."""

    template: str
    layers: tuple[int, ...]
    change: Change
    heads: tuple[int, ...] | None = None
    rows: Rows = EVERYWHERE
    elements: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class KnockOut:
    """Unnormalised attention weights of queries `rows` on `keys`, times a factor."""

    layers: tuple[int, ...]
    keys: Spans
    factor: float = 0.0
    heads: tuple[int, ...] | None = None
    rows: Rows = EVERYWHERE


@dataclass(frozen=True, slots=True)
class Edits:
    """All that a request changes. `overrides` are (step, token) pairs; `salt` tells its pages from others'."""

    edits: tuple[Edit, ...] = ()
    knock_outs: tuple[KnockOut, ...] = ()
    overrides: tuple[tuple[int, int], ...] = ()
    salt: bytes = b""

    @property
    def changes_values(self) -> bool:
        """Whether any inner value is changed."""
        return bool(self.edits or self.knock_outs)

    @property
    def each(self) -> tuple[Edit | KnockOut, ...]:
        """What changes values."""
        return (*self.edits, *self.knock_outs)

    def first_position(self) -> int | None:
        """The first position whose values are changed."""
        found = [first for each in self.each if (first := each.rows.first(0)) is not None]
        return min(found, default=None)


NO_EDITS = Edits()
