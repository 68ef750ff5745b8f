"""The keywords of `generate` and `complete`, typed once for the client, its asynchronous twin and the command line.

Every keyword may be left out or be None: then the model's generation_config decides, then the default named here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, TypedDict

if TYPE_CHECKING:
    from cutaway.capture import Capture
    from cutaway.edit import Edit

# One turn of a conversation: {"role": "user", "content": "What is gravity?"}
Message = Mapping[str, str]


class Sampling(TypedDict, total=False):
    """How tokens are chosen, and when to stop: the fields of the wire's SamplingParams."""

    temperature: float | None  # divides the logits; 0 is greedy. Default 1
    top_k: int | None  # keep the k likeliest tokens; 0 keeps all. Default 0
    top_p: float | None  # keep the likeliest tokens of this mass. Default 1
    min_p: float | None  # keep tokens this likely relative to the likeliest. Default 0
    typical_p: float | None  # keep this mass of tokens of typical surprise. Default 1
    repetition_penalty: float | None  # on tokens of prompt and output; 1 is none. Default 1
    presence_penalty: float | None  # subtracted once from tokens of the output. Default 0
    frequency_penalty: float | None  # subtracted per occurrence in the output. Default 0
    logit_bias: Mapping[int, float] | None  # token id -> what is added to its logit
    bad_words: str | Sequence[str] | None  # texts that must not be generated
    seed: int | None  # the same seed gives the same tokens. Default: drawn by the server
    stop: str | Sequence[str] | None  # texts that end a completion
    stop_token_ids: Iterable[int] | None  # token ids that end a completion
    min_tokens: int | None  # no end before this many. Default 0
    max_tokens: int | None  # at most this many; 0 scores the prompt only. Default: what is left of the context
    ignore_eos: bool | None  # go on past the model's end tokens. Default False
    n: int | None  # completions of the prompt, told apart by `index`. Default 1
    logprobs: int | None  # log-probability of each token, and of this many likeliest ones. Default: none
    prompt_logprobs: int | None  # likewise for the prompt's tokens. Default: none


class TokenizeOptions(TypedDict, total=False):
    """All keywords of `tokenize`. Exactly one of text and `messages` is given."""

    messages: Iterable[Message] | None  # a conversation, laid out by the model's chat template
    add_generation_prompt: bool | None  # end a conversation with the start of the assistant's turn. Default True
    parse_special_tokens: bool | None  # read "<|im_start|>" in a text as a token. Default False
    add_special_tokens: bool | None  # add the tokens the model expects around a text, as BOS. Default True
    merges: bool | None  # also tell the merge steps of byte-pair encoding. Default False
    timeout: float | None  # seconds until DeadlineExceeded. Default: the client's


class GenerateOptions(Sampling, total=False):
    """All keywords of `generate` and `complete`. Exactly one of prompt, `token_ids` and `messages` is given."""

    token_ids: Iterable[int] | None  # the prompt as tokens, used as they are
    messages: Iterable[Message] | None  # the prompt as a conversation, laid out by the model's chat template
    add_generation_prompt: bool | None  # end a conversation with the start of the assistant's turn. Default True
    echo: bool | None  # give the prompt's tokens first, with step 0. Default False
    parse_special_tokens: bool | None  # read "<|im_start|>" in a prompt as a token. Default False
    add_special_tokens: bool | None  # add the tokens the model expects around a prompt, as BOS. Default True
    skip_special_tokens: bool | None  # leave special tokens out of the text. Default True
    prefix_caching: bool | None  # let the request read and feed the prefix cache. Default True
    request_id: str | None  # the request's name for `abort` and the logs. Default: picked by the server
    captures: Iterable[Capture] | None  # inner values to send along; each token has `captures`. Default: none
    edits: Iterable[Edit] | None  # changes of inner values, made in this order at each point. Default: none
    max_capture_bytes: int | None  # refuse the request if they could be more. Default: the server's limit
    timeout: float | None  # seconds until DeadlineExceeded. Default: the client's
