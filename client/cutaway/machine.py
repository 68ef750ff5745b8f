"""What calls tell of the machine: its cache, its requests, its steps. Plain frozen values, with no gRPC in them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from cutaway.results import FinishReason

if TYPE_CHECKING:
    from cutaway.arrays import Array

BlockUse = Literal["used", "cached", "retained", "unspecified"]
BlockChange = Literal["taken", "copied", "shared", "released", "published", "evicted", "unspecified"]
Stage = Literal["queued", "prefill", "decode", "preempted", "finished", "unspecified"]


@dataclass(frozen=True, slots=True)
class CacheStats:
    """The KV cache between two steps, all tenants together; `own_*` are the caller's tenant's.

    Every block is used (a request holds it), cached (kept until room is needed: for prompts that begin alike, and
    `blocks_retained` of them for finished requests) or free. `fragmentation` is the share of the positions in used
    blocks that hold nothing. Tokens, `evictions` and `preemptions` are counted since the server started.
    """

    blocks_total: int
    blocks_used: int
    blocks_cached: int
    blocks_free: int
    blocks_retained: int
    page_size: int
    block_bytes: int
    fragmentation: float
    prefix_queried_tokens: int
    prefix_hit_tokens: int
    evictions: int
    preemptions: int
    requests_retained: int
    own_blocks_used: int
    own_blocks_cached: int
    prefix_caching: bool
    dtype: str

    @property
    def bytes_total(self) -> int:
        """Bytes of all blocks."""
        return self.blocks_total * self.block_bytes

    @property
    def bytes_used(self) -> int:
        """Bytes of the blocks that requests hold."""
        return self.blocks_used * self.block_bytes

    @property
    def hit_rate(self) -> float:
        """The share of the prompt tokens looked for that were found; 0 before any were."""
        return self.prefix_hit_tokens / self.prefix_queried_tokens if self.prefix_queried_tokens else 0.0


@dataclass(frozen=True, slots=True)
class BlockHolder:
    """A completion that holds a block, or that it is kept for; the block begins with its `position`."""

    request_id: str
    index: int
    position: int


@dataclass(frozen=True, slots=True)
class Block:
    """A block of the caller's tenant that is not free.

    `filled` of its positions have keys and values. `hash` is under what prompts that begin alike find it, empty if
    they cannot. `idle_seconds` is 0 while a request holds it. `tokens` and `text` are empty unless the server tells
    them.
    """

    block: int
    use: BlockUse
    references: int
    filled: int
    hash: bytes
    holders: tuple[BlockHolder, ...]
    made_by: str
    age_seconds: float
    idle_seconds: float
    tokens: tuple[int, ...]
    text: str


@dataclass(frozen=True, slots=True)
class Blocks:
    """The caller's tenant's blocks by number, and the whole pool, at one moment. Iterate over it."""

    stats: CacheStats
    blocks: tuple[Block, ...]

    def __iter__(self) -> Iterator[Block]:
        return iter(self.blocks)

    def __len__(self) -> int:
        return len(self.blocks)


@dataclass(frozen=True, slots=True)
class CacheContents:
    """Keys (after rotation) and values [layer, pos, kv_head, d_head] of a completion's positions.

    Positions [0, `stored`) have them; the last of its `tokens` has none until a token follows it. `running` tells
    whether the request had ended.
    """

    keys: Array
    values: Array
    prompt_tokens: int
    tokens: int
    stored: int
    running: bool
    stored_dtype: str
    model_hash: str
    quantization: str


@dataclass(frozen=True, slots=True)
class BlockEvent:
    """One change of one block. `references`: how many hold it after it; `source`: the block it is a copy of, or 0."""

    change: BlockChange
    block: int
    request_id: str
    index: int
    references: int
    hash: bytes
    source: int


@dataclass(frozen=True, slots=True)
class StepRows:
    """Positions [start, stop) of a completion, computed in a step; `revisited` of them were stored before.

    `cached_tokens` is set in the request's first step: how much of its prompt the prefix cache had.
    """

    request_id: str
    index: int
    start: int
    stop: int
    revisited: int
    cached_tokens: int | None
    tokens: tuple[int, ...]
    text: str


@dataclass(frozen=True, slots=True)
class StepToken:
    """A token of a completion, whose logits step `step` computed. `token` is None unless the server tells it."""

    request_id: str
    index: int
    step: int
    token: int | None
    text: str


@dataclass(frozen=True, slots=True)
class Step:
    """One step of the engine: the caller's tenant's rows and tokens, of others how many there were.

    `time` is in seconds since 1970, `phases` are seconds by name. Tokens that a device gave away late come in a step of
    their own, without rows and phases. `preempted` are completions that lost their blocks. `running`, `waiting` and
    the blocks are all tenants', after the step.
    """

    step: int
    time: float
    phases: Mapping[str, float]
    rows: tuple[StepRows, ...]
    sampled: tuple[StepToken, ...]
    preempted: tuple[tuple[str, int], ...]
    other_completions: int
    other_rows: int
    copies: int
    running: int
    waiting: int
    blocks_used: int
    blocks_cached: int

    @property
    def seconds(self) -> float:
        """How long it took."""
        return sum(self.phases.values())


@dataclass(frozen=True, slots=True)
class CompletionInfo:
    """A completion that the engine knows; positions [0, `stored`) have keys and values.

    `finish_reason` is "unspecified" while it runs. `tokens` are those made, and empty unless the server tells them.
    """

    index: int
    generated_tokens: int
    stored: int
    blocks: int
    finish_reason: FinishReason
    tokens: tuple[int, ...]
    text: str


@dataclass(frozen=True, slots=True)
class RequestInfo:
    """A request that waits, runs, or has ended and is kept. `ahead` of your requests wait before it, if it waits.

    `ended_seconds` is how long ago it ended, None while it has not. Until its prompt is computed (`computed_tokens` of
    it are), one completion stands for all.
    """

    request_id: str
    stage: Stage
    n: int
    prompt_tokens: int
    cached_tokens: int
    computed_tokens: int
    max_tokens: int
    preemptions: int
    age_seconds: float
    ended_seconds: float | None
    ahead: int
    completions: tuple[CompletionInfo, ...]
    prompt: str


@dataclass(frozen=True, slots=True)
class Requests:
    """The caller's tenant's requests, those that have ended first, then oldest first. Iterate over it.

    `running` completions and `waiting` sequences are all tenants'.
    """

    requests: tuple[RequestInfo, ...]
    other_requests: int
    other_retained: int
    running: int
    waiting: int

    def __iter__(self) -> Iterator[RequestInfo]:
        return iter(self.requests)

    def __len__(self) -> int:
        return len(self.requests)


@dataclass(frozen=True, slots=True)
class CacheHit:
    """What the prefix cache has of a prompt: `cached_tokens`, in whole blocks; it would be given `new_blocks` more."""

    prompt_tokens: int
    cached_tokens: int
    page_size: int
    new_blocks: int
