"""One completion while it is computed."""

from __future__ import annotations

from dataclasses import dataclass, field

from cutaway_server.cache.events import Owner
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
    told: int = 0  # what was to be seen of rows [0, told) was delivered
    finished: bool = False
    promised: bool = False  # its last token is being drawn: the place is taken, what it is is not known yet
    preemptions: int = 0
    digests: list[bytes] = field(default_factory=list)  # of its full blocks; grows with the tokens
    owner: Owner = field(init=False)

    def __post_init__(self) -> None:
        self.owner = Owner(self.request.tenant, self.request.request_id, self.index)

    @property
    def prompt_length(self) -> int:
        """Number of prompt tokens."""
        return len(self.request.prompt)

    @property
    def pending(self) -> int:
        """Number of rows to compute until a token can be sampled."""
        return len(self.tokens) - self.next

    def run(self, most: int) -> int:
        """Number of rows to compute next: what is pending, but of those revisited only the wanted."""
        most = min(most, self.pending)
        if self.next >= self.stored or not self.request.captures:
            return most
        for row in range(self.next + 1, min(self.next + most, self.stored)):
            if self.wanted_from(row) > row:
                return row - self.next
        return most

    def wanted_from(self, position: int) -> int:
        """The first row from `position` on that has to be computed: what is stored is computed only if it is wanted.

        Even if all is stored, the last row has to be.
        """
        wanted = max(position, min(self.stored, len(self.tokens) - 1))
        if self.request.sampling.prompt_logprobs is not None and self.scored < self.prompt_length - 1:
            wanted = min(wanted, max(position, self.scored))
        if self.request.captures:
            captured = self.request.first_captured(max(position, self.told))
            wanted = wanted if captured is None else min(wanted, captured)
        return wanted

    def __repr__(self) -> str:
        name = f"{self.request.request_id}/{self.index}"
        return f"<Sequence {name}: {self.next} of {len(self.tokens)} computed, {self.stored} stored>"
