"""The calls that look inside the model, of the asynchronous client."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar, Unpack, overload

from cutaway import looking
from cutaway.looking import (
    AttentionOptions,
    AttributionOptions,
    FeatureOptions,
    HiddenStatesOptions,
    LensOptions,
    Prompt,
    TraceOptions,
)
from cutaway.results import AttributionResult, Estimate, LensResult, Point, SelfCheck
from cutaway.v1 import introspection_pb2 as pb

if TYPE_CHECKING:
    from cutaway.aio import AsyncCalls
    from cutaway.arrays import Array, Arrays

    Answer = TypeVar("Answer")

AT_ONCE = 16  # prompts asked about at the same time


class AsyncInspecting:
    """What `AsyncClient` can see. Each reading call also takes `prompts=[...]`, and then answers with a list."""

    _calls: AsyncCalls

    async def list_points(self, *, timeout: float | None = None) -> tuple[Point, ...]:
        """Tell what can be read and changed in the served model."""
        return looking.points(
            await self._calls.ask(self._calls.introspection.ListPoints, pb.ListPointsRequest(), timeout)
        )

    @overload
    async def trace(
        self, prompt: Prompt | None = None, *, prompts: None = None, **options: Unpack[TraceOptions]
    ) -> Arrays: ...
    @overload
    async def trace(self, *, prompts: Sequence[Prompt], **options: Unpack[TraceOptions]) -> list[Arrays]: ...
    async def trace(
        self, prompt: Prompt | None = None, *, prompts: Sequence[Prompt] | None = None, **options: Unpack[TraceOptions]
    ) -> Arrays | list[Arrays]:
        """Compute a prompt (and `max_tokens` tokens after it) and read `points` of it: arrays by canonical name."""

        async def one(prompt: Prompt | None) -> Arrays:
            request = looking.trace_request(prompt, options)
            return looking.traced(
                await self._calls.read(self._calls.introspection.Trace, request, options.get("timeout"))
            )

        return await _each(one, prompt, prompts, options)

    @overload
    async def hidden_states(
        self, prompt: Prompt | None = None, *, prompts: None = None, **options: Unpack[HiddenStatesOptions]
    ) -> Array: ...
    @overload
    async def hidden_states(
        self, *, prompts: Sequence[Prompt], **options: Unpack[HiddenStatesOptions]
    ) -> list[Array]: ...
    async def hidden_states(
        self,
        prompt: Prompt | None = None,
        *,
        prompts: Sequence[Prompt] | None = None,
        **options: Unpack[HiddenStatesOptions],
    ) -> Array | list[Array]:
        """The residual stream of a prompt, [layer, pos, d_model]: layer i is what block i reads."""

        async def one(prompt: Prompt | None) -> Array:
            request = looking.hidden_states_request(prompt, options)
            method = self._calls.introspection.GetHiddenStates
            return looking.hidden_states(await self._calls.read(method, request, options.get("timeout")))

        return await _each(one, prompt, prompts, options)

    @overload
    async def attention(
        self, prompt: Prompt | None = None, *, prompts: None = None, **options: Unpack[AttentionOptions]
    ) -> Array: ...
    @overload
    async def attention(self, *, prompts: Sequence[Prompt], **options: Unpack[AttentionOptions]) -> list[Array]: ...
    async def attention(
        self,
        prompt: Prompt | None = None,
        *,
        prompts: Sequence[Prompt] | None = None,
        **options: Unpack[AttentionOptions],
    ) -> Array | list[Array]:
        """Attention probabilities of a prompt, [layer, head, q_pos, k_pos]; with `top_k` [layer, head, q_pos, top]."""

        async def one(prompt: Prompt | None) -> Array:
            request = looking.attention_request(prompt, options)
            method = self._calls.introspection.GetAttention
            return looking.attention(await self._calls.read(method, request, options.get("timeout")))

        return await _each(one, prompt, prompts, options)

    @overload
    async def logit_lens(
        self, prompt: Prompt | None = None, *, prompts: None = None, **options: Unpack[LensOptions]
    ) -> LensResult: ...
    @overload
    async def logit_lens(self, *, prompts: Sequence[Prompt], **options: Unpack[LensOptions]) -> list[LensResult]: ...
    async def logit_lens(
        self, prompt: Prompt | None = None, *, prompts: Sequence[Prompt] | None = None, **options: Unpack[LensOptions]
    ) -> LensResult | list[LensResult]:
        """What the model would say if it ended after each layer."""
        timeout = options.get("timeout")
        if any(isinstance(token, str) for token in options.get("tokens", ())):
            options["tokens"] = [await self._id(token, timeout) for token in options["tokens"]]

        async def one(prompt: Prompt | None) -> LensResult:
            request = looking.lens_request(prompt, options)
            lens = looking.lens_result(await self._calls.read(self._calls.introspection.LogitLens, request, timeout))
            ids = looking.ids_of(lens)
            return looking.with_texts(lens, (await self._calls.detokenize(ids, timeout=timeout)).texts if ids else ())

        return await _each(one, prompt, prompts, options)

    async def _id(self, token: int | str, timeout: float | None) -> int:
        if not isinstance(token, str):
            return token
        told = await self._calls.tokenize(token, add_special_tokens=False, timeout=timeout)
        return looking.only_id(token, told.ids, told.pieces)

    async def self_check(self, prompt: Prompt | None = None, *, timeout: float | None = None) -> SelfCheck:
        """Test on a prompt what must hold of the served model's inner values."""
        request = looking.self_check_request(prompt, timeout)
        return looking.self_check(await self._calls.ask(self._calls.introspection.SelfCheck, request, timeout))

    @overload
    async def features(
        self, prompt: Prompt | None = None, *, prompts: None = None, **options: Unpack[FeatureOptions]
    ) -> Array: ...
    @overload
    async def features(self, *, prompts: Sequence[Prompt], **options: Unpack[FeatureOptions]) -> list[Array]: ...
    async def features(
        self,
        prompt: Prompt | None = None,
        *,
        prompts: Sequence[Prompt] | None = None,
        **options: Unpack[FeatureOptions],
    ) -> Array | list[Array]:
        """The most active features of a stored sparse autoencoder, [pos, top]; `.indices` says which they are."""

        async def one(prompt: Prompt | None) -> Array:
            request = looking.features_request(prompt, options)
            method = self._calls.introspection.Trace
            return looking.features(await self._calls.read(method, request, options.get("timeout")))

        return await _each(one, prompt, prompts, options)

    @overload
    async def attribution(
        self, prompt: Prompt | None = None, *, prompts: None = None, **options: Unpack[AttributionOptions]
    ) -> AttributionResult: ...
    @overload
    async def attribution(
        self, *, prompts: Sequence[Prompt], **options: Unpack[AttributionOptions]
    ) -> list[AttributionResult]: ...
    async def attribution(
        self,
        prompt: Prompt | None = None,
        *,
        prompts: Sequence[Prompt] | None = None,
        **options: Unpack[AttributionOptions],
    ) -> AttributionResult | list[AttributionResult]:
        """What each layer, head and neuron adds to the logit of `target`, or to its difference from that of `minus`."""

        async def one(prompt: Prompt | None) -> AttributionResult:
            request = looking.attribution_request(prompt, options)
            method = self._calls.introspection.Attribution
            return looking.attributed(await self._calls.read(method, request, options.get("timeout")))

        return await _each(one, prompt, prompts, options)

    async def estimate(self, prompt: Prompt | None = None, **options: Unpack[TraceOptions]) -> Estimate:
        """Tell what a `trace` (or `generate` with these captures) would send, without computing it."""
        request = looking.estimate_request(prompt, options)
        return looking.estimate(
            await self._calls.ask(self._calls.introspection.Estimate, request, options.get("timeout"))
        )


async def _each(
    one: Callable[[Prompt | None], Awaitable[Answer]],
    prompt: Prompt | None,
    prompts: Sequence[Prompt] | None,
    options: Mapping[str, object],
) -> Answer | list[Answer]:
    """The answer for one prompt, or for each of several, asked about at the same time."""
    if prompts is None:
        return await one(prompt)
    asked = looking.several(prompt, prompts, options)
    places = asyncio.Semaphore(AT_ONCE)

    async def placed(place: int) -> Answer:
        async with places:
            try:
                return await one(asked[place])
            except Exception as error:
                looking.told_which(error, place)
                raise

    return list(await asyncio.gather(*map(placed, range(len(asked)))))
