"""A server's metrics, scraped over HTTP and parsed by prometheus_client's own parser."""

from __future__ import annotations

import urllib.request
from collections.abc import Iterable
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample


@dataclass(frozen=True, slots=True)
class Scrape:
    """All samples of one scrape."""

    samples: tuple[Sample, ...]

    def __call__(self, name: str, **labels: str) -> float:
        """The value of the one sample with these labels, which must be there."""
        found = [s.value for s in self.samples if s.name == name and labels.items() <= s.labels.items()]
        assert len(found) == 1, f"{len(found)} samples of {name} with {labels}"
        return found[0]

    def by(self, name: str, label: str) -> dict[str, float]:
        """The values that are not 0, by a label."""
        return {s.labels[label]: s.value for s in self.samples if s.name == name and s.value}

    @property
    def series(self) -> dict[str, set[str]]:
        """The names of all samples, and the labels of each."""
        found: dict[str, set[str]] = {}
        for sample in self.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
        return found


def fetch(address: str | None, path: str = "/metrics") -> str:
    with urllib.request.urlopen(f"http://{address}{path}", timeout=10) as response:
        return str(response.read().decode())


def scrape(address: str | None) -> Scrape:
    return parsed(fetch(address))


def parsed(text: str) -> Scrape:
    families: Iterable[object] = text_string_to_metric_families(text)
    return Scrape(tuple(sample for family in families for sample in family.samples))  # type: ignore[attr-defined]
