"""JSON objects from files that may be damaged: every error says where."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cutaway_server.errors import ModelError


@dataclass(frozen=True, slots=True)
class Fields:
    """A JSON object read by name and kind. A wrong kind raises `ModelError` with place, name and value."""

    values: Mapping[str, object]
    place: str

    def has(self, key: str) -> bool:
        """Whether `key` is there and not null."""
        return self.values.get(key) is not None

    def count(self, key: str) -> int:
        """An integer of at least 1."""
        value = self._present(key)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 2**31:
            raise self.wrong(key, "must be an integer of at least 1")
        return value

    def number(self, key: str) -> float:
        """A finite number."""
        value = self._present(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self.wrong(key, "must be a finite number")
        return float(value)

    def positive(self, key: str) -> float:
        """A finite number above 0."""
        value = self.number(key)
        if value <= 0:
            raise self.wrong(key, "must be above 0")
        return value

    def flag(self, key: str) -> bool:
        """True or false."""
        value = self._present(key)
        if not isinstance(value, bool):
            raise self.wrong(key, "must be true or false")
        return value

    def text(self, key: str) -> str:
        """A string."""
        value = self._present(key)
        if not isinstance(value, str):
            raise self.wrong(key, "must be a string")
        return value

    def texts(self, key: str) -> tuple[str, ...]:
        """A list of strings."""
        value = self._present(key)
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.wrong(key, "must be a list of strings")
        return tuple(value)

    def token_ids(self, key: str) -> frozenset[int]:
        """One token id or a list of them; none if the key is absent or null."""
        value = self.values.get(key)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if not all(isinstance(item, int) and not isinstance(item, bool) and item >= 0 for item in ids):
            raise self.wrong(key, "must be a token id or a list of them")
        return frozenset(ids)

    def inner(self, key: str) -> Fields:
        """An object within this one; empty if the key is absent or null."""
        value = self.values.get(key)
        if value is None:
            return Fields({}, f"{self.place}, {key}")
        if not isinstance(value, dict):
            raise self.wrong(key, "must be an object")
        return Fields(value, f"{self.place}, {key}")

    def over(self, defaults: Mapping[str, object]) -> Fields:
        """These fields, with `defaults` for keys that are absent."""
        return Fields({**defaults, **self.values}, self.place)

    def wrong(self, key: str, rule: str) -> ModelError:
        """The error that says that `key` breaks `rule`."""
        shown = repr(self.values.get(key))
        shown = shown if len(shown) <= 80 else shown[:77] + "..."
        return ModelError(f"{self.place}: {key} is {shown}; it {rule}")

    def _present(self, key: str) -> object:
        if not self.has(key):
            raise ModelError(f"{self.place}: {key} is missing")
        return self.values[key]


def read_object(path: Path) -> Fields:
    """The JSON object in the file at `path`.

    Raises:
        ModelError: it is missing, not UTF-8, not JSON (with line and column), or not an object.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror})") from error
    return parse_object(raw, str(path))


def parse_object(raw: bytes, place: str) -> Fields:
    """The JSON object in `raw`; `place` is for messages. A key given twice is refused, also within."""
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
    except UnicodeDecodeError as error:
        raise ModelError(f"{place}: not UTF-8 at byte {error.start}") from error
    except json.JSONDecodeError as error:
        raise ModelError(f"{place}: not JSON at line {error.lineno}, column {error.colno}: {error.msg}") from error
    except RecursionError as error:
        raise ModelError(f"{place}: nested too deeply") from error
    except ValueError as error:
        raise ModelError(f"{place}: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{place}: holds {type(value).__name__} where an object is expected")
    return Fields(value, place)


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)!r} is given twice")
    return unique
