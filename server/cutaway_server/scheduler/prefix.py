"""Prompts that start alike share blocks: a sequence's full blocks, found and published by their chained digests."""

from __future__ import annotations

from collections.abc import Sequence as Items

from cutaway_server.cache.blocks import ROOT, BlockPool
from cutaway_server.request import Request
from cutaway_server.scheduler.sequence import Sequence


class PrefixCache:
    """Finds and publishes blocks for sequences that allow it. Each token is hashed once per completion."""

    def __init__(self, pool: BlockPool, *, enabled: bool) -> None:
        self.pool = pool
        self.enabled = enabled

    def find(self, sequence: Sequence) -> list[int]:
        """The published blocks that hold the sequence's first tokens."""
        found: list[int] = []
        if self.serves(sequence.request):
            self._hash(sequence, len(sequence.tokens) // self.pool.page_size)
            for digest in sequence.digests:
                block = self.pool.find(digest)
                if block is None:
                    break
                found.append(block)
        return found

    def publish(self, sequence: Sequence, start: int) -> None:
        """Publish the blocks that the sequence has filled, from its block number `start` on."""
        full = sequence.stored // self.pool.page_size
        if full > start and self.serves(sequence.request):
            self._hash(sequence, full)
            for i in range(start, full):
                self.pool.publish(sequence.blocks[i], sequence.digests[i], sequence.owner)

    def serves(self, request: Request) -> bool:
        """Whether prompts of `request` are looked for, and kept."""
        return self.enabled and request.prefix_caching

    def _hash(self, sequence: Sequence, full: int) -> None:
        """Extend the sequence's digests to its first `full` blocks."""
        extend_digests(self.pool, sequence.digests, sequence.tokens, full, sequence.request)


def extend_digests(pool: BlockPool, digests: list[bytes], tokens: Items[int], full: int, request: Request) -> None:
    """Extend the digests of a request's tokens to those of the first `full` blocks.

    The tenant salts the first; edits that of the first position whose values they change.
    """
    size, edits = pool.page_size, request.edits
    edited = edits.first_position() if edits.changes_values else None
    for i in range(len(digests), full):
        parent = digests[-1] if i else ROOT
        salt = b"" if i else request.tenant.encode()
        if edited is not None and edited // size == i:
            salt += b"\0" + edits.salt  # no tenant's name has a zero
        digests.append(pool.chain(parent, tokens[i * size : (i + 1) * size], salt))


def digests_of(pool: BlockPool, request: Request) -> list[bytes]:
    """The digests of all full blocks of a request's prompt. Safe from any thread."""
    digests: list[bytes] = []
    extend_digests(pool, digests, request.prompt, len(request.prompt) // pool.page_size, request)
    return digests
