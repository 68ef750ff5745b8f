"""The tokens of a text."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids, each with its piece as the vocabulary writes it and the bytes of the text's UTF-8 that it covers.

    A token that was added (such as a first BOS) covers nothing: its start is its end. `words` numbers the pre-tokens
    that the tokens belong to; None for added tokens.
    """

    ids: tuple[int, ...]
    pieces: tuple[str, ...]
    byte_starts: tuple[int, ...]
    byte_ends: tuple[int, ...]
    words: tuple[int | None, ...]
