"""Text to token ids and back, by the tokenizers library, and what a served model's tokenizer knows beside that."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from itertools import groupby
from pathlib import Path

from tokenizers import Encoding, Tokenizer

from cutaway_server.errors import EngineFailed, InvalidField, ModelError, Unsupported
from cutaway_server.text.bound import LengthBound, length_bound
from cutaway_server.text.chat import ChatEncoder, ChatMessage, Layout
from cutaway_server.text.directory import source_from_directory
from cutaway_server.text.encoded import Encoded
from cutaway_server.text.gguf_metadata import source_from_gguf
from cutaway_server.text.merges import Merge, WordMerges, retrace
from cutaway_server.text.source import TextSource
from cutaway_server.text.spans import byte_spans
from cutaway_server.text.spelling import spelling_of
from cutaway_server.text.template import ChatTemplate

__all__ = ["ChatMessage", "Encoded", "Merge", "TextModel", "WordMerges"]

MAX_RETRACED_SYMBOLS = 100_000

LengthCheck = Callable[[int], None]


class TextModel:
    """A tokenizer and a chat template.

    It is safe to use from several threads at once. Of its two tokenizers, which share one vocabulary, `_reading` finds
    special tokens that are written in a text, and `_literal` takes them for plain text.
    """

    def __init__(self, source: TextSource) -> None:
        self._reading = source.tokenizer
        self._literal = literal_twin(source.tokenizer)
        self._merges = source.merges
        self.spelling = spelling_of(source.tokenizer)
        self._added = source.tokenizer.get_added_tokens_decoder()
        self._chat = ChatEncoder(self._literal, self._added)
        self._template = ChatTemplate(source.chat_template, source.named_tokens)
        self.chat_template = source.chat_template
        self.vocab_size = 1 + max(source.tokenizer.get_vocab().values())
        self.bos_token_id = self._named_id(source, "bos_token")
        self.eos_token_id = self._named_id(source, "eos_token")
        self.special_token_ids = frozenset(number for number, token in self._added.items() if token.special)

    @classmethod
    def from_directory(cls, path: Path) -> TextModel:
        """Read the tokenizer in a Hugging Face directory.

        Raises:
            ModelError: a file is missing or damaged.
        """
        return cls(source_from_directory(path))

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, object]) -> TextModel:
        """Rebuild the tokenizer from a GGUF file's metadata, as plain Python values.

        Raises:
            ModelError: a key is missing, damaged or of an unknown kind.
        """
        return cls(source_from_gguf(metadata))

    def encode(
        self,
        text: str,
        *,
        add_special_tokens: bool = True,
        parse_special_tokens: bool = False,
        check: LengthCheck | None = None,
    ) -> Encoded:
        """Turn `text` into tokens.

        Args:
            text: the text.
            add_special_tokens: add the tokens that the model expects around a text, such as a first BOS.
            parse_special_tokens: read special tokens that are written in the text as such; else they are plain text.
            check: is told how many tokens there are before anything is done for each of them, and may raise.

        Raises:
            InvalidField: the text is not Unicode, or writes a special token that this tokenizer can't spell out.
        """
        check_unicode("text", text)
        return self._encoded(text, self._read(text, check, add=add_special_tokens, parse=parse_special_tokens))

    def prompt_ids(
        self, text: str, most: int, *, add_special_tokens: bool = True, parse_special_tokens: bool = False
    ) -> tuple[int, ...]:
        """The ids of `encode` alone, in half the time; a text that plainly has more than `most` is not tokenised.

        Raises:
            InvalidField: as `encode`, or it has more.
        """
        check_unicode("text", text)
        check = self._check_fits(text, most)
        return tuple(self._read(text, check, add=add_special_tokens, parse=parse_special_tokens).ids)

    def encode_chat(
        self,
        messages: Sequence[ChatMessage],
        *,
        add_generation_prompt: bool = True,
        check: LengthCheck | None = None,
    ) -> tuple[str, Encoded]:
        """Lay out a conversation by the chat template: the text, and its tokens.

        The special tokens that the template writes are special; those that are written in messages are plain text.
        Nothing is added: where the model expects a first BOS, its template writes it. `check` is as for `encode`.

        Raises:
            InvalidField: the template refuses the conversation, or a message is not Unicode.
            Unsupported: there is no chat template, or it is broken, or it exceeds its limits.
        """
        rendered, layout = self._laid_out(messages, add_generation_prompt=add_generation_prompt)
        if layout is None:
            return rendered, self._encoded(rendered, self._read(rendered, check, add=False, parse=True))
        encoding, origin = self._read(layout.text, check, add=False, parse=False), layout.origin
        tokens = layout.restored(encoding.ids)

        def characters() -> list[tuple[int, int]]:
            return [(origin[start], origin[end]) for start, end in _characters(encoding)]

        return rendered, self._with_spans(rendered, tokens, characters, list(encoding.word_ids))

    def chat_prompt_ids(
        self, messages: Sequence[ChatMessage], most: int, *, add_generation_prompt: bool = True
    ) -> tuple[int, ...]:
        """The ids of `encode_chat` alone; a conversation that plainly has more than `most` is not tokenised.

        Raises:
            InvalidField, Unsupported: as `encode_chat`, or it has more.
        """
        rendered, layout = self._laid_out(messages, add_generation_prompt=add_generation_prompt)
        check = self._check_fits(rendered, most)
        if layout is None:
            return tuple(self._read(rendered, check, add=False, parse=True).ids)
        return tuple(layout.restored(self._read(layout.text, check, add=False, parse=False).ids))

    def _laid_out(self, messages: Sequence[ChatMessage], *, add_generation_prompt: bool) -> tuple[str, Layout | None]:
        """The text of a conversation; and its layout, if a message could be read as a special token."""
        for number, message in enumerate(messages):
            check_unicode(f"chat.messages[{number}].content", message.content)
        shielded = self._chat.shielded(messages)
        rendered = self._template.render(shielded, add_generation_prompt=add_generation_prompt)
        if shielded == list(messages):
            return rendered, None
        layout = self._chat.layout(rendered)
        return layout.rendered, layout

    def _read(self, text: str, check: LengthCheck | None, *, add: bool, parse: bool) -> Encoding:
        encoding = _tokens(self._reading if parse else self._literal, text, add_special_tokens=add)
        if check is not None:
            check(len(encoding))
        if not parse:
            self._check_spelled_out(encoding)
        return encoding

    def least_tokens(self, text: str) -> int:
        """No fewer tokens than this has `text`; quick to tell, and 0 where nothing can be told."""
        return 0 if self._bound is None else self._bound.least_tokens(text)

    @cached_property
    def _bound(self) -> LengthBound | None:
        return length_bound(self._reading, self.spelling, map(self.token_bytes, range(self.vocab_size)))

    def _check_fits(self, text: str, most: int) -> LengthCheck:
        """Refuse what plainly has too many tokens: before it is tokenised, and, by what is returned, after it."""
        if len(text) > most and (least := self.least_tokens(text)) > most:
            raise InvalidField("prompt", f"at least {least} tokens", f"the context has {most}")

        def check(count: int) -> None:
            if count > most:
                raise InvalidField("prompt", f"{count} tokens", f"the context has {most}")

        return check

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Turn token ids into text. Bytes that are not UTF-8 become U+FFFD; ids without a token stand for nothing."""
        for token in ids:
            self._check_id(token)
        known = [token for token in ids if token < self.vocab_size]
        return self._reading.decode(known, skip_special_tokens=skip_special_tokens)

    def piece(self, token: int) -> str | None:
        """The token as the vocabulary writes it; None if there is none of that id."""
        self._check_id(token)
        return self._reading.id_to_token(token) if token < self.vocab_size else None

    def token_bytes(self, token: int) -> bytes:
        """The exact bytes that the token stands for, which need not be whole characters."""
        piece = self.piece(token)
        if piece is None:
            return b""
        if self.spelling.kind == "byte_level" and token in self._added:
            return piece.encode()
        return self.spelling.decoded(piece)

    def merges(self, text: str, *, parse_special_tokens: bool = False) -> tuple[WordMerges, ...]:
        """The merge steps of byte-pair encoding, word by word.

        Raises:
            InvalidField: the text is not Unicode or very long.
            Unsupported: the tokenizer is not byte-pair encoding.
        """
        encoded = self.encode(text, add_special_tokens=False, parse_special_tokens=parse_special_tokens)
        return self.merges_of(encoded)

    def merges_of(self, encoded: Encoded) -> tuple[WordMerges, ...]:
        """The merge steps that made `encoded`, word by word; added tokens are no words.

        Raises:
            InvalidField: there are very many.
            Unsupported: the tokenizer is not byte-pair encoding.
        """
        if self._merges is None:
            raise Unsupported("this model's tokenizer is not byte-pair encoding, so it has no merges")
        length = sum(map(len, encoded.pieces))
        if length > MAX_RETRACED_SYMBOLS:
            rule = f"merge steps are told for at most {MAX_RETRACED_SYMBOLS} symbols"
            raise InvalidField("merges", f"{length} symbols", rule)
        tokens = [(word, token) for word, token in zip(encoded.words, encoded.ids, strict=True) if word is not None]
        return tuple(
            self._word_merges([token for _, token in group]) for _, group in groupby(tokens, key=lambda pair: pair[0])
        )

    def _word_merges(self, tokens: list[int]) -> WordMerges:
        assert self._merges is not None
        pieces = [self.piece(token) or "" for token in tokens]
        if len(tokens) == 1 and tokens[0] in self._added:
            return WordMerges(tuple(pieces), ())
        symbols = [symbol for piece in pieces for symbol in self.spelling.symbols(piece)]
        word = retrace(symbols, self._reading.token_to_id, self._merges)
        if word.pieces == tuple(pieces):
            return word
        if len(pieces) == 1:  # a whole word of the vocabulary that no merges lead to
            return WordMerges(tuple(pieces), ())
        raise EngineFailed(f"merge steps lead to {word.pieces}, not to {pieces}")

    def _encoded(self, text: str, encoding: Encoding) -> Encoded:
        words = [
            None if extra else word for word, extra in zip(encoding.word_ids, encoding.special_tokens_mask, strict=True)
        ]
        return self._with_spans(text, encoding.ids, lambda: _characters(encoding), words)

    def _with_spans(
        self,
        text: str,
        ids: Sequence[int],
        characters: Callable[[], Sequence[tuple[int, int]]],
        words: Sequence[int | None],
    ) -> Encoded:
        pieces = [self.piece(token) or "" for token in ids]
        contents = [self.token_bytes(token) for token in ids]
        starts, ends = byte_spans(text, contents, characters, [word is None for word in words])
        return Encoded(tuple(ids), tuple(pieces), tuple(starts), tuple(ends), tuple(words))

    def _check_spelled_out(self, encoding: Encoding) -> None:
        """Special tokens in text that is plain would be a way to forge a turn of a conversation."""
        for token, extra in zip(encoding.ids, encoding.special_tokens_mask, strict=True):
            if not extra and token in self.special_token_ids and token != self._unknown_id():
                rule = "this tokenizer can't spell that special token out as plain text"
                raise InvalidField("text", self._reading.id_to_token(token), rule)

    def _unknown_id(self) -> int | None:
        unknown = getattr(self._reading.model, "unk_token", None)
        return None if unknown is None else self._reading.token_to_id(unknown)

    @staticmethod
    def _check_id(token: int) -> None:
        if token < 0:
            raise InvalidField("token_ids", token, "token ids are not negative")

    @staticmethod
    def _named_id(source: TextSource, name: str) -> int | None:
        token = source.named_tokens.get(name)
        return None if token is None else source.tokenizer.token_to_id(token)


def check_unicode(field: str, text: str) -> None:
    """Refuse lone surrogates, which no UTF-8 has."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidField(field, text, f"character {error.start} is a lone surrogate, not Unicode text") from error


def literal_twin(tokenizer: Tokenizer) -> Tokenizer:
    """A tokenizer with the same vocabulary, in the same memory, that takes special tokens in text for plain text."""
    twin = Tokenizer(tokenizer.model)
    for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        if getattr(tokenizer, part) is not None:
            setattr(twin, part, getattr(tokenizer, part))
    added = tokenizer.get_added_tokens_decoder()
    twin.add_tokens([added[number] for number in sorted(added)])
    if {number: token.content for number, token in twin.get_added_tokens_decoder().items()} != {
        number: token.content for number, token in added.items()
    }:
        raise ModelError("the tokenizer's added tokens leave gaps between their ids")
    twin.encode_special_tokens = True
    return twin


def _tokens(backend: Tokenizer, text: str, *, add_special_tokens: bool) -> Encoding:
    """One text's tokens. `encode` would hold the interpreter's lock all the while; a batch of one does not."""
    return backend.encode_batch([text], add_special_tokens=add_special_tokens)[0]


def _characters(encoding: Encoding) -> list[tuple[int, int]]:
    """The characters each token was made from. `encoding.offsets` would hold the interpreter's lock all the while."""
    return [encoding.token_to_chars(number) or (0, 0) for number in range(len(encoding))]
