"""How a token was picked, on the wire: the question put, and the answer turned into values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any, TypedDict, TypeVar

from google.protobuf.message import Message as WireMessage

from cutaway.replay import Replay, SampleCandidate, SampleFilter, SampleReplay
from cutaway.requests import put, refuse_unknown
from cutaway.v1 import replay_pb2 as pb

Flat = TypeVar("Flat", SampleFilter, SampleCandidate)


class Changes(TypedDict, total=False):
    """Parameters that change which token is picked, as in `Sampling`; what is missing stays as the request had it."""

    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    typical_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    logit_bias: Mapping[int, float] | None
    bad_words: str | Sequence[str] | None
    min_tokens: int | None


class ReplayOptions(Changes, total=False):
    """What to tell of a token's sampling, and with which other parameters to do it."""

    index: int | None  # which completion. Default 0
    count: int | None  # so many of the likeliest tokens, at most 256. Default 10
    tokens: Iterable[int] | None  # and these, whatever their rank
    timeout: float | None  # seconds until DeadlineExceeded. Default: the client's


def replay_request(request_id: str, position: int, options: ReplayOptions) -> pb.ReplaySampleRequest:
    """The wire's request for a token's sampling.

    Raises:
        TypeError: a keyword is unknown, or a value has the wrong type.
        InvalidArgument: a value does not fit the wire.
    """
    refuse_unknown("replay_sample", options.keys(), ReplayOptions.__annotations__)
    request = pb.ReplaySampleRequest()
    put(request, "request_id", request_id)
    put(request, "position", position)
    for name in ("index", "count", "tokens"):
        put(request, name, options.get(name))
    for name in Changes.__annotations__:
        if (value := options.get(name)) is not None:
            put(request.sampling, name, value)
    return request


def sample_replay(wire: pb.ReplaySampleResponse) -> SampleReplay:
    """How the token was picked."""
    plain: dict[str, Any] = {
        field.name: getattr(wire, field.name)
        for field in fields(SampleReplay)
        if field.name not in ("replay", "changed")
    }
    changed = _replay(wire.changed) if wire.HasField("changed") else None
    return SampleReplay(replay=_replay(wire.replay), changed=changed, **plain)


def _replay(wire: pb.Replay) -> Replay:
    sampling: dict[str, object] = {field.name: value for field, value in wire.sampling.ListFields()}
    if wire.sampling.logit_bias:
        sampling["logit_bias"] = dict(wire.sampling.logit_bias)
    drawn = {name: getattr(wire, name) if wire.HasField(name) else None for name in ("uniform", "lower", "upper")}
    return Replay(
        sampling=sampling,
        token=wire.token,
        text=wire.text,
        rank=wire.rank,
        likeliest_first=wire.likeliest_first,
        filters=tuple(_flat(SampleFilter, each) for each in wire.filters),
        candidates=tuple(_flat(SampleCandidate, each) for each in wire.candidates),
        banned=wire.banned,
        **drawn,
    )


def _flat(kind: type[Flat], message: WireMessage) -> Flat:
    return kind(**{field.name: getattr(message, field.name) for field in fields(kind)})
