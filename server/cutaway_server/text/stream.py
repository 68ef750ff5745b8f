"""Text of a completion as its tokens come: whole characters only, and held back while it could be a stop text."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
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
    """Decodes token by token. All it returns, joined, is what `decode` makes of all the tokens at once."""

    def __init__(self, model: Pieces, skip_special_tokens: bool = True) -> None:
        self._model = model
        self._skipped = model.special_token_ids if skip_special_tokens else frozenset()
        self._reader = _Characters() if model.spelling.kind == "byte_level" else _Runs(model.spelling)

    def push(self, token: int) -> str:
        """The text that is complete with this token."""
        piece = None if token in self._skipped else self._model.piece(token)
        return "" if piece is None else self._reader.push(self._model.spelling, piece)

    def finish(self) -> str:
        """What is left when no more tokens come: U+FFFD for characters that were not completed."""
        return self._reader.finish()


class _Characters:
    """Byte-level pieces: bytes come in any number and leave as whole characters."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, spelling: Spelling, piece: str) -> str:
        return self._decoder.decode(spelling.decoded(piece))

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


class _Runs:
    """SentencePiece's pieces: text, or single bytes, whose run is judged as a whole.

    Decoding shows a run of byte pieces as U+FFFD for each byte if any of it is not UTF-8, so that nothing of a run
    can be shown before it ends.
    """

    def __init__(self, spelling: Spelling) -> None:
        self._run = bytearray()
        self._strips_space = spelling.strips_space

    def push(self, spelling: Spelling, piece: str) -> str:
        byte = spelling.byte(piece)
        if byte is not None:
            self._run.append(byte)
            return ""
        return self._stripped(self._ended_run() + spelling.decoded(piece).decode())

    def finish(self) -> str:
        return self._stripped(self._ended_run())

    def _ended_run(self) -> str:
        try:
            text = self._run.decode()
        except UnicodeDecodeError:
            text = REPLACEMENT * len(self._run)
        self._run.clear()
        return text

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


class _StopText:
    """How much of one stop text the text so far ends with (Knuth, Morris and Pratt 1977)."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.matched = 0
        self._borders = [0] * len(text)  # of each beginning, the longest proper beginning that it also ends with
        for end in range(1, len(text)):
            self._borders[end] = self._advanced(self._borders[end - 1], text[end])

    def push(self, character: str) -> bool:
        """Take one character; whether the stop text is complete with it."""
        if self.matched == len(self.text):
            self.matched = self._borders[-1]
        self.matched = self._advanced(self.matched, character)
        return self.matched == len(self.text)

    @property
    def pending(self) -> int:
        """Number of characters that could be the beginning of the stop text."""
        return self._borders[-1] if self.matched == len(self.text) else self.matched

    def _advanced(self, matched: int, character: str) -> int:
        while matched and self.text[matched] != character:
            matched = self._borders[matched - 1]
        return matched + 1 if self.text[matched] == character else 0


class CompletionText:
    """The text of one completion, which ends at the first of its stop texts.

    The stop text that is complete first ends it, however the text is cut into tokens; of several that are complete
    with the same character, the longest. What completes with one of the first `min_tokens` tokens ends nothing.
    """

    def __init__(self, model: Pieces, stops: Sequence[str], skip_special_tokens: bool, min_tokens: int) -> None:
        self._decoder = StreamDecoder(model, skip_special_tokens)
        self._stops = [_StopText(text) for text in sorted(set(stops), key=len, reverse=True)]
        self._min_tokens = min_tokens
        self._tokens = 0
        self._held = ""
        self.stop: str | None = None

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
            complete = [stop for stop in self._stops if stop.push(text[end - 1])]
            if complete and stopping:
                self.stop, self._held = complete[0].text, ""
                return text[: end - len(self.stop)]
        shown = len(text) - max(stop.pending for stop in self._stops)
        self._held = text[shown:]
        return text[:shown]
