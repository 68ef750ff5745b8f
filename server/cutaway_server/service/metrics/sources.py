"""Where metrics are read: the engine, its thread, and what is known of both. Reading changes nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cutaway_server.cache.blocks import BlockPool
from cutaway_server.config import Config
from cutaway_server.engine.build import EngineFacts
from cutaway_server.engine.engine import Engine
from cutaway_server.engine.footprint import tensor_bytes
from cutaway_server.engine.machine import empty_positions
from cutaway_server.engine.observed import Observed
from cutaway_server.engine.thread import EngineThread
from cutaway_server.scheduler import Sequence


@dataclass(frozen=True, slots=True)
class Sources:
    """A running engine, as metrics see it from their own thread.

    What the engine's thread changes meanwhile is read in single steps (a list's copy, a length, a number), so that a
    value can be a step old but never torn.
    """

    config: Config
    facts: EngineFacts
    thread: EngineThread
    weights_bytes: int
    pool_bytes: int

    @classmethod
    def of(cls, config: Config, facts: EngineFacts, thread: EngineThread) -> Sources:
        """The sources of an engine that has been warmed up: what it holds is counted here, once."""
        engine = thread.engine
        weights = tensor_bytes(engine.model.kernels, apart_from=engine.pages)
        return cls(config, facts, thread, weights, tensor_bytes(engine.pages))

    @property
    def engine(self) -> Engine:
        """What computes."""
        return self.thread.engine

    @property
    def observed(self) -> Observed:
        """What it has done."""
        return self.engine.observed

    @property
    def pool(self) -> BlockPool:
        """Its blocks."""
        return self.engine.scheduler.pool

    def running(self) -> int:
        """Requests with at least one sequence that holds blocks."""
        return len(_requests(self.engine.scheduler.running.copy()))

    def waiting(self) -> Mapping[str, int]:
        """Requests of which nothing runs, by why they wait."""
        scheduler = self.engine.scheduler
        waiting, running = scheduler.waiting.copy(), _requests(scheduler.running.copy())
        preempted = _requests([sequence for sequence in waiting if sequence.preemptions]) - running
        fresh = _requests([sequence for sequence in waiting if not sequence.preemptions]) - running - preempted
        return {"capacity": len(fresh) + self.thread.queued, "preempted": len(preempted)}

    def blocks(self) -> Mapping[str, int]:
        """Blocks of the pool by what they are: referenced, evictable, or empty."""
        free, cached = self.pool.free, self.pool.cached
        return {"used": self.pool.capacity - free - cached, "cached": cached, "free": free}

    @property
    def block_bytes(self) -> int:
        """Bytes of a block."""
        return self.pool_bytes // self.engine.pages.n_pages

    def usage(self) -> float:
        """The share of the pool that requests hold."""
        return self.blocks()["used"] / self.pool.capacity

    def fragmentation(self) -> float:
        """The share of the positions in blocks that requests hold that hold nothing (yet). 0 if none are held."""
        empty = empty_positions(self.engine.scheduler.running.copy(), self.pool.page_size)
        return min(1.0, empty / max(1, self.blocks()["used"] * self.pool.page_size))


def _requests(sequences: list[Sequence]) -> set[str]:
    return {sequence.request.request_id for sequence in sequences}
