"""What a metric is: its name, what it means, and where its value is read when somebody asks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

from cutaway_server.histogram import Histogram

S = TypeVar("S")  # what values are read from
Value = float | Histogram | Mapping[str, float] | Mapping[str, int] | Mapping[str, Histogram]
ALWAYS = ("model_name", "engine")  # labels that every metric of ours has


@dataclass(frozen=True, slots=True)
class Spec(Generic[S]):
    """A metric. `read` gives its value, values by what `label` is, or None where there is no such thing.

    `facts` are the labels of a metric that says what is so, and is always 1.
    """

    kind: Literal["counter", "gauge", "histogram"]
    name: str
    unit: str
    meaning: str
    read: Callable[[S], Value | None]
    label: str | None = None
    facts: Callable[[S], Mapping[str, str]] | None = None


def counter(name: str, unit: str, meaning: str, read: Callable[[S], Value | None], label: str | None = None) -> Spec[S]:
    """A number that only grows."""
    assert name.endswith("_total"), name
    return Spec("counter", name, unit, meaning, read, label)


def gauge(name: str, unit: str, meaning: str, read: Callable[[S], Value | None], label: str | None = None) -> Spec[S]:
    """A number that goes up and down."""
    return Spec("gauge", name, unit, meaning, read, label)


def histogram(
    name: str, unit: str, meaning: str, read: Callable[[S], Value | None], label: str | None = None
) -> Spec[S]:
    """How often a number was how large."""
    return Spec("histogram", name, unit, meaning, read, label)


def info(name: str, meaning: str, facts: Callable[[S], Mapping[str, str]]) -> Spec[S]:
    """Facts, as labels of a 1."""
    return Spec("gauge", name, "", meaning, lambda _: 1, facts=facts)
