"""What one step is looked at for: which rows of it, at which points, for which capture of which request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from cutaway_server.captures import Capture


@dataclass(slots=True)
class Pooled:
    """A picture in the making: the cells of each layer [heads, size, size] of a prompt so far."""

    cells: dict[int, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class Look:
    """The rows of a step that capture `number` of a request is about: one sequence's, in ascending order."""

    request_id: str
    number: int
    capture: Capture
    index: int | None  # of the completion; None: rows of the prompt
    sequence: int  # place in the batch
    rows: tuple[int, ...]  # of the batch
    positions: tuple[int, ...]  # absolute, one for each row
    revisited: int
    tokens: Sequence[int]  # of the whole sequence
    prompt_length: int
    pooled: Pooled | None = None

    @property
    def alike(self) -> object:
        """What looks that can be computed together have in common."""
        capture = self.capture
        together = (capture.template, capture.layers, capture.heads, capture.keys, capture.reduction)
        return (*together, capture.elements, capture.dtype, capture.after_edits)
