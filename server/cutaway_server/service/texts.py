"""Text, conversations and token ids of the wire, turned into each other. Everything here runs on a worker thread."""

from __future__ import annotations

from collections.abc import Sequence

from cutaway.v1 import inference_pb2 as v1

from cutaway_server.errors import InvalidField
from cutaway_server.text.tokenizer import ChatMessage, Encoded, TextModel, WordMerges

MAX_MESSAGES = 4096
MAX_DETOKENIZED = 2**18
MAX_ANSWER_BYTES = 4 * 2**20  # stock clients refuse larger messages
MAX_TOKENIZED = MAX_ANSWER_BYTES // 8  # each takes more bytes than that

Input = v1.GenerateRequest | v1.TokenizeRequest


def is_set(message: Input, name: str, *, default: bool) -> bool:
    """A flag of a message, or its default if it is not set."""
    return bool(getattr(message, name)) if message.HasField(name) else default  # type: ignore[arg-type]


def check_flags(message: Input) -> None:
    """Refuse what only says how plain text is read, where there is none.

    Raises:
        InvalidField: a flag is set that would do nothing.
    """
    kind = message.WhichOneof("prompt") if isinstance(message, v1.GenerateRequest) else message.WhichOneof("input")
    for flag in ("parse_special_tokens", "add_special_tokens"):
        if kind in ("chat", "token_ids") and message.HasField(flag):
            raise InvalidField(flag, getattr(message, flag), f"is for a text, and must not be set with {kind}")


def encode_text(message: v1.TokenizeRequest, model: TextModel, max_bytes: int) -> Encoded:
    """The tokens of a message's plain text: of an empty one those that are added, which may be none.

    Raises:
        InvalidField: it is too long.
    """
    _check_size("text", len(message.text.encode()), max_bytes)
    return model.encode(
        message.text,
        add_special_tokens=is_set(message, "add_special_tokens", default=True),
        parse_special_tokens=is_set(message, "parse_special_tokens", default=False),
        check=_check_count,
    )


def encode_chat(chat: v1.Chat, model: TextModel, max_bytes: int) -> tuple[str, Encoded]:
    """A conversation as the template lays it out: the text, and its tokens.

    Raises:
        InvalidField: it is empty, or too long, or has too many turns, or the template refuses it.
        Unsupported: the model has no template.
    """
    turns = _turns(chat, max_bytes)
    return model.encode_chat(turns, add_generation_prompt=_prompted(chat), check=_check_count)


def prompt_ids(message: v1.GenerateRequest, model: TextModel, max_bytes: int, most: int) -> tuple[int, ...]:
    """The tokens of a request's text or conversation, which has at most `most`.

    Raises:
        InvalidField, Unsupported: as `encode_text` and `encode_chat`, or it plainly has more.
    """
    if message.HasField("chat"):
        turns = _turns(message.chat, max_bytes)
        return model.chat_prompt_ids(turns, most, add_generation_prompt=_prompted(message.chat))
    _check_size("text", len(message.text.encode()), max_bytes)
    return model.prompt_ids(
        message.text,
        most,
        add_special_tokens=is_set(message, "add_special_tokens", default=True),
        parse_special_tokens=is_set(message, "parse_special_tokens", default=False),
    )


def _turns(chat: v1.Chat, max_bytes: int) -> list[ChatMessage]:
    if not chat.messages:
        raise InvalidField("chat.messages", "0 messages", "must have at least one")
    if len(chat.messages) > MAX_MESSAGES:
        raise InvalidField("chat.messages", f"{len(chat.messages)} messages", f"at most {MAX_MESSAGES} are allowed")
    size = sum(len(turn.role.encode()) + len(turn.content.encode()) for turn in chat.messages)
    _check_size("chat.messages", size, max_bytes)
    return [ChatMessage(turn.role, turn.content) for turn in chat.messages]


def _prompted(chat: v1.Chat) -> bool:
    return chat.add_generation_prompt if chat.HasField("add_generation_prompt") else True


def _check_size(field: str, size: int, max_bytes: int) -> None:
    if size > max_bytes:
        raise InvalidField(field, f"{size} bytes", f"at most {max_bytes} are allowed")


def token_ids(message: v1.TokenIds, vocab_size: int, most: int | None = None) -> Sequence[int]:
    """The ids of a message.

    Raises:
        InvalidField: one is not in the vocabulary, or there are more than `most`.
    """
    if not message.ids:
        raise InvalidField("token_ids", "0 ids", "must have at least one")
    if most is not None and len(message.ids) > most:
        raise InvalidField("token_ids", f"{len(message.ids)} ids", f"the context has {most}")
    for place, token in enumerate(message.ids):
        if not 0 <= token < vocab_size:
            raise InvalidField(f"token_ids.ids[{place}]", token, f"token ids are in [0, {vocab_size})")
    return message.ids


def tokenize(message: v1.TokenizeRequest, model: TextModel, max_bytes: int) -> v1.TokenizeResponse:
    """The answer to Tokenize.

    Raises:
        InvalidField: there is nothing, or too much, to tokenise or to tell.
        Unsupported: no template, or merges of a tokenizer that has none.
    """
    check_flags(message)
    match message.WhichOneof("input"):
        case "text":
            rendered, encoded = "", encode_text(message, model, max_bytes)
        case "chat":
            rendered, encoded = encode_chat(message.chat, model, max_bytes)
        case _:
            raise InvalidField("input", None, "one of text and chat must be set")
    answer = v1.TokenizeResponse(
        ids=encoded.ids,
        pieces=encoded.pieces,
        byte_starts=encoded.byte_starts,
        byte_ends=encoded.byte_ends,
        merges=[_wire_merges(word) for word in model.merges_of(encoded)] if message.merges else (),
        rendered=rendered,
    )
    _check_answer("input", len(encoded.ids), answer.ByteSize())
    return answer


def _check_count(count: int) -> None:
    """Refuse what cannot fit an answer before it is looked at token by token."""
    if count > MAX_TOKENIZED:
        raise InvalidField("input", f"{count} tokens", f"at most {MAX_TOKENIZED} are told at once: send it in parts")


def _check_answer(field: str, n_tokens: int, size: int) -> None:
    if size > MAX_ANSWER_BYTES:
        rule = f"the answer would have {size} bytes, and clients take {MAX_ANSWER_BYTES}: send it in parts"
        raise InvalidField(field, f"{n_tokens} tokens", rule)


def _wire_merges(word: WordMerges) -> v1.WordMerges:
    steps = [v1.Merge(left=step.left, right=step.right, rank=step.rank, position=step.position) for step in word.steps]
    return v1.WordMerges(symbols=word.symbols, steps=steps)


...


def detokenize(message: v1.DetokenizeRequest, model: TextModel, vocab_size: int) -> v1.DetokenizeResponse:
    """The answer to Detokenize.

    Raises:
        InvalidField: an id is not in the vocabulary, or there is too much to tell.
    """
    count = len(message.token_ids.ids)
    if count > MAX_DETOKENIZED:
        raise InvalidField("token_ids", f"{count} ids", f"at most {MAX_DETOKENIZED} are allowed: send them in parts")
    ids = token_ids(message.token_ids, vocab_size) if count else ()
    answer = v1.DetokenizeResponse(
        text=model.decode(ids, skip_special_tokens=message.skip_special_tokens),
        token_bytes=[model.token_bytes(token) for token in ids],
    )
    _check_answer("token_ids", len(ids), answer.ByteSize())
    return answer
