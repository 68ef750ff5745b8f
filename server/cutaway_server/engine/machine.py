"""The state of the machine, looked at between two steps: blocks, and requests. Everything here is a copy.

What is told of a tenant's own things is complete; of other tenants only how many there are.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass
from enum import Enum

from cutaway_server.cache.blocks import Books
from cutaway_server.cache.events import Owner
from cutaway_server.engine.engine import Engine
from cutaway_server.engine.requests import LiveRequest
from cutaway_server.engine.retained import Run
from cutaway_server.scheduler import Sequence


@dataclass(frozen=True, slots=True)
class CacheState:
    """The pool in numbers, all tenants together."""

    total: int  # blocks
    used: int
    cached: int
    retained: int  # of those cached: blocks of finished requests that are kept
    free: int
    page_size: int  # positions in a block
    block_bytes: int
    layers: int
    empty_positions: int  # of used blocks: positions that hold nothing (yet)
    queried_tokens: int  # of prompts, looked for in the prefix cache
    hit_tokens: int  # and found
    evictions: int
    preemptions: int
    runs: int  # finished requests that are kept
    prefix_caching: bool
    own_used: int  # blocks of the tenant that asks
    own_cached: int


def cache_state(engine: Engine, tenant: str) -> CacheState:
    """Count, in time proportional to what runs."""
    pool, observed = engine.scheduler.pool, engine.observed
    own_used, own_cached = pool.of(tenant)
    return CacheState(
        total=pool.capacity, used=pool.used, cached=pool.cached, retained=pool.retained, free=pool.free,
        page_size=pool.page_size, block_bytes=engine.pages.page_bytes, layers=len(engine.pages.keys),
        empty_positions=empty_positions(engine.scheduler.running, pool.page_size),
        queried_tokens=observed.prefix_queries, hit_tokens=observed.prefix_hits, evictions=pool.evictions,
        preemptions=observed.preemptions, runs=engine.retained.count(time.monotonic()),
        prefix_caching=engine.scheduler.caches_prefixes, own_used=own_used, own_cached=own_cached,
    )  # fmt: skip


def empty_positions(running: Items[Sequence], page_size: int) -> int:
    """Positions of the blocks of `running` that hold nothing (yet): ends of blocks, and prompts being read."""
    empty: dict[int, int] = {}  # by block: forks share one that is half full
    for sequence in running:
        stored, blocks = sequence.stored, sequence.blocks
        for i in range(stored // page_size, len(blocks)):
            empty[blocks[i]] = min(page_size, (i + 1) * page_size - stored)
    return sum(empty.values())


class BlockUse(Enum):
    """What a block is to the pool."""

    USED = "used"
    CACHED = "cached"
    RETAINED = "retained"  # cached, and kept for a finished request


@dataclass(frozen=True, slots=True)
class Holder:
    """Who holds a block, and where in its tokens the block is."""

    owner: Owner
    start: int  # the block's first position
    filled: int  # so many of its positions have K and V
    tokens: tuple[int, ...]  # at these, where they may be told


@dataclass(frozen=True, slots=True)
class BlockState:
    """One block that is not free. Without holders, `maker` was the last to have been given it."""

    block: int
    use: BlockUse
    references: int
    filled: int
    digest: bytes  # empty: it cannot be found
    holders: tuple[Holder, ...]
    maker: Owner
    age: float  # seconds since it was given out
    idle: float  # seconds since somebody held it; 0 while somebody does


@dataclass(frozen=True, slots=True)
class Held:
    """The blocks of one completion that runs. `tokens` are empty where they may not be told."""

    owner: Owner
    blocks: tuple[int, ...]
    stored: int
    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Ledger:
    """All that is known of a tenant's blocks: `blocks_of` reads it, on any thread."""

    tenant: str
    state: CacheState
    books: Books
    held: tuple[Held, ...]
    runs: tuple[Run, ...]
    now: float
    tells_tokens: bool


def ledger(engine: Engine, tenant: str, *, tokens: bool) -> Ledger:
    """Copy what `blocks_of` needs; `tokens`: which tokens blocks hold may be told."""
    now = time.monotonic()
    held = (
        Held(s.owner, tuple(s.blocks), s.stored, tuple(s.tokens) if tokens else ())
        for s in engine.scheduler.running
        if s.owner.tenant == tenant
    )
    runs = tuple(engine.retained.of(tenant, now))
    books = engine.scheduler.pool.books()
    return Ledger(tenant, cache_state(engine, tenant), books, tuple(held), runs, now, tokens)


def blocks_of(ledger: Ledger) -> list[BlockState]:
    """The tenant's blocks, by number."""
    books, tenant = ledger.books, ledger.tenant
    holders: dict[int, list[Holder]] = {}
    for held in ledger.held:
        for i, block in enumerate(held.blocks):
            holders.setdefault(block, []).append(_holder(held.owner, i, held.stored, held.tokens, ledger))
    keepers = _keepers(ledger)
    numbers = sorted({*holders, *(block for block in books.idle if books.owners[block].tenant == tenant)})
    return [_block(ledger, block, tuple(holders.get(block, keepers.get(block, ())))) for block in numbers]


def _holder(owner: Owner, place: int, stored: int, tokens: tuple[int, ...], ledger: Ledger) -> Holder:
    size = ledger.state.page_size
    filled = max(0, min(size, stored - place * size))
    told = tokens[place * size : place * size + filled] if ledger.tells_tokens else ()
    return Holder(owner, place * size, filled, told)


def _keepers(ledger: Ledger) -> dict[int, list[Holder]]:
    """The finished completions that blocks are kept for."""
    keepers: dict[int, list[Holder]] = {}
    for run in ledger.runs:
        for completion in run.completions:
            owner = Owner(run.request.tenant, run.request.request_id, completion.index)
            for i, lease in enumerate(completion.leases):
                if ledger.books.generations[lease.block] == lease.generation:
                    holder = _holder(owner, i, completion.stored, completion.tokens, ledger)
                    keepers.setdefault(lease.block, []).append(holder)
    return keepers


def _block(ledger: Ledger, block: int, holders: tuple[Holder, ...]) -> BlockState:
    books = ledger.books
    references, kept = books.references[block], block in books.kept
    use = BlockUse.USED if references else BlockUse.RETAINED if kept else BlockUse.CACHED
    filled = max((holder.filled for holder in holders), default=ledger.state.page_size)
    idle = 0.0 if references else max(0.0, ledger.now - books.released[block])
    return BlockState(
        block, use, references, filled, books.digests.get(block, b""), holders, books.owners[block],
        max(0.0, ledger.now - books.taken[block]), idle,
    )  # fmt: skip


class Stage(Enum):
    """How far a request has come."""

    QUEUED = "queued"
    PREFILL = "prefill"  # its prompt is being read
    DECODE = "decode"
    PREEMPTED = "preempted"  # all of it has lost its blocks to older requests, and waits
    FINISHED = "finished"  # it has ended, and is kept


@dataclass(frozen=True, slots=True)
class CompletionState:
    """A completion, of a request with a computed prompt. `tokens` are those made, where they may be told."""

    index: int
    generated: int
    stored: int  # positions with K and V, from the first on
    blocks: int
    ended: str  # why; empty: it has not
    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class RequestState:
    """A request that the engine knows."""

    request_id: str
    stage: Stage
    n: int
    prompt_tokens: int
    cached_tokens: int
    computed_tokens: int  # of the prompt
    max_tokens: int
    preemptions: int
    age: float  # seconds since it arrived
    since_end: float | None  # seconds since it ended; None: it has not
    ahead: int  # sequences of the tenant that wait before it, if it waits
    completions: tuple[CompletionState, ...]
    prompt: tuple[int, ...]  # where it may be told


@dataclass(frozen=True, slots=True)
class RequestsState:
    """A tenant's requests, those that have ended before the others, oldest first; of all tenants only counts."""

    requests: tuple[RequestState, ...]
    live: int
    running: int  # completions
    waiting: int  # sequences
    finished: int


def requests_state(engine: Engine, tenant: str, *, tokens: bool) -> RequestsState:
    """Describe a tenant's requests; `tokens`: tell which tokens they have, too."""
    now, scheduler = time.monotonic(), engine.scheduler
    waiting = [sequence for sequence in scheduler.waiting if sequence.owner.tenant == tenant]
    ahead = {sequence: place for place, sequence in enumerate(waiting)}
    ended = [_ended(run, now, tokens) for run in engine.retained.of(tenant, now)]
    own = [live for live in engine.live.values() if live.request.tenant == tenant]
    return RequestsState(
        (*ended, *(_live(live, ahead, now, tokens) for live in own)), len(engine.live), scheduler.n_running,
        scheduler.n_waiting, engine.retained.count(now),
    )  # fmt: skip


def _ended(run: Run, now: float, tokens: bool) -> RequestState:
    prompt = len(run.request.prompt)
    completions = tuple(
        CompletionState(
            each.index, len(each.tokens) - prompt, each.stored, len(each.leases), each.reason.value,
            each.tokens[prompt:] if tokens else (),
        )
        for each in run.completions
    )  # fmt: skip
    sampling = run.request.sampling
    return RequestState(
        run.request.request_id, Stage.FINISHED, sampling.n, prompt, run.cached_tokens, prompt, sampling.max_tokens,
        run.timings.preemptions, now - run.request.arrival, now - run.ended, 0, completions,
        run.request.prompt if tokens else (),
    )  # fmt: skip


def _live(live: LiveRequest, ahead: dict[Sequence, int], now: float, tokens: bool) -> RequestState:
    sequences = _sequences(live)
    sampling = live.request.sampling
    prompt = len(live.request.prompt)
    waits = [ahead[sequence] for sequence in sequences if sequence in ahead]
    return RequestState(
        live.request.request_id, _stage(live, len(waits) == len(sequences)), sampling.n, prompt, live.cached_tokens,
        min(prompt, max(sequence.stored for sequence in sequences)), sampling.max_tokens, live.preemptions,
        now - live.request.arrival, None, min(waits, default=0),
        tuple(_completion(sequence, prompt, tokens) for sequence in sequences),
        live.request.prompt if tokens else (),
    )  # fmt: skip


def _sequences(live: LiveRequest) -> list[Sequence]:
    if live.prompt is not None:
        return [live.prompt.sequence]
    return [live.completions[index].sequence for index in sorted(live.completions)]


def _completion(sequence: Sequence, prompt: int, tokens: bool) -> CompletionState:
    known = sequence.tokens[:-1] if sequence.promised else sequence.tokens
    told = tuple(known[prompt:]) if tokens else ()
    return CompletionState(sequence.index, len(known) - prompt, sequence.stored, len(sequence.blocks), "", told)


def _stage(live: LiveRequest, waits: bool) -> Stage:
    if live.started is None:
        return Stage.QUEUED
    if waits:
        return Stage.PREEMPTED
    return Stage.PREFILL if live.prompt is not None else Stage.DECODE


def cached_prefix(digests: Items[bytes]) -> Callable[[Engine], int]:
    """How many of a prompt's first blocks, given by their digests, would be found in the prefix cache now."""
    return lambda engine: engine.scheduler.pool.holding(digests) if engine.scheduler.caches_prefixes else 0
