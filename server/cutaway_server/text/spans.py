"""Which bytes of the text each token covers."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, groupby, pairwise

Span = tuple[int, int]


def byte_spans(text: str, contents: Sequence[bytes], characters: Sequence[Span], added: Sequence[bool]) -> list[Span]:
    """Find each token's bytes in the UTF-8 of `text`.

    Where the tokens' own bytes make up the text, each lies where its bytes lie. Where they do not (the tokenizer
    normalises, or drops spaces), a token covers the characters that it was made from.

    Args:
        text: the text.
        contents: each token's bytes.
        characters: the characters each token was made from, as the tokenizers library tells.
        added: tokens that stand for nothing in the text; their span is empty.
    """
    sizes = [0 if extra else len(content) for content, extra in zip(contents, added, strict=True)]
    joined = b"".join(content for content, extra in zip(contents, added, strict=True) if not extra)
    encoded = text.encode()
    if joined == encoded:
        return _tiles(sizes, 0)
    if joined == b" " + encoded:  # the space that SentencePiece puts before the first word
        return [(max(start - 1, 0), max(end - 1, 0)) for start, end in _tiles(sizes, 0)]
    return _of_characters(text, sizes, characters, added)


def _tiles(sizes: Sequence[int], start: int) -> list[Span]:
    ends = list(accumulate(sizes, initial=start))
    return list(pairwise(ends))


def _of_characters(text: str, sizes: Sequence[int], characters: Sequence[Span], added: Sequence[bool]) -> list[Span]:
    byte_at = list(accumulate((len(character.encode()) for character in text), initial=0))
    spans: list[Span] = []
    characters = _reaching_on(text, characters)
    for (first, last), group in groupby(range(len(sizes)), key=lambda i: characters[i]):
        tokens = list(group)
        start, end = byte_at[first], byte_at[last]
        inside = [sizes[i] for i in tokens]
        if len(tokens) > 1 and sum(inside) == end - start:  # the bytes of one character
            spans += _tiles(inside, start)
        else:
            spans += [(start, end)] * len(tokens)
    return _with_empty_added(spans, added)


def _reaching_on(text: str, characters: Sequence[Span]) -> list[Span]:
    """Let tokens cover what composing took away behind them (an accent that became one with its letter)."""
    reached: list[Span] = []
    current, following = (len(text), len(text)), len(text)
    for span in reversed(characters):
        if span != current:
            current, following = span, current[0]
        start, end = span
        extends = start < end < following and not text[end:following].isspace()
        reached.append((start, following) if extends else span)
    return reached[::-1]


def _with_empty_added(spans: list[Span], added: Sequence[bool]) -> list[Span]:
    place = 0
    for i, extra in enumerate(added):
        if extra:
            spans[i] = (place, place)
        place = max(place, spans[i][1])
    return spans
