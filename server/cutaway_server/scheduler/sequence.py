"""One completion while it is computed."""

from __future__ import annotations

from dataclasses import dataclass, field

from cutaway_server.request import Request


@dataclass(slots=True, eq=False, repr=False)
class Sequence:
    """One completion. It changes, and so lives on the engine thread only.

    While it runs `0 <= next <= stored <= len(tokens)`, and its blocks cover all its tokens once a step is scheduled.
    While it waits it has no blocks, and nothing is stored.
    """

    request: Request
    index: int
    order: tuple[int, int, int]  # priority (turned round), arrival number, index: the smaller, the sooner
    tokens: list[int]  # prompt and output
    slots: int = 1  # completions it stands for: `sampling.n` until it is forked
    blocks: list[int] = field(default_factory=list)  # grows in place; any other change is a new list
    stored: int = 0  # positions [0, stored) have K/V in its blocks
    next: int = 0  # the next position to compute a row for: below `stored` while it revisits
    scored: int = 0  # prompt rows [0, scored) were computed once, so their log-probabilities were delivered
    finished: bool = False
    promised: bool = False  # its last token is being drawn: the place is taken, what it is is not known yet
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
