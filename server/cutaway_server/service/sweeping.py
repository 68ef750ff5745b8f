"""Sweep: one change after another of the same prompt, each a request of its own, and the metric of each."""
# ruff: noqa: N802  (the contract names the methods, and gRPC gives each both arguments)

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from cutaway.v1 import capture_pb2, edit_pb2, inference_pb2
from cutaway.v1 import sweep_pb2 as v1
from numpy.typing import NDArray

from cutaway_server.architecture import ModelConfig
from cutaway_server.errors import InvalidField
from cutaway_server.probe.points import Point, find, size_of
from cutaway_server.service.attributing import token_of
from cutaway_server.service.capturing import HEADS
from cutaway_server.service.editing import MAX_EDITS
from cutaway_server.service.gathering import Gathered
from cutaway_server.service.generation import Generation, Served
from cutaway_server.service.introspection import without_captures
from cutaway_server.service.selecting import indices, rows
from cutaway_server.service.status import Context
from cutaway_server.service.tensors import Axis, chunks, header

AT_ONCE = 32  # changes at work
MAX_CHANGES = 2**14
AXES = ("layer", "pos", "head")

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Metric:
    """What is measured of logits [d_vocab] (or of those of `tokens` alone)."""

    kind: int  # of the wire
    tokens: tuple[int, ...]  # target, and minus

    @property
    def elements(self) -> tuple[int, ...]:
        """The logits that are enough; empty: all are needed."""
        return tuple(sorted(set(self.tokens))) if self.kind == v1.Metric.KIND_LOGIT else ()

    def of(self, logits: Floats, reference: Floats) -> float:
        """The metric of a prediction; `reference` is what a divergence is from."""
        values = logits.astype(np.float64)
        if self.kind == v1.Metric.KIND_LOGIT:
            signed = zip(self.tokens, (1, -1), strict=False)
            return float(sum(sign * values[self.elements.index(token)] for token, sign in signed))
        logprobs = _log_softmax(values)
        if self.kind == v1.Metric.KIND_PROBABILITY:
            return float(sum(sign * np.exp(logprobs[t]) for t, sign in zip(self.tokens, (1, -1), strict=False)))
        wanted = _log_softmax(reference.astype(np.float64))
        return float((np.exp(wanted) * (wanted - logprobs)).sum())


@dataclass(frozen=True, slots=True)
class Plan:
    """What a sweep changes: places of each axis, and along which of them it goes."""

    point: Point
    layers: tuple[int, ...]
    positions: tuple[int, ...]
    heads: tuple[int, ...] | None  # None: the point has none
    over: tuple[str, ...]  # in the order of AXES

    def places(self, axis: str) -> tuple[int, ...]:
        """All places of an axis."""
        return {"layer": self.layers, "pos": self.positions, "head": self.heads or ()}[axis]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the outcome."""
        return tuple(len(self.places(axis)) for axis in self.over)

    def changes(self) -> Iterator[dict[str, tuple[int, ...]]]:
        """The places of each change, in C order."""
        for chosen in itertools.product(*(self.places(axis) for axis in self.over)):
            one = dict(zip(self.over, ((place,) for place in chosen), strict=True))
            yield {axis: one.get(axis, self.places(axis)) for axis in AXES}


class Sweeping:
    """The method, for `methods_of`."""

    def __init__(self, generation: Generation) -> None:
        self._generation = generation

    async def Sweep(self, request: v1.SweepRequest, context: Context) -> None:
        """Stream what each change does."""
        served = self._generation.ready()
        base = _alone(request.generate)
        metric = await self._generation.work(lambda: metric_of(request.metric, served))
        point = point_of(request, served.facts.config)
        unchanged = await self._predicted(base, metric, context)
        source = unchanged
        if request.WhichOneof("change") == "source" or request.ablation == v1.ABLATION_MEAN:
            asked = _alone(request.source) if request.WhichOneof("change") == "source" else base
            source = await self._predicted(asked, metric, context, point)
        plan = plan_of(request, served.facts.config, point, unchanged.length, source.length)
        patching = request.WhichOneof("change") == "source"
        await context.write(
            v1.SweepResponse(
                started=v1.SweepStarted(
                    unchanged=metric.of(unchanged.logits, source.logits if patching else unchanged.logits),
                    source=metric.of(source.logits, source.logits) if patching else None,
                    changes=int(np.prod(plan.shape)), model_hash=served.facts.model_hash,
                )
            )
        )  # fmt: skip
        reference = source.logits if patching else unchanged.logits
        places = asyncio.Semaphore(AT_ONCE)

        async def effect(change: dict[str, tuple[int, ...]]) -> float:
            async with places:
                asked = inference_pb2.GenerateRequest()
                asked.CopyFrom(base)
                asked.edits.extend(edits_of(request, plan, change, source.values))
                return metric.of((await self._predicted(asked, metric, context)).logits, reference)

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(effect(change)) for change in plan.changes()]
        except ExceptionGroup as errors:  # the first ended the others
            raise errors.exceptions[0] from None
        found = np.array([task.result() for task in tasks], np.float32).reshape(plan.shape)
        axes = [Axis(axis, plan.places(axis)) for axis in plan.over]
        await context.write(v1.SweepResponse(tensor=header("sweep", "F32", axes, found.nbytes)))
        for chunk in chunks(0, found):
            await context.write(v1.SweepResponse(chunk=chunk))

    async def _predicted(
        self, asked: inference_pb2.GenerateRequest, metric: Metric, context: Context, point: Point | None = None
    ) -> Predicted:
        """The prediction at a prompt's last row, and the values of a point at all its rows."""
        made = inference_pb2.GenerateRequest()
        made.CopyFrom(asked)
        logits = made.captures.add(point="logits")
        logits.positions.spans.add(region=capture_pb2.REGION_LAST)
        logits.elements.list.extend(metric.elements)
        if not metric.elements:
            logits.ClearField("elements")
        if point is not None:
            made.captures.add(point=point.name.replace("{i}", "*"))
        gathered = await self._generation.gather(made, context)
        return Predicted(gathered.values(0)[0], gathered.positions(0)[0] + 1, gathered if point is not None else None)


@dataclass(frozen=True, slots=True)
class Predicted:
    """What came of a prompt."""

    logits: Floats
    length: int  # of the prompt
    gathered: Gathered | None

    @property
    def values(self) -> Floats:
        """Of the point, [layer, pos, (head,) ...]."""
        return np.empty(0, np.float32) if self.gathered is None else self.gathered.values(1)


def _alone(request: inference_pb2.GenerateRequest) -> inference_pb2.GenerateRequest:
    """A request's prompt alone, under a name that is picked.

    Raises:
        InvalidField: it has captures.
    """
    asked = without_captures(request)
    asked.sampling.Clear()
    asked.sampling.max_tokens = 0
    asked.ClearField("request_id")
    return asked


def metric_of(message: v1.Metric, served: Served) -> Metric:
    """Check what is measured.

    Raises:
        InvalidField: names the field, the value and the rule.
    """
    named = [field for field in ("target", "minus") if message.HasField(field)]
    if message.kind == v1.Metric.KIND_DIVERGENCE:
        if named:
            raise InvalidField(f"metric.{named[0]}", "set", "must not be set with a divergence, which is of all tokens")
        return Metric(message.kind, ())
    if message.kind not in (v1.Metric.KIND_LOGIT, v1.Metric.KIND_PROBABILITY):
        raise InvalidField("metric.kind", message.kind, "must be logit, probability or divergence")
    text, d_vocab = served.text, served.facts.config.d_vocab
    tokens = [token_of(message.target, "metric.target", text, d_vocab)]
    if message.HasField("minus"):
        tokens.append(token_of(message.minus, "metric.minus", text, d_vocab))
    return Metric(message.kind, tuple(tokens))


def point_of(request: v1.SweepRequest, config: ModelConfig) -> Point:
    """The point that is changed.

    Raises:
        InvalidField: it is none of all layers that can be.
    """
    found = find(config, request.point, "point")
    if not found.every or not found.point.writable:
        raise InvalidField("point", request.point, 'must be writable, with "*" in place of a layer')
    if request.WhichOneof("change") is None:
        raise InvalidField("source", None, "source or ablation must be set")
    return found.point


def plan_of(request: v1.SweepRequest, config: ModelConfig, point: Point, length: int, source: int) -> Plan:
    """Check what a sweep of a prompt goes over; `source` is the length of the prompt that it patches from.

    Raises:
        InvalidField: names the field, the value and the rule.
    """
    if source != length:
        rule = f"must have as many tokens as generate's prompt, which has {length}"
        raise InvalidField("source.prompt", f"{source} tokens", rule)
    axis = next((axis for axis in point.axes if axis in HEADS), None)
    heads = None if axis is None else tuple(range(size_of(config, axis)))
    if request.HasField("heads"):
        if axis is None:
            raise InvalidField("heads", list(request.heads.list)[:16], f"{point.name} has no heads")
        heads = indices(request.heads, size_of(config, axis), "heads", f"{axis}s")
    layers = tuple(range(config.n_layers))
    if request.HasField("layers"):
        layers = indices(request.layers, config.n_layers, "layers", "layers")
    positions = tuple(rows(request.positions, "positions", length, length).within(0, length))
    for name in request.over:
        if name not in AXES or (name == "head" and heads is None):
            raise InvalidField("over", name, f"must be of {', '.join(AXES if heads is not None else AXES[:2])}")
    plan = Plan(point, layers, positions, heads, tuple(axis for axis in AXES if axis in request.over))
    most = MAX_EDITS - len(request.generate.edits)
    if "layer" not in plan.over and len(layers) > most:
        raise InvalidField("layers", f"{len(layers)} at once", f"at most {most} can be changed at once: go over layer")
    if (size := int(np.prod(plan.shape))) > MAX_CHANGES:
        raise InvalidField("over", f"{size} changes", f"at most {MAX_CHANGES} are allowed")
    return plan


def edits_of(
    request: v1.SweepRequest, plan: Plan, change: dict[str, tuple[int, ...]], values: Floats
) -> Iterator[edit_pb2.Edit]:
    """The edits of one change, one for each of its layers."""
    patching = request.WhichOneof("change") == "source"
    for layer in change["layer"]:
        made = edit_pb2.Edit(point=plan.point.name.replace("{i}", str(layer)))
        made.positions.list.extend(change["pos"])
        if plan.heads is not None:
            made.heads.list.extend(change["head"])
        if not patching and request.ablation != v1.ABLATION_MEAN:
            made.zero.SetInParent()
            yield made
            continue
        own = values[layer]  # [pos, (head,) ...]
        own = own[list(change["pos"])] if patching else own.mean(0, keepdims=True)
        if plan.heads is not None:
            own = own[:, list(change["head"])]
        made.set.values = np.ascontiguousarray(own, "<f4").tobytes()
        yield made


def _log_softmax(values: NDArray[np.float64]) -> NDArray[np.float64]:
    shifted = values - values.max()
    found: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum())
    return found
