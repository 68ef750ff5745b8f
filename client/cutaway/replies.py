"""What the wire says, as the values that calls return."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from typing import TypeVar, cast

from google.protobuf.message import Message as WireMessage

from cutaway.options import Sampling
from cutaway.results import (
    Architecture,
    Completion,
    Detokenized,
    FinishReason,
    Limits,
    Merge,
    Model,
    PromptToken,
    Started,
    TextInfo,
    Timings,
    Token,
    Tokenized,
    TopLogprob,
    Usage,
    WordMerges,
)
from cutaway.v1 import inference_pb2 as pb

FINISH_REASONS: dict[int, FinishReason] = {
    pb.FINISH_REASON_STOP: "stop",
    pb.FINISH_REASON_LENGTH: "length",
    pb.FINISH_REASON_ABORT: "abort",
}

Flat = TypeVar("Flat", Started, Usage, Timings, Limits)


def flat(kind: type[Flat], message: WireMessage) -> Flat:
    """A value whose fields are named and typed as the message's; an optional one that is not set is None."""
    known = message.DESCRIPTOR.fields_by_name
    return kind(
        **{
            field.name: None
            if known[field.name].has_presence and not message.HasField(field.name)
            else getattr(message, field.name)
            for field in fields(kind)
        }
    )


def token(wire: pb.Token, index: int) -> Token:
    """One token of a completion."""
    return Token(wire.id, wire.text, _logprob(wire), _top(wire), index, wire.step)


def prompt_tokens(wire: pb.PromptLogprobs) -> tuple[PromptToken, ...]:
    """Consecutive tokens of the prompt."""
    return tuple(
        PromptToken(position, each.id, each.text, _logprob(each), _top(each))
        for position, each in enumerate(wire.tokens, start=wire.position)
    )


def _logprob(wire: pb.Token) -> float | None:
    return wire.logprob if wire.HasField("logprob") else None


def _top(wire: pb.Token) -> tuple[TopLogprob, ...]:
    return tuple(TopLogprob(top.id, top.logprob) for top in wire.top_logprobs)


def completion(wire: pb.Completion, tokens: Iterable[Token]) -> Completion:
    """One completion that has ended, with the tokens that came for it."""
    tokens = tuple(tokens)
    return Completion(
        index=wire.index,
        tokens=tokens,
        text="".join(token.text for token in tokens),
        finish_reason=FINISH_REASONS.get(wire.finish_reason, "unspecified"),
        completion_tokens=wire.completion_tokens,
        stop=wire.stop if wire.HasField("stop") else None,
        stop_token_id=wire.stop_token_id if wire.HasField("stop_token_id") else None,
    )


def tokenized(wire: pb.TokenizeResponse, text: str | None) -> Tokenized:
    """The tokens of a text; of the rendered one, if there is none."""
    source = (wire.rendered if text is None else text).encode()
    places = zip(wire.pieces, wire.byte_starts, wire.byte_ends, strict=True)
    return Tokenized(
        ids=tuple(wire.ids),
        pieces=tuple(wire.pieces),
        offsets=tuple(zip(wire.byte_starts, wire.byte_ends, strict=True)),
        merges=tuple(
            WordMerges(
                symbols=tuple(word.symbols),
                steps=tuple(Merge(step.left, step.right, step.rank, step.position) for step in word.steps),
            )
            for word in wire.merges
        ),
        rendered=wire.rendered,
        texts=tuple(source[start:end].decode(errors="replace") or piece for piece, start, end in places),
    )


def detokenized(wire: pb.DetokenizeResponse) -> Detokenized:
    """The text of tokens."""
    return Detokenized(wire.text, tuple(wire.token_bytes))


def model(wire: pb.GetModelResponse) -> Model:
    """What is served."""
    shape = wire.architecture
    return Model(
        name=wire.name,
        model_hash=wire.model_hash,
        server_version=wire.server_version,
        kernels=wire.kernels,
        dtype=wire.dtype,
        quantization=wire.quantization,
        kv_dtype=wire.kv_dtype,
        device=wire.device,
        architecture=Architecture(
            family=shape.family,
            n_layers=shape.n_layers,
            d_model=shape.d_model,
            n_heads=shape.n_heads,
            n_kv_heads=shape.n_kv_heads,
            d_head=shape.d_head,
            d_mlp=shape.d_mlp,
            d_vocab=shape.d_vocab,
            n_parameters=shape.n_parameters,
            windows=tuple(shape.windows),
        ),
        limits=flat(Limits, wire.limits),
        text=TextInfo(
            bos_token_id=wire.text.bos_token_id if wire.text.HasField("bos_token_id") else None,
            eos_token_ids=tuple(wire.text.eos_token_ids),
            chat_template=wire.text.chat_template,
        ),
        default_sampling=_sampling(wire.default_sampling),
    )


def _sampling(wire: pb.SamplingParams) -> Sampling:
    """The sampling fields that are set, as the keywords of `generate`."""
    values: dict[str, object] = {}
    for field, value in wire.ListFields():
        values[field.name] = value
    for name in ("bad_words", "stop", "stop_token_ids"):
        if name in values:
            values[name] = tuple(getattr(wire, name))
    if "logit_bias" in values:
        values["logit_bias"] = dict(wire.logit_bias)
    return cast("Sampling", values)
