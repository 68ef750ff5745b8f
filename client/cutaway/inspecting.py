"""The calls that look inside the model, of the synchronous client."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
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
    from cutaway.arrays import Array, Arrays
    from cutaway.client import Calls

    Answer = TypeVar("Answer")

AT_ONCE = 16  # prompts asked about at the same time


class Inspecting:
    """What `Client` can see. Each reading call also takes `prompts=[...]` and then answers with a list, one each."""

    _calls: Calls

    def list_points(self, *, timeout: float | None = None) -> tuple[Point, ...]:
        """Tell what can be read and changed in the served model."""
        return looking.points(self._calls.ask(self._calls.introspection.ListPoints, pb.ListPointsRequest(), timeout))

    @overload
    def trace(
        self, prompt: Prompt | None = None, *, prompts: None = None, **options: Unpack[TraceOptions]
    ) -> Arrays: ...
    @overload
    def trace(self, *, prompts: Sequence[Prompt], **options: Unpack[TraceOptions]) -> list[Arrays]: ...
    def trace(
        self, prompt: Prompt | None = None, *, prompts: Sequence[Prompt] | None = None, **options: Unpack[TraceOptions]
    ) -> Arrays | list[Arrays]:
        """Compute a prompt (and `max_tokens` tokens after it) and read `points` of it: arrays by canonical name."""

        def one(prompt: Prompt | None) -> Arrays:
            request = looking.trace_request(prompt, options)
            return looking.traced(self._calls.read(self._calls.introspection.Trace, request, options.get("timeout")))

        return _each(one, prompt, prompts, options)

    @overload
    def hidden_states(
        self, prompt: Prompt | None = None, *, prompts: None = None, **options: Unpack[HiddenStatesOptions]
    ) -> Array: ...
    @overload
    def hidden_states(self, *, prompts: Sequence[Prompt], **options: Unpack[HiddenStatesOptions]) -> list[Array]: ...
    def hidden_states(
        self,
        prompt: Prompt | None = None,
        *,
        prompts: Sequence[Prompt] | None = None,
        **options: Unpack[HiddenStatesOptions],
    ) -> Array | list[Array]:
        """The residual stream of a prompt, [layer, pos, d_model]: layer i is what block i reads."""

        def one(prompt: Prompt | None) -> Array:
            request = looking.hidden_states_request(prompt, options)
            method = self._calls.introspection.GetHiddenStates
            return looking.hidden_states(self._calls.read(method, request, options.get("timeout")))

        return _each(one, prompt, prompts, options)

    @overload
    def attention(
        self, prompt: Prompt | None = None, *, prompts: None = None, **options: Unpack[AttentionOptions]
    ) -> Array: ...
    @overload
    def attention(self, *, prompts: Sequence[Prompt], **options: Unpack[AttentionOptions]) -> list[Array]: ...
    def attention(
        self,
        prompt: Prompt | None = None,
        *,
        prompts: Sequence[Prompt] | None = None,
        **options: Unpack[AttentionOptions],
    ) -> Array | list[Array]:
        """Attention probabilities of a prompt, [layer, head, q_pos, k_pos]; with `top_k` [layer, head, q_pos, top]."""

        def one(prompt: Prompt | None) -> Array:
            request = looking.attention_request(prompt, options)
            method = self._calls.introspection.GetAttention
            return looking.attention(self._calls.read(method, request, options.get("timeout")))

        return _each(one, prompt, prompts, options)

    @overload
    def logit_lens(
        self, prompt: Prompt | None = None, *, prompts: None = None, **options: Unpack[LensOptions]
    ) -> LensResult: ...
    @overload
    def logit_lens(self, *, prompts: Sequence[Prompt], **options: Unpack[LensOptions]) -> list[LensResult]: ...
    def logit_lens(
        self, prompt: Prompt | None = None, *, prompts: Sequence[Prompt] | None = None, **options: Unpack[LensOptions]
    ) -> LensResult | list[LensResult]:
        """What the model would say if it ended after each layer."""
        timeout = options.get("timeout")
        if any(isinstance(token, str) for token in options.get("tokens", ())):
            options["tokens"] = [self._id(token, timeout) for token in options["tokens"]]

        def one(prompt: Prompt | None) -> LensResult:
            request = looking.lens_request(prompt, options)
            lens = looking.lens_result(self._calls.read(self._calls.introspection.LogitLens, request, timeout))
            ids = looking.ids_of(lens)
            return looking.with_texts(lens, self._calls.detokenize(ids, timeout=timeout).texts if ids else ())

        return _each(one, prompt, prompts, options)

    def _id(self, token: int | str, timeout: float | None) -> int:
        if not isinstance(token, str):
            return token
        told = self._calls.tokenize(token, add_special_tokens=False, timeout=timeout)
        return looking.only_id(token, told.ids, told.pieces)

    def self_check(self, prompt: Prompt | None = None, *, timeout: float | None = None) -> SelfCheck:
        """Test on a prompt what must hold of the served model's inner values."""
        request = looking.self_check_request(prompt, timeout)
        return looking.self_check(self._calls.ask(self._calls.introspection.SelfCheck, request, timeout))

    @overload
    def features(
        self, prompt: Prompt | None = None, *, prompts: None = None, **options: Unpack[FeatureOptions]
    ) -> Array: ...
    @overload
    def features(self, *, prompts: Sequence[Prompt], **options: Unpack[FeatureOptions]) -> list[Array]: ...
    def features(
        self,
        prompt: Prompt | None = None,
        *,
        prompts: Sequence[Prompt] | None = None,
        **options: Unpack[FeatureOptions],
    ) -> Array | list[Array]:
        """The most active features of a stored sparse autoencoder, [pos, top]; `.indices` says which they are."""

        def one(prompt: Prompt | None) -> Array:
            request = looking.features_request(prompt, options)
            method = self._calls.introspection.Trace
            return looking.features(self._calls.read(method, request, options.get("timeout")))

        return _each(one, prompt, prompts, options)

    @overload
    def attribution(
        self, prompt: Prompt | None = None, *, prompts: None = None, **options: Unpack[AttributionOptions]
    ) -> AttributionResult: ...
    @overload
    def attribution(
        self, *, prompts: Sequence[Prompt], **options: Unpack[AttributionOptions]
    ) -> list[AttributionResult]: ...
    def attribution(
        self,
        prompt: Prompt | None = None,
        *,
        prompts: Sequence[Prompt] | None = None,
        **options: Unpack[AttributionOptions],
    ) -> AttributionResult | list[AttributionResult]:
        """What each layer, head and neuron adds to the logit of `target`, or to its difference from that of `minus`."""

        def one(prompt: Prompt | None) -> AttributionResult:
            request = looking.attribution_request(prompt, options)
            method = self._calls.introspection.Attribution
            return looking.attributed(self._calls.read(method, request, options.get("timeout")))

        return _each(one, prompt, prompts, options)

    def estimate(self, prompt: Prompt | None = None, **options: Unpack[TraceOptions]) -> Estimate:
        """Tell what a `trace` (or `generate` with these captures) would send, without computing it."""
        request = looking.estimate_request(prompt, options)
        return looking.estimate(self._calls.ask(self._calls.introspection.Estimate, request, options.get("timeout")))


def _each(
    one: Callable[[Prompt | None], Answer],
    prompt: Prompt | None,
    prompts: Sequence[Prompt] | None,
    options: Mapping[str, object],
) -> Answer | list[Answer]:
    """The answer for one prompt, or for each of several, asked about at the same time."""
    if prompts is None:
        return one(prompt)
    asked = looking.several(prompt, prompts, options)

    def placed(place: int) -> Answer:
        try:
            return one(asked[place])
        except Exception as error:
            looking.told_which(error, place)
            raise

    with ThreadPoolExecutor(max(1, min(len(asked), AT_ONCE))) as pool:
        return list(pool.map(placed, range(len(asked))))
