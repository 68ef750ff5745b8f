"""Numbers counted into buckets: cheap to add to on one thread, and readable from any other."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from itertools import accumulate, pairwise


class Histogram:
    """How many numbers fell into which bucket. A bucket takes what is at most its edge and above the edge before."""

    __slots__ = ("_counts", "edges", "total")

    def __init__(self, edges: Iterable[float]) -> None:
        self.edges = tuple(edges)
        assert all(low < high for low, high in pairwise(self.edges)), "edges grow"
        self._counts = [0] * (len(self.edges) + 1)  # the last takes what is above every edge
        self.total = 0.0  # the sum of the numbers

    def observe(self, value: float) -> None:
        """Count a number."""
        self._counts[bisect_left(self.edges, value)] += 1
        self.total += value

    def cumulative(self) -> list[int]:
        """For each edge, how many numbers are at most that; at the end, how many there are."""
        return list(accumulate(self._counts.copy()))  # the copy is one step to other threads

    @property
    def count(self) -> int:
        """How many numbers were counted."""
        return sum(self._counts)


def one_two_five(most: float) -> tuple[float, ...]:
    """The edges 1, 2, 5, 10, 20, 50 and so on, up to the first that is no less than `most`."""
    edges = [1.0]
    while edges[-1] < most:
        factor = 2.5 if str(edges[-1]).startswith("2") else 2.0
        edges.append(edges[-1] * factor)
    return tuple(edges)
