"""A tokenizer from a Hugging Face directory: tokenizer.json, tokenizer_config.json and chat_template.jinja.

What is added around a text (BOS, EOS) is tokenizer.json's to say; transformers, too, ignores `add_bos_token` beside it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from tokenizers import AddedToken, Tokenizer

from cutaway_server.errors import ModelError
from cutaway_server.text.merges import MergeTable
from cutaway_server.text.source import TextSource

Json = Mapping[str, object]
_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")


def source_from_directory(path: Path) -> TextSource:
    """Read the tokenizer in the directory `path`.

    Raises:
        ModelError: a file is missing or damaged; the message says which, and what to do.
    """
    file = path / "tokenizer.json"
    if not file.is_file():
        raise ModelError(
            f"{path} has no tokenizer.json; make one with transformers: "
            f"AutoTokenizer.from_pretrained({str(path)!r}).save_pretrained({str(path)!r})"
        )
    text = _read(file)
    description = _parsed(file, text)
    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # the library raises nothing narrower
        raise ModelError(f"{file}: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    config_file = path / "tokenizer_config.json"
    config = _parsed(config_file, _read(config_file)) if config_file.is_file() else {}
    named = _named_tokens(config_file, config, tokenizer)
    _add_tokens(config_file, config, tokenizer, named)
    return TextSource(tokenizer, _merge_table(description), named, _chat_template(path, config))


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{file}: {error}") from error


def _parsed(file: Path, text: str) -> Json:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ModelError(f"{file}: not JSON at line {error.lineno}, column {error.colno}: {error.msg}") from error
    except ValueError as error:
        raise ModelError(f"{file}: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{file}: should hold one JSON object")
    return value


def _content(value: object) -> object:
    """The text of a token that is written as text or as an object."""
    return value.get("content") if isinstance(value, dict) else value


def _named_tokens(file: Path, config: Json, tokenizer: Tokenizer) -> dict[str, str]:
    named = {}
    for name in _NAMES:
        token = _content(config.get(name))
        if token is None:
            continue
        if not isinstance(token, str):
            raise ModelError(f"{file}: {name}: {token!r:.80} should be a token's text")
        if tokenizer.token_to_id(token) is not None or _listed(config, token):
            named[name] = token
        elif name in ("bos_token", "eos_token"):
            raise ModelError(f"{file}: {name}: {token!r} is not in the vocabulary")
    return named


def _listed(config: Json, token: str) -> bool:
    listed = config.get("added_tokens_decoder")
    return isinstance(listed, dict) and any(_content(entry) == token for entry in listed.values())


def _add_tokens(file: Path, config: Json, tokenizer: Tokenizer, named: Mapping[str, str]) -> None:
    """Add what tokenizer_config.json lists beyond tokenizer.json, and see that named tokens are special."""
    listed = config.get("added_tokens_decoder", {})
    if not isinstance(listed, dict):
        raise ModelError(f"{file}: added_tokens_decoder: should be an object")
    known = tokenizer.get_added_tokens_decoder()
    for key, entry in sorted(listed.items(), key=lambda item: item[0].zfill(20)):
        token = _content(entry)
        if not key.isdecimal() or not isinstance(entry, dict) or not isinstance(token, str):
            raise ModelError(f"{file}: added_tokens_decoder[{key!r}]: should be a token id and its description")
        flags = {name: entry.get(name) is True for name in ("single_word", "lstrip", "rstrip", "normalized", "special")}
        if int(key) not in known:
            tokenizer.add_tokens([AddedToken(token, **flags)])
        if tokenizer.token_to_id(token) != int(key):
            raise ModelError(f"{file}: added_tokens_decoder[{key!r}]: {token!r} has another id in tokenizer.json")
    special = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
    tokenizer.add_tokens(
        [AddedToken(token, normalized=False, special=True) for token in named.values() if token not in special]
    )


def _merge_table(description: Json) -> MergeTable | None:
    model = description.get("model")
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE" or "merges" not in model:
        return None
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        return None  # pieces that are not simply the sum of their parts
    pairs = [pair.split(" ", 1) if isinstance(pair, str) else pair for pair in model["merges"]]
    return MergeTable(model["vocab"], ((left, right) for left, right in pairs))  # the library has checked them


def _chat_template(path: Path, config: Json) -> str:
    file = path / "chat_template.jinja"
    if file.is_file():
        return _read(file)
    template = config.get("chat_template", "")
    if isinstance(template, list):  # several, by name
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default", next(iter(named.values())) if len(named) == 1 else "")
    if template is not None and not isinstance(template, str):
        raise ModelError(f"{path / 'tokenizer_config.json'}: chat_template: should be text or a list of named texts")
    return template or ""
