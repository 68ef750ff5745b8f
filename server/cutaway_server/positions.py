"""Sets of positions in a text that is still growing: the prompt's, the generated ones, every so manieth, ..."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

ENDLESS = 2**31  # past every position


@dataclass(frozen=True, slots=True)
class Rows:
    """Absolute positions: those in any of `ranges` (of ascending steps), and those `listed`."""

    ranges: tuple[range, ...] = ()
    listed: frozenset[int] = frozenset()

    @classmethod
    def everywhere(cls) -> Rows:
        """Every position."""
        return cls((range(ENDLESS),))

    def __contains__(self, position: object) -> bool:
        return position in self.listed or any(position in r for r in self.ranges)

    def within(self, start: int, stop: int) -> list[int]:
        """Those in [start, stop), ascending."""
        if stop - start == 1:
            return [start] if start in self else []
        return sorted({p for cut in self._cut(start, stop) for p in cut})

    def count(self, start: int, stop: int) -> int:
        """How many there are in [start, stop)."""
        cut = list(self._cut(start, stop))
        return len(cut[0]) if len(cut) == 1 else len({p for each in cut for p in each})

    def first(self, start: int) -> int | None:
        """The first at or after `start`."""
        found = [cut[0] for r in self.ranges if (cut := _from(r, start))]
        found += [p for p in self.listed if p >= start]
        return min(found, default=None)

    def _cut(self, start: int, stop: int) -> Iterator[range | list[int]]:
        for r in self.ranges:
            cut = _from(r, start)
            if cut and cut.start < stop:
                yield range(cut.start, min(stop, cut.stop), cut.step)
        if listed := [p for p in self.listed if start <= p < stop]:
            yield listed


def _from(r: range, start: int) -> range:
    """The part of `r` from `start` on."""
    if start <= r.start:
        return r
    return range(r.start + -(-(start - r.start) // r.step) * r.step, r.stop, r.step)
