"""What calls return: plain frozen values, with no gRPC in them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Literal

from cutaway.options import Sampling

if TYPE_CHECKING:
    from cutaway.arrays import Array

FinishReason = Literal["stop", "length", "abort", "unspecified"]


@dataclass(frozen=True, slots=True)
class TopLogprob:
    """One of the likeliest tokens at a place, and the natural logarithm of its probability."""

    id: int
    logprob: float


@dataclass(frozen=True, slots=True)
class Token:
    """One token of completion `index`, made in engine step `step` (0: an echoed prompt token).

    `text` is what can be shown with it: empty while a character is incomplete or could be part of a stop text.
    """

    id: int
    text: str
    logprob: float | None
    top_logprobs: tuple[TopLogprob, ...]
    index: int
    step: int
    captures: Mapping[str, Array] = field(
        default_factory=dict, compare=False
    )  # what led to it: rows since the token before


@dataclass(frozen=True, slots=True)
class PromptToken:
    """One token of the prompt, at `position`, with its log-probability given the tokens before it."""

    position: int
    id: int
    text: str
    logprob: float | None
    top_logprobs: tuple[TopLogprob, ...]


@dataclass(frozen=True, slots=True)
class Started:
    """The request is computed from now on, or was aborted in the queue: what was cached, and what computes."""

    request_id: str
    prompt_tokens: int
    cached_tokens: int
    model_hash: str
    kernels: str
    dtype: str
    seed: int
    quantization: str = ""
    kv_dtype: str = ""


@dataclass(frozen=True, slots=True)
class Completion:
    """One completion of the prompt. `stop` or `stop_token_id` is what ended it, if it was not the model itself."""

    index: int
    tokens: tuple[Token, ...]
    text: str
    finish_reason: FinishReason
    completion_tokens: int
    stop: str | None
    stop_token_id: int | None

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The ids of `tokens`; an echoed prompt is part of them."""
        return tuple(token.id for token in self.tokens)


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens counted; `completion_tokens` are those of all completions together."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds by the server's clock: to the first step, from there to the first token, from there to the last."""

    queue_seconds: float
    prefill_seconds: float
    decode_seconds: float
    preemptions: int


@dataclass(frozen=True, slots=True)
class Answer:
    """Everything that one request brought. `text`, `tokens` and so on are those of completion 0."""

    started: Started
    completions: tuple[Completion, ...]
    prompt_logprobs: tuple[PromptToken, ...] | None
    usage: Usage
    timings: Timings
    captures: Mapping[str, Array] = field(default_factory=dict, compare=False)  # of the prompt and completion 0

    @property
    def text(self) -> str:
        """The text of completion 0."""
        return self.completions[0].text

    @property
    def tokens(self) -> tuple[Token, ...]:
        """The tokens of completion 0."""
        return self.completions[0].tokens

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The token ids of completion 0."""
        return self.completions[0].token_ids

    @property
    def finish_reason(self) -> FinishReason:
        """Why completion 0 ended."""
        return self.completions[0].finish_reason

    @property
    def request_id(self) -> str:
        """The request's name."""
        return self.started.request_id


@dataclass(frozen=True, slots=True)
class Merge:
    """Two neighbours become one: `left` is at `position` before the merge; lower ranks merge first."""

    left: str
    right: str
    rank: int
    position: int


@dataclass(frozen=True, slots=True)
class WordMerges:
    """How byte-pair encoding builds the tokens of one word."""

    symbols: tuple[str, ...]
    steps: tuple[Merge, ...]


@dataclass(frozen=True, slots=True)
class Tokenized:
    """The tokens of a text.

    `pieces` are as the vocabulary writes them, `texts` as the text has them; `offsets` are (start, end) in the UTF-8
    bytes of the text, or of `rendered`, the text that the chat template made of a conversation.
    """

    ids: tuple[int, ...]
    pieces: tuple[str, ...]
    offsets: tuple[tuple[int, int], ...]
    merges: tuple[WordMerges, ...]
    rendered: str
    texts: tuple[str, ...] = ()  # "\ufffd" stands for a part of a character; a token that is not in the text: its piece


@dataclass(frozen=True, slots=True)
class Detokenized:
    """The text of tokens, and the exact bytes of each."""

    text: str
    token_bytes: tuple[bytes, ...]

    @property
    def texts(self) -> tuple[str, ...]:
        """The text of each token; "\ufffd" stands for a part of a character."""
        return tuple(each.decode(errors="replace") for each in self.token_bytes)


@dataclass(frozen=True, slots=True)
class Architecture:
    """The network's shape. `windows` is each layer's sliding window in tokens, 0 for full attention."""

    family: str
    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_mlp: int
    d_vocab: int
    n_parameters: int
    windows: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Limits:
    """What requests must stay within; 0 is what the server, an older one, does not tell.

    `max_calls`: calls that you may have open at a time, by your credentials; None: no such limit.
    """

    max_context: int
    max_running: int
    max_queued: int
    max_batch_tokens: int
    page_size: int
    total_pages: int
    max_n: int
    max_logprobs: int
    max_prompt_bytes: int
    max_message_bytes: int
    max_chat_messages: int
    max_stops: int
    max_stop_bytes: int
    max_stop_token_ids: int
    max_bad_words: int
    max_bad_word_bytes: int
    max_bad_word_tokens: int
    max_logit_biases: int
    max_detokenized: int
    max_answer_bytes: int
    max_backlog_bytes: int
    max_streams: int
    max_calls: int | None
    max_captures: int
    max_capture_bytes: int
    max_edits: int


@dataclass(frozen=True, slots=True)
class TextInfo:
    """Special tokens, and the chat template's source (empty: the model has none)."""

    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    chat_template: str


@dataclass(frozen=True, slots=True)
class Model:
    """What is served, computed in `dtype`, with weights rounded to `quantization` and a cache that holds `kv_dtype`."""

    name: str
    model_hash: str
    server_version: str
    kernels: str
    dtype: str
    quantization: str
    kv_dtype: str
    device: str
    architecture: Architecture
    limits: Limits
    text: TextInfo
    default_sampling: Sampling


class Health(Enum):
    """What the server says of itself; the numbers are those of grpc.health.v1."""

    UNKNOWN = 0
    SERVING = 1
    NOT_SERVING = 2
    SERVICE_UNKNOWN = 3


@dataclass(frozen=True, slots=True)
class Point:
    """A place in the network that has a name: {i} in `name` is the layer. 0 in `shape` grows with the text."""

    name: str
    axes: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    readable: bool
    writable: bool
    cost: str  # "copy", "open", "context", "matrix": what reading it adds to a step
    bytes_per_position: int
    aliases: tuple[str, ...]
    description: str


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a request would send, at most, in bytes, and why it would be refused (empty: it would not)."""

    bytes: int
    capture_bytes: tuple[int, ...]
    max_bytes: int
    open_layers: int
    refusal: str


@dataclass(frozen=True, slots=True)
class LensResult:
    """What the model would say if it ended after each layer: axes [layer, pos, top] and [layer, pos, token]."""

    tokens: Array | None  # the likeliest, likeliest first
    logprobs: Array | None
    given_logprobs: Array | None  # of the tokens that were named, whose ids are at["token"]
    given_ranks: Array | None  # 0 is the likeliest
    texts: Array | None = None  # of `tokens`, as numpy has strings

    def labelled(self, tokens: Iterable[str]) -> LensResult:
        """The same result with a text for each position: see `Array.labelled`."""
        named = tuple(tokens)
        arrays = (self.tokens, self.logprobs, self.given_logprobs, self.given_ranks, self.texts)
        return LensResult(*(None if each is None else each.labelled(named) for each in arrays))

    def _repr_html_(self) -> str:
        """A table of the likeliest tokens by layer and position, for a notebook."""
        from cutaway.notebook import lens_html

        return lens_html(self)


@dataclass(frozen=True, slots=True)
class Identity:
    """Something that must hold of inner values; `error` is the largest found, `tolerance` what the dtype may cause."""

    name: str
    description: str
    error: float
    tolerance: float
    holds: bool
    exact: bool


@dataclass(frozen=True, slots=True)
class SelfCheck:
    """What was tested on the served model, and whether it holds."""

    holds: bool
    identities: tuple[Identity, ...]
    model_hash: str
    kernels: str
    dtype: str
    quantization: str
    prompt_tokens: int


@dataclass(frozen=True, slots=True)
class AttributionResult:
    """What each part of the network adds to a logit before soft-capping, with norms held at the scale they had.

    `embed`, `pos_embed`, `norm_bias`, `unexplained`, and `attn` and `mlp` of all layers add up to `logit`; `heads`,
    `attn_bias` and `attn_rest` to `attn`; `neurons`, `mlp_bias` and `mlp_rest` to `mlp`. The rests are what the neurons
    that were not asked for add, and rounding; `unexplained` is that and what edits of the residual stream add.
    """

    logit: Array  # [pos]
    embed: Array  # [pos]
    pos_embed: Array | None  # [pos], where positions are learned
    norm_bias: Array  # [pos], of the final norm
    unexplained: Array  # [pos]
    attn: Array  # [layer, pos]
    mlp: Array  # [layer, pos]
    heads: Array  # [layer, pos, head]
    attn_bias: Array  # [layer, pos]
    attn_rest: Array  # [layer, pos]
    neurons: Array | None  # [layer, pos, top], those that add or take most first
    neuron_indices: Array | None  # which neurons these are
    mlp_bias: Array | None  # [layer, pos]
    mlp_rest: Array | None  # [layer, pos]
