"""Who makes way for somebody that waits: those of less priority, and those of tenants that hold more than their share.

What a tenant holds is the larger of its shares of places and of blocks. Nobody makes way for a tenant that would then
hold more than its own share, or that is not far behind: two would take turns in driving each other out.
"""

from __future__ import annotations

from collections import Counter

from cutaway_server.cache.blocks import BlockPool
from cutaway_server.scheduler.sequence import Sequence
from cutaway_server.scheduler.shares import Shares

PATIENCE = 8  # steps of decodes that others have been given more


def displaced(
    newcomer: Sequence, running: list[Sequence], max_running: int, pool: BlockPool, shares: Shares
) -> list[Sequence]:
    """Those to preempt, so that there are places and blocks for `newcomer`; nobody if that is not fair or not enough.

    Args:
        newcomer: waits, and has the next turn.
        running: all that run, in order of age.
        max_running: places, one for each completion.
        pool: owns the blocks.
        shares: says whose turn is last.
    """
    holdings = _Holdings(running, max_running, pool)
    need = -(-len(newcomer.tokens) // pool.page_size)
    fits = holdings.of(newcomer.request.tenant, newcomer.slots, need) <= shares.fraction(newcomer.request.tenant)
    n_running = sum(sequence.slots for sequence in running)
    places = n_running + newcomer.slots - max_running
    blocks = need + n_running + newcomer.slots - pool.available  # one in reserve for each, as for who is admitted
    found: list[Sequence] = []
    for sequence in reversed(shares.ranked(running)):
        if places <= 0 and blocks <= 0:
            break
        if sequence.order[0] == newcomer.order[0]:
            tenant = sequence.request.tenant
            far = shares.behind(newcomer, sequence) > PATIENCE * n_running
            if not (fits and far and holdings.of(tenant) > shares.fraction(tenant)):
                continue
        elif sequence.order[0] < newcomer.order[0]:
            continue
        found.append(sequence)
        holdings.drop(sequence)
        places -= sequence.slots
        blocks -= sum(pool.references(block) == 1 for block in sequence.blocks)
    return found if places <= 0 and blocks <= 0 else []


class _Holdings:
    """What each tenant holds: places and blocks. A block that several share counts for each."""

    def __init__(self, running: list[Sequence], max_running: int, pool: BlockPool) -> None:
        self._max_running, self._capacity = max_running, pool.capacity
        self._places: Counter[str] = Counter()
        self._blocks: Counter[str] = Counter()
        for sequence in running:
            self._places[sequence.request.tenant] += sequence.slots
            self._blocks[sequence.request.tenant] += len(sequence.blocks)

    def of(self, tenant: str, places: int = 0, blocks: int = 0) -> float:
        """What `tenant` would hold with so many places and blocks more, as a share of all."""
        of_places = (self._places[tenant] + places) / self._max_running
        return max(of_places, (self._blocks[tenant] + blocks) / self._capacity)

    def drop(self, sequence: Sequence) -> None:
        """Take what a sequence holds away."""
        self._places[sequence.request.tenant] -= sequence.slots
        self._blocks[sequence.request.tenant] -= len(sequence.blocks)
