"""One row followed from its logits to its token: what `sample` itself did, stage by stage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from cutaway_server.sampler.batch import SamplingBatch
from cutaway_server.sampler.choose import sample
from cutaway_server.sampler.draw import distances

FILTERS = ("top_k", "top_p", "min_p", "typical_p")  # in the order in which they are applied

Values = NDArray[Any]
Logits = NDArray[np.float32]
Probabilities = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Followed:
    """What the stages of one row left, by their names, on the host; `Stages.of` makes sense of it, on any thread."""

    noted: dict[str, Values]
    token: int
    valid: bool


@dataclass(frozen=True, slots=True, eq=False)
class Filtered:
    """What a filter left: bool [V], and its mass among all tokens' probabilities after temperature."""

    name: str
    kept: NDArray[np.bool_]
    mass: float


@dataclass(frozen=True, slots=True, eq=False)
class Stages:
    """A row's way. Arrays are [V]; `adjusted` is -inf for tokens that must not be drawn."""

    logits: Logits
    biased: Logits
    penalised: Logits
    adjusted: Logits
    scaled: Logits  # how far below the likeliest, in units of the temperature (of 1 in greedy rows): 0 or less
    probabilities: Probabilities  # after temperature, before filters
    filters: tuple[Filtered, ...]
    final: Probabilities  # what the number is drawn against; of a greedy row, 1 for the likeliest
    order: NDArray[np.int64]  # tokens that could be drawn, [N], as the number runs over them
    likeliest_first: bool
    uniform: float | None  # None: greedy
    token: int

    @classmethod
    def of(cls, followed: Followed) -> Stages:
        """The way of a row whose token is valid."""
        noted = followed.noted
        scaled: Logits = np.subtract(0, noted["distances"], dtype=np.float32)
        likelihood = np.exp(scaled.astype(np.float64))
        probabilities = likelihood / likelihood.sum()
        kept = [(name, _whole(noted[name], noted.get("places"), len(scaled))) for name in FILTERS if name in noted]
        filters = tuple(Filtered(name, each, float(probabilities[each].sum())) for name, each in kept)
        final = np.where(kept[-1][1], probabilities, 0.0) if kept else probabilities
        uniform = float(noted["uniform"]) if "uniform" in noted else None
        if uniform is None:
            final = np.zeros_like(probabilities)
            final[followed.token] = 1.0
        order = noted.get("places", np.arange(len(final)))
        biased = noted.get("biased", noted["logits"])
        return cls(
            noted["logits"], biased, noted.get("penalised", biased), noted["adjusted"], scaled, probabilities, filters,
            final / final.sum(), order[final[order] > 0], "places" in noted, uniform, followed.token,
        )  # fmt: skip

    def rank(self, token: int) -> int:
        """How many tokens come before this one in the adjusted logits: 0 is the likeliest, lower ids among equals."""
        mine = self.adjusted[token]
        return int((self.adjusted > mine).sum() + (self.adjusted[:token] == mine).sum())

    def top(self, count: int) -> list[int]:
        """So many of the likeliest tokens by the adjusted logits, likeliest first, lower ids among equals."""
        count = min(count, len(self.adjusted))
        if count == 0:
            return []
        least = np.partition(self.adjusted, -count)[-count]
        likely = np.flatnonzero(self.adjusted >= least)
        found: list[int] = likely[np.argsort(-self.adjusted[likely], kind="stable")][:count].tolist()
        return found

    def share(self, token: int) -> tuple[float, float] | None:
        """The numbers that pick this token, from the first up to (not with) the last; None: none does."""
        place = np.flatnonzero(self.order == token)
        if self.uniform is None or not len(place):
            return None
        running = np.concatenate([[0.0], self.final[self.order].cumsum()])
        return float(running[place[0]]), float(running[place[0] + 1])

    def removed_by(self, token: int) -> str:
        """The first filter that took the token out, "ban" if it must not be drawn at all; empty: none did."""
        if self.adjusted[token] == -np.inf:
            return "ban"
        return next((each.name for each in self.filters if not each.kept[token]), "")


def follow(logits: Tensor, batch: SamplingBatch) -> Followed:
    """Sample one row, logits [1, V], and keep what its stages leave."""
    notes = {"logits": logits.float()}

    def note(stage: str, value: Tensor) -> None:
        notes[stage] = value.clone()

    sampled = sample(logits, batch, note)
    adjusted = notes["adjusted"]
    notes["distances"] = distances(adjusted, adjusted.amax(1), batch.parameters.temperature)
    noted = {stage: value[0].cpu().numpy() for stage, value in notes.items()}
    return Followed(noted, int(sampled.tokens), bool(sampled.valid))


def _whole(kept: Values, places: Values | None, size: int) -> NDArray[np.bool_]:
    """A set of candidates as a set of tokens, bool [size]."""
    if places is None:
        return kept.astype(np.bool_)
    whole = np.zeros(size, np.bool_)
    whole[places] = kept
    return whole
