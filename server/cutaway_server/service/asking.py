"""From a GenerateRequest to a Request: everything that the wire can carry and the engine must not see ends here."""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from cutaway.v1 import inference_pb2 as v1

from cutaway_server.engine.build import EngineFacts
from cutaway_server.errors import InvalidField, OverBudget
from cutaway_server.probe.estimate import capture_bytes
from cutaway_server.request import (
    MAX_BAD_WORD_TOKENS,
    Request,
    SamplingOptions,
    SamplingParams,
    check_bad_words,
    resolve_sampling,
)  # fmt: skip
from cutaway_server.service.caller import ANYBODY, Caller
from cutaway_server.service.capturing import captures_of
from cutaway_server.service.editing import edits_of
from cutaway_server.service.outbox import token_size
from cutaway_server.service.reply import Asked
from cutaway_server.service.shelf import Shelf
from cutaway_server.service.texts import check_flags, is_set, prompt_ids, token_ids
from cutaway_server.service.tokens import sampling_options, wire_token
from cutaway_server.text.stream import CompletionText, StreamDecoder, stop_texts
from cutaway_server.text.tokenizer import TextModel

NAME = re.compile(r"[A-Za-z0-9._:-]{1,128}")


@dataclass(frozen=True, slots=True)
class Limits:
    """What requests must stay within."""

    facts: EngineFacts
    max_prompt_bytes: int
    max_backlog: int
    max_capture_bytes: int
    shelf: Shelf


def ask(
    message: v1.GenerateRequest,
    model: TextModel,
    limits: Limits,
    arrival: float,
    deadline: float | None,
    caller: Caller = ANYBODY,
) -> Asked:
    """Check and tokenise a request of `caller`. Times are seconds of time.monotonic().

    Raises:
        InvalidField: names the field, the value and the rule.
        Unsupported: the model has no chat template.
    """
    options = sampling_options(message.sampling).over(limits.facts.defaults)
    prompt = _prompt(message, model, limits)
    sampling = sampling_of(options, model, limits.facts, len(prompt))
    drawer = limits.shelf.of(caller.tenant)
    captures = captures_of(message.captures, limits.facts.config, len(prompt), sampling.max_tokens, drawer)
    request = Request(
        name_of(message),
        prompt,
        sampling,
        arrival,
        deadline,
        caller.tenant,
        prefix_caching=is_set(message, "prefix_caching", default=True),
        priority=caller.priority,
        share=caller.share,
        captures=captures,
        edits=edits_of(message.edits, limits.facts.config, len(prompt), sampling.max_tokens, drawer),
    )
    size = sum(bytes_of(request, limits))
    allowed = message.max_capture_bytes if message.HasField("max_capture_bytes") else None
    check_budget(size, allowed, limits.max_capture_bytes)
    skip = is_set(message, "skip_special_tokens", default=True)
    return _asked(request, model, limits, size, skip=skip, echo=message.echo)


def bytes_of(request: Request, limits: Limits) -> list[int]:
    """The most bytes that each capture of a request sends."""
    sampling = request.sampling
    return [
        capture_bytes(limits.facts.config, capture, len(request.prompt), sampling.max_tokens, sampling.n)
        for capture in request.captures
    ]


def check_budget(size: int, asked: int | None, limit: int) -> None:
    """Refuse what could be more bytes than the request allows, or the server.

    Raises:
        OverBudget: tells both numbers.
    """
    if asked is not None and size > asked:
        raise OverBudget(f"captures: they could send {size} bytes, and max_capture_bytes is {asked}")
    if size > limit:
        raise OverBudget(f"captures: they could send {size} bytes, and the server allows a request {limit}")


def _asked(request: Request, model: TextModel, limits: Limits, size: int, *, skip: bool, echo: bool) -> Asked:
    """Do all that takes longer for a long prompt or long stop texts here, and not on the event loop."""
    sampling = request.sampling
    decoder = StreamDecoder(model, skip)
    texts: tuple[str, ...] = ()
    if echo or sampling.prompt_logprobs is not None:
        texts = tuple(map(decoder.push, request.prompt))
    else:
        decoder.skim(request.prompt)
    if not echo:
        decoder.disown()  # what is pending belongs to the prompt, which is not sent
    text = CompletionText(decoder, stop_texts(sampling.stop), sampling.min_tokens)
    echoed = tuple(map(_echoed, request.prompt, texts)) if echo else None
    _check_echo(echoed, sampling, limits.max_backlog)
    return Asked(request, skip, text, texts, echoed, size)


def name_of(message: v1.GenerateRequest) -> str:
    """The request's name, or one that is picked.

    Raises:
        InvalidField: it cannot be a name.
    """
    asked = message.request_id
    if asked and not NAME.fullmatch(asked):
        raise InvalidField("request_id", asked, "must be at most 128 characters of [A-Za-z0-9._:-]")
    return asked or f"req-{secrets.token_hex(8)}"


def _prompt(message: v1.GenerateRequest, model: TextModel, limits: Limits) -> tuple[int, ...]:
    ids: Sequence[int]
    check_flags(message)
    match message.WhichOneof("prompt"):
        case "text" | "chat":
            ids = prompt_ids(message, model, limits.max_prompt_bytes, limits.facts.max_context)
        case "token_ids":
            ids = token_ids(message.token_ids, limits.facts.config.d_vocab, limits.facts.max_context)
        case _:
            raise InvalidField("prompt", None, "one of text, token_ids and chat must be set")
    if not ids:
        raise InvalidField("prompt", "0 tokens", "must have at least one token")
    return tuple(ids)


def sampling_of(options: SamplingOptions, model: TextModel, facts: EngineFacts, prompt_length: int) -> SamplingParams:
    """Options, checked, for a prompt of that many tokens.

    Raises:
        InvalidField: names the field, the value and the rule.
    """
    _check_length(prompt_length, options.max_tokens, facts.max_context)
    check_bad_words(options.bad_words)
    bad_words = tuple(
        spelling for i, word in enumerate(options.bad_words) for spelling in _spellings(f"[{i}]", word, model)
    )
    return resolve_sampling(
        options,
        prompt_length=prompt_length,
        max_context=facts.max_context,
        vocab_size=facts.config.d_vocab,
        eos_token_ids=facts.eos_token_ids,
        bad_words=bad_words,
        seed=secrets.randbits(63),
    )


def _check_length(length: int, max_tokens: int | None, max_context: int) -> None:
    if length > max_context:
        raise InvalidField("prompt", f"{length} tokens", f"the context has {max_context}")
    if length == max_context and max_tokens is None:
        rule = f"it fills the context of {max_context}: shorten it, or set sampling.max_tokens to 0 to score it"
        raise InvalidField("prompt", f"{length} tokens", rule)


def _spellings(place: str, word: str, model: TextModel) -> list[tuple[int, ...]]:
    """A bad word's tokens at the start of a text and within it, where most vocabularies join the space to it."""
    spellings = {
        tuple(model.encode(text, add_special_tokens=False, parse_special_tokens=False).ids)
        for text in (word, " " + word.lstrip())
        if text.strip() or text == word
    }
    for spelling in spellings:
        if len(spelling) > MAX_BAD_WORD_TOKENS:
            rule = f"must have at most {MAX_BAD_WORD_TOKENS} tokens"
            raise InvalidField(f"sampling.bad_words{place}", word, f"{rule}, and has {len(spelling)}")
    return sorted(spelling for spelling in spellings if spelling)


def _echoed(token: int, text: str) -> v1.Token:
    return wire_token(token, text, 0, None)


def _check_echo(echo: tuple[v1.Token, ...] | None, sampling: SamplingParams, max_backlog: int) -> None:
    """Refuse an echo that would fill the space for unread messages by itself."""
    if echo is None:
        return
    size = sampling.n * sum(token_size(token) + 16 * (sampling.prompt_logprobs or 0) for token in echo)
    if size > max_backlog // 2:
        rule = f"{len(echo)} tokens with their log-probabilities for each of n={sampling.n} completions are too much"
        raise InvalidField("echo", True, f"{rule} ({size} bytes of at most {max_backlog // 2})")
