"""What a vocabulary's pieces stand for: bytes. Two spellings are known, byte-level and SentencePiece's.

SentencePiece writes a space as "▁" and a byte that belongs to no piece as "<0x0A>".
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Literal

from tokenizers import Tokenizer

from cutaway_server.errors import ModelError
from cutaway_server.text.alphabet import spelled_bytes

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACE = "▁"


@dataclass(frozen=True, slots=True)
class Spelling:
    """How pieces are read back. `strips_space`: one space at the very beginning of a decoded text is dropped."""

    kind: Literal["byte_level", "sentencepiece"]
    strips_space: bool = False

    def byte(self, piece: str) -> int | None:
        """The single byte that a piece such as "<0x0A>" stands for."""
        match = _BYTE_PIECE.fullmatch(piece) if self.kind == "sentencepiece" else None
        return int(match[1], 16) if match else None

    def decoded(self, piece: str) -> bytes:
        """The bytes that `piece` adds to a decoded text."""
        if self.kind == "byte_level":
            spelled = spelled_bytes(piece)
            return piece.encode() if spelled is None else spelled
        byte = self.byte(piece)
        return piece.replace(_SPACE, " ").encode() if byte is None else bytes([byte])

    def symbols(self, piece: str) -> list[str]:
        """What byte-pair encoding starts from to build `piece`."""
        return list(piece) if self.byte(piece) is None else [piece]


def spelling_of(tokenizer: Tokenizer) -> Spelling:
    """Recognise how `tokenizer` decodes.

    Raises:
        ModelError: its decoder is missing or of another kind.
    """
    decoder = None if tokenizer.decoder is None else json.loads(tokenizer.decoder.__getstate__())
    steps = decoder.get("decoders", [decoder]) if isinstance(decoder, dict) else []
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return Spelling("byte_level")
    if kinds in (["Replace", "ByteFallback", "Fuse"], ["Replace", "ByteFallback", "Fuse", "Strip"]):
        replaces_space = steps[0]["pattern"] == {"String": _SPACE} and steps[0]["content"] == " "
        strips_one = all(step["content"] == " " and step["start"] == 1 and step["stop"] == 0 for step in steps[3:])
        if replaces_space and strips_one:
            return Spelling("sentencepiece", strips_space=len(steps) == 4)
    raise ModelError(f"the tokenizer's decoder is neither byte-level nor SentencePiece's: {decoder}")
