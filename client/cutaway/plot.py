"""Pictures of arrays as matplotlib figures, for papers, files and notebooks; needs the extra `plot`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.colors import LinearSegmentedColormap, Normalize, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator

from cutaway.notebook import DEEP, HIDDEN, LIGHT, NEGATIVE, labels, scale_of, visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage
    from numpy.typing import NDArray

    from cutaway.arrays import Array
    from cutaway.results import LensResult

MAPS = 16
COLUMNS = 4
NAMED = 48  # places of an axis that have their names beside them; of more, numbers stand there
DPI = 120


def _colours(*stops: tuple[int, int, int]) -> LinearSegmentedColormap:
    listed = [tuple(part / 255 for part in stop) for stop in stops]
    return LinearSegmentedColormap.from_list("cutaway", listed, bad=HIDDEN)


def heat_map(array: Array, *, title: str = "", rows: Sequence[str] = ()) -> Figure:
    """A map of the last two axes for each place of the others, 16 at most, in the same colours.

    White to blue from the least value to the largest; where some are negative, white is zero and they are red.
    `rows` are other names for the rows.

    Raises:
        ValueError: the array has no numbers.
    """
    values = np.atleast_2d(np.asarray(array.values, np.float64))
    if not values.size:
        raise ValueError(f"{array!r} has nothing to draw")
    axes = ("", *array.axes) if array.ndim == 1 else array.axes
    lead = values.shape[:-2]
    places = list(np.ndindex(*lead))[:MAPS]
    least, most, told = scale_of(values[np.isfinite(values)])
    across = min(COLUMNS, len(places))
    down = -(-len(places) // across)
    width, height = min(9.0, 1.4 + 0.26 * values.shape[-1]), min(9.0, 1.2 + 0.2 * values.shape[-2])
    scale = min(1.0, 11 / (width * across))
    figure = Figure(
        (max(4.0, width * across * scale), max(1.6, height * down * scale) + 0.6), DPI, layout="constrained"
    )
    grid = figure.subplots(down, across, squeeze=False)
    for axis in grid.flat[len(places) :]:
        axis.set_visible(False)
    for axis, place in zip(grid.flat, places, strict=False):
        picture = _draw(axis, values[place], least, most)
        named = zip(axes, place, strict=False)
        axis.set_title(", ".join(f"{name} {labels(array, name)[i]}" for name, i in named), fontsize=9)
        _name(axis, (axes[-2], rows or shown(array, axes[-2])), (axes[-1], shown(array, axes[-1])))
    figure.colorbar(picture, ax=grid, shrink=0.8, extend="both" if "beyond" in told else "neither")
    left = np.prod(lead, dtype=int) - len(places)
    figure.suptitle((title or repr(array)) + (f" ({left} more maps)" if left else ""), fontsize=10)
    return figure


def lens_map(lens: LensResult, *, title: str = "what each layer would say next") -> Figure:
    """The likeliest token of each layer (the last on top) at each position, the darker the likelier.

    Raises:
        ValueError: the lens was asked for no likeliest tokens.
    """
    if lens.logprobs is None or lens.texts is None:
        raise ValueError("the lens was asked for no likeliest tokens (top_k=0)")
    shares = np.exp(lens.logprobs.values[::-1, :, 0])
    texts = lens.texts.values[::-1, :, 0]
    height, width = shares.shape
    figure = Figure((min(24.0, 1.5 + 0.75 * width), min(24.0, 1.2 + 0.22 * height)), DPI, layout="constrained")
    axis = figure.subplots()
    picture = _draw(axis, shares, 0.0, 1.0)
    for (row, column), share in np.ndenumerate(shares):
        text = visible(str(texts[row, column]))[:10].replace("$", r"\$")
        axis.text(column, row, text, ha="center", va="center", fontsize=7, color="white" if share > 0.5 else "black")
    layers = [str(layer) for layer in reversed(lens.logprobs.at["layer"])]
    _name(axis, ("layer", layers), ("pos", shown(lens.logprobs, "pos")))
    figure.colorbar(picture, ax=axis, shrink=0.8)
    figure.suptitle(title, fontsize=10)
    return figure


def _draw(axis: Axes, values: NDArray[np.float64], least: float, most: float) -> AxesImage:
    if least < 0:
        end = max(-least, most)
        norm: Normalize = TwoSlopeNorm(0, -end, end)
        colours = _colours(NEGATIVE, LIGHT, DEEP)
    else:
        norm, colours = Normalize(least, most), _colours(LIGHT, DEEP)
    finite = np.where(np.isfinite(values), values, np.nan)
    return axis.imshow(finite, cmap=colours, norm=norm, aspect="auto", interpolation="nearest")


def _name(axis: Axes, *named: tuple[str, Sequence[str]]) -> None:
    for side, (name, places) in zip((axis.yaxis, axis.xaxis), named, strict=True):
        side.set_label_text(name, fontsize=8)
        if len(places) <= NAMED:
            side.set_major_locator(FixedLocator(range(len(places))))
            side.set_ticklabels([place.replace("$", r"\$") for place in places])
    axis.tick_params(labelsize=7, length=2)
    axis.tick_params(axis="x", labelrotation=90)


def shown(array: Array, axis: str) -> list[str]:
    """The names of an axis's places, blanks made visible."""
    return [visible(name) for name in labels(array, axis)]
