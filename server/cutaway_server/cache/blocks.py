"""Who owns which block of the KV cache: reference counts, and an index of full blocks by what they hold.

a block is    in                 counted by
free          _free              free         holds nothing anyone can find
used          none of these      used         references > 0; published, kept, or neither
cached        _evictable         cached       published, no references; reused least recently released first
              _last              cached       kept for someone who may come back to it, no references; reused after
                                              all others, in the same order
"""

from __future__ import annotations

from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import takewhile

from cutaway_server.cache.events import NOBODY, BlockChange, BlockEvent, Owner
from cutaway_server.cache.statistics import BlockStatistics

DIGEST_SIZE = 16
ROOT = bytes(DIGEST_SIZE)  # the parent of a first block: as long as a digest, so that no two inputs read alike


class OutOfBlocks(Exception):
    """Every block is in use."""


@dataclass(frozen=True, slots=True)
class Lease:
    """The contents of a block from the time it was given out: `generation` tells whether it has been since."""

    block: int
    generation: int


@dataclass(frozen=True, slots=True)
class Books:
    """What a pool has written down about its blocks. Lists have a place for each; mappings know some."""

    references: Sequence[int]
    owners: Sequence[Owner]  # who each was last given out to
    digests: Mapping[int, bytes]  # of those that can be found
    kept: Mapping[int, int]
    generations: Sequence[int]  # how often each was given out
    idle: Sequence[int]  # cached, the next to be evicted first
    taken: Sequence[float]  # when each was last given out
    released: Sequence[float]  # when each was last released and stayed cached


class BlockPool:
    """Blocks 1 to `n_blocks - 1`, each `page_size` positions long. Block 0 is never given out: padding stores there.

    Every operation takes constant time but `check`.
    """

    def __init__(self, n_blocks: int, page_size: int, key: bytes) -> None:
        assert n_blocks >= 2, "block 0 is never given out, so a pool has at least two"
        assert page_size >= 1
        self.n_blocks = n_blocks
        self.page_size = page_size
        self.evictions = 0
        self.hits = 0
        self.statistics = BlockStatistics(n_blocks)
        self.log: list[BlockEvent] | None = None  # what happens from now on; None: nobody watches
        self._hasher = blake2b(digest_size=DIGEST_SIZE, key=key)
        self._references = [0] * n_blocks
        self._free = list(range(n_blocks - 1, 0, -1))
        self._evictable: OrderedDict[int, None] = OrderedDict()  # least recently released first
        self._last: OrderedDict[int, None] = OrderedDict()  # likewise, of blocks in _kept
        self._published: dict[bytes, int] = {}
        self._digests: dict[int, bytes] = {}  # the inverse of _published
        self._kept: dict[int, int] = {}  # by how many
        self._owners = [NOBODY] * n_blocks  # who each was last given out to
        self._generations = [0] * n_blocks  # how often each was given out
        self._used: Counter[str] = Counter()  # blocks by tenant; none with 0
        self._cached: Counter[str] = Counter()

    @property
    def capacity(self) -> int:
        """Number of blocks that can be given out."""
        return self.n_blocks - 1

    @property
    def free(self) -> int:
        """Number of blocks that hold nothing."""
        return len(self._free)

    @property
    def cached(self) -> int:
        """Number of blocks that nobody references but that can be found."""
        return len(self._evictable) + len(self._last)

    @property
    def available(self) -> int:
        """How many times `take` would succeed."""
        return len(self._free) + len(self._evictable) + len(self._last)

    @property
    def retained(self) -> int:
        """Number of cached blocks that are kept for someone."""
        return len(self._last)

    @property
    def used(self) -> int:
        """Number of blocks with references."""
        return self.capacity - self.available

    def references(self, block: int) -> int:
        """How many hold `block`."""
        return self._references[block]

    def chain(self, parent: bytes, tokens: Sequence[int], salt: bytes = b"") -> bytes:
        """The digest of a full block: keyed, and chained to all that comes before it by `parent`.

        Args:
            parent: the digest of the block before, or ROOT.
            tokens: the block's `page_size` token ids.
            salt: what else its contents depend on from this block on. It is inherited through `parent`.
        """
        assert len(parent) == DIGEST_SIZE
        assert len(tokens) == self.page_size
        hasher = self._hasher.copy()
        hasher.update(parent)
        hasher.update(array("q", tokens).tobytes())
        hasher.update(salt)
        return hasher.digest()

    def take(self, owner: Owner = NOBODY, copy_of: int = 0) -> int:
        """Give out a block, with one reference, for new contents, or for a copy of those of another block.

        Raises:
            OutOfBlocks: every block is in use.
        """
        block = self._free.pop() if self._free else self._evict()
        self._references[block] = 1
        self._owners[block] = owner
        self._generations[block] += 1
        self._used[owner.tenant] += 1
        self.statistics.took(block)
        if self.log is not None:
            change = BlockChange.COPIED if copy_of else BlockChange.TAKEN
            self.log.append(BlockEvent(change, block, owner, 1, b"", copy_of))
        return block

    def _evict(self) -> int:
        idle = self._evictable or self._last
        if not idle:
            raise OutOfBlocks(f"all {self.capacity} blocks are in use")
        block, _ = idle.popitem(last=False)
        digest = self._digests.pop(block, b"")
        if digest:
            del self._published[digest]
        self._kept.pop(block, None)
        self._leaves(self._cached, block)
        self.evictions += 1
        self.statistics.evicted(block)
        if self.log is not None:
            self.log.append(BlockEvent(BlockChange.EVICTED, block, self._owners[block], 0, digest))
        return block

    def share(self, block: int, owner: Owner = NOBODY) -> None:
        """Add a reference to a block that is in use or cached."""
        if self._references[block] == 0:
            idle = self._last if block in self._kept else self._evictable
            assert block in idle, f"block {block} holds nothing to share"
            del idle[block]
            self._leaves(self._cached, block)
            self._used[self._owners[block].tenant] += 1
            self.statistics.reused(block)
        self._references[block] += 1
        if self.log is not None:
            self._log(BlockChange.SHARED, block, owner)

    def release(self, block: int, owner: Owner = NOBODY) -> None:
        """Take one reference back. Release a sequence's blocks last first: its tail is then evicted before its head."""
        assert self._references[block] > 0, f"block {block} is released more often than taken"
        self._references[block] -= 1
        if self._references[block] == 0:
            self._leaves(self._used, block)
            self._lay(block)
            if block in self._digests or block in self._kept:
                self.statistics.released(block)
        if self.log is not None:
            self._log(BlockChange.RELEASED, block, owner)

    def _lay(self, block: int) -> None:
        """Put a block that nobody references where it waits for what comes."""
        if block not in self._kept and block not in self._digests:
            self._free.append(block)
            return
        (self._last if block in self._kept else self._evictable)[block] = None
        self._cached[self._owners[block].tenant] += 1

    def _leaves(self, counted: Counter[str], block: int) -> None:
        tenant = self._owners[block].tenant
        counted[tenant] -= 1
        if not counted[tenant]:
            del counted[tenant]

    def keep(self, block: int) -> Lease:
        """Let a block that is in use be evicted after all that nobody keeps, once nobody references it.

        It need not be full or published: what it holds now stays where it is until it is evicted.
        """
        assert self._references[block] > 0, f"block {block} is kept by nobody"
        self._kept[block] = self._kept.get(block, 0) + 1
        return Lease(block, self._generations[block])

    def holds(self, lease: Lease) -> bool:
        """Whether the block was not given out anew since it was kept."""
        return self._generations[lease.block] == lease.generation and lease.block in self._kept

    def let_go(self, lease: Lease) -> None:
        """Take one `keep` back."""
        if not self.holds(lease):
            return
        block = lease.block
        self._kept[block] -= 1
        if not self._kept[block]:
            del self._kept[block]
            if self._references[block] == 0:
                del self._last[block]
                self._leaves(self._cached, block)
                self._lay(block)

    def publish(self, block: int, digest: bytes, owner: Owner = NOBODY) -> None:
        """Let a full block be found under `digest`, unless another one already is."""
        assert self._references[block] > 0, f"block {block} is published by nobody"
        if digest not in self._published:
            assert block not in self._digests, f"block {block} has another digest"
            self._published[digest] = block
            self._digests[block] = digest
            if self.log is not None:
                self._log(BlockChange.PUBLISHED, block, owner)

    def _log(self, change: BlockChange, block: int, owner: Owner) -> None:
        assert self.log is not None
        self.log.append(BlockEvent(change, block, owner, self._references[block], self._digests.get(block, b"")))

    def find(self, digest: bytes) -> int | None:
        """The block published under `digest`; `share` it to keep it."""
        block = self._published.get(digest)
        self.hits += block is not None
        return block

    def of(self, tenant: str) -> tuple[int, int]:
        """How many blocks of a tenant are used, and cached."""
        return self._used[tenant], self._cached[tenant]

    def holding(self, digests: Iterable[bytes]) -> int:
        """How many of the first of `digests` would be found. Unlike `find` it leaves no trace."""
        return sum(1 for _ in takewhile(self._published.__contains__, digests))

    def books(self) -> Books:
        """Everything that is written down about each block, copied: quick, however many there are."""
        return Books(
            references=self._references.copy(),
            owners=self._owners.copy(),
            digests=self._digests.copy(),
            kept=self._kept.copy(),
            generations=self._generations.copy(),
            idle=(*self._evictable, *self._last),
            taken=self.statistics.taken.copy(),
            released=self.statistics.released_at.copy(),
        )

    def check(self) -> None:
        """Assert every invariant of the pool, in time proportional to its size."""
        free, cached = set(self._free), {*self._evictable, *self._last}
        used = {block for block, references in enumerate(self._references) if references}
        assert min(self._references) >= 0, "a block has fewer than no references"
        assert len(free) == len(self._free), "a block is free twice"
        assert len(free) + len(cached) + len(used) == self.capacity, "a block is lost, or in two states"
        assert free | cached | used == set(range(1, self.n_blocks)), "block 0 was given out, or another lost"
        assert {block: digest for digest, block in self._published.items()} == self._digests
        assert len(self._published) == len(self._digests), "a block is published twice"
        assert len(cached) == self.cached, "a block is cached twice"
        assert self._evictable.keys() <= self._digests.keys(), "a cached block can't be found"
        assert self._last.keys() == self._kept.keys() - used, "a kept block is not where it should be"
        assert not free & self._digests.keys(), "a free block can be found"
        assert all(count > 0 for count in self._kept.values()), "a block is kept by fewer than one"
        assert self._used == Counter(self._owners[block].tenant for block in used), "a tenant's blocks are miscounted"
        assert self._cached == Counter(self._owners[block].tenant for block in cached), "a tenant's are miscounted"
