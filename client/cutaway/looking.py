"""What the calls that look inside ask, and what they make of the answer: shared by both clients."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, TypedDict, cast

from cutaway import requests
from cutaway.errors import InvalidArgument
from cutaway.options import GenerateOptions, Message
from cutaway.results import AttributionResult, Estimate, Identity, LensResult, Point, SelfCheck
from cutaway.v1 import inference_pb2, introspection_pb2, sweep_pb2

if TYPE_CHECKING:
    from cutaway.arrays import Array, Arrays
    from cutaway.capture import Indices, Positions, Spans
    from cutaway.edit import Edit
    from cutaway.stored import StoredFile
    from cutaway.transcript import Transcript

Prompt = str | Sequence[int] | Sequence[Message]


class PromptOptions(TypedDict, total=False):
    """What every call that looks inside takes beside the prompt. Exactly one prompt is given, or `prompts`."""

    token_ids: Iterable[int] | None  # the prompt as tokens, used as they are
    messages: Iterable[Message] | None  # the prompt as a conversation
    parse_special_tokens: bool | None  # read "<|im_start|>" in a prompt as a token. Default False
    add_special_tokens: bool | None  # add the tokens the model expects around a prompt, as BOS. Default True
    prefix_caching: bool | None  # let the request read and feed the prefix cache. Default True
    edits: Iterable[Edit] | None  # changes of inner values, made in this order at each point. Default: none
    max_capture_bytes: int | None  # refuse the request if it could send more. Default: the server's limit
    request_id: str | None  # the request's name. Default: picked by the server
    timeout: float | None  # seconds until DeadlineExceeded. Default: the client's


class HiddenStatesOptions(PromptOptions, total=False):
    """All keywords of `hidden_states`."""

    layers: Indices  # i is what block i reads, n_layers what the last block leaves. Default all
    positions: Positions  # "all", "last", [5, -1], range(0, 100, 2). Default "all"
    dtype: str  # "F32", "F16" or "BF16". Default "F32"


class AttentionOptions(PromptOptions, total=False):
    """All keywords of `attention`."""

    layers: Indices  # default all
    heads: Indices  # query heads; default all
    queries: Positions  # as positions. Default "all"
    keys: Spans  # spans of keys, such as [(0, 4)]. Default all
    top_k: int | None  # only so many of the largest of each query. Default: all
    dtype: str  # "F32", "F16" or "BF16". Default "F32"


class LensOptions(PromptOptions, total=False):
    """All keywords of `logit_lens`."""

    layers: Indices  # as for `hidden_states`. Default all
    positions: Positions  # default "all"
    top_k: int  # likeliest tokens. Default 5
    tokens: Iterable[int | str]  # ids, or texts of one token, whose log-probability and rank to tell. Default none
    translators: StoredFile | str | None  # a tuned lens: a stored file, or its id. Default none


class FeatureOptions(PromptOptions, total=False):
    """All keywords of `features`."""

    sae: StoredFile | str  # a stored autoencoder, or its id; must be given
    point: str  # what it reads. Default: what it was trained on
    positions: Positions  # default "all"
    top_k: int  # most active features. Default 10


class AttributionOptions(PromptOptions, total=False):
    """All keywords of `attribution`. A token is an id, or a text that is one token: " Paris"."""

    target: int | str  # the token whose logit is taken apart; must be given
    minus: int | str | None  # the token whose logit is taken away from it. Default none
    positions: Positions  # rows that predict. Default "last"
    neurons: int  # so many of each layer: those that add or take most. Default 10


class TraceOptions(GenerateOptions, total=False):
    """All keywords of `trace`: those of `generate`, of which max_tokens is 0 by default, and what to look at."""

    points: Iterable[str]  # names of points, with a layer's number or "*"
    positions: Positions  # of `points`. Default "all"


def several(prompt: Prompt | None, prompts: Sequence[Prompt], options: Mapping[str, object]) -> list[Prompt]:
    """The prompts of a call that was given several.

    Raises:
        InvalidArgument: there is another prompt beside them, or one name for all of them.
    """
    if isinstance(prompts, str):
        raise InvalidArgument(f"prompts: {prompts!r} must be a list of prompts")
    other = [name for name in ("token_ids", "messages") if options.get(name) is not None]
    if prompt is not None or other:
        raise InvalidArgument(f"prompts: give prompts or {(other or ['a prompt'])[0]}, not both")
    if options.get("request_id") is not None:
        raise InvalidArgument("request_id: one name cannot stand for several requests; leave it out with prompts")
    return list(prompts)


def told_which(error: Exception, place: int) -> None:
    """Add to an error of one of several prompts which one it was."""
    error.add_note(f"this is about prompts[{place}]")


def generate_of(prompt: Prompt | None, options: Mapping[str, object]) -> inference_pb2.GenerateRequest:
    """The request for a prompt given as text, tokens or a conversation."""
    given = {name: options[name] for name in GenerateOptions.__annotations__ if name in options}
    if prompt is not None and not isinstance(prompt, str):
        listed = list(prompt)
        if listed and isinstance(listed[0], str):
            raise InvalidArgument("prompt: is a list of texts; give them as prompts=[...]")
        given["messages" if listed and isinstance(listed[0], Mapping) else "token_ids"] = listed
        prompt = None
    return requests.generate_request(prompt, given)  # type: ignore[arg-type]


def trace_request(prompt: Prompt | None, options: TraceOptions) -> introspection_pb2.TraceRequest:
    """The wire's request."""
    from cutaway.capture import Capture

    requests.refuse_unknown("trace", options.keys(), TraceOptions.__annotations__)
    points = options.get("points", ())
    if isinstance(points, str):
        points = (points,)
    where = options.get("positions", "all")
    captures = [Capture(point, positions=where) for point in points]
    given = {**options, "captures": [*captures, *(options.get("captures") or ())]}
    if not given["captures"]:
        raise InvalidArgument("points: name at least one, or give captures")
    return introspection_pb2.TraceRequest(generate=generate_of(prompt, given))


def hidden_states_request(
    prompt: Prompt | None, options: HiddenStatesOptions
) -> introspection_pb2.GetHiddenStatesRequest:
    """The wire's request."""
    from cutaway.capture import positions, put_indices

    requests.refuse_unknown("hidden_states", options.keys(), HiddenStatesOptions.__annotations__)
    request = introspection_pb2.GetHiddenStatesRequest(
        generate=generate_of(prompt, options),
        positions=positions(options.get("positions", "all")),
        dtype=options.get("dtype", "F32"),
    )
    put_indices(request, "layers", options.get("layers"))
    return request


def attention_request(prompt: Prompt | None, options: AttentionOptions) -> introspection_pb2.GetAttentionRequest:
    """The wire's request."""
    from cutaway.capture import positions, put_indices, spans

    requests.refuse_unknown("attention", options.keys(), AttentionOptions.__annotations__)
    request = introspection_pb2.GetAttentionRequest(
        generate=generate_of(prompt, options),
        queries=positions(options.get("queries", "all")),
        keys=spans(options.get("keys", ())),
        dtype=options.get("dtype", "F32"),
    )
    put_indices(request, "layers", options.get("layers"))
    put_indices(request, "heads", options.get("heads"))
    requests.put(request, "top_k", options.get("top_k"))
    return request


def lens_request(prompt: Prompt | None, options: LensOptions) -> introspection_pb2.LogitLensRequest:
    """The wire's request."""
    from cutaway.capture import lens, positions, put_indices

    requests.refuse_unknown("logit_lens", options.keys(), LensOptions.__annotations__)
    request = introspection_pb2.LogitLensRequest(
        generate=generate_of(prompt, options),
        positions=positions(options.get("positions", "all")),
        lens=lens(
            options.get("top_k", 5), cast("Iterable[int]", options.get("tokens", ())), options.get("translators")
        ),
    )
    put_indices(request, "layers", options.get("layers"))
    return request


def features_request(prompt: Prompt | None, options: FeatureOptions) -> introspection_pb2.TraceRequest:
    """The wire's request."""
    from cutaway.capture import Capture

    requests.refuse_unknown("features", options.keys(), FeatureOptions.__annotations__)
    if (sae := options.get("sae")) is None:
        raise InvalidArgument("sae: name the autoencoder whose features are to be told")
    capture = Capture(
        options.get("point", ""), positions=options.get("positions", "all"), sae=sae, top_k=options.get("top_k")
    )
    return introspection_pb2.TraceRequest(generate=generate_of(prompt, {**options, "captures": [capture]}))


def attribution_request(prompt: Prompt | None, options: AttributionOptions) -> introspection_pb2.AttributionRequest:
    """The wire's request."""
    from cutaway.capture import positions

    requests.refuse_unknown("attribution", options.keys(), AttributionOptions.__annotations__)
    if (target := options.get("target")) is None:
        raise InvalidArgument("target: name the token whose logit is to be taken apart")
    request = introspection_pb2.AttributionRequest(
        generate=generate_of(prompt, options), target=token_choice(target, "target"),
        positions=positions(options.get("positions", "last")),
    )  # fmt: skip
    requests.put(request, "neurons", options.get("neurons", 10))
    if (minus := options.get("minus")) is not None:
        request.minus.CopyFrom(token_choice(minus, "minus"))
    return request


def token_choice(token: int | str, field: str) -> sweep_pb2.TokenChoice:
    """The wire's token."""
    made = sweep_pb2.TokenChoice()
    try:
        if isinstance(token, str):
            made.text = token
        else:
            made.id = token
    except ValueError as error:
        raise InvalidArgument(f"{field}: {token!r} cannot be sent: {error}") from error
    return made


def estimate_request(prompt: Prompt | None, options: TraceOptions) -> introspection_pb2.EstimateRequest:
    """The wire's request."""
    generate = trace_request(prompt, options).generate
    if not generate.sampling.HasField("max_tokens"):
        generate.sampling.max_tokens = 0  # as `trace`
    return introspection_pb2.EstimateRequest(generate=generate)


def traced(transcript: Transcript) -> Arrays:
    """One array for each point and layer."""
    from cutaway.seen import by_layer

    return by_layer(transcript.captures)


def hidden_states(transcript: Transcript) -> Array:
    """[layer, pos, d_model]."""
    from cutaway.seen import layers_joined

    return layers_joined(transcript.captures.values())


def attention(transcript: Transcript) -> Array:
    """[layer, head, q_pos, k_pos], or [layer, head, q_pos, top]."""
    return next(iter(transcript.captures.values()))


def features(transcript: Transcript) -> Array:
    """[pos, top], or with "*" as the point's layer [layer, pos, top]; `active` [pos] is a part."""
    return next(iter(transcript.captures.values()))


def lens_result(transcript: Transcript) -> LensResult:
    """What each layer's residual predicts."""
    parts = hidden_states(transcript).parts
    return LensResult(*(parts.get(name) for name in ("tokens", "logprobs", "given_logprobs", "given_ranks")))


def attributed(transcript: Transcript) -> AttributionResult:
    """What each part adds."""
    parts: dict[str, Array | None] = dict.fromkeys(AttributionResult.__dataclass_fields__)
    parts |= {piece.header.part: piece.array for piece in transcript._pieces if piece.header.part in parts}
    return AttributionResult(**parts)  # type: ignore[arg-type]


def ids_of(lens: LensResult) -> list[int]:
    """The tokens that a lens found, each once, in the order that `with_texts` takes."""
    import numpy as np

    return [] if lens.tokens is None else [int(each) for each in np.unique(lens.tokens.values)]


def with_texts(lens: LensResult, texts: Sequence[str]) -> LensResult:
    """The result with the texts of its tokens."""
    import numpy as np

    if lens.tokens is None:
        return lens
    places = np.unique(lens.tokens.values, return_inverse=True)[1].reshape(lens.tokens.shape)
    found = np.array(texts if len(texts) else [""], dtype=np.str_)[places]
    return replace(lens, texts=replace(lens.tokens, values=found, dtype_sent="", parts={}))


def only_id(text: str, ids: Sequence[int], pieces: Sequence[str]) -> int:
    """The id of a text that is one token.

    Raises:
        InvalidArgument: it is none, or several.
    """
    if len(ids) != 1:
        raise InvalidArgument(f"tokens: {text!r} is {len(ids)} tokens ({', '.join(pieces)}); it must be one")
    return ids[0]


def estimate(wire: introspection_pb2.EstimateResponse) -> Estimate:
    """What a request would send."""
    return Estimate(wire.bytes, tuple(wire.capture_bytes), wire.max_bytes, wire.open_layers, wire.refusal)


COSTS = {
    introspection_pb2.COST_COPY: "copy",
    introspection_pb2.COST_OPEN: "open",
    introspection_pb2.COST_CONTEXT: "context",
    introspection_pb2.COST_MATRIX: "matrix",
}


def points(wire: introspection_pb2.ListPointsResponse) -> tuple[Point, ...]:
    """The points of the model."""
    return tuple(
        Point(
            each.name, tuple(each.axes), tuple(each.shape), each.dtype, each.readable, each.writable,
            COSTS.get(each.cost, "unspecified"), each.bytes_per_position, tuple(each.aliases), each.description,
        )
        for each in wire.points
    )  # fmt: skip


def self_check_request(prompt: Prompt | None, timeout: float | None) -> introspection_pb2.SelfCheckRequest:
    """The wire's request."""
    if prompt is None:
        return introspection_pb2.SelfCheckRequest()
    return introspection_pb2.SelfCheckRequest(generate=generate_of(prompt, {"timeout": timeout}))


def self_check(wire: introspection_pb2.SelfCheckResponse) -> SelfCheck:
    """What was tested."""
    found = tuple(
        Identity(each.name, each.description, each.error, each.tolerance, each.holds, each.exact)
        for each in wire.identities
    )
    return SelfCheck(
        wire.holds, found, wire.model_hash, wire.kernels, wire.dtype, wire.quantization, wire.prompt_tokens
    )
