"""What a step's sampling is asked, one row per completion, and what it answers."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Seen:
    """N tokens that the penalties touch. No (row, token) comes twice."""

    rows: Tensor  # int64 [N]
    tokens: Tensor  # int64 [N]
    counts: Tensor  # int64 [N]: how often in the output; 0 for tokens of the prompt only


@dataclass(frozen=True, slots=True)
class Biases:
    """N logits to add to. No (row, token) comes twice."""

    rows: Tensor  # int64 [N]
    tokens: Tensor  # int64 [N]
    values: Tensor  # fp64 [N]


@dataclass(frozen=True, slots=True)
class Banned:
    """N tokens that must not be drawn."""

    rows: Tensor  # int64 [N]
    tokens: Tensor  # int64 [N]


@dataclass(frozen=True, slots=True)
class Parameters:
    """One number per row, [R]: floats fp64, integers int64."""

    temperature: Tensor  # above 0 (1 in greedy rows)
    top_p: Tensor
    min_p: Tensor
    typical_p: Tensor
    repetition: Tensor
    presence: Tensor
    frequency: Tensor
    top_k: Tensor  # 0: all
    seeds: Tensor
    indices: Tensor  # of the completion within its request
    positions: Tensor  # of the token to be drawn


@dataclass(frozen=True, slots=True)
class Paths:
    """Which rows are chosen how: each is in exactly one of the four, ascending; None where nobody is.

    The counts and flags are known on the host, so that a stage nobody asks for costs nothing.
    """

    greedy: Tensor | None  # take the likeliest token
    plain: Tensor | None  # draw from the whole vocabulary
    short: Tensor | None  # top_k is small: draw from that many candidates
    long: Tensor | None  # filter the whole vocabulary
    longest_short: int  # the largest top_k in `short`
    any_long_k: bool  # of `long` only; the others are of `short` and `long`
    any_top_p: bool
    any_min_p: bool
    any_typical_p: bool

    @property
    def drawing(self) -> bool:
        """Whether any row is chosen by a random number."""
        return self.plain is not None or self.short is not None or self.long is not None


@dataclass(frozen=True, slots=True)
class SamplingBatch:
    """R rows to sample, on the device of their logits. None is what nobody asks for."""

    parameters: Parameters
    paths: Paths
    seen: Seen | None = None
    biases: Biases | None = None
    banned: Banned | None = None
    mask: Tensor | None = None  # int32 [R, ceil(vocab / 32)]: bit t % 32 of word t / 32 allows token t
    scored: Tensor | None = None  # int64: the rows that want log-probabilities
    logprobs: int | None = None  # the most top log-probabilities that one of them wants


@dataclass(frozen=True, slots=True)
class SampledBatch:
    """R drawn tokens. Log-probabilities are those of the model; rows that want none have zeros there."""

    tokens: Tensor  # int64 [R]
    valid: Tensor  # bool [R]: False where every token is banned, or a logit is NaN or +inf; the token is 0 there
    logprobs: Tensor | None  # fp32 [R]
    top_tokens: Tensor | None  # int64 [R, K], likeliest first, lower ids first among equals
    top_logprobs: Tensor | None  # fp32 [R, K]
