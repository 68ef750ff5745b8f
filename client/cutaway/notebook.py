"""What a notebook shows of arrays: heat maps and tables, in plain HTML without scripts.

Everything is laid out in grids of `div`: notebooks restyle tables, each in its own way.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from itertools import product
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from cutaway.arrays import Array
    from cutaway.results import LensResult

SIDE = 64  # cells of a map along each side: larger ones are thinned out, and the caption says so
CELLS = 6000  # of all maps of one array
MAPS = 12
LENS_COLUMNS = 48
FAR_OUT = 3  # times the 99th percentile
Colour = tuple[int, int, int]
LIGHT, DEEP, NEGATIVE = (247, 251, 255), (8, 48, 107), (165, 15, 21)
HIDDEN = "#d9d9d9"  # no number: a masked score


def colour(value: float, least: float, most: float) -> str:
    """White to blue from least to most; where there are negative numbers, white is 0 and they are red."""
    if not np.isfinite(value):
        return HIDDEN
    if least < 0:
        share, towards = abs(value) / max(-least, most), NEGATIVE if value < 0 else DEEP
    else:
        share, towards = (value - least) / ((most - least) or 1.0), DEEP
    return "#" + "".join(f"{round(a + (b - a) * min(1.0, share)):02x}" for a, b in zip(LIGHT, towards, strict=True))


def array_html(array: Array) -> str:
    """Heat maps of the last two axes, one for each place of the others, as far as they fit."""
    head = f"<div style='font-family:monospace'>{escape(repr(array))}</div>"
    if array.values.size == 0 or array.values.dtype.kind not in "fiu":
        return head
    lead = max(0, array.values.ndim - 2)
    places = list(product(*(range(size) for size in array.shape[:lead])))
    cells = int(np.prod([min(SIDE, size) for size in array.shape[lead:]]))
    drawn = places[: max(1, min(MAPS, CELLS // max(1, cells)))]
    pictures = [np.atleast_2d(np.asarray(array.values[place], np.float64)) for place in drawn]
    finite = np.concatenate([picture[np.isfinite(picture)] for picture in pictures])
    least, most, told = scale_of(finite)
    rows, columns = (labels(array, axis) for axis in ("", *array.axes[lead:])[-2:])
    maps = (
        f"<div><small>{escape(_named(array, place))}</small>{heat_map(picture, rows, columns, least, most)}</div>"
        for place, picture in zip(drawn, pictures, strict=True)
    )
    left = f", {len(drawn)} of {len(places)} maps" if len(drawn) < len(places) else ""
    scale = f"<small>{told}{left}{_thinned(pictures[0].shape)}</small>"
    return f"{head}<div style='display:flex;flex-wrap:wrap;gap:12px'>{''.join(maps)}</div>{scale}"


def scale_of(values: NDArray[np.float64]) -> tuple[float, float, str]:
    """Where the colours begin and end, and the caption: a few values far out must not make all others white."""
    if not values.size:
        return 0.0, 1.0, "no numbers"
    least, most = float(values.min()), float(values.max())
    told = f"{least:.4g} to {most:.4g}"
    end = float(np.quantile(np.abs(values), 0.99))
    if values.size > 200 and 0 < FAR_OUT * end < max(-least, most):
        return max(least, -end), min(most, end), f"{told}, of which 1 % is beyond the last colour, at {end:.4g}"
    return least, most, told


def heat_map(
    picture: NDArray[np.float64], rows: Sequence[str], columns: Sequence[str], least: float, most: float
) -> str:
    """A grid of coloured cells: each tells its place and value to the mouse; texts stand beside them if there are any.

    picture [rows, columns]; rows and columns are the names of their places.
    """
    steps = steps_of(picture.shape)
    side = 14 if max(picture.shape) <= SIDE // 2 else 8
    beside, above = (any(not name.lstrip("-").isdigit() for name in names) for names in (rows, columns))
    cells: list[str] = []
    if above:
        cells += ["<i></i>"] * beside
        cells += [_label(name, "writing-mode:vertical-rl;transform:rotate(180deg)") for name in columns[:: steps[1]]]
    for row, values in zip(rows[:: steps[0]], picture[:: steps[0], :: steps[1]], strict=True):
        cells += [_label(row, "text-align:right")] * beside
        cells += (
            f'<i title="{escape(f"{row} {column}: {value:.4g}")}" style="background:{colour(value, least, most)}"></i>'
            for column, value in zip(columns[:: steps[1]], values, strict=True)
        )
    down, across = (len(range(0, size, step)) for size, step in zip(picture.shape, steps, strict=True))
    style = (
        f"display:grid;grid-template-columns:{'auto ' * beside}repeat({across},{side}px);"
        f"grid-template-rows:{'auto ' * above}repeat({down},{side}px);justify-content:start"
    )
    return f'<div style="{style}">{"".join(cells)}</div>'


def lens_html(lens: LensResult) -> str:
    """The likeliest token of each layer (last layer first) and position, the darker the likelier."""
    if lens.tokens is None or lens.logprobs is None or lens.texts is None:
        return f"<div style='font-family:monospace'>{escape(repr(lens))}</div>"
    layers, positions = lens.tokens.at["layer"], lens.tokens.positions[-LENS_COLUMNS:]
    first = len(lens.tokens.positions) - len(positions)
    cells = ["<b>layer</b>", *(f"<b>{escape(visible(name))}</b>" for name in labels(lens.tokens, "pos")[first:])]
    for place in reversed(range(len(layers))):
        cells.append(f"<b>{layers[place]}</b>")
        cells += (_lens_cell(lens, place, column) for column in range(first, first + len(positions)))
    style = (
        f"display:grid;grid-template-columns:repeat({len(positions) + 1},auto);justify-content:start;gap:1px;"
        "font:12px monospace;white-space:pre;overflow-x:auto"
    )
    left = f"<small>the last {len(positions)} of {first + len(positions)} positions</small>" if first else ""
    return f'<div style="{style}">{"".join(cells)}</div>{left}'


def _lens_cell(lens: LensResult, layer: int, column: int) -> str:
    assert lens.logprobs is not None
    assert lens.texts is not None
    shares = np.exp(lens.logprobs.values[layer, column])
    texts = lens.texts.values[layer, column]
    title = "\n".join(f"{share:7.2%}  {text!r}" for share, text in zip(shares, texts, strict=True))
    ink = "#fff" if shares[0] > 0.5 else "#000"
    style = f"background:{colour(shares[0], 0, 1)};color:{ink};padding:0 3px"
    return f'<span title="{escape(title)}" style="{style}">{escape(visible(texts[0])[:14])}</span>'


def table_html(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table of texts."""
    cells = [f"<b>{escape(name)}</b>" for name in header]
    cells += (f"<span>{escape(str(cell))}</span>" for row in rows for cell in row)
    style = f"display:grid;grid-template-columns:repeat({len(header)},auto);justify-content:start;gap:2px 16px"
    return f'<div style="{style};font:12px monospace">{"".join(cells)}</div>'


def arrays_html(arrays: Mapping[str, Array]) -> str:
    """Names, axes and sizes of several arrays."""
    return table_html(
        ("point", "axes", "type"),
        (
            (name, ", ".join(f"{axis}={size}" for axis, size in zip(array.axes, array.shape, strict=True)), array.dtype)
            for name, array in arrays.items()
        ),
    )


def labels(array: Array, axis: str) -> list[str]:
    """The names of an axis's places: of positions their tokens, where these are known, and numbers elsewhere."""
    if not axis:
        return [""]
    places = array.at.get(axis, range(array.shape[array.axes.index(axis)]))
    if axis in ("pos", "q_pos", "k_pos") and array.tokens:
        return [array.tokens[place] if place < len(array.tokens) else str(place) for place in places]
    return [str(place) for place in places]


def visible(text: str) -> str:
    """A token's text in which blanks and line ends can be seen."""
    return "".join({" ": "·", "\n": "↵", "\t": "→"}.get(letter, letter) for letter in text)


def steps_of(shape: tuple[int, ...]) -> tuple[int, int]:
    """Which rows and columns of a map are shown: every so many."""
    rows, columns = (max(1, -(-size // SIDE)) for size in shape)
    return rows, columns


def _thinned(shape: tuple[int, ...]) -> str:
    rows, columns = steps_of(shape)
    named = [f"one in {step} {what}s" for step, what in ((rows, "row"), (columns, "column")) if step > 1]
    return f", {' and '.join(named)}" if named else ""


def _label(name: str, style: str) -> str:
    style = f"font:11px/14px monospace;white-space:pre;padding:0 3px;{style}"
    return f'<span style="{style}">{escape(visible(name))}</span>'


def _named(array: Array, place: tuple[int, ...]) -> str:
    """Where a map comes from, as "layer 3, head 0"."""
    axes = array.axes[: len(place)]
    return ", ".join(f"{axis} {labels(array, axis)[i]}" for axis, i in zip(axes, place, strict=True))
