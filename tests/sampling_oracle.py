"""A naive sampler for one row: Python integers and numpy in float64, from the contract's words alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Row = NDArray[np.float64]


@dataclass
class Way:
    """Every stage of a row: see `way`."""

    biased: Row
    penalised: Row
    adjusted: Row
    probabilities: Row
    left: dict[str, NDArray[np.bool_]] = field(default_factory=dict)
    token: int = -1


def way(
    logits: Row, number: float, prompt: list[int], output: list[int], *, temperature: float = 1.0, top_k: int = 0,
    top_p: float = 1.0, min_p: float = 0.0, typical_p: float = 1.0, repetition_penalty: float = 1.0,
    presence_penalty: float = 0.0, frequency_penalty: float = 0.0, logit_bias: dict[int, float] | None = None,
    banned: Iterable[int] = (),
) -> Way:  # fmt: skip
    """Choose a token by a number in [0, 1)."""
    biased = logits.astype(np.float64)
    for token, bias in (logit_bias or {}).items():
        biased[token] += bias
    penalised = biased.copy()
    for token in {*prompt, *output}:
        value = penalised[token]
        penalised[token] = value / repetition_penalty if value > 0 else value * repetition_penalty
        count = output.count(token)
        penalised[token] -= frequency_penalty * count + presence_penalty * (count > 0)
    adjusted = penalised.copy()
    adjusted[list(banned)] = -np.inf
    found = Way(biased, penalised, adjusted, softmax(adjusted / (temperature or 1.0)))
    if temperature == 0.0:
        found.token = int(np.argmax(adjusted))
        return found
    p = found.probabilities
    down = np.argsort(-p, kind="stable")
    kept = np.ones(len(p), np.bool_)
    if top_k:
        kept[down[top_k:]] = False
        found.left["top_k"] = kept.copy()
    if top_p < 1.0:
        kept &= smallest(np.where(kept, p, 0.0), down, top_p)
        found.left["top_p"] = kept.copy()
    if min_p > 0.0:
        kept &= p >= min_p * p.max()
        found.left["min_p"] = kept.copy()
    if typical_p < 1.0:
        q = np.where(kept, p, 0.0) / p[kept].sum()
        surprise = -np.log(np.where(q > 0, q, 1.0))
        entropy = (q * surprise).sum()
        kept &= smallest(q, np.argsort(np.where(kept, np.abs(surprise - entropy), np.inf), kind="stable"), typical_p)
        found.left["typical_p"] = kept.copy()
    order = down if 0 < top_k <= 256 else np.arange(len(p))
    running = np.cumsum(np.where(kept, p, 0.0)[order])
    found.token = int(order[np.searchsorted(running, number * running[-1], side="right")])
    return found


def smallest(weights: Row, order: NDArray[np.intp], mass: float) -> NDArray[np.bool_]:
    """The first of `order` that together have this share of the weights."""
    running = np.cumsum(weights[order])
    kept = np.zeros(len(weights), np.bool_)
    kept[order[: int(np.searchsorted(running, mass * running[-1])) + 1]] = True
    return kept


def softmax(values: Row) -> Row:
    """Probabilities of logits."""
    likelihood = np.exp(values - values.max())
    return np.asarray(likelihood / likelihood.sum())


def number_of(seed: int, index: int, position: int) -> float:
    """The number of a seed, a completion and a position: Philox4x32-10, word by word."""
    words = [position & 0xFFFFFFFF, position >> 32, index, 0]
    key = [seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF]
    for _ in range(10):
        first, second = 0xD2511F53 * words[0], 0xCD9E8D57 * words[2]
        words = [
            (second >> 32) ^ words[1] ^ key[0], second & 0xFFFFFFFF,
            (first >> 32) ^ words[3] ^ key[1], first & 0xFFFFFFFF,
        ]  # fmt: skip
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return ((words[0] >> 5) * 2**26 + (words[1] >> 6)) / 2**53
