"""What to change of a request's inner values, as Python says it, put on the wire."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypedDict, Unpack

import numpy as np
from numpy.typing import ArrayLike

from cutaway.capture import Indices, Positions, positions, put_indices, spans
from cutaway.errors import InvalidArgument
from cutaway.stored import Stored, StoredFile
from cutaway.v1 import edit_pb2 as pb

Vectors = ArrayLike | Stored  # numbers, or where the server has them


class Where(TypedDict, total=False):
    """Which values an edit is about; all by default."""

    layers: Indices  # for a point with "*"
    heads: Indices
    positions: Positions  # "prompt", "generated", "last", "steps", [5, -1], range(0, 100, 2), or several
    elements: Indices  # places on the last axis, such as neurons


class Edit:
    """One change, made by one of the methods below: `Edit.add("blocks.8.hook_resid_post", vector, scale=6.0)`.

    A point is a writable name of `list_points`, with a layer's number or "*".
    """

    def __init__(self, message: pb.Edit) -> None:
        self._message = message

    def __repr__(self) -> str:
        return f"<Edit {self._message.WhichOneof('change')} {self._message.point}>"

    def message(self) -> pb.Edit:
        """The wire's edit."""
        return self._message

    @classmethod
    def add(cls, point: str, vector: Vectors, scale: float = 1.0, **where: Unpack[Where]) -> Edit:
        """Add scale * vector: for all heads alike, or [heads, d_head]."""
        made = _at(point, where)
        _put(made.add, "vector", vector)
        made.add.scale = scale
        return cls(made)

    @classmethod
    def scale(cls, point: str, factor: float, **where: Unpack[Where]) -> Edit:
        """Multiply by a number."""
        made = _at(point, where)
        made.scale.factor = factor
        return cls(made)

    @classmethod
    def zero(cls, point: str, **where: Unpack[Where]) -> Edit:
        """Set to zero, as to ablate a head: `Edit.zero("blocks.5.attn.hook_z", heads=[2])`."""
        made = _at(point, where)
        made.zero.SetInParent()
        return cls(made)

    @classmethod
    def set(
        cls,
        point: str,
        values: Vectors | StoredFile,
        *,
        from_positions: Iterable[int] = (),
        **where: Unpack[Where],
    ) -> Edit:
        """Set to values: one vector, or one for each head, or [rows, (heads,) elements] of the rows selected.

        Of a stored run: to the values that the same point and layer had there, at the same positions or, for the
        selected rows in order, at `from_positions`.
        """
        made = _at(point, where)
        if isinstance(values, StoredFile):
            made.set.run.id = values.id
            made.set.run.positions.extend(from_positions)
            return cls(made)
        _put(made.set, "values", values)
        return cls(made)

    @classmethod
    def project_out(cls, point: str, directions: Vectors, **where: Unpack[Where]) -> Edit:
        """Take out the components along one or several directions."""
        made = _at(point, where)
        _put(made.project_out, "directions", directions)
        return cls(made)

    @classmethod
    def clamp(
        cls,
        point: str,
        direction: Vectors,
        *,
        min: float | None = None,  # noqa: A002  (as numpy.clip calls it)
        max: float | None = None,  # noqa: A002
        **where: Unpack[Where],
    ) -> Edit:
        """Keep the component along a direction (whose length does not matter) within bounds."""
        made = _at(point, where)
        _put(made.clamp, "direction", direction)
        if min is not None:
            made.clamp.min = min
        if max is not None:
            made.clamp.max = max
        return cls(made)

    @classmethod
    def knock_out(
        cls,
        layers: Indices = "all",
        heads: Indices = "all",
        *,
        queries: Positions = "all",
        keys: int | range | Iterable[int | range | tuple[int, int]],
        factor: float = 0.0,
    ) -> Edit:
        """Keep queries from attending to keys; with a factor, weigh those keys so many times as much."""
        made = pb.Edit()
        put_indices(made, "layers", layers)
        put_indices(made, "heads", heads)
        _put_positions(made, queries)
        several = [keys] if isinstance(keys, int | range) else keys
        pairs = [(key, key + 1) if isinstance(key, int) else key for key in several]
        made.knock_out.keys.extend(spans(pairs))
        made.knock_out.factor = factor
        return cls(made)

    @classmethod
    def override(cls, step: int, token_id: int) -> Edit:
        """Take a token in place of generated token number `step`, counted from 0."""
        made = pb.Edit()
        try:
            made.override.step, made.override.token_id = step, token_id
        except ValueError as error:
            raise InvalidArgument(f"override: ({step!r}, {token_id!r}) cannot be sent: {error}") from error
        return cls(made)


def _at(point: str, where: Where) -> pb.Edit:
    unknown = sorted(set(where) - set(Where.__annotations__))
    if unknown:
        raise TypeError(f"Edit got an unexpected keyword argument {unknown[0]!r}")
    made = pb.Edit(point=point)
    put_indices(made, "layers", where.get("layers"))
    put_indices(made, "heads", where.get("heads"))
    put_indices(made, "elements", where.get("elements"))
    _put_positions(made, where.get("positions", "all"))
    return made


def _put_positions(made: pb.Edit, given: Positions) -> None:
    if not (isinstance(given, str) and given == "all"):
        made.positions.CopyFrom(positions(given))


def _put(change: pb.Add | pb.Set | pb.ProjectOut | pb.Clamp, field: str, values: Vectors) -> None:
    """Numbers, or the name of where the server has them."""
    if isinstance(values, Stored):
        change.stored.CopyFrom(values.message())
    else:
        setattr(change, field, np.ascontiguousarray(values, "<f4").tobytes())
