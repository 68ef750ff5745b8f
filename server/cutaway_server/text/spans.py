"""Which bytes of the text each token covers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

Span = tuple[int, int]


def byte_spans(
    text: str, contents: Sequence[bytes], characters: Callable[[], Sequence[Span]], added: Sequence[bool]
) -> tuple[list[int], list[int]]:
    """Find each token's bytes in the UTF-8 of `text`.

    A token covers the bytes that it stands for, less the space that SentencePiece puts before a first word. Where the
    text has other bytes (the tokenizer normalises, or drops spaces), it covers the characters that it was made from.

    Args:
        text: the text.
        contents: each token's bytes.
        characters: gives the characters each token was made from, as the tokenizers library tells; seldom needed.
        added: tokens that stand for nothing in the text; their span is empty.

    Returns:
        Where they start, and where they end: numbers, since of many pairs the garbage collector would lose count.
    """
    encoded = text.encode()
    made_from: list[Span] | None = None
    starts: list[int] = []
    ends: list[int] = []
    place = 0
    for number, (content, extra) in enumerate(zip(contents, added, strict=True)):
        if extra:
            start, end = place, place
        elif encoded.startswith(content, place):
            start, end = place, place + len(content)
        elif content.startswith(b" ") and _continues(encoded, content[1:], place):
            start, end = place, place + len(content) - 1
        else:
            made_from = _byte_places(text, characters()) if made_from is None else made_from
            start, end = made_from[number]
        starts.append(start)
        ends.append(end)
        place = max(place, end)
    return starts, ends


def _continues(encoded: bytes, content: bytes, place: int) -> bool:
    """Whether `content` is next; a "▁" of the text's own is what SentencePiece reads as a space."""
    return encoded.startswith(content, place) and not encoded.startswith("▁".encode(), place)


def _byte_places(text: str, characters: Sequence[Span]) -> list[Span]:
    """The bytes of the characters each token was made from, and of what composing took away behind them.

    (An accent that became one with its letter belongs to the letter's tokens.)
    """
    byte_at = list(accumulate((len(character.encode()) for character in text), initial=0))
    reached: list[Span] = []
    current, following = (len(text), len(text)), len(text)
    for span in reversed(characters):
        if span != current:
            current, following = span, current[0]
        start, end = span
        extends = start < end < following and not text[end:following].isspace()
        reached.append((byte_at[start], byte_at[following if extends else end]))
    return reached[::-1]
