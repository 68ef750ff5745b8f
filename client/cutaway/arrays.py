"""Arrays with named axes: what every call that looks inside the model returns."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin

from cutaway.safetensors import encoded

if TYPE_CHECKING:
    from numpy.typing import DTypeLike, NDArray

Places = range | tuple[int, ...]
Axis = str | int | Sequence[str | int] | None


@dataclass(frozen=True, eq=False)
class Array(NDArrayOperatorsMixin):
    """A numpy array whose axes have names and whose places say what they are.

    `array.values` is the numpy array; numpy's functions and operators take `array` itself. What is computed element by
    element, as `after - before`, keeps the names. `at["pos"]` are the absolute positions along that axis, `at["head"]`
    the heads, and so on. `name` is the canonical name of the point.
    """

    values: NDArray[Any]
    axes: tuple[str, ...]
    name: str = ""
    at: Mapping[str, Places] = field(default_factory=dict)
    model_hash: str = ""
    dtype_sent: str = ""  # as safetensors names it; BF16 is held as float32
    parts: Mapping[str, Array] = field(default_factory=dict)  # of a reduction: "indices", "mass", ...
    tokens: tuple[str, ...] = ()  # text of each token from position 0 on, if it was `labelled`

    def __post_init__(self) -> None:
        assert self.values.ndim == len(self.axes), "every axis has a name"

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the axes."""
        return self.values.shape

    @property
    def ndim(self) -> int:
        """How many axes there are."""
        return self.values.ndim

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

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **options: Any) -> Any:
        """Compute with the values; the result has the names of the axes if it has the shape and all operands agree."""
        arrays = [each for each in inputs if isinstance(each, Array)]
        plain = [each.values if isinstance(each, Array) else each for each in inputs]
        result = getattr(ufunc, method)(*plain, **options)
        elementwise = method == "__call__" and ufunc.signature is None and isinstance(result, np.ndarray)
        if not elementwise or result.shape != self.shape or not all(self._is_like(each) for each in arrays):
            return result
        return replace(self, values=result, dtype_sent="", parts={})

    def _is_like(self, other: Array) -> bool:
        places = [{axis: tuple(at) for axis, at in each.at.items()} for each in (self, other)]
        return self.axes == other.axes and places[0] == places[1]

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
                raise KeyError(f"{axis} {place} of {self.name!r} was not captured; there are {_listed(known)}")
            index[self.axes.index(axis)] = known.index(place)
        left = tuple(axis for axis in self.axes if axis not in places)
        parts = {
            name: part.sel(**{a: p for a, p in places.items() if a in part.axes}) for name, part in self.parts.items()
        }
        at = {axis: where for axis, where in self.at.items() if axis in left}
        return replace(self, values=self.values[tuple(index)], axes=left, at=at, parts=parts)

    def labelled(self, tokens: Iterable[str]) -> Array:
        """The same array with a text for each position, which pictures show: those of `client.tokenize(..).texts`."""
        tokens = tuple(tokens)
        parts = {name: part.labelled(tokens) for name, part in self.parts.items()}
        return replace(self, tokens=tokens, parts=parts)

    def mean(self, axis: Axis = None, **options: Any) -> Any:
        """As numpy; an axis may be named: `attention.mean("head")`, which keeps the names of the others."""
        return self._reduced(np.mean, axis, options)

    def sum(self, axis: Axis = None, **options: Any) -> Any:
        """As `mean`."""
        return self._reduced(np.sum, axis, options)

    def max(self, axis: Axis = None, **options: Any) -> Any:
        """As `mean`."""
        return self._reduced(np.max, axis, options)

    def min(self, axis: Axis = None, **options: Any) -> Any:
        """As `mean`."""
        return self._reduced(np.min, axis, options)

    def _reduced(self, function: Callable[..., Any], axis: Axis, options: Mapping[str, Any]) -> Any:
        if axis is None:
            return function(self.values, **options)
        several = [axis] if isinstance(axis, str | int) else axis
        unknown = [each for each in several if isinstance(each, str) and each not in self.axes]
        if unknown:
            raise KeyError(f"{self.name!r} has no axis {unknown[0]!r}; it has {', '.join(self.axes)}")
        gone = tuple(self.axes.index(each) if isinstance(each, str) else each % self.ndim for each in several)
        values = function(self.values, axis=gone, **options)
        if values.ndim != self.ndim - len(gone):  # keepdims
            return values
        left = tuple(name for i, name in enumerate(self.axes) if i not in gone)
        at = {name: where for name, where in self.at.items() if name in left}
        return replace(self, values=values, axes=left, at=at, dtype_sent="", parts={})

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
        """Heat maps of the last two axes, for a notebook."""
        from cutaway.notebook import array_html

        return array_html(self)


def _listed(places: Places) -> str:
    named = [str(place) for place in places[:20]]
    return ", ".join([*named, "..."] if len(places) > 20 else named) or "none"


def save_arrays(arrays: Mapping[str, Array], path: str | Path) -> None:
    """Write arrays as one safetensors file: their parts as `name#part`, axes and places as metadata."""
    flat: dict[str, Array] = {}
    for name, array in arrays.items():
        flat[name] = array
        flat |= {f"{name}#{part}": value for part, value in array.parts.items()}
    described = {name: _described(array) for name, array in flat.items()}
    with open(path, "wb") as file:
        for part in encoded({name: array.values for name, array in flat.items()}, described):
            file.write(part)


def _described(array: Array) -> str:
    at = {
        axis: [places.start, places.stop] if isinstance(places, range) else {"at": list(places)}
        for axis, places in array.at.items()
    }
    return json.dumps({"axes": array.axes, "at": at, "model_hash": array.model_hash})


class Arrays(dict[str, "Array"]):
    """Arrays by canonical name; `save` writes them all as one safetensors file."""

    def stacked(self, name: str) -> Array:
        """The arrays of several layers as one, `layer` its first axis: `seen.stacked("blocks.*.hook_resid_post")`.

        Raises:
            KeyError: there is none of that name.
        """
        before, star, after = name.partition("*")
        layers = {
            int(key[len(before) : len(key) - len(after)]): array
            for key, array in self.items()
            if key.startswith(before) and key.endswith(after) and key[len(before) : len(key) - len(after)].isdigit()
        }
        if not star or not layers:
            raise KeyError(f"{name!r} must have a * for the layer; there are {', '.join(self) or 'none'}")
        several = [layers[layer] for layer in sorted(layers)]
        return _stacked(several, name, tuple(sorted(layers)))

    def save(self, path: str | Path) -> None:
        """Write one safetensors file."""
        save_arrays(self, path)

    def _repr_html_(self) -> str:
        """A table of what there is, for a notebook."""
        from cutaway.notebook import arrays_html

        return arrays_html(self)


def _stacked(several: Sequence[Array], name: str, layers: tuple[int, ...]) -> Array:
    first = several[0]
    values = np.stack([array.values for array in several])
    parts = {part: _stacked([array.parts[part] for array in several], name, layers) for part in first.parts}
    at = {"layer": layers, **first.at}
    return replace(first, values=values, axes=("layer", *first.axes), name=name, at=at, parts=parts)


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
