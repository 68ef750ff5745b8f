"""Arrays with named axes: what every call that looks inside the model returns."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import DTypeLike, NDArray

Places = range | tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Array:
    """A numpy array whose axes have names and whose places say what they are.

    `array.values` is the numpy array, and numpy's functions take `array` itself. `at["pos"]` are the absolute positions
    along that axis, `at["head"]` the heads, and so on. `name` is the canonical name of the point.
    """

    values: NDArray[Any]
    axes: tuple[str, ...]
    name: str = ""
    at: Mapping[str, Places] = field(default_factory=dict)
    model_hash: str = ""
    dtype_sent: str = ""  # as safetensors names it; BF16 is held as float32
    parts: Mapping[str, Array] = field(default_factory=dict)  # of a reduction: "indices", "mass", ...

    def __post_init__(self) -> None:
        assert self.values.ndim == len(self.axes), "every axis has a name"

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the axes."""
        return self.values.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """Element type of the values."""
        return self.values.dtype

    @cached_property
    def positions(self) -> tuple[int, ...]:
        """Absolute positions of its rows; empty if it has none."""
        return tuple(next((self.at[axis] for axis in ("pos", "q_pos") if axis in self.at), ()))

    @property
    def indices(self) -> Array:
        """Of the largest values: where they were.

        Raises:
            AttributeError: nothing of the kind was asked for.
        """
        return self._part("indices")

    @property
    def mass(self) -> Array:
        """Of the largest values: how much of each row they hold."""
        return self._part("mass")

    def _part(self, name: str) -> Array:
        if name not in self.parts:
            raise AttributeError(f"{self.name!r} was not reduced to its largest values: it has no {name}")
        return self.parts[name]

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> NDArray[Any]:
        return np.array(self.values, dtype=dtype, copy=copy)

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: Any) -> Any:
        """As numpy: the values at an index, without names."""
        return self.values[index]

    def sel(self, **places: int) -> Array:
        """The array at one place of some axes: `array.sel(layer=3, head=1, q_pos=17)`.

        Raises:
            KeyError: there is no such axis, or it has no such place.
        """
        index: list[int | slice] = [slice(None)] * len(self.axes)
        for axis, place in places.items():
            if axis not in self.axes:
                raise KeyError(f"{self.name!r} has no axis {axis!r}; it has {', '.join(self.axes)}")
            known = self.at.get(axis, range(self.shape[self.axes.index(axis)]))
            if place not in known:
                raise KeyError(f"{axis} {place} of {self.name!r} was not captured")
            index[self.axes.index(axis)] = known.index(place)
        left = tuple(axis for axis in self.axes if axis not in places)
        parts = {
            name: part.sel(**{a: p for a, p in places.items() if a in part.axes}) for name, part in self.parts.items()
        }
        at = {axis: where for axis, where in self.at.items() if axis in left}
        return Array(self.values[tuple(index)], left, self.name, at, self.model_hash, self.dtype_sent, parts)

    def to_torch(self) -> Any:
        """The values as a torch tensor, which shares their memory where torch allows it; torch must be installed."""
        import torch

        return torch.from_numpy(np.require(self.values, requirements=["C", "W"]))

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, with the names of axes and places in its metadata."""
        save_arrays({self.name or "array": self}, path)

    def __repr__(self) -> str:
        axes = ", ".join(f"{axis}={size}" for axis, size in zip(self.axes, self.shape, strict=True))
        return f"<Array {self.name} [{axes}] {self.values.dtype}>"

    def _repr_html_(self) -> str:
        """A heat map of the last two axes (of the first place of all others) for a notebook."""
        caption = f"<div style='font-family:monospace'>{escape(repr(self))}</div>"
        picture = self.values
        while picture.ndim > 2:
            picture = picture[0]
        if picture.size == 0:
            return caption
        return caption + heat_map(np.atleast_2d(picture).astype(np.float64))


CELLS = 64  # of a heat map along each side: larger arrays are thinned out, and the caption says so


def heat_map(picture: NDArray[np.float64]) -> str:
    """An HTML table coloured from white (least) to dark blue (most)."""
    steps = [max(1, -(-size // CELLS)) for size in picture.shape]
    shown = picture[:: steps[0], :: steps[1]]
    finite = shown[np.isfinite(shown)]
    least, most = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    share = np.clip((shown - least) / ((most - least) or 1.0), 0, 1)
    rows = []
    for values, shades in zip(shown, np.nan_to_num(share), strict=True):
        cells = "".join(
            f"<td title='{value:.4g}' style='width:8px;height:8px;padding:0;background:"
            f"rgb({round(247 - 239 * shade)},{round(251 - 203 * shade)},{round(255 - 148 * shade)})'></td>"
            for value, shade in zip(values, shades, strict=True)
        )
        rows.append(f"<tr>{cells}</tr>")
    thinned = "" if steps == [1, 1] else f", every {steps[0]}th row and {steps[1]}th column"
    scale = f"<small>{least:.4g} to {most:.4g}{thinned}</small>"
    return f"<table style='border-collapse:collapse'>{''.join(rows)}</table>{scale}"


SAFETENSORS = {"float32": "F32", "float16": "F16", "float64": "F64", "int32": "I32", "int64": "I64", "uint8": "U8"}


def save_arrays(arrays: Mapping[str, Array], path: str | Path) -> None:
    """Write arrays as one safetensors file: their parts as `name#part`, axes and places as metadata."""
    flat: dict[str, Array] = {}
    for name, array in arrays.items():
        flat[name] = array
        flat |= {f"{name}#{part}": value for part, value in array.parts.items()}
    header: dict[str, Any] = {"__metadata__": {name: _described(array) for name, array in flat.items()}}
    offset = 0
    for name, array in flat.items():
        size = array.values.nbytes
        kind = SAFETENSORS[str(array.values.dtype)]
        header[name] = {"dtype": kind, "shape": list(array.shape), "data_offsets": [offset, offset + size]}
        offset += size
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for array in flat.values():
            file.write(np.ascontiguousarray(array.values).astype(array.values.dtype.newbyteorder("<")).tobytes())


def _described(array: Array) -> str:
    at = {
        axis: [places.start, places.stop] if isinstance(places, range) else {"at": list(places)}
        for axis, places in array.at.items()
    }
    return json.dumps({"axes": array.axes, "at": at, "model_hash": array.model_hash})


class Arrays(dict[str, "Array"]):
    """Arrays by canonical name; `save` writes them all as one safetensors file."""

    def save(self, path: str | Path) -> None:
        """Write one safetensors file."""
        save_arrays(self, path)


def joined(pieces: Sequence[Array], fill: float) -> Array:
    """Pieces of one value as one array: they follow each other along their rows; keys a piece lacks are `fill`."""
    first = pieces[0]
    if len(pieces) == 1:
        return first
    rows = next(axis for axis in ("pos", "q_pos") if axis in first.axes)
    keys = first.axes.index("k_pos") if "k_pos" in first.axes else None
    at = dict(first.at)
    values = [piece.values for piece in pieces]
    if keys is not None:
        at["k_pos"] = max((piece.at["k_pos"] for piece in pieces), key=len)
        values = [_widened(value, keys, len(at["k_pos"]), fill) for value in values]
    at[rows] = tuple(place for piece in pieces for place in piece.at[rows])
    whole = np.concatenate(values, axis=first.axes.index(rows))
    parts = {name: joined([piece.parts[name] for piece in pieces], fill) for name in first.parts}
    return Array(whole, first.axes, first.name, at, first.model_hash, first.dtype_sent, parts)


def _widened(values: NDArray[Any], axis: int, size: int, fill: float) -> NDArray[Any]:
    missing = size - values.shape[axis]
    if not missing:
        return values
    padding = [(0, 0)] * values.ndim
    padding[axis] = (0, missing)
    return np.pad(values, padding, constant_values=fill)
