"""Tokens and sampling parameters as the wire has them, and as the rooms below do."""

from __future__ import annotations

from cutaway.v1 import inference_pb2 as v1

from cutaway_server.request import Logprobs, SamplingOptions

_SCALARS = (
    "temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty", "presence_penalty",
    "frequency_penalty", "seed", "min_tokens", "max_tokens", "ignore_eos", "n", "logprobs", "prompt_logprobs",
)  # fmt: skip


def wire_token(token: int, text: str, step: int, logprobs: Logprobs | None) -> v1.Token:
    """A token with its text, and its log-probabilities if there are any."""
    if logprobs is None:
        return v1.Token(id=token, text=text, step=step)
    top = [v1.TopLogprob(id=likely, logprob=value) for likely, value in logprobs.top]
    return v1.Token(id=token, text=text, step=step, logprob=logprobs.logprob, top_logprobs=top)


def sampling_options(message: v1.SamplingParams) -> SamplingOptions:
    """What was asked; a field that is not set is None."""
    return SamplingOptions(
        **{name: getattr(message, name) for name in _SCALARS if message.HasField(name)},  # type: ignore[arg-type]
        logit_bias=dict(message.logit_bias),
        bad_words=tuple(message.bad_words),
        stop=tuple(message.stop),
        stop_token_ids=tuple(message.stop_token_ids),
    )


def wire_sampling(options: SamplingOptions) -> v1.SamplingParams:
    """Options as a message; what is None is not set."""
    return v1.SamplingParams(
        **{name: getattr(options, name) for name in _SCALARS},
        logit_bias=options.logit_bias,
        bad_words=options.bad_words,
        stop=options.stop,
        stop_token_ids=options.stop_token_ids,
    )
