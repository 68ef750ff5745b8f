"""Conversations to tokens: what the template writes can be special, what people write never is.

A chat template pastes messages into its own text, and the result no longer tells who wrote a "<|im_end|>". So a
message that could spell a special token is shielded before it is rendered: marks, random characters that no message
has, are put inside the token. In the rendered text every special token that is still whole is the template's. It is
exchanged for an anchor, a token that only the tokenizer's literal twin knows, and then the marks are taken out and the
rest, special tokens of messages included, is encoded as plain text in its place.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel

from cutaway_server.errors import InvalidField

_NONCHARACTERS = [chr(code) for code in range(0xFDD0, 0xFDF0)]
_ROLE = re.compile(r"[A-Za-z0-9_.-]{1,64}")


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Layout:
    """A rendered conversation, ready to be encoded: `text` is `rendered` with anchors for the special tokens.

    `anchored`: the special tokens' ids, in order. `origin[i]`: where character i of `text` lies in `rendered`.
    """

    text: str
    rendered: str
    anchors: frozenset[int]
    anchored: tuple[int, ...]
    origin: tuple[int, ...]

    def restored(self, ids: Sequence[int]) -> list[int]:
        """Token ids of `text`, with the special tokens for their anchors."""
        special = iter(self.anchored)
        return [next(special) if token in self.anchors else token for token in ids]


class ChatEncoder:
    """Shields messages from being read as special tokens, and finds the template's special tokens again."""

    def __init__(self, literal: Tokenizer, added: Mapping[int, AddedToken]) -> None:
        special = {number: token for number, token in added.items() if token.special}
        self._mark = _nonce()
        self._special_ids = {token.content: number for number, token in special.items()}
        self._flags = {token.content: (token.lstrip, token.rstrip) for token in special.values()}
        self._finder = _finder([token.content for token in added.values()])
        self._heads = _parts(self._special_ids, lambda token, cut: token[:cut])
        self._tails = _parts(self._special_ids, lambda token, cut: token[cut:])
        self._longest = max(map(len, self._special_ids), default=0)
        self._anchors = {(left, right): _nonce() for left in (False, True) for right in (False, True)}
        literal.add_tokens(
            [
                AddedToken(anchor, lstrip=left, rstrip=right, normalized=False, special=False)
                for (left, right), anchor in self._anchors.items()
            ]
        )
        self._anchor_ids = frozenset(filter(None, map(literal.token_to_id, self._anchors.values())))

    def shielded(self, messages: Sequence[ChatMessage]) -> list[ChatMessage]:
        """The messages, with marks wherever they could spell a special token, or a part of one at either end."""
        if not messages:
            raise InvalidField("chat.messages", [], "a conversation has at least one message")
        for number, message in enumerate(messages):
            if not _ROLE.fullmatch(message.role):
                rule = "a role is 1 to 64 characters of [A-Za-z0-9_.-]"
                raise InvalidField(f"chat.messages[{number}].role", message.role, rule)
        return [
            ChatMessage(message.role, self._shielded(f"chat.messages[{number}].content", message.content))
            for number, message in enumerate(messages)
        ]

    def _shielded(self, field: str, content: str) -> str:
        content = self._cut(content, self._edges(content))
        while found := [match for match in self._find(content) if match[2] in self._special_ids]:
            if any(end - start == 1 for start, end, _ in found):
                raise InvalidField(field, content, "holds a special token of one character, which can't be plain text")
            content = self._cut(content, {start + 1 for start, _, _ in found})  # again: "<s<s>>" hides another
        return content

    def _edges(self, content: str) -> set[int]:
        """Where to cut so that no special token reaches over the message's ends (templates may trim spaces there)."""
        cuts = set()
        left, right = len(content) - len(content.lstrip()), len(content.rstrip())
        for size in range(1, self._longest):
            if size <= right and content[right - size : right] in self._heads:
                cuts.add(right - size + 1)
            if content[left : left + size] in self._tails:
                cuts.add(min(left + size - 1, len(content)))
        return cuts

    def _cut(self, content: str, cuts: set[int]) -> str:
        places = [0, *sorted(cuts), len(content)]
        return self._mark.join(content[start:end] for start, end in pairwise(places))

    def layout(self, marked: str) -> Layout:
        """Take a text that was rendered from shielded messages apart."""
        text: list[str] = []
        rendered: list[str] = []
        anchored: list[int] = []
        origin: list[int] = []
        place = length = 0
        for start, end, token in [*self._find(marked), (len(marked), len(marked), "")]:
            if token and token not in self._special_ids:
                continue  # an added token that is not special is found in plain text, too
            plain = marked[place:start].replace(self._mark, "")
            anchor = self._anchors[self._flags[token]] if token else ""
            text += [plain, anchor]
            rendered += [plain, token]
            origin += [*range(length, length + len(plain)), *[length + len(plain)] * len(anchor)]
            length += len(plain) + len(token)
            place = end
            if token:
                anchored.append(self._special_ids[token])
        origin.append(length)
        return Layout("".join(text), "".join(rendered), self._anchor_ids, tuple(anchored), tuple(origin))

    def _find(self, text: str) -> list[tuple[int, int, str]]:
        """Every added token that is written in `text`: start, end (in characters), token."""
        encoding = self._finder.encode_batch([text])[0]  # `encode` would hold the interpreter's lock all the while
        return [
            (start, end, token)
            for token, (start, end), number in zip(encoding.tokens, encoding.offsets, encoding.ids, strict=True)
            if number != 0
        ]


def _nonce() -> str:
    """Eighty random bits in characters that Unicode sets aside: no template changes their case or trims them."""
    return "".join(secrets.choice(_NONCHARACTERS) for _ in range(16))


def _finder(tokens: Sequence[str]) -> Tokenizer:
    """A tokenizer to which everything is unknown but `tokens`: a fast search for the longest of many strings."""
    unknown = _nonce()
    finder = Tokenizer(WordLevel({unknown: 0}, unk_token=unknown))
    finder.add_tokens([AddedToken(token, normalized=False, special=True) for token in tokens])
    return finder


def _parts(tokens: Mapping[str, int], part: Callable[[str, int], str]) -> frozenset[str]:
    return frozenset(part(token, cut) for token in tokens for cut in range(1, len(token)))
