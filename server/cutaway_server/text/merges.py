"""How byte-pair encoding builds tokens: which neighbours become one, in which order (Sennrich et al. 2016).

Encoding itself is the tokenizers library's. This retraces what it did, for a reader, and its result is checked
against the tokens that the library gave.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Merge:
    """Two neighbours become one; `position` is the left one's place in the word before. Lower ranks merge first."""

    left: str
    right: str
    rank: int
    position: int


@dataclass(frozen=True, slots=True)
class WordMerges:
    """How one word (pre-token) came about: what it starts from, and the merges in the order they happen."""

    symbols: tuple[str, ...]
    steps: tuple[Merge, ...]

    @property
    def pieces(self) -> tuple[str, ...]:
        """What is left in the end: the word's tokens."""
        pieces = list(self.symbols)
        for step in self.steps:
            pieces[step.position : step.position + 2] = [step.left + step.right]
        return tuple(pieces)


class MergeTable:
    """The rank of every pair that merges. Half a million pairs take 8 MB here and ten times that in a dict."""

    def __init__(self, vocabulary: Mapping[str, int], pairs: Iterable[tuple[str, str]]) -> None:
        keys = [vocabulary[left] << 32 | vocabulary[right] for left, right in pairs]
        order = np.argsort(np.asarray(keys, dtype=np.int64), kind="stable")
        self._keys: NDArray[np.int64] = np.asarray(keys, dtype=np.int64)[order]
        self._ranks: NDArray[np.int32] = order.astype(np.int32)

    def rank(self, left: int, right: int) -> int | None:
        """The rank of the pair of token ids; None if it never merges."""
        key = left << 32 | right
        place = int(np.searchsorted(self._keys, key, side="right")) - 1  # of pairs listed twice the later counts
        if place < 0 or int(self._keys[place]) != key:
            return None
        return int(self._ranks[place])


class _Places:
    """How many symbols are left before a place (a Fenwick tree)."""

    def __init__(self, size: int) -> None:
        self._sums = [place & -place for place in range(size + 1)]

    def remove(self, place: int) -> None:
        place += 1
        while place < len(self._sums):
            self._sums[place] -= 1
            place += place & -place

    def before(self, place: int) -> int:
        count = 0
        while place > 0:
            count += self._sums[place]
            place -= place & -place
        return count


def retrace(symbols: Sequence[str], token_id: Callable[[str], int | None], table: MergeTable) -> WordMerges:
    """Merge `symbols` as byte-pair encoding does: always the lowest rank, leftmost first."""
    pieces: list[str | None] = list(symbols)
    after = [*range(1, len(symbols)), -1]
    before = list(range(-1, len(symbols) - 1))
    places = _Places(len(symbols))
    queue: list[tuple[int, int, str, str]] = []

    def consider(place: int) -> None:
        left = pieces[place] if place >= 0 else None
        right = pieces[after[place]] if left is not None and after[place] >= 0 else None
        if left is None or right is None:
            return
        left_id, right_id = token_id(left), token_id(right)
        rank = None if left_id is None or right_id is None else table.rank(left_id, right_id)
        if rank is not None:
            heappush(queue, (rank, place, left, right))

    for place in range(len(symbols)):
        consider(place)
    steps: list[Merge] = []
    while queue:
        rank, place, left, right = heappop(queue)
        gone = after[place]
        if pieces[place] != left or gone < 0 or pieces[gone] != right:
            continue  # one of the two has merged with another neighbour meanwhile
        steps.append(Merge(left, right, rank, places.before(place)))
        pieces[place], pieces[gone] = left + right, None
        after[place] = after[gone]
        if after[gone] >= 0:
            before[after[gone]] = place
        places.remove(gone)
        consider(before[place])
        consider(place)
    return WordMerges(tuple(symbols), tuple(steps))
