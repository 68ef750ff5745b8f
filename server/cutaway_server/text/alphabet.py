"""How byte-level vocabularies spell bytes: each of the 256 bytes is one printable character (GPT-2, Radford 2019)."""

from __future__ import annotations

from functools import cache, lru_cache


@cache
def letters() -> tuple[str, ...]:
    """The character that spells each byte: printable Latin-1 spells itself, the rest is U+0100 and on, in order."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return tuple(chr(byte) if byte in printable else chr(next(others)) for byte in range(256))


@cache
def byte_of_letter() -> dict[str, int]:
    """The byte that each character spells."""
    return {letter: byte for byte, letter in enumerate(letters())}


@lru_cache(2**16)  # a stream of text asks about the same pieces again and again
def spelled_bytes(piece: str) -> bytes | None:
    """The bytes that `piece` spells, or None if it has characters that spell none."""
    table = byte_of_letter()
    values = [table.get(character) for character in piece]
    return None if None in values else bytes(value for value in values if value is not None)
