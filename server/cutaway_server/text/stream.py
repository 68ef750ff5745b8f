"""Text of a completion as its tokens come: whole characters only, and held back while it could be a stop text."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Protocol

from cutaway_server.text.spelling import Spelling

REPLACEMENT = "�"


class Pieces(Protocol):
    """What is asked of a `TextModel` here."""

    spelling: Spelling
    special_token_ids: frozenset[int]

    def piece(self, token: int) -> str | None:
        """The token as the vocabulary writes it."""


class StreamDecoder:
    """Decodes token by token. All it returns, joined, is what `decode` makes of all the tokens at once.

    A completion goes on where its prompt ends: it is decoded by a fork of the decoder that has taken the prompt.
    """

    def __init__(self, model: Pieces, skip_special_tokens: bool = True) -> None:
        self._model = model
        self._skipped = model.special_token_ids if skip_special_tokens else frozenset()
        self._reader: _Characters | _Runs = (
            _Characters() if model.spelling.kind == "byte_level" else _Runs(model.spelling.strips_space)
        )

    @property
    def pending(self) -> bool:
        """Whether bytes wait to become characters."""
        return self._reader.pending

    def push(self, token: int) -> str:
        """The text that is complete with this token."""
        piece = self._piece(token)
        return "" if piece is None else self._reader.push(self._model.spelling, piece)

    def finish(self) -> str:
        """What is left when no more tokens come: U+FFFD for characters that were not completed."""
        return self._reader.finish()

    def skim(self, tokens: Sequence[int]) -> None:
        """Take tokens whose text nobody wants, from the last on that starts afresh whatever was before it."""
        last = next((place for place in reversed(range(len(tokens))) if self._starts_afresh(tokens[place])), 0)
        for token in tokens[last:]:
            self.push(token)

    def disown(self) -> None:
        """Leave what is pending to another text: of it, only a character that later tokens complete is returned."""
        self._reader.disown()

    def fork(self) -> StreamDecoder:
        """A decoder that has taken the same tokens."""
        fork = copy(self)
        fork._reader = self._reader.fork()
        return fork

    def _piece(self, token: int) -> str | None:
        return None if token in self._skipped else self._model.piece(token)

    def _starts_afresh(self, token: int) -> bool:
        piece = self._piece(token)
        return piece is not None and self._reader.starts_afresh(self._model.spelling, piece)


class _Characters:
    """Byte-level pieces: bytes come in any number and leave as whole characters."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._disowned = False

    @property
    def pending(self) -> bool:
        return bool(self._decoder.getstate()[0])

    def push(self, spelling: Spelling, piece: str) -> str:
        return self._owned(self._decoder.decode(spelling.decoded(piece)))

    def finish(self) -> str:
        return self._owned(self._decoder.decode(b"", final=True))

    def starts_afresh(self, spelling: Spelling, piece: str) -> bool:
        return any(not 0x80 <= byte < 0xC0 for byte in spelling.decoded(piece))

    def disown(self) -> None:
        self._disowned = self.pending

    def fork(self) -> _Characters:
        fork = _Characters()
        fork._decoder.setstate(self._decoder.getstate())
        fork._disowned = self._disowned
        return fork

    def _owned(self, text: str) -> str:
        """The text without the U+FFFD for bytes that were disowned and never completed."""
        if not text or not self._disowned:
            return text
        self._disowned = False
        return text.removeprefix(REPLACEMENT)


class _Runs:
    """SentencePiece's pieces: text, or single bytes, whose run is judged as a whole.

    Decoding shows a run of byte pieces as U+FFFD for each byte if any of it is not UTF-8, so that nothing of a run
    can be shown before it ends.
    """

    def __init__(self, strips_space: bool) -> None:
        self._run = bytearray()
        self._disowned = 0  # so many bytes of the run
        self._strips_space = strips_space

    @property
    def pending(self) -> bool:
        return bool(self._run)

    def push(self, spelling: Spelling, piece: str) -> str:
        byte = spelling.byte(piece)
        if byte is not None:
            self._run.append(byte)
            return ""
        return self._stripped(self._ended_run() + spelling.decoded(piece).decode())

    def finish(self) -> str:
        return self._stripped(self._ended_run())

    def starts_afresh(self, spelling: Spelling, piece: str) -> bool:
        return spelling.byte(piece) is None and bool(piece)

    def disown(self) -> None:
        self._disowned = len(self._run)

    def fork(self) -> _Runs:
        fork = _Runs(self._strips_space)
        fork._run[:] = self._run
        fork._disowned = self._disowned
        return fork

    def _ended_run(self) -> str:
        try:
            text = self._run.decode()
            told = len(self._run[: self._disowned].decode(errors="ignore"))  # not a character that was completed
        except UnicodeDecodeError:
            text, told = REPLACEMENT * len(self._run), self._disowned
        self._run.clear()
        self._disowned = 0
        if told:
            self._strips_space = False
        return text[told:]

    def _stripped(self, text: str) -> str:
        if not text or not self._strips_space:
            return text
        self._strips_space = False  # only the very first character counts
        return text.removeprefix(" ")


@dataclass(frozen=True, slots=True)
class Shown:
    """Text that can be shown now, and the stop text that ended the completion, if one did."""

    text: str
    stop: str | None = None


@dataclass(frozen=True, slots=True)
class StopText:
    """One stop text, to be looked for character by character (Knuth, Morris and Pratt 1977).

    `borders`: of each beginning, the length of the longest proper beginning that it also ends with.
    """

    text: str
    borders: tuple[int, ...]

    @classmethod
    def of(cls, text: str) -> StopText:
        """Work the borders out: this takes as many steps as the text has characters."""
        borders = [0] * len(text)
        for end in range(1, len(text)):
            borders[end] = _advanced(text, borders, borders[end - 1], text[end])
        return cls(text, tuple(borders))

    def advanced(self, matched: int, character: str) -> int:
        """How much of it a text ends with, given the text's last character and how much it ended with before."""
        return _advanced(self.text, self.borders, self.pending(matched), character)

    def pending(self, matched: int) -> int:
        """How many of the characters matched could be the beginning of another occurrence."""
        return self.borders[-1] if matched == len(self.text) else matched


def _advanced(text: str, borders: Sequence[int], matched: int, character: str) -> int:
    while matched and text[matched] != character:
        matched = borders[matched - 1]
    return matched + 1 if text[matched] == character else 0


def stop_texts(texts: Iterable[str]) -> tuple[StopText, ...]:
    """Stop texts as `CompletionText` looks for them: each once, the longest first."""
    return tuple(StopText.of(text) for text in sorted(set(texts), key=len, reverse=True))


class CompletionText:
    """The text of one completion, which ends at the first of its stop texts.

    The stop text that is complete first ends it, however the text is cut into tokens; of several that are complete
    with the same character, the longest. What completes with one of the first `min_tokens` tokens ends nothing.
    """

    def __init__(self, decoder: StreamDecoder, stops: tuple[StopText, ...], min_tokens: int) -> None:
        """Prepare for tokens.

        Args:
            decoder: has taken the prompt, and belongs to this completion from now on.
            stops: from `stop_texts`; completions may share them.
            min_tokens: no stop text counts before so many tokens.
        """
        self._decoder = decoder
        self._stops = stops
        self._matched = [0] * len(stops)
        self._min_tokens = min_tokens
        self._tokens = 0
        self._held = ""
        self.stop: str | None = None

    @property
    def pending(self) -> bool:
        """Whether `finish` could bring text."""
        return self.stop is None and (bool(self._held) or self._decoder.pending)

    def fork(self) -> CompletionText:
        """The same text, to go on differently; it takes no longer for a long text or long stop texts."""
        fork = copy(self)
        fork._decoder = self._decoder.fork()
        fork._matched = list(self._matched)
        return fork

    def push(self, token: int) -> Shown:
        """Take one token. After a stop text nothing is shown any more."""
        if self.stop is not None:
            return Shown("", self.stop)
        self._tokens += 1
        return Shown(self._released(self._decoder.push(token), self._tokens > self._min_tokens), self.stop)

    def finish(self) -> str:
        """What is left when no more tokens come. A stop text may turn up in it, and is then found in `stop`."""
        if self.stop is not None:
            return ""
        text = self._released(self._decoder.finish(), self._tokens > self._min_tokens)
        rest = "" if self.stop is not None else self._held
        self._held = ""
        return text + rest

    def _released(self, text: str, stopping: bool) -> str:
        if not self._stops:
            return text
        held = len(self._held)
        text = self._held + text
        for end in range(held + 1, len(text) + 1):
            complete = self._completed(text[end - 1])
            if complete is not None and stopping:
                self.stop, self._held = complete, ""
                return text[: end - len(complete)]
        shown = len(text) - max(map(StopText.pending, self._stops, self._matched))
        self._held = text[shown:]
        return text[:shown]

    def _completed(self, character: str) -> str | None:
        """The longest stop text that ends with this character."""
        self._matched = [
            stop.advanced(matched, character) for stop, matched in zip(self._stops, self._matched, strict=True)
        ]
        ended = (s.text for s, matched in zip(self._stops, self._matched, strict=True) if matched == len(s.text))
        return next(ended, None)
