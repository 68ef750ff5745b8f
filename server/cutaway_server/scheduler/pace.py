"""How many rows of prompts a step takes beside decodes.

A step is taken to last `fixed + rows * per_row` seconds, whatever the rows are: the line through two points that are
measured as steps go by, one of steps with prompts and one of steps without. A prompt that is read beside decodes may
make their step `stretch` times as long, and several prompts more, when fewer decode: who waits for a first token counts
as much as who waits for the next. What a row computes never depends on this, only when.
"""

from __future__ import annotations

from dataclasses import dataclass

LEAST_ROWS = 16  # prompts go on whatever the clock says
WEIGHT = 0.3  # of the newest step
OUTLIER = 2.0  # a step counts as at most so many times as long as it was expected to be


@dataclass(slots=True)
class Typical:
    """A step as they were of late, the newest counting most."""

    rows: float
    seconds: float

    def move(self, rows: float, seconds: float) -> None:
        """Take one more step in."""
        self.rows += WEIGHT * (rows - self.rows)
        self.seconds += WEIGHT * (seconds - self.seconds)


class Pace:
    """Learns how long steps take. Seconds are given in."""

    def __init__(self, stretch: float) -> None:
        assert stretch > 1.0
        self.stretch = stretch
        self._decoding: Typical | None = None  # steps of decodes only
        self._reading: Typical | None = None  # steps with rows of prompts

    @property
    def line(self) -> tuple[float, float] | None:
        """Seconds of a step without rows, and of each row; None before both kinds of steps were seen."""
        if self._decoding is None or self._reading is None:
            return None
        least = self._decoding.seconds * 1e-3
        more = max(self._reading.seconds - self._decoding.seconds, least)
        per_row = more / max(self._reading.rows - self._decoding.rows, 1.0)
        return max(self._decoding.seconds - per_row * self._decoding.rows, 0.0), per_row

    def note(self, decodes: int, prompt_rows: int, seconds: float) -> None:
        """Take note of how long a step took."""
        rows, line = decodes + prompt_rows, self.line
        if line is not None:
            seconds = min(seconds, OUTLIER * (line[0] + line[1] * rows))
        known = self._reading if prompt_rows else self._decoding
        if known is not None:
            known.move(rows, seconds)
        elif prompt_rows:
            self._reading = Typical(rows, seconds)
        else:
            self._decoding = Typical(rows, seconds)

    def prompt_rows(self, decodes: int, prompts: int, most: int) -> int:
        """How many of at most `most` rows may be of prompts in a step with `decodes` decodes, for `prompts` prompts."""
        line = self.line
        if line is None or not decodes:
            return most
        undisturbed = line[0] / line[1] + decodes  # as many rows would take so long, if none were fixed
        rows = (self.stretch - 1.0) * max(1.0, prompts / decodes) * undisturbed
        return int(min(most, max(LEAST_ROWS, rows)))
