"""A Hugging Face directory as a checkpoint: config.json, generation_config.json, tokenizer.json and safetensors."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from cutaway_server.errors import ModelError
from cutaway_server.model.checkpoint import CHUNK_BYTES, Checkpoint
from cutaway_server.model.families import ignored, layout, read_config
from cutaway_server.model.generation_config import sampling_defaults, warn_of_the_rest
from cutaway_server.model.json_file import Fields, read_object
from cutaway_server.model.layout import Layout, TensorReader
from cutaway_server.model.safetensors_files import open_safetensors
from cutaway_server.text.tokenizer import TextModel


def open_directory(path: Path) -> Checkpoint:
    """The checkpoint in the directory at `path`. No weights are read yet.

    Raises:
        ModelError: a file is missing, damaged or not served; the message says which and why.
    """
    raw = read_object(path / "config.json")
    try:
        config = read_config(raw.values)
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from error
    reader = open_safetensors(path)
    names = reader.names()
    places, nothing = layout(raw.values, names), ignored(raw.values, names)
    if config.tied_embeddings and "unembed" in places:
        places, nothing = _tie_if_equal(places, nothing, reader)
    generation_path = path / "generation_config.json"
    generation = read_object(generation_path) if generation_path.exists() else Fields({}, str(generation_path))
    warn_of_the_rest(generation, config.max_context)
    text = TextModel.from_directory(path)
    return Checkpoint(
        config=replace(config, tied_embeddings="unembed" not in places),
        layout=places,
        reader=reader,
        text=text,
        eos_token_ids=_end_tokens(raw, generation, text, config.d_vocab),
        defaults=sampling_defaults(generation),
        ignored=nothing,
    )


def _tie_if_equal(places: Layout, nothing: frozenset[str], reader: TensorReader) -> tuple[Layout, frozenset[str]]:
    """Leave the unembedding out if it equals the embedding; one that differs is used, as transformers does."""
    (embed,), (unembed,) = places["embed"], places["unembed"]
    if not _equal(reader, embed.name, unembed.name):
        return places, nothing
    tied = {path: pieces for path, pieces in places.items() if path != "unembed"}
    return tied, nothing | {unembed.name}


def _equal(reader: TensorReader, first: str, second: str) -> bool:
    shape = reader.shape(first)
    if reader.shape(second) != shape or len(shape) != 2:
        return False
    step = max(1, CHUNK_BYTES // (4 * max(1, shape[1])))
    starts = range(0, shape[0], step)
    return all(torch.equal(reader.rows(first, at, at + step), reader.rows(second, at, at + step)) for at in starts)


def _end_tokens(config: Fields, generation: Fields, text: TextModel, vocab_size: int) -> frozenset[int]:
    """Those of generation_config.json, or of config.json if it has none, and the tokenizer's."""
    source = generation if generation.has("eos_token_id") else config
    ids = source.token_ids("eos_token_id")
    if beyond := sorted(token for token in ids if token >= vocab_size):
        raise ModelError(f"{source.place}: eos_token_id {beyond[0]} is not in the vocabulary of {vocab_size}")
    own = text.eos_token_id
    return ids if own is None or own >= vocab_size else ids | {own}
