"""What a caller asks, put on the wire. Rules about values are the server's; here is only what the wire cannot say."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from google.protobuf.message import Message as WireMessage

from cutaway.errors import InvalidArgument
from cutaway.options import GenerateOptions, Message, Sampling, TokenizeOptions
from cutaway.v1 import inference_pb2 as pb
from cutaway.v1 import introspection_pb2

if TYPE_CHECKING:
    from cutaway.capture import Capture
    from cutaway.edit import Edit

FLAGS = ("parse_special_tokens", "add_special_tokens", "skip_special_tokens", "echo", "prefix_caching")


def generate_request(prompt: str | None, options: GenerateOptions) -> pb.GenerateRequest:
    """The wire's request for these options.

    Raises:
        TypeError: a keyword is unknown, or a value has the wrong type.
        InvalidArgument: the prompt is not given exactly once, or a value does not fit the wire.
    """
    refuse_unknown("generate", options.keys(), GenerateOptions.__annotations__)
    token_ids, messages = options.get("token_ids"), options.get("messages")
    if sum(given is not None for given in (prompt, token_ids, messages)) != 1:
        raise InvalidArgument("prompt: give exactly one of a prompt, token_ids and messages")
    request = pb.GenerateRequest()
    put(request, "text", prompt)
    put_token_ids(request, token_ids)
    put_chat(request, messages, options.get("add_generation_prompt"))
    put_options(request, options)
    return request


def put_options(request: pb.GenerateRequest, options: GenerateOptions) -> None:
    """Set all but the prompt."""
    request.sampling.CopyFrom(sampling_params(options))
    put(request, "request_id", options.get("request_id"))
    for flag in FLAGS:
        put(request, flag, options.get(flag))
    put_messages(request, "captures", options.get("captures"), "a Capture")
    put_messages(request, "edits", options.get("edits"), "an Edit")
    put(request, "max_capture_bytes", options.get("max_capture_bytes"))


def fork_request(
    request_id: str, at: int | None, index: int, options: GenerateOptions
) -> introspection_pb2.ForkRequest:
    """The wire's request for the continuation of a completion; raises as `generate_request`."""
    refuse_unknown("fork", options.keys(), GenerateOptions.__annotations__.keys() - {"token_ids", "messages"})
    made = introspection_pb2.ForkRequest()
    for field, value in (("request_id", request_id), ("index", index), ("at", at)):
        put(made, field, value)
    put_options(made.generate, options)
    return made


def put_messages(request: pb.GenerateRequest, field: str, given: Iterable[Capture | Edit] | None, what: str) -> None:
    """Set what to capture or to edit; one that stands alone is a list of one."""
    several: Iterable[object] = () if given is None else [given] if hasattr(given, "message") else given
    for i, each in enumerate(several):
        if not hasattr(each, "message"):
            raise TypeError(f"{field}[{i}]: {each!r}: must be {what}")
        getattr(request, field).append(each.message())


def sampling_params(options: Sampling) -> pb.SamplingParams:
    """The wire's sampling fields; what is missing or None stays unset."""
    params = pb.SamplingParams()
    for name in Sampling.__annotations__:
        put(params, name, options.get(name))
    return params


def tokenize_request(text: str | None, options: TokenizeOptions) -> pb.TokenizeRequest:
    """The wire's request for the tokens of a text or a conversation; raises as `generate_request`."""
    refuse_unknown("tokenize", options.keys(), TokenizeOptions.__annotations__)
    messages = options.get("messages")
    if (text is None) == (messages is None):
        raise InvalidArgument("text: give exactly one of a text and messages")
    request = pb.TokenizeRequest()
    put(request, "text", text)
    put_chat(request, messages, options.get("add_generation_prompt"))
    for flag in ("parse_special_tokens", "add_special_tokens", "merges"):
        put(request, flag, options.get(flag))
    return request


def detokenize_request(ids: Iterable[int], skip_special_tokens: bool | None) -> pb.DetokenizeRequest:
    """The wire's request for the text of tokens."""
    request = pb.DetokenizeRequest()
    put_token_ids(request, ids)
    put(request, "skip_special_tokens", skip_special_tokens)
    return request


def refuse_unknown(call: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Refuse a misspelt keyword, as Python does for a function without `**`."""
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise TypeError(f"{call}() got an unexpected keyword argument {unknown[0]!r}")


def put_token_ids(request: pb.GenerateRequest | pb.DetokenizeRequest, ids: Iterable[int] | None) -> None:
    """Set the prompt's tokens, even if there are none: the server says what is wrong with that."""
    if ids is not None:
        request.token_ids.SetInParent()
        put(request.token_ids, "ids", ids)


def put_chat(
    request: pb.GenerateRequest | pb.TokenizeRequest,
    messages: Iterable[Message] | None,
    add_generation_prompt: bool | None,
) -> None:
    """Set the conversation."""
    if messages is None:
        return
    request.chat.SetInParent()
    if isinstance(messages, str | Mapping):
        raise TypeError(f"messages: {messages!r}: must be a list of them")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise TypeError(f"messages[{i}]: {message!r}: must be a mapping with 'role' and 'content'")
        if message.keys() != {"role", "content"}:
            raise InvalidArgument(f"messages[{i}]: has {sorted(message)}, must have 'role' and 'content'")
        turn = request.chat.messages.add()
        for field in ("role", "content"):
            if not isinstance(message[field], str):
                raise TypeError(f"messages[{i}].{field}: {message[field]!r}: must be a text")
            put(turn, field, message[field])
    put(request.chat, "add_generation_prompt", add_generation_prompt)


def put(message: WireMessage, field: str, value: object) -> None:
    """Set a field of any kind, unless the value is None; a lone text is a list of one."""
    try:
        if value is None:
            return
        if message.DESCRIPTOR.fields_by_name[field].message_type is not None:
            getattr(message, field).update(_mapping(value))
        elif message.DESCRIPTOR.fields_by_name[field].is_repeated:
            getattr(message, field).extend([value] if isinstance(value, str) else value)
        else:
            setattr(message, field, value)
    except ValueError as error:  # a number out of the wire's range, a text that is no Unicode
        raise InvalidArgument(f"{field}: {value!r} cannot be sent: {error}") from error
    except TypeError as error:
        raise TypeError(f"{field}: {value!r}: {error}") from error


def _mapping(value: object) -> Mapping[object, object]:
    if not isinstance(value, Mapping):
        raise TypeError("must be a mapping")
    return value
