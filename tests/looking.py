"""Requests that look inside, and what they saw, put together again without the client's code."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from cutaway_server.captures import Capture, Captured, Part
from cutaway_server.engine.engine import Engine
from cutaway_server.probe.points import POINTS, points_of
from cutaway_server.request import Request, RequestFailed, Sampled
from numpy.typing import NDArray

KEYED = {point.name for point in POINTS if point.keyed}


def everything(config: Any, **fields: Any) -> tuple[Capture, ...]:
    """A capture of every point of a model, of all layers."""
    layers = tuple(range(config.n_layers))
    return tuple(
        Capture(point.name, layers if point.layered else (), stacked=point.layered, **fields)
        for point in points_of(config)
    )


@dataclass
class Seen:
    """What one request was told."""

    tokens: dict[int, list[int]] = field(default_factory=dict)
    pieces: list[Captured] = field(default_factory=list)
    order: list[str] = field(default_factory=list)
    error: Exception | None = None

    def rows(self, number: int, index: int | None = None) -> dict[int, list[Part]]:
        """Parts by absolute position, each with one row: of the prompt, or of completion `index`."""
        found: dict[int, list[Part]] = {}
        for piece in self.pieces:
            if piece.number == number and piece.index == index:
                for part in piece.parts:
                    for position, row in by_row(part):
                        assert all(known.name != part.name for known in found.get(position, [])), "a row came twice"
                        found.setdefault(position, []).append(row)
        return found

    def value(self, number: int, index: int | None = None, part: str = "") -> NDArray[Any]:
        """All rows in order of position, as [.., rows, ...] with the row axis where it was."""
        rows = self.rows(number, index)
        return np.concatenate(
            [next(p for p in rows[position] if p.name == part).data for position in sorted(rows)],
            axis=self._axis(number),
        )

    def positions(self, number: int, index: int | None = None) -> list[int]:
        return sorted(self.rows(number, index))

    def _axis(self, number: int) -> int:
        axes = next(piece.parts[0].axes for piece in self.pieces if piece.number == number)
        return row_axis(axes)


def row_axis(axes: Any) -> int:
    return next(i for i, (name, _) in enumerate(axes) if name in ("pos", "q_pos"))


def by_row(part: Part) -> list[tuple[int, Part]]:
    axis = row_axis(part.axes)
    assert part.data.shape == tuple(len(places) for _, places in part.axes), (part.axes, part.data.shape)
    rows = []
    for i, position in enumerate(part.axes[axis][1]):
        rows.append((position, replace(part, data=np.take(part.data, [i], axis))))
    return rows


def watch(engine: Engine, *requests: Request) -> dict[str, Seen]:
    """Run requests to their end."""
    seen = {request.request_id: Seen() for request in requests}
    for request in requests:
        engine.add(request)
    for _ in range(5000):
        if not engine.has_work:
            break
        for name, event in engine.step():
            mine = seen[name]
            mine.order.append(type(event).__name__)
            if isinstance(event, Sampled):
                mine.tokens.setdefault(event.index, []).append(event.token)
            elif isinstance(event, Captured):
                mine.pieces.append(event)
            elif isinstance(event, RequestFailed):
                mine.error = event.error
        engine.scheduler.check()
    assert not engine.has_work
    assert engine.scheduler.pool.used == 0, "blocks were not given back"
    return seen
