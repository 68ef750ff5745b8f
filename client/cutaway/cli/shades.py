"""A heat map in the terminal: coloured cells, or shaded characters (with a minus, if need be) where no colours are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cutaway.cli.screen import harmless
from cutaway.notebook import colour, scale_of

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.text import Text

SHADES = "·░▒▓█"
LONGEST = 12  # characters of a token that are shown
CELL = 2  # columns of the terminal for each cell


@dataclass(frozen=True, slots=True)
class HeatMap:
    """values [rows, columns] with the name of each place; as many of the last columns as fit are shown."""

    values: NDArray[np.float64]
    rows: Sequence[str]
    columns: Sequence[str]
    title: str

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The title, the columns' names from top to bottom, a line for each row, and what the colours mean."""
        import numpy as np
        from rich.cells import cell_len
        from rich.text import Text

        margin = max((cell_len(short(name)) for name in self.rows), default=0) + 1
        fitting = max(1, (options.max_width - margin) // CELL)
        first = max(0, len(self.columns) - fitting)
        values = self.values[:, first:]
        least, most, told = scale_of(values[np.isfinite(values)])
        yield Text(self.title, style="bold")
        for letters in upright([short(name) for name in self.columns[first:]]):
            yield Text(
                " " * margin + "".join(letter + " " * (CELL - cell_len(letter)) for letter in letters).rstrip(),
                style="dim",
            )
        plain = console.no_color or console.color_system is None
        for name, row in zip(self.rows, values, strict=True):
            line = Text(" " * (margin - 1 - cell_len(short(name))) + short(name) + " ", no_wrap=True)
            for value in row:
                self._add(line, float(value), least, most, plain)
            yield line
        left = f"; the last {fitting} of {len(self.columns)} columns" if first else ""
        yield Text(" " * margin + told + left, style="dim")

    def _add(self, line: Text, value: float, least: float, most: float, plain: bool) -> None:
        if not plain:
            line.append(" " * CELL, style=f"on {colour(value, least, most)}")
        elif value != value or value in (float("inf"), float("-inf")):
            line.append(" " * CELL)
        else:
            share = abs(value) / max(-least, most) if least < 0 else (value - least) / ((most - least) or 1.0)
            shade = SHADES[round(min(1.0, share) * (len(SHADES) - 1))]
            line.append(shade + ("-" if value < 0 and shade != SHADES[0] else shade))


def short(name: str) -> str:
    """A name of limited length, which can do no harm."""
    shown = harmless(name) or "∅"
    return shown if len(shown) <= LONGEST else shown[: LONGEST - 1] + "…"


def upright(names: Sequence[str]) -> Iterator[str]:
    """The names side by side, each from top to bottom and ending on the last line."""
    height = max(map(len, names), default=0)
    for line in zip(*(name.rjust(height) for name in names), strict=True):
        yield "".join(line)
