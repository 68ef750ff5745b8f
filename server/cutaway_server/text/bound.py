"""How many tokens a text has at least, told without tokenising it, so that what can never fit is refused at once.

No token covers more bytes than the longest of the vocabulary, nor more letters and digits than the one that has most.
That holds where every byte of the text ends in some token, which is looked for in how the tokenizer is put together.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from string import ascii_letters, digits

from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.normalizers import Normalizer
from tokenizers.pre_tokenizers import PreTokenizer

from cutaway_server.text.alphabet import letters
from cutaway_server.text.spelling import Spelling

_WORDY = (ascii_letters + digits).encode()
_NOT_WORDY = bytes({*range(256)} - {*_WORDY})
_KEEPING = ("ByteLevel", "Split", "Digits", "Metaspace")  # pre-tokenizers that cut, and drop nothing
_SPACE = "▁"


@dataclass(frozen=True, slots=True)
class LengthBound:
    """The most that one token covers: bytes, and ASCII letters and digits.

    `composes`: the text is normalised to NFC, which changes only what is not ASCII. `strips`: some added tokens take
    the blanks around them, however many there are. `dropped`: bytes that no token has, and that are left out.
    """

    longest: int
    wordiest: int
    composes: bool
    strips: bool
    dropped: bytes

    def least_tokens(self, text: str) -> int:
        """No fewer tokens than this has `text`."""
        if self.composes and not text.isascii():
            return 0
        text = text.replace(_SPACE, " ")  # SentencePiece reads both as the same
        kept = ("".join(text.split()) if self.strips else text).encode().translate(None, self.dropped)
        wordy = len(kept.translate(None, _NOT_WORDY))
        return max(-(-len(kept) // self.longest), -(-wordy // self.wordiest))


def length_bound(tokenizer: Tokenizer, spelling: Spelling, contents: Iterable[bytes]) -> LengthBound | None:
    """The bound of a tokenizer whose tokens stand for the bytes `contents`; None: it may drop or join text at will."""
    normalizers = list(_steps(tokenizer.normalizer, "normalizers"))
    cutters = list(_steps(tokenizer.pre_tokenizer, "pretokenizers"))
    composes = any(step["type"] == "NFC" for step in normalizers)
    dropped = _dropped(tokenizer, spelling, {str(step["type"]) for step in cutters})
    keeps = all(step["type"] in ("NFC", "Prepend") or _spells_spaces(step) for step in normalizers) and all(
        step["type"] in _KEEPING and step.get("behavior") != "Removed" for step in cutters
    )
    if dropped is None or not keeps:
        return None
    sizes = [(len(content), len(content.translate(None, _NOT_WORDY))) for content in contents]
    strips = any(token.lstrip or token.rstrip for token in tokenizer.get_added_tokens_decoder().values())
    longest, wordiest = max(size for size, _ in sizes), max(wordy for _, wordy in sizes)
    return LengthBound(max(1, longest), max(1, wordiest), composes, strips, dropped)


def _steps(part: Normalizer | PreTokenizer | None, inner: str) -> Iterator[dict[str, object]]:
    """The steps of a normalizer or pre-tokenizer, sequences taken apart."""
    if part is not None:
        yield from _flat(json.loads(part.__getstate__()), inner)


def _flat(step: dict[str, object], inner: str) -> Iterator[dict[str, object]]:
    parts = step[inner] if step["type"] == "Sequence" else None
    if not isinstance(parts, list):
        yield step
        return
    for part in parts:
        yield from _flat(part, inner)


def _spells_spaces(step: dict[str, object]) -> bool:
    return step["type"] == "Replace" and step["pattern"] == {"String": " "} and step["content"] == _SPACE


def _dropped(tokenizer: Tokenizer, spelling: Spelling, cutters: set[str]) -> bytes | None:
    """The bytes that the vocabulary does not have and encoding leaves out; None: it may join what it does not know."""
    if spelling.kind == "byte_level":
        known = [tokenizer.token_to_id(letter) is not None for letter in letters()]
        drops = "ByteLevel" in cutters and isinstance(tokenizer.model, BPE) and tokenizer.model.unk_token is None
        return bytes(byte for byte in range(256) if not known[byte]) if drops else None
    falls_back = getattr(tokenizer.model, "byte_fallback", False)
    spelled = (tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in range(256))
    return b"" if falls_back and None not in spelled else None
