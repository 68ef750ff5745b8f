"""An engine that never lets the device wait: a decode step is launched before the tokens of the last one are read.

Tokens that are drawn stay on the device, where the next step finds them; the host learns of them while that step
computes. A completion that turns out to have ended has computed one row for nothing. Its blocks may be given to others
at once, for the device does everything in order.

Only steps in which every row decodes, and draws greedily or from the whole vocabulary, go this way. All others wait for
what is on its way and then take the plain engine's.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cutaway_server.cache.pages import Pages
from cutaway_server.engine.batch import BatchBuilder
from cutaway_server.engine.draws import Draws, plain_draws
from cutaway_server.engine.engine import Draw, Engine, Events
from cutaway_server.engine.graphs import DecodeGraphs, GraphedTransformer, Launched
from cutaway_server.engine.observed import FORWARD, PREPARE, REPORT, SAMPLE, SCHEDULE
from cutaway_server.scheduler import Schedule, Scheduler


@dataclass(frozen=True, slots=True)
class Flight:
    """A step on its way: row i of it is drawn for draws[i]."""

    schedule: Schedule
    draws: list[Draw]
    launched: Launched


class AheadEngine(Engine):
    """Computes completions like `Engine`, and tells of decoded tokens one call of `step` later."""

    def __init__(self, graphs: DecodeGraphs, pages: Pages, scheduler: Scheduler, builder: BatchBuilder) -> None:
        super().__init__(GraphedTransformer(graphs), pages, scheduler, builder)
        self.graphs = graphs
        self._flight: Flight | None = None

    @property
    def computing(self) -> bool:
        """Whether a step is on its way."""
        return self._flight is not None

    def step(self) -> Events:
        """Launch or compute one step, and tell what came of it or of the one before."""
        self.observed.begin()
        if self._flight is not None and not self._may_run_ahead(self._flight):
            return self._land()
        flight = self._flight
        if flight is not None:
            self.scheduler.complete(flight.schedule)
            for draw in _unfinished(flight):
                self.scheduler.promise(draw.completion.sequence)
        begun = time.monotonic()
        schedule = self.scheduler.schedule(begun)
        draws = self._plain(schedule)
        if draws is None and flight is None:
            return self._run(schedule, begun)
        events = [*self._refused(schedule), *self._started(schedule)]
        if draws is not None:
            return events + self._launch(schedule, draws, flight)
        assert flight is not None
        assert not schedule.work, "what runs ahead only decodes, or has come to its end"
        self._flight = None
        return events + self._tell(flight)

    def _may_run_ahead(self, flight: Flight) -> bool:
        """Whether the next step is sure to be of the same sequences, each with room for one row more."""
        scheduler, left = self.scheduler, _unfinished(flight)
        lengths = [len(draw.completion.sequence.tokens) for draw in left]
        return (
            0 < len(left) == len(scheduler.running)
            and scheduler.settled
            and scheduler.pool.available >= 2 * len(left)  # nor preempted: each has room for a block, and for a copy
            and max(lengths) + 1 < scheduler.max_context
        )

    def _plain(self, schedule: Schedule) -> tuple[list[Draw], Draws] | None:
        """The draws of a step that only decodes, and how; None if it does anything else."""
        found: list[Draw] = []
        for row, work in enumerate(schedule.work):
            sequence = work.sequence
            live = self.live.get(sequence.request.request_id)
            decodes = work.stop - work.start == 1 and work.samples and work.start >= sequence.prompt_length
            if not decodes or live is None or live.prompt is not None or live.request.probed:
                return None
            found.append(Draw(live, live.completions[sequence.index], row, self.steps + 1))
        if not found:
            return None
        positions = [len(draw.completion.sequence.tokens) for draw in found]
        plain = plain_draws([draw.completion.sampler for draw in found], positions)
        return None if plain is None else (found, plain)

    def _launch(self, schedule: Schedule, draws: tuple[list[Draw], Draws], before: Flight | None) -> Events:
        """Start a step, then tell of the one before."""
        self.observed.mark(SCHEDULE)
        self._copy(schedule)
        self.steps += 1
        batch = self.builder.build(schedule.work, [1] * len(schedule.work))
        launched = self.graphs.launch(batch, draws[1], None if before is None else _rows_before(schedule, before))
        self._flight = Flight(schedule, draws[0], launched)
        self.observed.mark(PREPARE)
        self.before_layers()
        self.observed.mark(REPORT)
        events = [] if before is None else self._tell(before)
        self.observed.step(schedule)
        self.watched.computed(schedule, self.steps)
        return events

    def _land(self) -> Events:
        """Wait for the step on its way, and tell of it."""
        flight = self._flight
        assert flight is not None
        self._flight = None
        self.scheduler.complete(flight.schedule)
        return self._tell(flight)

    def _tell(self, flight: Flight) -> Events:
        tokens, valid = flight.launched.tokens()
        self.observed.mark(FORWARD)
        draws = _unfinished(flight)
        events = self._take(draws, [(tokens[draw.row], valid[draw.row], None) for draw in draws])
        self.observed.mark(SAMPLE)
        return events


def _unfinished(flight: Flight) -> list[Draw]:
    """The draws of those who have not been ended since."""
    return [draw for draw in flight.draws if not draw.completion.sequence.finished]


def _rows_before(schedule: Schedule, before: Flight) -> NDArray[np.int64]:
    """For each row its row in the step before, whose token it computes."""
    rows = {draw.completion.sequence: draw.row for draw in before.draws}
    return np.array([rows[work.sequence] for work in schedule.work], dtype=np.int64)
