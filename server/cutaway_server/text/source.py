"""What a model's files say about its text, whatever their format: what `directory.py` and `gguf_metadata.py` read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from cutaway_server.text.merges import MergeTable


@dataclass(frozen=True, slots=True)
class TextSource:
    """A tokenizer that reads special tokens, and what goes with it.

    `named_tokens` are the special tokens that chat templates know by name: "bos_token", "eos_token", ...
    """

    tokenizer: Tokenizer
    merges: MergeTable | None
    named_tokens: Mapping[str, str]
    chat_template: str


def surround(tokenizer: Tokenizer, first: str | None, last: str | None) -> None:
    """Let `tokenizer` add the token `first` before a text and `last` after it."""
    around = {name: token for name, token in (("first", first), ("last", last)) if token is not None}
    single = [*(["first"] if first is not None else []), "$A", *(["last"] if last is not None else [])]
    tokenizer.post_processor = TemplateProcessing(
        single=single,
        pair=[*single, "$B:1"],
        special_tokens=[
            {"id": name, "ids": [tokenizer.token_to_id(token)], "tokens": [token]} for name, token in around.items()
        ],
    )
