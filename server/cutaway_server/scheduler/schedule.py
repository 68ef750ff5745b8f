"""What one step computes."""

from __future__ import annotations

from dataclasses import dataclass, field

from cutaway_server.scheduler.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Work:
    """Rows [start, stop) of one sequence. Those below `stored` are revisited: they read pages and store nothing."""

    sequence: Sequence
    start: int
    stop: int
    stored: int

    @property
    def samples(self) -> bool:
        """Whether the last row's logits choose a token. Ask before the step's tokens are appended."""
        return self.stop == len(self.sequence.tokens) and self.sequence.request.sampling.max_tokens > 0


@dataclass(frozen=True, slots=True)
class Schedule:
    """One step. Its page copies come first, all reads before or in order with the writes; then its rows, decodes first.

    `expired` and `exhausted` sequences are finished already and have given their blocks back: only their clients
    are to be told. A step that fails can't be repeated: finish the sequences it has work for.
    """

    work: tuple[Work, ...] = ()
    copies: tuple[tuple[int, int], ...] = ()  # pages, source to destination: a shared block is about to be written
    started: tuple[tuple[Sequence, int], ...] = ()  # admitted for the first time, with tokens found in the cache
    preempted: tuple[Sequence, ...] = ()  # lost their blocks, and wait to be recomputed
    expired: tuple[Sequence, ...] = ()  # their deadline has passed
    exhausted: tuple[Sequence, ...] = ()  # ran alone and outgrew the whole pool: they end for LENGTH
    decodes: int = 0  # so many of its rows are decodes; all others are of prompts

    @property
    def prompt_rows(self) -> int:
        """Rows of prompts."""
        return sum([work.stop - work.start for work in self.work]) - self.decodes


@dataclass(slots=True)
class Draft:
    """A schedule in the making."""

    budget: int  # rows left
    decodes: int = 0
    work: list[Work] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    started: list[tuple[Sequence, int]] = field(default_factory=list)
    preempted: list[Sequence] = field(default_factory=list)
    expired: list[Sequence] = field(default_factory=list)
    exhausted: list[Sequence] = field(default_factory=list)

    def give_rows(self, sequence: Sequence) -> int:
        """Give `sequence` as many of its pending rows as the budget has: the number."""
        rows = sequence.run(self.budget)
        if rows:
            self.work.append(Work(sequence, sequence.next, sequence.next + rows, sequence.stored))
            self.budget -= rows
        return rows

    def freeze(self) -> Schedule:
        """The schedule as it goes to the engine."""
        return Schedule(
            work=tuple(self.work),
            copies=tuple(self.copies),
            started=tuple(self.started),
            preempted=tuple(self.preempted),
            expired=tuple(self.expired),
            exhausted=tuple(self.exhausted),
            decodes=self.decodes,
        )
