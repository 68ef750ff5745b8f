"""cutaway.v1.Introspection: what each call does, in terms of captures and the one way to compute a request."""
# ruff: noqa: N802, ARG002  (the contract names the methods, and gRPC gives each both arguments)

from __future__ import annotations

from dataclasses import replace
from functools import partial

from cutaway.v1 import capture_pb2, inference_pb2
from cutaway.v1 import introspection_pb2 as v1

from cutaway_server.architecture import ModelConfig
from cutaway_server.errors import InvalidField, OverBudget
from cutaway_server.probe.estimate import open_layers
from cutaway_server.probe.points import Cost, Point, aliases_of, points_of, size_of
from cutaway_server.service.asking import bytes_of, check_budget
from cutaway_server.service.attributing import Attributing, capture_needed, choice_of
from cutaway_server.service.generation import Generation
from cutaway_server.service.selecting import indices
from cutaway_server.service.self_check import LONGEST, Gathered, check_request, told
from cutaway_server.service.status import Context

COSTS = {
    Cost.COPY: v1.COST_COPY, Cost.OPEN: v1.COST_OPEN, Cost.CONTEXT: v1.COST_CONTEXT, Cost.MATRIX: v1.COST_MATRIX,
}  # fmt: skip
BYTES = 4  # of an F32
ENDLESS = 2**63


class Introspection:
    """The methods that compute, for `methods_of`."""

    def __init__(self, generation: Generation) -> None:
        self._generation = generation

    async def ListPoints(self, request: v1.ListPointsRequest, context: Context) -> v1.ListPointsResponse:
        """Tell what can be read and changed."""
        facts = self._generation.ready().facts
        points = [_point(point, facts.config) for point in points_of(facts.config)]
        return v1.ListPointsResponse(points=points, model_hash=facts.model_hash)

    async def Trace(self, request: v1.TraceRequest, context: Context) -> None:
        """Stream what a request captures."""
        asked = of_the_prompt(request.generate)
        await self._generation.stream(asked, context, lambda event: v1.TraceResponse(event=event))

    async def GetHiddenStates(self, request: v1.GetHiddenStatesRequest, context: Context) -> None:
        """Stream the residual stream."""
        asked = without_captures(request.generate)
        for capture in self._between_layers(request, asked):
            capture.dtype = request.dtype
        await self._generation.stream(asked, context, lambda event: v1.GetHiddenStatesResponse(event=event))

    async def LogitLens(self, request: v1.LogitLensRequest, context: Context) -> None:
        """Stream what each layer's residual predicts."""
        asked = without_captures(request.generate)
        for capture in self._between_layers(request, asked):
            capture.lens.CopyFrom(request.lens)
            capture.lens.SetInParent()
        await self._generation.stream(asked, context, lambda event: v1.LogitLensResponse(event=event))

    def _between_layers(
        self, request: v1.GetHiddenStatesRequest | v1.LogitLensRequest, asked: inference_pb2.GenerateRequest
    ) -> list[capture_pb2.Capture]:
        """Add captures of the residual before the layers asked for; one past the last is what the last one leaves."""
        n = self._generation.ready().facts.config.n_layers
        wanted: tuple[int, ...] = tuple(range(n + 1))
        if request.HasField("layers"):
            wanted = indices(request.layers, n + 1, "layers", "places between layers")
        made = []
        if before := [layer for layer in wanted if layer < n]:
            made.append(asked.captures.add(point="blocks.*.hook_resid_pre", layers=capture_pb2.Indices(list=before)))
        if n in wanted:
            last = capture_pb2.Indices(list=[n - 1])
            made.append(asked.captures.add(point="blocks.*.hook_resid_post", layers=last))
        for capture in made:
            capture.positions.CopyFrom(request.positions)
        return made

    async def GetAttention(self, request: v1.GetAttentionRequest, context: Context) -> None:
        """Stream attention patterns."""
        asked = without_captures(request.generate)
        capture = asked.captures.add(point="blocks.*.attn.hook_pattern", keys=request.keys, dtype=request.dtype)
        capture.positions.CopyFrom(request.queries)
        for name in ("layers", "heads"):
            if request.HasField(name):
                getattr(capture, name).CopyFrom(getattr(request, name))
        if request.HasField("top_k"):
            capture.top_k.k = request.top_k
        await self._generation.stream(asked, context, lambda event: v1.GetAttentionResponse(event=event))

    async def Attribution(self, request: v1.AttributionRequest, context: Context) -> None:
        """Stream what each part of the network adds to a logit."""
        served = self._generation.ready()
        asked = without_captures(request.generate)
        choice = await self._generation.work(partial(choice_of, request, served.text, served.facts))
        attributing = Attributing(choice, served.facts)
        capture_needed(asked, request.positions, attributing.names)
        await self._generation.distil(
            asked, context, lambda event: v1.AttributionResponse(event=event), attributing.messages
        )

    async def SelfCheck(self, request: v1.SelfCheckRequest, context: Context) -> v1.SelfCheckResponse:
        """Test what must hold."""
        facts = self._generation.ready().facts
        gathered = Gathered(facts)
        await self._generation.run(check_request(request.generate, facts), context, gathered.take, most_tokens=LONGEST)
        return await self._generation.work(partial(told, gathered, facts))

    async def Estimate(self, request: v1.EstimateRequest, context: Context) -> v1.EstimateResponse:
        """Tell what a request would send and cost. What breaks a rule is refused as by the call itself."""
        limits = self._generation.limits()
        unbounded = inference_pb2.GenerateRequest()
        unbounded.CopyFrom(request.generate)
        unbounded.ClearField("max_capture_bytes")
        asked = await self._generation.ask(unbounded, limits=replace(limits, max_capture_bytes=ENDLESS))
        sizes = bytes_of(asked.request, limits)
        answer = v1.EstimateResponse(
            bytes=sum(sizes), capture_bytes=sizes, max_bytes=limits.max_capture_bytes,
            open_layers=open_layers(asked.request.captures),
        )  # fmt: skip
        allowed = request.generate.max_capture_bytes if request.generate.HasField("max_capture_bytes") else None
        try:
            check_budget(sum(sizes), allowed, limits.max_capture_bytes)
        except OverBudget as error:
            answer.refusal = str(error)
        return answer


def of_the_prompt(request: inference_pb2.GenerateRequest) -> inference_pb2.GenerateRequest:
    """The request, which computes its prompt alone if nothing is said of tokens."""
    if request.sampling.HasField("max_tokens"):
        return request
    asked = inference_pb2.GenerateRequest()
    asked.CopyFrom(request)
    asked.sampling.max_tokens = 0
    return asked


def without_captures(request: inference_pb2.GenerateRequest) -> inference_pb2.GenerateRequest:
    """A copy, to which captures are added.

    Raises:
        InvalidField: it has some of its own.
    """
    if request.captures:
        raise InvalidField("generate.captures", f"{len(request.captures)} entries", "must not be set: Trace takes them")
    asked = inference_pb2.GenerateRequest()
    asked.CopyFrom(of_the_prompt(request))
    return asked


def _point(point: Point, config: ModelConfig) -> v1.Point:
    sizes = [size_of(config, axis) for axis in point.axes]
    each = BYTES
    for size in sizes:
        each *= size or 1
    return v1.Point(
        name=point.name, axes=point.axes, shape=sizes, dtype="F32", readable=True, writable=point.writable,
        cost=COSTS[point.cost], bytes_per_position=each, aliases=aliases_of(config, point),
        description=point.description,
    )  # fmt: skip
