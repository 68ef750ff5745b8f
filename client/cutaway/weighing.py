"""The calls that read weights, of both clients. Scope `weights`; off unless the operator allows them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from cutaway.capture import Indices, put_indices
from cutaway.errors import InvalidArgument, ServerError
from cutaway.stored import Stored
from cutaway.v1 import weights_pb2 as pb

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from cutaway.aio import AsyncCalls
    from cutaway.arrays import Array
    from cutaway.client import Calls
    from cutaway.receiving import Receiver

Measure = Literal["logit", "unembed cosine", "embed cosine"]
MEASURES = {
    "logit": pb.MEASURE_LOGIT, "unembed cosine": pb.MEASURE_UNEMBED_COSINE, "embed cosine": pb.MEASURE_EMBED_COSINE,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class ScoredToken:
    """A token and its score."""

    id: int
    text: str
    score: float


@dataclass(frozen=True, slots=True)
class NearestTokens:
    """The tokens at both ends: what a vector promotes, or what is nearest, and what it suppresses."""

    largest: tuple[ScoredToken, ...]
    smallest: tuple[ScoredToken, ...]


class Weighing:
    """What `Client` can read of the weights."""

    _calls: Calls

    def weights(
        self,
        name: str,
        *,
        layers: Indices = None,
        dtype: str = "F32",
        max_bytes: int | None = None,
        timeout: float | None = None,
        **select: Indices,
    ) -> Array:
        """A weight by its TransformerLens name, or a slice: `weights("blocks.3.attn.W_O", head=[2], d_model=range(8))`.

        The keyword of a selection is the name of an axis. With "*" in place of a layer the first axis is `layer`.

        Raises:
            FailedPrecondition: the operator does not allow it.
        """
        calls = self._calls
        request = weights_request(name, layers, dtype, max_bytes, select)
        taking = _Taking()
        for message in calls.each(calls.introspection.GetWeights, request, timeout):
            taking.take(message)
        return taking.whole()

    def nearest_tokens(
        self,
        vector: ArrayLike | Stored | None = None,
        *,
        neuron: tuple[int, int] | None = None,
        measure: Measure = "logit",
        top_k: int = 10,
        timeout: float | None = None,
    ) -> NearestTokens:
        """The tokens that a vector of the residual stream, or a neuron (layer, index), promotes and suppresses."""
        calls = self._calls
        request = nearest_request(vector, neuron, measure, top_k)
        return nearest_tokens(calls.ask(calls.introspection.GetNearestTokens, request, timeout))


class AsyncWeighing:
    """What `AsyncClient` can read of the weights: as `Weighing`, awaited."""

    _calls: AsyncCalls

    async def weights(
        self,
        name: str,
        *,
        layers: Indices = None,
        dtype: str = "F32",
        max_bytes: int | None = None,
        timeout: float | None = None,
        **select: Indices,
    ) -> Array:
        """A weight by its TransformerLens name, or a slice of it."""
        calls = self._calls
        request = weights_request(name, layers, dtype, max_bytes, select)
        taking = _Taking()
        async for message in calls.each(calls.introspection.GetWeights, request, timeout):
            taking.take(message)
        return taking.whole()

    async def nearest_tokens(
        self,
        vector: ArrayLike | Stored | None = None,
        *,
        neuron: tuple[int, int] | None = None,
        measure: Measure = "logit",
        top_k: int = 10,
        timeout: float | None = None,
    ) -> NearestTokens:
        """The tokens that a vector of the residual stream, or a neuron (layer, index), promotes and suppresses."""
        calls = self._calls
        request = nearest_request(vector, neuron, measure, top_k)
        return nearest_tokens(await calls.ask(calls.introspection.GetNearestTokens, request, timeout))


class _Taking:
    """A tensor on its way."""

    def __init__(self) -> None:
        self._receiver: Receiver | None = None
        self._array: Array | None = None

    def take(self, message: pb.GetWeightsResponse) -> None:
        """Take a header or a chunk."""
        if self._receiver is None:
            from cutaway.receiving import Receiver

            self._receiver = Receiver(message.model_hash)
        if message.WhichOneof("part") == "tensor":
            received = self._receiver.header(message.tensor)
        else:
            received = self._receiver.chunk(message.chunk)
        self._array = received.array if received is not None else self._array

    def whole(self) -> Array:
        """The tensor.

        Raises:
            ServerError: something is missing.
        """
        if self._array is None:
            raise ServerError("the stream ended before the weight was whole")
        return self._array


def weights_request(
    name: str,
    layers: Indices,
    dtype: str,
    max_bytes: int | None,
    select: dict[str, Indices],
) -> pb.GetWeightsRequest:
    """The wire's request."""
    request = pb.GetWeightsRequest(name=name, dtype=dtype, max_bytes=max_bytes)
    put_indices(request, "layers", layers)
    for axis, chosen in select.items():
        selection = pb.AxisSelection(axis=axis)
        put_indices(selection, "indices", chosen)
        if selection.HasField("indices"):  # "all" needs no selection
            request.select.append(selection)
    return request


def nearest_request(
    vector: ArrayLike | Stored | None, neuron: tuple[int, int] | None, measure: Measure, top_k: int
) -> pb.GetNearestTokensRequest:
    """The wire's request.

    Raises:
        InvalidArgument: vector and neuron are not given exactly once, or a value does not fit the wire.
    """
    import numpy as np

    if (vector is None) == (neuron is None):
        raise InvalidArgument("vector: give a vector or a neuron")
    if measure not in MEASURES:
        raise InvalidArgument(f"measure: {measure!r} is none of {', '.join(MEASURES)}")
    try:
        request = pb.GetNearestTokensRequest(measure=MEASURES[measure], top_k=top_k)
        if isinstance(vector, Stored):
            request.stored.CopyFrom(vector.message())
        elif neuron is not None:
            request.neuron.layer, request.neuron.index = neuron
            request.neuron.SetInParent()
        else:
            request.vector = np.ascontiguousarray(vector, "<f4").tobytes()
    except ValueError as error:
        raise InvalidArgument(f"nearest_tokens: a value cannot be sent: {error}") from error
    return request


def nearest_tokens(wire: pb.GetNearestTokensResponse) -> NearestTokens:
    """The tokens at both ends."""
    largest, smallest = (
        tuple(ScoredToken(each.id, each.text, each.score) for each in tokens)
        for tokens in (wire.largest, wire.smallest)
    )
    return NearestTokens(largest, smallest)
