"""Whose turn it is: priority decides, then which tenant has been given least for its share, then age.

What a tenant is given is counted in rows computed, each divided by the tenant's share, and only while there are others:
who is alone owes nobody. Who comes, or comes back, begins where the least served of those present is, and who asks for
more is taken to be at most `credit` rows behind: who asked for little cannot save up and then shut all others out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from cutaway_server.scheduler.sequence import Sequence

Turn = tuple[int, float, tuple[int, int, int]]


class Shares:
    """What each tenant has been given. With one tenant and one priority, turns are in order of arrival."""

    def __init__(self, credit: float) -> None:
        self._credit = credit
        self._present: Counter[str] = Counter()  # unfinished sequences by tenant
        self._kinds: Counter[tuple[str, int]] = Counter()  # the same by tenant and priority
        self._given: dict[str, float] = {}
        self._weights: dict[str, float] = {}  # each tenant's share, as its last request has it

    @property
    def contended(self) -> bool:
        """Whether anything but age decides."""
        return len(self._kinds) > 1

    def arrive(self, sequence: Sequence) -> None:
        """Take note of a sequence that is not finished."""
        tenant = sequence.request.tenant
        if not self._present:
            self._given.clear()
            self._weights.clear()
        if tenant not in self._present:
            self._raise(tenant, min((self._given[other] for other in self._present), default=0.0))
        self._present[tenant] += 1
        self._kinds[tenant, sequence.request.priority] += 1
        self._weights[tenant] = sequence.request.share
        most = max(self._given[other] for other in self._present)
        self._raise(tenant, most - self._credit / min(self._weights[other] for other in self._present))

    def leave(self, sequence: Sequence) -> None:
        """Take note that a sequence is finished."""
        _subtract(self._present, sequence.request.tenant)
        _subtract(self._kinds, (sequence.request.tenant, sequence.request.priority))

    def charge(self, sequence: Sequence, rows: int) -> None:
        """Count rows that `sequence` is given in a step."""
        if len(self._present) > 1:
            self._given[sequence.request.tenant] += rows / sequence.request.share

    def behind(self, sequence: Sequence, other: Sequence) -> float:
        """How many rows more the tenant of `other` has been given, in rows of its own."""
        more = self._given[other.request.tenant] - self._given[sequence.request.tenant]
        return more * other.request.share

    def turn(self, sequence: Sequence) -> Turn:
        """The smaller, the sooner."""
        return sequence.order[0], self._given[sequence.request.tenant], sequence.order

    def ranked(self, sequences: Iterable[Sequence]) -> list[Sequence]:
        """Sequences that are in order of age, by turn."""
        return sorted(sequences, key=self.turn) if self.contended else list(sequences)

    def first(self, sequences: list[Sequence]) -> Sequence:
        """Whose turn is next, of at least one, in order of age. Looks no further than it must."""
        best, seen = sequences[0], {sequences[0].request.tenant}
        if not self.contended:
            return best
        for sequence in sequences:
            if sequence.order[0] != best.order[0] or len(seen) == len(self._present):
                break
            tenant = sequence.request.tenant
            if tenant not in seen and self._given[tenant] < self._given[best.request.tenant]:
                best = sequence
            seen.add(tenant)
        return best

    def fraction(self, tenant: str) -> float:
        """Of everything, what is this tenant's share among those present."""
        return self._weights[tenant] / sum(self._weights[other] for other in self._present)

    def _raise(self, tenant: str, least: float) -> None:
        self._given[tenant] = max(self._given.get(tenant, 0.0), least)


def _subtract(counter: Counter[str] | Counter[tuple[str, int]], key: str | tuple[str, int]) -> None:
    counter[key] -= 1  # type: ignore[index]
    if not counter[key]:  # type: ignore[index]
        del counter[key]
