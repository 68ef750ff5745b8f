"""How the rows of a step draw, where none looks at its past: greedily, or from the whole vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cutaway_server.sampler import SampledBatch, SamplerState, SamplingBatch, sample
from cutaway_server.sampler.batch import Parameters, Paths
from cutaway_server.sampler.state import FLOATS, Path

FIELDS = 5  # of `Draws.numbers`


@dataclass(frozen=True, slots=True)
class Draws:
    """One row per sequence: temperature (by its bits), seed, index, position, and 1 where greedy. int64 [5, R]."""

    numbers: NDArray[np.int64]

    @property
    def greedy(self) -> bool:
        """Whether all rows take the likeliest token."""
        return bool(self.numbers[4].all())


def plain_draws(states: Sequence[SamplerState], positions: Sequence[int]) -> Draws | None:
    """What the rows ask for; None if one of them asks for more than a graph has."""
    if not all(map(_plain, states)):
        return None
    numbers = np.stack([state.numbers for state in states], axis=1)
    greedy = np.array([state.path is Path.GREEDY for state in states], np.int64)
    return Draws(np.stack([numbers[0], *numbers[FLOATS + 1 : FLOATS + 3], np.array(positions, np.int64), greedy]))


def _plain(state: SamplerState) -> bool:
    alone = state.biases is None and state.sampling.logprobs is None and not state.past_matters
    return alone and state.path in (Path.GREEDY, Path.PLAIN)


def draw(logits: Tensor, numbers: Tensor, *, greedy: bool) -> tuple[Tensor, Tensor]:
    """Tokens and whether they are valid, int64 and bool [R], of `Draws.numbers` on the device of the logits [R, V].

    The sampler's own greedy and plain paths, each over all rows: which one counts is chosen row by row, on the device.
    """
    everyone = torch.arange(len(logits), device=logits.device)
    likeliest = _sample(logits, numbers, greedy=everyone)
    if greedy:
        return likeliest.tokens, likeliest.valid
    drawn = _sample(logits, numbers, plain=everyone)
    return torch.where(numbers[4] == 1, likeliest.tokens, drawn.tokens), drawn.valid


def _sample(logits: Tensor, numbers: Tensor, greedy: Tensor | None = None, plain: Tensor | None = None) -> SampledBatch:
    temperature = numbers[0].contiguous().view(torch.float64)
    one, none = torch.ones_like(temperature), torch.zeros_like(numbers[1])
    parameters = Parameters(temperature, one, one, one, one, one, one, none, numbers[1], numbers[2], numbers[3])
    paths = Paths(greedy, plain, None, None, 0, any_long_k=False, any_top_p=False, any_min_p=False, any_typical_p=False)
    return sample(logits, SamplingBatch(parameters, paths))
