"""Who owns which block of the KV cache: reference counts, and an index of full blocks by what they hold.

a block is    in                 counted by
free          _free              free         holds nothing anyone can find
used          neither            used         references > 0; published or not
cached        _evictable         cached       published, no references; reused least recently released first
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b

from cutaway_server.cache.statistics import BlockStatistics

DIGEST_SIZE = 16
ROOT = bytes(DIGEST_SIZE)  # the parent of a first block: as long as a digest, so that no two inputs read alike


class OutOfBlocks(Exception):
    """Every block is in use."""


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
        self._hasher = blake2b(digest_size=DIGEST_SIZE, key=key)
        self._references = [0] * n_blocks
        self._free = list(range(n_blocks - 1, 0, -1))
        self._evictable: OrderedDict[int, None] = OrderedDict()  # least recently released first
        self._published: dict[bytes, int] = {}
        self._digests: dict[int, bytes] = {}  # the inverse of _published

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
        return len(self._evictable)

    @property
    def available(self) -> int:
        """How many times `take` would succeed."""
        return len(self._free) + len(self._evictable)

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

    def take(self) -> int:
        """Give out a block, with one reference, for new contents.

        Raises:
            OutOfBlocks: every block is in use.
        """
        block = self._free.pop() if self._free else self._evict()
        self._references[block] = 1
        self.statistics.took(block)
        return block

    def _evict(self) -> int:
        if not self._evictable:
            raise OutOfBlocks(f"all {self.capacity} blocks are in use")
        block, _ = self._evictable.popitem(last=False)
        del self._published[self._digests.pop(block)]
        self.evictions += 1
        self.statistics.evicted(block)
        return block

    def share(self, block: int) -> None:
        """Add a reference to a block that is in use or cached."""
        if self._references[block] == 0:
            assert block in self._evictable, f"block {block} holds nothing to share"
            del self._evictable[block]
            self.statistics.reused(block)
        self._references[block] += 1

    def release(self, block: int) -> None:
        """Take one reference back. Release a sequence's blocks last first: its tail is then evicted before its head."""
        assert self._references[block] > 0, f"block {block} is released more often than taken"
        self._references[block] -= 1
        if self._references[block] == 0:
            if block in self._digests:
                self._evictable[block] = None
                self.statistics.released(block)
            else:
                self._free.append(block)

    def publish(self, block: int, digest: bytes) -> None:
        """Let a full block be found under `digest`, unless another one already is."""
        assert self._references[block] > 0, f"block {block} is published by nobody"
        if digest not in self._published:
            assert block not in self._digests, f"block {block} has another digest"
            self._published[digest] = block
            self._digests[block] = digest

    def find(self, digest: bytes) -> int | None:
        """The block published under `digest`; `share` it to keep it."""
        block = self._published.get(digest)
        self.hits += block is not None
        return block

    def check(self) -> None:
        """Assert every invariant of the pool, in time proportional to its size."""
        free, cached = set(self._free), set(self._evictable)
        used = {block for block, references in enumerate(self._references) if references}
        assert min(self._references) >= 0, "a block has fewer than no references"
        assert len(free) == len(self._free), "a block is free twice"
        assert len(free) + len(cached) + len(used) == self.capacity, "a block is lost, or in two states"
        assert free | cached | used == set(range(1, self.n_blocks)), "block 0 was given out, or another lost"
        assert {block: digest for digest, block in self._published.items()} == self._digests
        assert len(self._published) == len(self._digests), "a block is published twice"
        assert cached <= self._digests.keys(), "a cached block can't be found"
        assert not free & self._digests.keys(), "a free block can be found"
