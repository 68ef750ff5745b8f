"""Text to token ids and back. (skeleton: the text room fills it in)"""

from __future__ import annotations


class TextModel:
    """A tokenizer and a chat template."""
