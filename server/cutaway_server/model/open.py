"""A model's name to an opened checkpoint, whatever its format."""

from __future__ import annotations

from cutaway_server.model.checkpoint import Checkpoint
from cutaway_server.model.gguf_file import open_gguf
from cutaway_server.model.huggingface import open_directory
from cutaway_server.model.sources import resolve


def open_model(name: str) -> Checkpoint:
    """Find (or fetch) the model that `name` stands for, and open it.

    Raises:
        ModelError: there is no such model, or its files are damaged or of an unknown kind.
    """
    path = resolve(name)
    return open_directory(path) if path.is_dir() else open_gguf(path)
