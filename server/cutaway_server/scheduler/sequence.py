"""One completion while it is computed, and what one step computes of it."""

from __future__ import annotations

from dataclasses import dataclass, field

from cutaway_server.request import Request


@dataclass(slots=True, eq=False, repr=False)
class Sequence:
    """One completion. It changes, and so lives on the engine thread only.

    0 <= next <= stored <= len(tokens)     or, while nothing is revisited, next == stored
    blocks cover [0, len(tokens)) while it runs, and are none while it waits
    """

    request: Request
    index: int
    order: tuple[int, int]  # arrival number and index: the smaller, the older
    tokens: list[int]  # prompt and output
    slots: int = 1  # completions it stands for: `sampling.n` until it is forked
    blocks: list[int] = field(default_factory=list)
    stored: int = 0  # positions [0, stored) have K/V in its blocks
    next: int = 0  # the next position to compute a row for: below `stored` while it revisits
    scored: int = 0  # prompt rows [0, scored) were computed once, so their log-probabilities were delivered
    finished: bool = False
    preemptions: int = 0
    digests: list[bytes] = field(default_factory=list)  # of its full blocks; grows with the tokens

    @property
    def prompt_length(self) -> int:
        """Number of prompt tokens."""
        return len(self.request.prompt)

    @property
    def pending(self) -> int:
        """Number of rows to compute until a token can be sampled."""
        return len(self.tokens) - self.next

    def __repr__(self) -> str:
        name = f"{self.request.request_id}/{self.index}"
        return f"<Sequence {name}: {self.next} of {len(self.tokens)} computed, {self.stored} stored>"


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
