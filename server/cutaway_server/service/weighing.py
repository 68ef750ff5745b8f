"""The part of cutaway.v1.Introspection that reads weights: only where the operator allows it."""
# ruff: noqa: N802, ARG002  (the contract names the methods, and gRPC gives each both arguments)

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from cutaway.v1 import weights_pb2 as v1
from numpy.typing import NDArray
from torch import Tensor

from cutaway_server.architecture import ModelConfig
from cutaway_server.config import Config
from cutaway_server.engine.build import EngineFacts
from cutaway_server.errors import InvalidField, OverBudget, Unsupported
from cutaway_server.probe.group import DTYPES
from cutaway_server.probe.named_weights import Named, Source, find, size_of
from cutaway_server.probe.nearest import Measure, neuron_vector, scores
from cutaway_server.service.caller import current
from cutaway_server.service.capturing import vectors
from cutaway_server.service.generation import Generation, Served
from cutaway_server.service.selecting import indices
from cutaway_server.service.shelf import Drawer
from cutaway_server.service.status import Context
from cutaway_server.service.tensors import Axis, chunks, header

MEASURES = {
    v1.MEASURE_UNSPECIFIED: Measure.LOGIT, v1.MEASURE_LOGIT: Measure.LOGIT,
    v1.MEASURE_UNEMBED_COSINE: Measure.UNEMBED_COSINE, v1.MEASURE_EMBED_COSINE: Measure.EMBED_COSINE,
}  # fmt: skip
MAX_TOKENS, DEFAULT_TOKENS = 1024, 10


@dataclass(frozen=True, slots=True)
class Slice:
    """A selection of a weight: of several layers, or of one (or none) without an axis for it."""

    named: Named
    layers: tuple[int, ...]
    stacked: bool
    places: tuple[tuple[int, ...], ...]  # of each axis
    name: str
    dtype: str

    @property
    def layer_bytes(self) -> int:
        """Bytes of one layer's."""
        return math.prod(map(len, self.places)) * (4 if self.dtype == "F32" else 2)

    @property
    def n_bytes(self) -> int:
        """Bytes of all."""
        return self.layer_bytes * max(1, len(self.layers))

    def axes(self) -> list[Axis]:
        """The axes, as they are sent."""
        own = [Axis(name, at) for name, at in zip(self.named.axes, map(_places, self.places), strict=True)]
        return [Axis("layer", self.layers), *own] if self.stacked else own

    def read(self, facts: EngineFacts, layer: int) -> NDArray[np.generic]:
        """One layer's elements, on the host."""
        picks = tuple(torch.tensor(places) for places in self.places)
        found = self.named.read(Source(facts.config, facts.weights, layer, picks))
        data = found.to(DTYPES[self.dtype]).cpu().contiguous()
        return (data.view(torch.int16) if self.dtype == "BF16" else data).numpy()


class Weighing:
    """The methods, for `methods_of`."""

    def __init__(self, generation: Generation, config: Config) -> None:
        self._generation, self._config = generation, config

    async def GetWeights(self, request: v1.GetWeightsRequest, context: Context) -> None:
        """Stream a weight."""
        facts = self._allowed().facts
        cut = slice_of(request, facts, self._config.max_capture_bytes)
        with self._generation.holding(cut.layer_bytes):
            told = header(cut.name, cut.dtype, cut.axes(), cut.n_bytes)
            await context.write(v1.GetWeightsResponse(tensor=told, model_hash=facts.model_hash))
            for place, layer in enumerate(cut.layers or (-1,)):
                data = await self._generation.work(partial(cut.read, facts, layer))
                for chunk in chunks(0, data):
                    chunk.offset += place * cut.layer_bytes
                    await context.write(v1.GetWeightsResponse(chunk=chunk))

    async def GetNearestTokens(
        self, request: v1.GetNearestTokensRequest, context: Context
    ) -> v1.GetNearestTokensResponse:
        """Tell a vector's tokens."""
        served = self._allowed()
        drawer = self._generation.shelf.of(current().caller.tenant)
        return await self._generation.work(partial(nearest, request, served, drawer))

    def _allowed(self) -> Served:
        if not self._config.serve_weights:
            raise Unsupported("weights are not told: the operator has not set --serve-weights")
        return self._generation.ready()


def slice_of(request: v1.GetWeightsRequest, facts: EngineFacts, most_bytes: int) -> Slice:
    """What a request means.

    Raises:
        InvalidField: it names what there is not.
        OverBudget: it is too much.
    """
    config = facts.config
    named, layer, every = find(config, facts.weights, request.name)
    if request.HasField("layers") and not every:
        raise InvalidField("layers", list(request.layers.list)[:16], 'is for names with "*" in place of a layer')
    layers: tuple[int, ...] = () if layer is None else (layer,)
    if every:
        layers = tuple(range(config.n_layers))
        if request.HasField("layers"):
            layers = indices(request.layers, config.n_layers, "layers", "layers")
    if request.dtype not in ("", *DTYPES):
        raise InvalidField("dtype", request.dtype, f"must be one of {', '.join(DTYPES)}")
    name = named.name.replace("{i}", "*" if every else str(layer))
    cut = Slice(named, layers, every, _selected(request, named, config), name, request.dtype or "F32")
    allowed = min(most_bytes, request.max_bytes) if request.HasField("max_bytes") else most_bytes
    if cut.n_bytes > allowed:
        raise OverBudget(f"{name}: these are {cut.n_bytes} bytes, and {allowed} are allowed; select some of it")
    return cut


def _selected(request: v1.GetWeightsRequest, named: Named, config: ModelConfig) -> tuple[tuple[int, ...], ...]:
    chosen: dict[str, tuple[int, ...]] = {}
    for i, each in enumerate(request.select):
        field = f"select[{i}]"
        if each.axis not in named.axes:
            raise InvalidField(f"{field}.axis", each.axis, f"{named.name} has {', '.join(named.axes)}")
        if each.axis in chosen:
            raise InvalidField(f"{field}.axis", each.axis, "is selected twice")
        chosen[each.axis] = indices(each.indices, size_of(config, each.axis), f"{field}.indices", f"{each.axis} places")
    return tuple(chosen.get(axis) or tuple(range(size_of(config, axis))) for axis in named.axes)


def _places(places: tuple[int, ...]) -> range | tuple[int, ...]:
    whole = range(places[0], places[-1] + 1)
    return whole if len(whole) == len(places) else places


def nearest(request: v1.GetNearestTokensRequest, served: Served, drawer: Drawer) -> v1.GetNearestTokensResponse:
    """A vector's tokens.

    Raises:
        InvalidField: names the field, the value and the rule.
    """
    facts = served.facts
    if request.measure not in MEASURES:
        raise InvalidField("measure", request.measure, "is no measure that this server knows")
    most = min(MAX_TOKENS, facts.config.d_vocab)
    if request.top_k > most:
        raise InvalidField("top_k", request.top_k, f"must be at most {most}")
    vector = _vector(request, facts, drawer)
    found = scores(facts.config, facts.weights, vector, MEASURES[request.measure])

    def told(largest: bool) -> Iterator[v1.ScoredToken]:
        top = found.topk(min(request.top_k or DEFAULT_TOKENS, most), largest=largest)
        for score, token in zip(top.values.tolist(), top.indices.tolist(), strict=True):
            yield v1.ScoredToken(id=token, text=served.text.decode([token]), score=score)

    return v1.GetNearestTokensResponse(largest=told(largest=True), smallest=told(largest=False))


def _vector(request: v1.GetNearestTokensRequest, facts: EngineFacts, drawer: Drawer) -> Tensor:
    config = facts.config
    match request.WhichOneof("source"):
        case "vector":
            found = vectors(request.vector, config.d_model, "vector")
        case "stored":
            found = drawer.values(request.stored, "stored").reshape(-1)
            if len(found) != config.d_model:
                raise InvalidField("stored", f"{len(found)} numbers", f"must be {config.d_model}")
        case "neuron":
            for name, value, size in (
                ("layer", request.neuron.layer, config.n_layers), ("index", request.neuron.index, config.d_mlp),
            ):  # fmt: skip
                if value >= size:
                    raise InvalidField(f"neuron.{name}", value, f"must be in [0, {size})")
            return neuron_vector(config, facts.weights, request.neuron.layer, request.neuron.index)
        case _:
            raise InvalidField("source", None, "one of vector, stored and neuron must be set")
    if found.size != config.d_model:
        raise InvalidField("vector", f"{found.size} numbers", f"must be {config.d_model}")
    return torch.from_numpy(found.reshape(-1))
