"""Where files are kept between starts: fetched models and the compiled kernels."""

from __future__ import annotations

import os
from pathlib import Path


def cache_directory() -> Path:
    """$CUTAWAY_CACHE, else $XDG_CACHE_HOME/cutaway, else ~/.cache/cutaway."""
    if chosen := os.environ.get("CUTAWAY_CACHE"):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "cutaway"
