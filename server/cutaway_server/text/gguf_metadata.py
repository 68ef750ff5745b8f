"""A tokenizer from a GGUF file's metadata (keys as llama.cpp writes them).

Two kinds are known: "gpt2", byte-level byte-pair encoding with merges in the file, and "llama", SentencePiece's
byte-pair encoding, whose merges follow from the pieces' scores.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from tokenizers import AddedToken, Tokenizer, decoders, normalizers
from tokenizers.models import BPE

from cutaway_server.errors import ModelError
from cutaway_server.text.merges import MergeTable
from cutaway_server.text.source import TextSource, surround
from cutaway_server.text.split import Split, split_named

Metadata = Mapping[str, object]
Pair = tuple[str, str]
_T = TypeVar("_T", str, int, float, bool)

_TOKENS = "tokenizer.ggml.tokens"
_SCORES = "tokenizer.ggml.scores"
_TYPES = "tokenizer.ggml.token_type"
_MERGES = "tokenizer.ggml.merges"
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6
_NAMED = {
    "bos_token": "tokenizer.ggml.bos_token_id",
    "eos_token": "tokenizer.ggml.eos_token_id",
    "unk_token": "tokenizer.ggml.unknown_token_id",
    "pad_token": "tokenizer.ggml.padding_token_id",
}


def source_from_gguf(metadata: Metadata) -> TextSource:
    """Build the tokenizer that `metadata` describes.

    Raises:
        ModelError: a key is missing, damaged or of an unknown kind.
    """
    kind = _one(metadata, "tokenizer.ggml.model", str, None)
    tokens = _many(metadata, _TOKENS, str)
    types = _many(metadata, _TYPES, int) if _TYPES in metadata else [_NORMAL] * len(tokens)
    if not tokens:
        raise ModelError(f"{_TOKENS}: the vocabulary is empty")
    if len(types) != len(tokens):
        raise ModelError(f"{_TYPES}: {len(types)} types for {len(tokens)} tokens")
    if kind == "gpt2":
        split = split_named(_one(metadata, "tokenizer.ggml.pre", str, "default"))
        tokenizer, merges, adds_bos = *_byte_level(metadata, tokens, split), split.adds_bos
    elif kind == "llama":
        tokens = [_respelled(token) for token in tokens]
        tokenizer, merges, adds_bos = *_sentencepiece(metadata, tokens, types), True
    else:
        raise ModelError(f"tokenizer.ggml.model: {kind!r} is not known; known are 'gpt2' and 'llama'")
    named = _named_tokens(metadata, tokens)
    _add_tokens(tokenizer, tokens, types, set(named.values()))
    _surround(tokenizer, metadata, named, adds_bos)
    template = _one(metadata, "tokenizer.chat_template", str, "")
    return TextSource(tokenizer, merges, named, template)


def _byte_level(metadata: Metadata, tokens: list[str], split: Split) -> tuple[Tokenizer, MergeTable]:
    vocabulary = _vocabulary(tokens)
    pairs = _listed_pairs(metadata, vocabulary)
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=pairs, ignore_merges=split.whole_words))
    normalizer = split.normalizer()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = split.pre_tokenizer()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, MergeTable(vocabulary, pairs)


def _sentencepiece(metadata: Metadata, tokens: list[str], types: list[int]) -> tuple[Tokenizer, MergeTable]:
    vocabulary = _vocabulary(tokens)
    if _MERGES in metadata:
        pairs = _listed_pairs(metadata, vocabulary)
    else:
        pairs = _pairs_from_scores(tokens, types, _scores(metadata, types), vocabulary)
    unknown = _named_tokens(metadata, tokens).get("unk_token")
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=pairs, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    prefix = _one(metadata, "tokenizer.ggml.add_space_prefix", bool, True)
    before = [normalizers.Prepend("▁")] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*before, normalizers.Replace(" ", "▁")])
    after = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *after]
    )
    return tokenizer, MergeTable(vocabulary, pairs)


def _respelled(token: str) -> str:
    """Runs of spaces, which files list as they are (Gemma), in SentencePiece's spelling."""
    return "▁" * len(token) if token and not token.strip(" ") else token


def _vocabulary(tokens: list[str]) -> dict[str, int]:
    vocabulary = {token: number for number, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        number = next(number for number, token in enumerate(tokens) if vocabulary[token] != number)
        raise ModelError(f"{_TOKENS}: {tokens[number]!r} is listed as {number} and as {vocabulary[tokens[number]]}")
    return vocabulary


def _listed_pairs(metadata: Metadata, vocabulary: Mapping[str, int]) -> list[Pair]:
    pairs = []
    for number, line in enumerate(_many(metadata, _MERGES, str)):
        left, space, right = line.partition(" ")
        if not space or left not in vocabulary or right not in vocabulary or left + right not in vocabulary:
            raise ModelError(f"{_MERGES}[{number}]: {line!r} does not make one token of two")
        pairs.append((left, right))
    return pairs


def _scores(metadata: Metadata, types: list[int]) -> list[float]:
    scores = _many(metadata, _SCORES, float)
    if len(scores) != len(types):
        raise ModelError(f"{_SCORES}: {len(scores)} scores for {len(types)} tokens")
    # Converters overwrite the scores of user-defined pieces; SentencePiece itself gives them 0, above all others.
    return [0.0 if kind == _USER_DEFINED else score for score, kind in zip(scores, types, strict=True)]


def _pairs_from_scores(
    tokens: list[str], types: list[int], scores: list[float], vocabulary: Mapping[str, int]
) -> list[Pair]:
    """Every way to make a piece of two others, the best score first, then the longest left part.

    SentencePiece merges whatever two neighbours make the piece with the best score, so this is the same thing as a
    list of merges. Pieces that stand for no text take no part, so that text never spells a special token.
    """
    parts = {token for token, kind in zip(tokens, types, strict=True) if kind not in (_UNKNOWN, _CONTROL, _BYTE)}
    found: list[tuple[float, int, str, str]] = []
    for token in parts:
        score = -scores[vocabulary[token]]
        for cut in range(len(token) - 1, 0, -1):
            left, right = token[:cut], token[cut:]
            if left in parts and right in parts:
                found.append((score, vocabulary[token], left, right))
    found.sort(key=lambda pair: (pair[0], -len(pair[2]), -len(pair[3]), pair[1]))
    return [(left, right) for _, _, left, right in found]


def _named_tokens(metadata: Metadata, tokens: list[str]) -> dict[str, str]:
    named = {}
    for name, key in _NAMED.items():
        if key in metadata:
            number = _one(metadata, key, int, None)
            if not 0 <= number < len(tokens):
                raise ModelError(f"{key}: {number} is outside the vocabulary of {len(tokens)} tokens")
            named[name] = tokens[number]
    return named


def _add_tokens(tokenizer: Tokenizer, tokens: list[str], types: list[int], named: set[str]) -> None:
    """Mark the tokens that are found in text as a whole: control tokens (special), and user-defined ones."""
    added = []
    for token, kind in zip(tokens, types, strict=True):
        special = kind in (_CONTROL, _UNKNOWN) or token in named
        if token and (special or kind == _USER_DEFINED):
            added.append(AddedToken(token, normalized=False, special=special))
    tokenizer.add_tokens(added)


def _surround(tokenizer: Tokenizer, metadata: Metadata, named: Mapping[str, str], adds_bos: bool) -> None:
    first = named.get("bos_token") if _one(metadata, "tokenizer.ggml.add_bos_token", bool, adds_bos) else None
    last = named.get("eos_token") if _one(metadata, "tokenizer.ggml.add_eos_token", bool, False) else None
    surround(tokenizer, first, last)


def _one(metadata: Metadata, key: str, kind: type[_T], default: _T | None) -> _T:
    value = metadata.get(key, default)
    if value is None:
        raise ModelError(f"{key} is missing")
    if type(value) is not kind:
        raise ModelError(f"{key}: {value!r:.80} should be of type {kind.__name__}")
    return value


def _many(metadata: Metadata, key: str, kind: type[_T]) -> list[_T]:
    values = metadata.get(key)
    if not isinstance(values, list):
        raise ModelError(f"{key} is missing" if values is None else f"{key}: should be a list")
    for number, value in enumerate(values):
        if type(value) is not kind:
            raise ModelError(f"{key}[{number}]: {value!r:.80} should be of type {kind.__name__}")
    return values
