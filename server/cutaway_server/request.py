"""The life of one request: what is asked, and the events that answer it.

Everything here crosses between threads and is therefore frozen. Sampling fields come in as `SamplingOptions`, where
None means unset, and are resolved once, against the model's defaults and the rules, into `SamplingParams`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from enum import Enum

from cutaway_server.captures import Capture, Captured
from cutaway_server.edits import NO_EDITS, Edits
from cutaway_server.errors import CutawayError, InvalidField

MAX_N = 128
MAX_LOGPROBS = 128
MAX_BIASES = 1024
MAX_STOPS = 64
MAX_STOP_BYTES = 1024
MAX_STOP_TOKENS = 1024
MAX_BAD_WORDS = 128
MAX_BAD_WORD_BYTES = 256
MAX_BAD_WORD_TOKENS = 64


@dataclass(frozen=True, slots=True)
class SamplingOptions:
    """How tokens are chosen, as asked: None is unset. The wire's SamplingParams says what each means."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    bad_words: tuple[str, ...] = ()
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    min_tokens: int | None = None
    max_tokens: int | None = None
    ignore_eos: bool | None = None
    n: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    def over(self, defaults: SamplingOptions) -> SamplingOptions:
        """These options, with `defaults` where they are unset."""
        unset = {f.name for f in fields(self) if getattr(self, f.name) in (None, (), {})}
        return replace(self, **{name: getattr(defaults, name) for name in unset})


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen, resolved and valid. `bad_words` are token sequences; `logit_bias` is sorted by id."""

    seed: int
    max_tokens: int
    temperature: float = 1.0
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()
    stop: tuple[str, ...] = ()
    stop_token_ids: frozenset[int] = frozenset()
    eos_token_ids: frozenset[int] = frozenset()  # empty under ignore_eos
    min_tokens: int = 0
    n: int = 1
    logprobs: int | None = None  # None: none at all; 0: the token's own only
    prompt_logprobs: int | None = None

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken, without a draw."""
        return self.temperature == 0.0

    @property
    def penalised(self) -> bool:
        """Whether the tokens so far change the logits."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0


def resolve_sampling(
    options: SamplingOptions,
    *,
    prompt_length: int,
    max_context: int,
    vocab_size: int,
    eos_token_ids: frozenset[int],
    bad_words: tuple[tuple[int, ...], ...],
    seed: int,
) -> SamplingParams:
    """Check `options` against the rules and fill what is unset.

    Args:
        options: what was asked, already laid over the model's defaults.
        prompt_length: number of prompt tokens, at most `max_context`.
        max_context: tokens of prompt and completion together.
        vocab_size: ids are in [0, vocab_size).
        eos_token_ids: the model's end tokens.
        bad_words: `options.bad_words` as token sequences (several per text where spelling depends on context).
        seed: the seed if none was asked for.

    Raises:
        InvalidField: names the field, the value and the rule.
    """
    room = max_context - prompt_length
    max_tokens = room if options.max_tokens is None else _integer(options, "max_tokens", 0, 2**31 - 1, room)
    if max_tokens > room:
        rule = f"prompt ({prompt_length} tokens) and max_tokens must fit the context of {max_context}"
        raise InvalidField("sampling.max_tokens", max_tokens, rule)
    min_tokens = _integer(options, "min_tokens", 0, 2**31 - 1, 0)
    if options.min_tokens is not None and min_tokens > max_tokens:
        raise InvalidField("sampling.min_tokens", min_tokens, f"must be at most max_tokens ({max_tokens})")
    top_k = _integer(options, "top_k", -1, 2**31 - 1, 0)
    return SamplingParams(
        seed=seed if options.seed is None else _integer(options, "seed", -(2**63), 2**63 - 1, 0),
        max_tokens=max_tokens,
        temperature=_number(options, "temperature", 0.0, 100.0, 1.0),
        top_k=0 if top_k == -1 else min(top_k, vocab_size),
        top_p=_number(options, "top_p", 0.0, 1.0, 1.0, above=True),
        min_p=_number(options, "min_p", 0.0, 1.0, 0.0),
        typical_p=_number(options, "typical_p", 0.0, 1.0, 1.0, above=True),
        repetition_penalty=_number(options, "repetition_penalty", 0.0, 100.0, 1.0, above=True),
        presence_penalty=_number(options, "presence_penalty", -2.0, 2.0, 0.0),
        frequency_penalty=_number(options, "frequency_penalty", -2.0, 2.0, 0.0),
        logit_bias=_biases(options.logit_bias, vocab_size),
        bad_words=bad_words,
        stop=_texts("stop", options.stop, MAX_STOPS, MAX_STOP_BYTES),
        stop_token_ids=_stop_tokens(options.stop_token_ids, vocab_size),
        eos_token_ids=frozenset() if options.ignore_eos else eos_token_ids,
        min_tokens=min_tokens,
        n=_integer(options, "n", 1, MAX_N, 1),
        logprobs=None if options.logprobs is None else _integer(options, "logprobs", 0, MAX_LOGPROBS, 0),
        prompt_logprobs=(
            None if options.prompt_logprobs is None else _integer(options, "prompt_logprobs", 0, MAX_LOGPROBS, 0)
        ),
    )


def check_bad_words(texts: tuple[str, ...]) -> None:
    """Check the bad words' texts, before they are tokenised."""
    _texts("bad_words", texts, MAX_BAD_WORDS, MAX_BAD_WORD_BYTES)


def _number(
    options: SamplingOptions, name: str, low: float, high: float, default: float, *, above: bool = False
) -> float:
    value = getattr(options, name)
    if value is None:
        return default
    if not math.isfinite(value) or value > high or value < low or (above and value == low):
        rule = f"must be a finite number in {'(' if above else '['}{low:g}, {high:g}]"
        raise InvalidField(f"sampling.{name}", value, rule)
    return float(value)


def _integer(options: SamplingOptions, name: str, low: int, high: int, default: int) -> int:
    value = getattr(options, name)
    if value is None:
        return default
    if not low <= value <= high:
        raise InvalidField(f"sampling.{name}", value, f"must be an integer in [{low}, {high}]")
    return int(value)


def _biases(biases: Mapping[int, float], vocab_size: int) -> tuple[tuple[int, float], ...]:
    if len(biases) > MAX_BIASES:
        raise InvalidField("sampling.logit_bias", f"{len(biases)} entries", f"at most {MAX_BIASES} are allowed")
    for token, bias in biases.items():
        if not 0 <= token < vocab_size:
            raise InvalidField("sampling.logit_bias", token, f"token ids are in [0, {vocab_size})")
        if not math.isfinite(bias) or abs(bias) > 100:
            raise InvalidField(f"sampling.logit_bias[{token}]", bias, "must be a finite number in [-100, 100]")
    return tuple(sorted((token, float(bias)) for token, bias in biases.items()))


def _texts(name: str, texts: tuple[str, ...], most: int, most_bytes: int) -> tuple[str, ...]:
    if len(texts) > most:
        raise InvalidField(f"sampling.{name}", f"{len(texts)} entries", f"at most {most} are allowed")
    for i, text in enumerate(texts):
        if not 1 <= len(text.encode()) <= most_bytes:
            raise InvalidField(f"sampling.{name}[{i}]", text, f"must have 1 to {most_bytes} bytes of UTF-8")
    return texts


def _stop_tokens(ids: tuple[int, ...], vocab_size: int) -> frozenset[int]:
    if len(ids) > MAX_STOP_TOKENS:
        raise InvalidField("sampling.stop_token_ids", f"{len(ids)} entries", f"at most {MAX_STOP_TOKENS} are allowed")
    for token in ids:
        if not 0 <= token < vocab_size:
            raise InvalidField("sampling.stop_token_ids", token, f"token ids are in [0, {vocab_size})")
    return frozenset(ids)


@dataclass(frozen=True, slots=True)
class Request:
    """One request for `sampling.n` completions of one prompt.

    `arrival` and `deadline` are seconds of `time.monotonic()`. `tenant` salts the prefix cache. Those of higher
    `priority` go first; between tenants, rows are divided by `share`.
    """

    request_id: str
    prompt: tuple[int, ...]
    sampling: SamplingParams
    arrival: float
    deadline: float | None = None
    tenant: str = ""
    prefix_caching: bool = True
    captures: tuple[Capture, ...] = ()
    edits: Edits = NO_EDITS
    priority: int = 0
    share: float = 1.0

    @property
    def probed(self) -> bool:
        """Whether somebody looks inside, or changes what is there."""
        return bool(self.captures) or self.edits is not NO_EDITS

    def first_captured(self, start: int) -> int | None:
        """The first position from `start` on that is to be looked at."""
        found = [first for capture in self.captures if (first := capture.rows.first(start)) is not None]
        return min(found, default=None)


class FinishReason(Enum):
    """Why a completion ended."""

    STOP = "stop"  # an end token, a stop token or a stop text
    LENGTH = "length"  # max_tokens, or the context, is used up
    ABORT = "abort"  # Abort was called


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Natural log-probabilities at one place: of the token there, and of the likeliest tokens, likeliest first."""

    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Started:
    """The request is computed from now on; `cached_tokens` of its prompt were found in the prefix cache."""

    cached_tokens: int


@dataclass(frozen=True, slots=True)
class PromptScored:
    """Log-probabilities of consecutive prompt tokens, the first at `position` (1 or more)."""

    position: int
    tokens: tuple[int, ...]
    logprobs: tuple[Logprobs, ...]


@dataclass(frozen=True, slots=True)
class Sampled:
    """One new token of completion `index`, made in engine step `step`."""

    index: int
    token: int
    step: int
    logprobs: Logprobs | None


@dataclass(frozen=True, slots=True)
class CompletionEnded:
    """Completion `index` has no more tokens. `stop_token` is the stop token that ended it, if one did."""

    index: int
    reason: FinishReason
    stop_token: int | None = None


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds: arrival to first step, first step to first token, first to last token; and preemptions."""

    queue_seconds: float
    prefill_seconds: float
    decode_seconds: float
    preemptions: int


@dataclass(frozen=True, slots=True)
class RequestEnded:
    """The last event of a request: every completion has ended."""

    timings: Timings


@dataclass(frozen=True, slots=True)
class RequestFailed:
    """The last event of a request that failed; `error` maps to one status."""

    error: CutawayError


Event = Started | PromptScored | Captured | Sampled | CompletionEnded | RequestEnded | RequestFailed
