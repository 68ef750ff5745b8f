"""The state of the machine on the wire: questions put, and answers turned into values."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from typing import Any, TypedDict, TypeVar, cast

from google.protobuf.descriptor import EnumDescriptor
from google.protobuf.message import Message as WireMessage

from cutaway.capture import Indices, Positions, positions, put_indices
from cutaway.errors import ServerError
from cutaway.machine import (
    Block,
    BlockChange,
    BlockEvent,
    BlockHolder,
    Blocks,
    BlockUse,
    CacheContents,
    CacheHit,
    CacheStats,
    CompletionInfo,
    RequestInfo,
    Requests,
    Stage,
    Step,
    StepRows,
    StepToken,
)
from cutaway.options import GenerateOptions
from cutaway.receiving import Receiver
from cutaway.replies import FINISH_REASONS
from cutaway.requests import generate_request, put, refuse_unknown
from cutaway.v1 import machine_pb2 as pb

KEYS, VALUES = "blocks.*.attn.hook_rot_k", "blocks.*.attn.hook_v"

Flat = TypeVar("Flat", CacheStats, BlockHolder, CacheHit)


class ReadOptions(TypedDict, total=False):
    """What to read of a request's keys and values; what is missing or None is everything.

    `index` names the completion (0), `positions` are as in `Capture`, of those that are stored,
    `dtype` is what is sent: "F32", "F16", "BF16", or as stored. More than `max_bytes` are refused.
    """

    index: int
    layers: Indices
    heads: Indices
    positions: Positions | None
    dtype: str | None
    max_bytes: int | None
    timeout: float | None


def read_request(request_id: str, options: ReadOptions) -> pb.ReadCacheRequest:
    """The wire's request for keys and values.

    Raises:
        TypeError: a keyword is unknown, or a value has the wrong type.
        InvalidArgument: a value does not fit the wire.
    """
    refuse_unknown("read_cache", options.keys(), ReadOptions.__annotations__)
    request = pb.ReadCacheRequest(request_id=request_id)
    for name in ("index", "dtype", "max_bytes"):
        put(request, name, options.get(name))
    where = options.get("positions")
    put_indices(request, "layers", options.get("layers"))
    put_indices(request, "heads", options.get("heads"))
    if where is not None and where != "all":
        request.positions.CopyFrom(positions(where))
    return request


def predict_request(prompt: str | None, options: GenerateOptions) -> pb.PredictCacheHitRequest:
    """The wire's request for what the prefix cache has of a prompt; raises as `generate_request`."""
    return pb.PredictCacheHitRequest(generate=generate_request(prompt, options))


def _flat(kind: type[Flat], message: WireMessage) -> Flat:
    return kind(**{field.name: getattr(message, field.name) for field in fields(kind)})


def stats(wire: pb.GetCacheStatsResponse) -> CacheStats:
    """The cache in numbers."""
    return _flat(CacheStats, wire)


def hit(wire: pb.PredictCacheHitResponse) -> CacheHit:
    """What the prefix cache has."""
    return _flat(CacheHit, wire)


def blocks(parts: Iterable[pb.GetBlocksResponse]) -> Blocks:
    """The blocks of all parts."""
    parts = list(parts)
    if not parts:
        raise ServerError("the stream ended without a message")
    return Blocks(stats(parts[0].stats), tuple(_block(block) for part in parts for block in part.blocks))


def _block(wire: pb.Block) -> Block:
    values = _plain(wire, ("block", "references", "filled", "hash", "made_by", "age_seconds", "idle_seconds", "text"))
    use = cast("BlockUse", _word(pb.BlockUse.DESCRIPTOR, wire.use, "BLOCK_USE_"))
    holders = tuple(_flat(BlockHolder, holder) for holder in wire.holders)
    return Block(use=use, holders=holders, tokens=tuple(wire.tokens), **values)


def event(wire: pb.BlockEvent) -> BlockEvent:
    """One change of one block."""
    values = _plain(wire, ("block", "request_id", "index", "references", "hash", "source"))
    change = cast("BlockChange", _word(pb.BlockChange.DESCRIPTOR, wire.change, "BLOCK_CHANGE_"))
    return BlockEvent(change=change, **values)


def step(wire: pb.Step) -> Step:
    """One step."""
    names = (
        "step", "time", "other_completions", "other_rows", "copies", "running", "waiting", "blocks_used",
        "blocks_cached",
    )  # fmt: skip
    return Step(
        phases={phase.phase: phase.seconds for phase in wire.phases},
        rows=tuple(_rows(rows) for rows in wire.rows),
        sampled=tuple(_sampled(token) for token in wire.sampled),
        preempted=tuple((name.request_id, name.index) for name in wire.preempted),
        **_plain(wire, names),
    )


def _rows(wire: pb.StepRows) -> StepRows:
    values = _plain(wire, ("request_id", "index", "start", "stop", "revisited", "text"))
    cached = wire.cached_tokens if wire.HasField("cached_tokens") else None
    return StepRows(cached_tokens=cached, tokens=tuple(wire.tokens), **values)


def _sampled(wire: pb.StepToken) -> StepToken:
    token = wire.token if wire.HasField("token") else None
    return StepToken(token=token, **_plain(wire, ("request_id", "index", "step", "text")))


def requests(wire: pb.ListRequestsResponse) -> Requests:
    """The requests."""
    counts = _plain(wire, ("other_requests", "other_retained", "running", "waiting"))
    return Requests(tuple(_request(request) for request in wire.requests), **counts)


def _request(wire: pb.RequestInfo) -> RequestInfo:
    names = (
        "request_id", "n", "prompt_tokens", "cached_tokens", "computed_tokens", "max_tokens", "preemptions",
        "age_seconds", "ahead", "prompt",
    )  # fmt: skip
    return RequestInfo(
        stage=cast("Stage", _word(pb.RequestStage.DESCRIPTOR, wire.stage, "REQUEST_STAGE_")),
        ended_seconds=wire.ended_seconds if wire.HasField("ended_seconds") else None,
        completions=tuple(_completion(completion) for completion in wire.completions),
        **_plain(wire, names),
    )


def _completion(wire: pb.CompletionInfo) -> CompletionInfo:
    values = _plain(wire, ("index", "generated_tokens", "stored", "blocks", "text"))
    reason = FINISH_REASONS.get(wire.finish_reason, "unspecified")
    return CompletionInfo(finish_reason=reason, tokens=tuple(wire.tokens), **values)


class CacheReader:
    """Takes the messages of ReadCache."""

    def __init__(self) -> None:
        self._tensors = Receiver()
        self._read: pb.CacheRead | None = None
        self._arrays: dict[str, Any] = {}

    def take(self, message: pb.ReadCacheResponse) -> None:
        """Take the next message."""
        kind = message.WhichOneof("event")
        received = None
        if kind == "read":
            self._read = message.read
            self._tensors.model_hash = message.read.model_hash
        elif kind == "tensor":
            received = self._tensors.header(message.tensor)
        elif kind == "chunk":
            received = self._tensors.chunk(message.chunk)
        if received is not None:
            self._arrays[received.header.name] = received.array

    def contents(self) -> CacheContents:
        """All that has come.

        Raises:
            ServerError: the stream ended before everything had.
        """
        if self._read is None or self._arrays.keys() != {KEYS, VALUES}:
            raise ServerError("the stream ended before all keys and values had come")
        names = ("prompt_tokens", "tokens", "stored", "running", "stored_dtype", "model_hash", "quantization")
        return CacheContents(self._arrays[KEYS], self._arrays[VALUES], **_plain(self._read, names))


def _plain(wire: WireMessage, names: Iterable[str]) -> dict[str, Any]:
    return {name: getattr(wire, name) for name in names}


def _word(enum: EnumDescriptor, value: int, prefix: str) -> str:
    """A value's name as people write it; that of a newer server is unspecified."""
    known = enum.values_by_number.get(value, enum.values_by_number[0])
    return known.name.removeprefix(prefix).lower()
