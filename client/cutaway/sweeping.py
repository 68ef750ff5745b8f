"""Sweeps of both clients: many changes of one prompt, and what each does to a metric."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Unpack

from cutaway.errors import InvalidArgument, ServerError
from cutaway.looking import Prompt, PromptOptions, generate_of, token_choice
from cutaway.requests import refuse_unknown
from cutaway.v1 import sweep_pb2 as pb

if TYPE_CHECKING:
    from cutaway.aio import AsyncCalls
    from cutaway.arrays import Array
    from cutaway.capture import Indices, Positions
    from cutaway.client import Calls
    from cutaway.receiving import Receiver


@dataclass(frozen=True, slots=True)
class Logit:
    """The logit of a token: an id, or a text that is one token."""

    target: int | str


@dataclass(frozen=True, slots=True)
class LogitDifference:
    """The logit of one token less that of another."""

    target: int | str
    minus: int | str


@dataclass(frozen=True, slots=True)
class Probability:
    """The probability of a token."""

    target: int | str


@dataclass(frozen=True, slots=True)
class Divergence:
    """The Kullback-Leibler divergence, in nats, from the clean prediction, or, of an ablation, from the unchanged."""


Metric = Logit | LogitDifference | Probability | Divergence


@dataclass(frozen=True, slots=True)
class SweepResult:
    """The metric of each change, whose axes are those gone over; and of no change, and of the clean prompt."""

    effects: Array
    unchanged: float
    clean: float | None  # None: it was an ablation


class SweepOptions(PromptOptions, total=False):
    """All keywords of `sweep` beside the prompts."""

    point: str  # "hook_resid_pre", "blocks.*.attn.hook_z", "z.*"; must be given
    over: Iterable[str]  # axes to go along one by one: "layer", "pos", "head". Default layer and pos
    metric: Metric  # must be given
    ablate: Literal["zero", "mean"] | None  # what to put in place of values, where there is no clean prompt
    layers: Indices  # default all
    heads: Indices  # default all
    positions: Positions  # default "all"


class Sweeping:
    """What `Client` can sweep. Scopes `introspect` and `edit`."""

    _calls: Calls

    def sweep(self, clean: Prompt, corrupt: Prompt | None = None, **options: Unpack[SweepOptions]) -> SweepResult:
        """Put values of the clean prompt into the corrupt one, place by place, and measure what each does.

        With one prompt and `ablate`, put zeros or means there. Both prompts have as many tokens.
        """
        calls, taking = self._calls, _Taking()
        request = sweep_request(clean, corrupt, options)
        for message in calls.each(calls.introspection.Sweep, request, options.get("timeout")):
            taking.take(message)
        return taking.result()


class AsyncSweeping:
    """What `AsyncClient` can sweep: as `Sweeping`, awaited."""

    _calls: AsyncCalls

    async def sweep(self, clean: Prompt, corrupt: Prompt | None = None, **options: Unpack[SweepOptions]) -> SweepResult:
        """Put values of the clean prompt into the corrupt one, place by place, and measure what each does."""
        calls, taking = self._calls, _Taking()
        request = sweep_request(clean, corrupt, options)
        async for message in calls.each(calls.introspection.Sweep, request, options.get("timeout")):
            taking.take(message)
        return taking.result()


class _Taking:
    """The answer on its way."""

    def __init__(self) -> None:
        self._started: pb.SweepStarted | None = None
        self._receiver: Receiver | None = None
        self._array: Array | None = None

    def take(self, message: pb.SweepResponse) -> None:
        """Take one message."""
        if message.WhichOneof("part") == "started":
            from cutaway.receiving import Receiver

            self._started, self._receiver = message.started, Receiver(message.started.model_hash)
            return
        if self._receiver is None:
            raise ServerError("the stream did not begin with what it began with")
        if message.WhichOneof("part") == "tensor":
            received = self._receiver.header(message.tensor)
        else:
            received = self._receiver.chunk(message.chunk)
        self._array = received.array if received is not None else self._array

    def result(self) -> SweepResult:
        """The answer.

        Raises:
            ServerError: something is missing.
        """
        if self._started is None or self._array is None:
            raise ServerError("the stream ended before the sweep was whole")
        clean = self._started.source if self._started.HasField("source") else None
        return SweepResult(self._array, self._started.unchanged, clean)


def sweep_request(clean: Prompt, corrupt: Prompt | None, options: SweepOptions) -> pb.SweepRequest:
    """The wire's request.

    Raises:
        InvalidArgument: something must be given, or does not fit the wire.
    """
    from cutaway.capture import positions, put_indices

    refuse_unknown("sweep", options.keys(), SweepOptions.__annotations__)
    ablate = options.get("ablate")
    if (corrupt is None) == (ablate is None):
        raise InvalidArgument("corrupt: give a prompt to patch into, or ablate")
    over = options.get("over", ("layer", "pos"))
    request = pb.SweepRequest(
        generate=generate_of(clean if corrupt is None else corrupt, options),
        point=_point(options.get("point", "")), over=[over] if isinstance(over, str) else over,
        metric=_metric(options.get("metric")), positions=positions(options.get("positions", "all")),
    )  # fmt: skip
    if corrupt is None:
        kinds = {"zero": pb.ABLATION_ZERO, "mean": pb.ABLATION_MEAN}
        if ablate not in kinds:
            raise InvalidArgument(f"ablate: {ablate!r} is neither zero nor mean")
        request.ablation = kinds[ablate]
    else:
        plain = {name: value for name, value in options.items() if name not in ("edits", "request_id")}
        request.source.CopyFrom(generate_of(clean, plain))
    put_indices(request, "layers", options.get("layers"))
    put_indices(request, "heads", options.get("heads"))
    return request


def _point(name: str) -> str:
    """A point of all layers; "hook_z" is short for it."""
    return name if "*" in name or "." in name or not name else f"{name.removeprefix('hook_')}.*"


def _metric(metric: Metric | None) -> pb.Metric:
    match metric:
        case Logit(target):
            return pb.Metric(kind=pb.Metric.KIND_LOGIT, target=token_choice(target, "metric.target"))
        case LogitDifference(target, minus):
            return pb.Metric(
                kind=pb.Metric.KIND_LOGIT, target=token_choice(target, "metric.target"),
                minus=token_choice(minus, "metric.minus"),
            )  # fmt: skip
        case Probability(target):
            return pb.Metric(kind=pb.Metric.KIND_PROBABILITY, target=token_choice(target, "metric.target"))
        case Divergence():
            return pb.Metric(kind=pb.Metric.KIND_DIVERGENCE)
    raise InvalidArgument(f"metric: {metric!r}: give a Logit, LogitDifference, Probability or Divergence")
