"""The block pool does what a naive dictionary does, however its operations are mixed."""

from __future__ import annotations

import hashlib
import struct

import pytest
from cutaway_server.cache.blocks import ROOT, BlockPool, Lease, OutOfBlocks
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

KEY = b"a key of this process"


def pool_of(capacity: int, page_size: int = 4) -> BlockPool:
    return BlockPool(capacity + 1, page_size, KEY)


def digest_of(name: int) -> bytes:
    return hashlib.sha256(bytes([name])).digest()[:16]


class PoolAgainstDictionary(RuleBasedStateMachine):
    """The model: what each block was last published as and how many hold it; a list of what was released, in order.

    Each block's content is a number that changes with every take, so a block that is found must still hold what it
    held when it was published.
    """

    steps = 0
    evictions = 0

    @initialize(capacity=st.integers(1, 5))
    def start(self, capacity: int) -> None:
        self.pool = pool_of(capacity)
        self.capacity = capacity
        self.held: dict[int, int] = {}
        self.name_of: dict[int, int] = {}  # block -> the name it can be found under
        self.released: list[int] = []  # findable and held by nobody, oldest release first
        self.kept: dict[int, list[Lease]] = {}
        self.last: list[int] = []  # kept and held by nobody, oldest release first
        self.stale: list[Lease] = []
        self.content = [0] * (capacity + 1)
        self.content_of_name: dict[int, int] = {}
        self.writes = self.evicted = self.found = 0

    @rule()
    def take(self) -> None:
        if len(self.held) == self.capacity:
            with pytest.raises(OutOfBlocks, match=f"all {self.capacity} blocks are in use"):
                self.pool.take()
            return
        unused = set(range(1, self.capacity + 1)) - self.held.keys() - set(self.released) - set(self.last)
        self.took(self.pool.take(), unused)

    def took(self, block: int, unused: set[int]) -> None:
        if unused:
            assert block in unused
        else:
            assert block == (self.released or self.last).pop(0)
            if block in self.name_of:
                del self.content_of_name[self.name_of.pop(block)]
            self.stale += self.kept.pop(block, [])
            self.evicted += 1
            PoolAgainstDictionary.evictions += 1
        self.held[block] = 1
        self.writes += 1
        self.content[block] = self.writes

    @precondition(lambda self: len(self.held) < self.capacity)
    @rule(name=st.integers(0, 11))
    def come_and_go(self, name: int) -> None:
        """Take, fill, publish and release one block, so that the cache fills and evicts often."""
        unused = set(range(1, self.capacity + 1)) - self.held.keys() - set(self.released) - set(self.last)
        block = self.pool.take()
        self.took(block, unused)
        self.publish_one(block, name)
        self.release_one(block)

    @precondition(lambda self: self.held or self.released or self.last)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(sorted([*self.held, *self.released, *self.last])))
        self.pool.share(block)
        self.held[block] = self.held.get(block, 0) + 1
        for idle in (self.released, self.last):
            if block in idle:
                idle.remove(block)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def keep(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(sorted(self.held)))
        self.kept.setdefault(block, []).append(self.pool.keep(block))

    @precondition(lambda self: self.kept)
    @rule(data=st.data())
    def let_go(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(sorted(self.kept)))
        lease = self.kept[block].pop()
        assert self.pool.holds(lease)
        self.pool.let_go(lease)
        if not self.kept[block]:
            del self.kept[block]
            self.stale.append(lease)
            if block in self.last:
                self.last.remove(block)
                if block in self.name_of:
                    self.released.append(block)

    @precondition(lambda self: self.stale)
    @rule()
    def let_go_of_what_is_gone(self) -> None:
        lease = self.stale.pop()
        if lease not in self.kept.get(lease.block, []):
            assert not self.pool.holds(lease)
            self.pool.let_go(lease)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        self.release_one(data.draw(st.sampled_from(sorted(self.held))))

    def release_one(self, block: int) -> None:
        self.pool.release(block)
        self.held[block] -= 1
        if self.held[block] == 0:
            del self.held[block]
            if block in self.kept:
                self.last.append(block)
            elif block in self.name_of:
                self.released.append(block)

    @precondition(lambda self: self.held.keys() - self.name_of.keys())
    @rule(data=st.data(), name=st.integers(0, 11))
    def publish(self, data: st.DataObject, name: int) -> None:
        self.publish_one(data.draw(st.sampled_from(sorted(self.held.keys() - self.name_of.keys()))), name)

    def publish_one(self, block: int, name: int) -> None:
        self.pool.publish(block, digest_of(name))
        if name not in self.name_of.values():
            self.name_of[block] = name
            self.content_of_name[name] = self.content[block]

    @rule(name=st.integers(0, 11))
    def find(self, name: int) -> None:
        block = self.pool.find(digest_of(name))
        assert block == next((b for b, n in self.name_of.items() if n == name), None)
        if block is not None:
            self.found += 1
            assert self.content[block] == self.content_of_name[name]

    @precondition(lambda self: len(self.held) < self.capacity)
    @rule(data=st.data())
    def misuse(self, data: st.DataObject) -> None:
        """What nobody holds can't be released or published, and what is not findable can't be shared."""
        block = data.draw(st.sampled_from(sorted(set(range(1, self.capacity + 1)) - self.held.keys())))
        with pytest.raises(AssertionError, match="released more often"):
            self.pool.release(block)
        with pytest.raises(AssertionError, match="published by nobody"):
            self.pool.publish(block, digest_of(99))
        if block not in self.released + self.last:
            with pytest.raises(AssertionError, match="nothing to share"):
                self.pool.share(block)

    @invariant()
    def agrees(self) -> None:
        PoolAgainstDictionary.steps += 1
        self.pool.check()
        assert [self.pool.references(b) for b in range(self.capacity + 1)] == [
            self.held.get(b, 0) for b in range(self.capacity + 1)
        ]
        assert self.pool.used == len(self.held)
        assert (self.pool.cached, self.pool.retained) == (len(self.released) + len(self.last), len(self.last))
        assert self.pool.free == self.capacity - len(self.held) - self.pool.cached
        assert self.pool.available == self.capacity - len(self.held)
        assert (self.pool.evictions, self.pool.hits) == (self.evicted, self.found)


def test_ten_thousand_random_steps_agree_with_a_dictionary() -> None:
    few = settings(
        max_examples=40,
        stateful_step_count=100,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    PoolAgainstDictionary.steps = PoolAgainstDictionary.evictions = 0
    while PoolAgainstDictionary.steps < 10_000:
        run_state_machine_as_test(PoolAgainstDictionary, settings=few)
    assert PoolAgainstDictionary.evictions > 100, "the steps hardly ever evict: they test too little"


def test_a_sequence_released_last_first_loses_its_tail_before_its_head() -> None:
    pool = pool_of(3)
    blocks = [pool.take() for _ in range(3)]
    for i, block in enumerate(blocks):
        pool.publish(block, digest_of(i))
    for block in reversed(blocks):
        pool.release(block)
    evicted_first = pool.take()
    assert evicted_first == blocks[2]
    assert [pool.find(digest_of(i)) for i in range(3)] == [blocks[0], blocks[1], None]


def test_a_found_block_that_is_shared_again_is_not_evicted() -> None:
    pool = pool_of(2)
    first, second = pool.take(), pool.take()
    for name, block in enumerate((first, second)):
        pool.publish(block, digest_of(name))
        pool.release(block)
    pool.share(first)
    assert pool.take() == second
    with pytest.raises(OutOfBlocks):
        pool.take()


def test_the_first_of_two_equal_blocks_stays_the_one_that_is_found() -> None:
    pool = pool_of(2)
    first, second = pool.take(), pool.take()
    pool.publish(first, digest_of(0))
    pool.publish(second, digest_of(0))
    assert pool.find(digest_of(0)) == first
    pool.release(second)
    assert (pool.free, pool.cached) == (1, 0)


def test_a_digest_is_blake2b_of_parent_tokens_and_salt_under_the_key_of_the_process() -> None:
    pool = pool_of(1, page_size=3)
    expected = hashlib.blake2b(bytes(16) + struct.pack("<3q", 5, 6, 7) + b"tenant", key=KEY, digest_size=16).digest()
    assert pool.chain(ROOT, [5, 6, 7], b"tenant") == expected
    child = hashlib.blake2b(expected + struct.pack("<3q", 8, 9, 10), key=KEY, digest_size=16).digest()
    assert pool.chain(expected, (8, 9, 10)) == child


def test_digests_differ_in_key_parent_tokens_order_and_salt() -> None:
    pool, other = pool_of(1, page_size=2), BlockPool(2, 2, b"another key")
    parent = pool.chain(ROOT, [1, 2])
    digests = [
        parent,
        other.chain(ROOT, [1, 2]),
        pool.chain(parent, [1, 2]),
        pool.chain(ROOT, [2, 1]),
        pool.chain(ROOT, [1, 2], b"tenant"),
        pool.chain(ROOT, [1, 2], b"tenants"),
    ]
    assert len(set(digests)) == len(digests)


@pytest.mark.parametrize(
    "damage",
    [
        lambda pool, block: pool._free.append(block),
        lambda pool, block: pool._free.pop(),
        lambda pool, block: pool._references.__setitem__(block, -1),
        lambda pool, block: pool._references.__setitem__(block, 0),
        lambda pool, block: pool._references.__setitem__(0, 1),
        lambda pool, block: pool._published.clear(),
        lambda pool, block: pool._digests.clear(),
        lambda pool, block: pool._evictable.__setitem__(block, None),
        lambda pool, block: pool._last.__setitem__(block, None),
        lambda pool, block: pool._kept.__setitem__(pool._free[0], 1),
        lambda pool, block: pool._digests.__setitem__(pool._free[0], digest_of(9)),
    ],
)
def test_check_notices_damage(damage) -> None:  # type: ignore[no-untyped-def]
    pool = pool_of(4)
    block = pool.take()
    pool.publish(block, digest_of(0))
    pool.check()
    damage(pool, block)
    with pytest.raises(AssertionError):
        pool.check()
