"""What one completion brings to the sampler: its parameters, made ready once, and the past that they look at."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from cutaway_server.request import SamplingParams

Integers = NDArray[np.int64]

LARGEST_SHORT = 256  # top_k up to here picks candidates, above it filters the vocabulary
FLOATS = 7  # of `SamplerState.numbers`
LEAST_TEMPERATURE = 1e-30  # fp32 has no room for less; all but the likeliest are at -inf long before


class Path(Enum):
    """How a row's token is chosen: it follows from the row's own parameters."""

    GREEDY = 0
    PLAIN = 1
    SHORT = 2
    LONG = 3


class SamplerState:
    """One completion's parameters and past. Lives on the engine's thread.

    Args:
        sampling: the request's parameters.
        prompt: its prompt.
        vocab_size: ids are in [0, vocab_size).
        index: which of the request's completions this is.
    """

    __slots__ = ("_end_tokens", "_length", "_reach", "_tail", "_words", "biases", "numbers", "path", "sampling", "seen")

    def __init__(self, sampling: SamplingParams, prompt: Sequence[int], vocab_size: int, index: int = 0) -> None:
        ends = [token for token in sampling.eos_token_ids | sampling.stop_token_ids if token < vocab_size]
        self.sampling = sampling
        self.path = _path(sampling, vocab_size)
        self.numbers = _numbers(sampling, index)
        self.biases = _biases(sampling)
        self.seen = SeenTokens(prompt if sampling.repetition_penalty != 1.0 else ()) if sampling.penalised else None
        self._length = 0  # tokens of output
        self._end_tokens = np.array(ends, np.int64)
        self._words = _by_token_before(sampling.bad_words)
        self._reach = max((len(word) - 1 for word in sampling.bad_words), default=0)  # how far back they look
        self._tail = self._last(tuple(prompt))

    @property
    def past_matters(self) -> bool:
        """Whether what a step is asked changes with the tokens so far, and not only with their number."""
        return self.seen is not None or bool(self._words) or self._length < self.sampling.min_tokens

    def append(self, token: int) -> None:
        """Take a drawn token into the past."""
        self._length += 1
        if self._reach:
            self._tail = self._last((*self._tail, token))
        if self.seen is not None:
            self.seen.add(token)

    def fork(self, index: int) -> SamplerState:
        """The same past for another completion of the request; from here on each goes its own way."""
        twin = copy(self)
        twin.numbers = _numbers(self.sampling, index)
        twin.seen = None if self.seen is None else self.seen.copy()
        return twin

    def banned(self) -> Integers:
        """Tokens that must not come next: last tokens of bad words, and all end tokens while under min_tokens."""
        candidates = [*self._words.get((), ()), *self._words.get(self._tail[-1:], ())] if self._words else []
        lasts = [last for before, last in candidates if self._last(self._tail, len(before)) == before]
        words = np.array(lasts, np.int64)
        return np.concatenate([words, self._end_tokens]) if self._length < self.sampling.min_tokens else words

    def _last(self, tokens: tuple[int, ...], reach: int | None = None) -> tuple[int, ...]:
        reach = self._reach if reach is None else reach
        return tokens[max(len(tokens) - reach, 0) :]


class SeenTokens:
    """The distinct tokens so far and how often each is in the output: arrays that grow, never rebuilt."""

    __slots__ = ("_counts", "_slots", "_tokens")

    def __init__(self, prompt: Sequence[int]) -> None:
        distinct = np.unique(np.asarray(prompt, dtype=np.int64))
        self._slots = {token: slot for slot, token in enumerate(distinct.tolist())}
        self._tokens = np.concatenate([distinct, np.zeros(64, np.int64)])
        self._counts = np.zeros(len(self._tokens), np.int64)

    @property
    def tokens(self) -> Integers:
        """The distinct tokens, in order of first sight."""
        return self._tokens[: len(self._slots)]

    @property
    def counts(self) -> Integers:
        """How often each is in the output."""
        return self._counts[: len(self._slots)]

    def add(self, token: int) -> None:
        """Count one more token of the output."""
        slot = self._slots.setdefault(token, len(self._slots))
        if slot == len(self._tokens):
            self._tokens = np.concatenate([self._tokens, np.zeros_like(self._tokens)])
            self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
        self._tokens[slot] = token
        self._counts[slot] += 1

    def copy(self) -> SeenTokens:
        """A copy that grows by itself."""
        twin = SeenTokens.__new__(SeenTokens)
        twin._slots, twin._tokens, twin._counts = self._slots.copy(), self._tokens.copy(), self._counts.copy()
        return twin


def _path(sampling: SamplingParams, vocab_size: int) -> Path:
    if sampling.greedy:
        return Path.GREEDY
    if 0 < sampling.top_k <= min(LARGEST_SHORT, vocab_size):
        return Path.SHORT
    filtered = 0 < sampling.top_k < vocab_size or sampling.top_p < 1.0 or sampling.min_p > 0.0
    return Path.LONG if filtered or sampling.typical_p < 1.0 else Path.PLAIN


def _numbers(sampling: SamplingParams, index: int) -> Integers:
    """The parameters in one array, floats by their bits: `build.py` stacks them."""
    temperature = 1.0 if sampling.greedy else max(sampling.temperature, LEAST_TEMPERATURE)
    floats = np.array(
        [
            temperature,
            sampling.top_p,
            sampling.min_p,
            sampling.typical_p,
            sampling.repetition_penalty,
            sampling.presence_penalty,
            sampling.frequency_penalty,
        ]
    )
    return np.concatenate([floats.view(np.int64), np.array([sampling.top_k, sampling.seed, index], np.int64)])


def _biases(sampling: SamplingParams) -> tuple[Integers, Integers] | None:
    """Tokens, and values by their bits."""
    if not sampling.logit_bias:
        return None
    tokens, values = zip(*sampling.logit_bias, strict=True)
    return np.array(tokens, np.int64), np.array(values, np.float64).view(np.int64)


Words = dict[tuple[int, ...], list[tuple[tuple[int, ...], int]]]


def _by_token_before(bad_words: Sequence[tuple[int, ...]]) -> Words:
    """Each word as (what comes before its last token, that token), to be found by the token just before the last."""
    words: Words = {}
    for *before, last in bad_words:
        words.setdefault(tuple(before[-1:]), []).append((tuple(before), last))
    return words
