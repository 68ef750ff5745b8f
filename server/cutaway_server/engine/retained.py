"""Requests that have ended and stay for a while: their tokens, and their blocks until someone needs the room.

Nothing is reserved. A kept block counts as cached and is evicted after every other one, so keeping a request never
makes another wait, lose its place, or end. What was evicted is noticed when it is looked for.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from cutaway_server.cache.blocks import BlockPool, Lease
from cutaway_server.request import FinishReason, Request, Timings
from cutaway_server.scheduler import Sequence

MOST_OF_POOL = 4  # all tenants together keep at most one block in so many: the rest is for prompts that begin alike


@dataclass(frozen=True, slots=True)
class Ended:
    """A completion that has ended. `leases` are of its blocks, which had K and V of positions [0, stored)."""

    index: int
    tokens: tuple[int, ...]  # prompt and output
    reason: FinishReason
    stored: int
    leases: tuple[Lease, ...]


@dataclass(frozen=True, slots=True)
class Run:
    """A request that has ended, without the completions that were aborted before their first token."""

    request: Request
    completions: tuple[Ended, ...]
    cached_tokens: int  # of its prompt
    timings: Timings
    ended: float  # seconds of time.monotonic()

    @property
    def blocks(self) -> int:
        """How many blocks it keeps."""
        return len({lease for completion in self.completions for lease in completion.leases})


class Retained:
    """The runs kept, by the request's name. Belongs to the engine's thread."""

    def __init__(self, pool: BlockPool, block_bytes: int = 1, max_bytes: int = 0, seconds: float = 0.0) -> None:
        """Keep runs of each tenant in blocks of at most `max_bytes`, each for at most `seconds`; 0 keeps none."""
        self._pool = pool
        self._most_blocks = min(max_bytes // block_bytes, pool.capacity // MOST_OF_POOL)
        self._most_in_all = pool.capacity // MOST_OF_POOL
        self._seconds = seconds
        self._runs: OrderedDict[str, Run] = OrderedDict()  # the first to end first
        self._names: dict[str, OrderedDict[str, None]] = {}  # by tenant, in the same order
        self._blocks: dict[str, int] = {}  # by tenant

    def __len__(self) -> int:
        """All tenants' runs, with those whose time is up and that nobody has looked for since."""
        return len(self._runs)

    @property
    def keeps(self) -> bool:
        """Whether anything is kept at all."""
        return self._most_blocks > 0 and self._seconds > 0

    def end(self, sequence: Sequence, reason: FinishReason) -> Ended | None:
        """Keep the blocks of a completion that is about to give them back. None: nothing is kept."""
        if not self.keeps:
            return None
        tokens = sequence.tokens[:-1] if sequence.promised else sequence.tokens
        stored = min(sequence.stored, len(tokens))
        used = sequence.blocks[: -(-stored // self._pool.page_size)]
        return Ended(sequence.index, tuple(tokens), reason, stored, tuple(map(self._pool.keep, used)))

    def add(self, run: Run) -> None:
        """Keep a run whose completions were kept by `end`; what there is no room for is let go, oldest first."""
        tenant, name = run.request.tenant, run.request.request_id
        self.expire(run.ended)
        self._forget(name)
        if run.blocks > self._most_blocks:
            for completion in run.completions:
                self.let_go(completion)
            return
        self._runs[name] = run
        self._names.setdefault(tenant, OrderedDict())[name] = None
        self._blocks[tenant] = self._blocks.get(tenant, 0) + run.blocks
        while self._blocks.get(tenant, 0) > self._most_blocks:
            self._forget(next(iter(self._names[tenant])))
        while sum(self._blocks.values()) > self._most_in_all:
            most = max(self._blocks, key=self._blocks.__getitem__)
            self._forget(next(iter(self._names[most])))

    def let_go(self, completion: Ended) -> None:
        """Take back what `end` has kept."""
        for lease in completion.leases:
            self._pool.let_go(lease)

    def expire(self, now: float) -> None:
        """Let go of what has been kept long enough."""
        while self._runs and (first := next(iter(self._runs.values()))).ended + self._seconds < now:
            self._forget(first.request.request_id)

    def find(self, name: str, now: float) -> Run | None:
        """The run of that name that ended last, if it is still there."""
        self.expire(now)
        return self._runs.get(name)

    def of(self, tenant: str, now: float) -> list[Run]:
        """A tenant's runs, the first to end first."""
        self.expire(now)
        return [self._runs[name] for name in self._names.get(tenant, ())]

    def count(self, now: float) -> int:
        """All tenants' runs."""
        self.expire(now)
        return len(self._runs)

    def _forget(self, name: str) -> None:
        run = self._runs.pop(name, None)
        if run is None:
            return
        tenant = run.request.tenant
        del self._names[tenant][name]
        self._blocks[tenant] -= run.blocks
        if not self._names[tenant]:
            del self._names[tenant], self._blocks[tenant]
        for completion in run.completions:
            self.let_go(completion)
