"""Who follows the sampler is told what its stages leave, by the stages themselves."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

# Called with a stage's name and what it leaves, which the next stage may change in place.
Note = Callable[[str, Tensor], None]


def unnoted(stage: str, value: Tensor) -> None:
    """Nobody follows."""
