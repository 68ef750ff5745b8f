"""Steps and changes of blocks, written down while somebody watches; otherwise nothing is.

What is written down tells of all tenants: whoever passes it on takes out what is not theirs.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass, replace
from typing import NamedTuple

from cutaway_server.cache.events import BlockEvent, Owner
from cutaway_server.request import Event, Sampled
from cutaway_server.scheduler import Schedule, Scheduler


class StepRow(NamedTuple):
    """Positions [start, stop) of a completion, computed in a step. `tokens` are theirs where those may be told."""

    owner: Owner
    start: int
    stop: int
    revisited: int  # so many of them were stored before
    tokens: tuple[int, ...]


class NewToken(NamedTuple):
    """A token that was drawn, in step `step`."""

    owner: Owner
    step: int
    token: int


@dataclass(frozen=True, slots=True)
class StepReport:
    """One step. Where the engine runs ahead of its device, tokens are told with a later step, or without one."""

    step: int
    time: float  # when it was over, in seconds since 1970
    seconds: tuple[float, ...]  # by phase, as `observed.PHASES`; empty for tokens that come without a step
    rows: tuple[StepRow, ...]
    sampled: tuple[NewToken, ...]
    started: tuple[tuple[Owner, int], ...]  # admitted for the first time, with tokens found in the prefix cache
    preempted: tuple[Owner, ...]
    copies: int  # blocks that were copied before they were written
    running: int  # completions, after it
    waiting: int
    used: int  # blocks, after it
    cached: int


@dataclass(frozen=True, slots=True)
class Told:
    """What has happened since watchers were last told."""

    steps: tuple[StepReport, ...]
    blocks: tuple[BlockEvent, ...]


class Watched:
    """Belongs to the engine's thread. `tell` is called there, and must return at once."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._steps = False
        self._tokens = False
        self._tell: Callable[[Told], None] = lambda _: None
        self._schedule: Schedule | None = None
        self._rows: tuple[StepRow, ...] = ()
        self._owners: dict[tuple[str, int], Owner] = {}  # of the last two steps' rows
        self._sampled: list[NewToken] = []
        self._reports: list[StepReport] = []
        self._step = 0

    def watch(self, tell: Callable[[Told], None], *, steps: bool, blocks: bool, tokens: bool) -> None:
        """Write down, from now on, what is asked for, and nothing else; `tokens`: also which tokens rows have."""
        self._tell, self._steps, self._tokens = tell, steps, tokens
        pool = self._scheduler.pool
        pool.log = (pool.log or []) if blocks else None
        if not steps:
            self._schedule, self._rows, self._owners = None, (), {}
            self._sampled.clear()
            self._reports.clear()

    def computed(self, schedule: Schedule, step: int) -> None:
        """A step has been computed, or is on its way."""
        if not self._steps:
            return
        before = self._rows
        self._schedule, self._step = schedule, step
        self._rows = tuple(
            [
                StepRow(
                    work.sequence.owner, work.start, work.stop, max(0, min(work.stop, work.stored) - work.start),
                    tuple(work.sequence.tokens[work.start : work.stop]) if self._tokens else (),
                )
                for work in schedule.work
            ]
        )  # fmt: skip
        if len(before) != len(self._rows) or any(a[0] is not b[0] for a, b in zip(before, self._rows, strict=True)):
            self._owners = {(row.owner.request_id, row.owner.index): row.owner for row in (*before, *self._rows)}

    def over(self, events: Items[tuple[str, Event]], seconds: Items[float]) -> None:
        """A call of `Engine.step` is over, these events came of it, and it took so long by phase."""
        if not self._steps:
            return
        self._sampled += [
            NewToken(owner, event.step, event.token)
            for name, event in events
            if type(event) is Sampled and (owner := self._owner(name, event.index)) is not None
        ]
        if self._schedule is not None:
            self._reports.append(self._report(self._schedule, self._rows, tuple(seconds)))
        elif self._sampled:
            self._reports.append(self._report(Schedule(), (), ()))
        self._schedule = None

    def _owner(self, name: str, index: int) -> Owner | None:
        """Whose token it is. A twin's first one comes out of the prompt's row, which was completion 0's.

        None if its row was computed before anybody watched.
        """
        owner = self._owners.get((name, index))
        if owner is None and (name, 0) in self._owners:
            owner = replace(self._owners[name, 0], index=index)
        return owner

    def _report(self, schedule: Schedule, rows: tuple[StepRow, ...], seconds: tuple[float, ...]) -> StepReport:
        scheduler = self._scheduler
        sampled, self._sampled = tuple(self._sampled), []
        return StepReport(
            step=self._step, time=time.time(), seconds=seconds, rows=rows, sampled=sampled,
            started=tuple((sequence.owner, cached) for sequence, cached in schedule.started),
            preempted=tuple(sequence.owner for sequence in schedule.preempted), copies=len(schedule.copies),
            running=scheduler.n_running, waiting=scheduler.n_waiting, used=scheduler.pool.used,
            cached=scheduler.pool.cached,
        )  # fmt: skip

    def flush(self) -> None:
        """Tell what has been written down."""
        pool = self._scheduler.pool
        if not self._reports and not pool.log:
            return
        told = Told(tuple(self._reports), tuple(pool.log or ()))
        self._reports.clear()
        if pool.log:
            pool.log = []
        self._tell(told)
