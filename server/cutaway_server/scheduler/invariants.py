"""What must hold between any two steps: who owns which block, and that nobody writes into another's."""

from __future__ import annotations

from collections import Counter

from cutaway_server.cache.blocks import BlockPool
from cutaway_server.scheduler.schedule import Schedule
from cutaway_server.scheduler.sequence import Sequence


def check_ownership(pool: BlockPool, running: list[Sequence], waiting: list[Sequence]) -> None:
    """Assert that those running own every block in use, that those waiting own none, and that nobody overtakes."""
    pool.check()
    owned = Counter(block for sequence in running for block in sequence.blocks)
    assert all(owned[block] == pool.references(block) for block in range(pool.n_blocks)), "a block has lost its owner"
    for line in (running, waiting):
        orders = [sequence.order for sequence in line]
        assert orders == sorted(set(orders)), "a line is out of order"
    _check_ages(running, waiting)
    for sequence in waiting:
        assert not sequence.finished
        assert (sequence.blocks, sequence.stored, sequence.next) == ([], 0, 0)
    for sequence in running:
        _check_running(pool, sequence)


def _check_ages(running: list[Sequence], waiting: list[Sequence]) -> None:
    """Of one tenant and priority, those who run are older than those who wait."""
    youngest = {(s.request.tenant, s.order[0]): s.order for s in running}
    for sequence in waiting:
        other = youngest.get((sequence.request.tenant, sequence.order[0]))
        assert other is None or other < sequence.order, "someone was overtaken"


def _check_running(pool: BlockPool, sequence: Sequence) -> None:
    assert not sequence.finished
    assert 0 <= sequence.next <= sequence.stored <= len(sequence.tokens)
    begun, most = (-(-length // pool.page_size) for length in (sequence.stored, len(sequence.tokens)))
    assert begun <= len(sequence.blocks) <= most
    assert len(sequence.digests) <= len(sequence.tokens) // pool.page_size
    assert all(pool.references(block) == 1 for block in sequence.blocks[begun:]), "an unwritten block is shared"


def check_writes(pool: BlockPool, schedule: Schedule) -> None:
    """Assert that no row of `schedule`, just made, is stored in a block that someone else can see."""
    for work in schedule.work:
        for position in range(max(work.start, work.stored), work.stop):
            block = work.sequence.blocks[position // pool.page_size]
            assert pool.references(block) == 1, "a shared write"
