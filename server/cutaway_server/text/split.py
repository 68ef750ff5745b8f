"""Where byte-level tokenizers cut text into words before merging: the patterns that GGUF files name.

A GGUF file names its pre-tokenizer in `tokenizer.ggml.pre` and carries no pattern. The patterns are those of the
models' own tokenizer.json files.
"""

from __future__ import annotations

from dataclasses import dataclass

from tokenizers import Regex, normalizers, pre_tokenizers
from tokenizers.normalizers import Normalizer
from tokenizers.pre_tokenizers import PreTokenizer

from cutaway_server.errors import ModelError

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_LLAMA3 = rf"{_CONTRACTIONS}|{_LETTERS}|\p{{N}}{{1,3}}|{_SIGNS}|{_TAIL}"
_QWEN2 = rf"{_CONTRACTIONS}|{_LETTERS}|\p{{N}}|{_SIGNS}|{_TAIL}"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    rf"|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_TAIL}"
)
_GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
    rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_TAIL}"
)


@dataclass(frozen=True, slots=True)
class Split:
    """One way to cut text. `pattern` None is GPT-2's own; `digits`: every digit is cut off first.

    `whole_words`: a word that is in the vocabulary is a token, whatever the merges say. `adds_bos`: BOS comes first
    unless the file says otherwise, as llama.cpp has it.
    """

    pattern: str | None = None
    digits: bool = False
    composes: bool = False  # Unicode normal form C first
    whole_words: bool = False
    adds_bos: bool = False

    def pre_tokenizer(self) -> PreTokenizer:
        """The tokenizers library's form of it."""
        steps: list[PreTokenizer] = [pre_tokenizers.Digits(individual_digits=True)] if self.digits else []
        if self.pattern is not None:
            steps.append(pre_tokenizers.Split(Regex(self.pattern), behavior="isolated"))
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=self.pattern is None))
        return pre_tokenizers.Sequence(steps)

    def normalizer(self) -> Normalizer | None:
        """What happens to the text before."""
        return normalizers.NFC() if self.composes else None


_GPT2 = Split()
_DIGITS = Split(digits=True)
_LLAMA3_FAMILY = Split(_LLAMA3, whole_words=True, adds_bos=True)
_SPLITS = {
    **dict.fromkeys(("default", "gpt-2", "phi-2", "olmo", "mpt"), _GPT2),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell"), _DIGITS),
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "lfm2"), _LLAMA3_FAMILY),
    **dict.fromkeys(("dbrx", "smaug-bpe"), Split(_LLAMA3)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez"), Split(_QWEN2, composes=True)),
    "tekken": Split(_TEKKEN, whole_words=True, adds_bos=True),
    "gpt-4o": Split(_GPT4O),
}


def split_named(name: str) -> Split:
    """The way to cut text that `tokenizer.ggml.pre` calls `name`.

    Raises:
        ModelError: the name is not known.
    """
    if name not in _SPLITS:
        raise ModelError(f"tokenizer.ggml.pre: {name!r} is not known; known are {', '.join(sorted(_SPLITS))}")
    return _SPLITS[name]
