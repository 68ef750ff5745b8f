"""Specs as prometheus_client collects them: read when it asks, into samples whose labels are made once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Generic

from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample
from prometheus_client.utils import floatToGoString

from cutaway_server.histogram import Histogram
from cutaway_server.service.metrics.spec import S, Spec


class SpecCollector(Collector, Generic[S]):
    """Collects `specs` from `source`, which gives None while there is nothing to read from."""

    def __init__(self, specs: Iterable[Spec[S]], source: Callable[[], S | None], labels: Mapping[str, str]) -> None:
        self._source = source
        self._families = [_Family(spec, labels) for spec in specs]

    def describe(self) -> Iterable[Metric]:
        """Nothing: without this the registry would collect once to know the names."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """Every metric that there is at the moment."""
        source = self._source()
        if source is not None:
            for family in self._families:
                yield from family.collect(source)


class _Family(Generic[S]):
    """One spec, with the labels of its samples as they were made first: later scrapes only read."""

    def __init__(self, spec: Spec[S], labels: Mapping[str, str]) -> None:
        self._spec = spec
        self._base = dict(labels)
        self._name = spec.name.removesuffix("_total") if spec.kind == "counter" else spec.name
        self._labels: dict[str, dict[str, str]] = {}  # of each child
        self._buckets: dict[str, list[dict[str, str]]] = {}  # of each child's buckets

    def collect(self, source: S) -> Iterator[Metric]:
        value = self._spec.read(source)
        if value is None:
            return
        if self._spec.facts is not None and not self._labels:
            self._labels[""] = {**self._base, **self._spec.facts(source)}
        metric = Metric(self._name, self._spec.meaning, self._spec.kind)
        children = value.items() if isinstance(value, Mapping) else (("", value),)
        for child, one in children:
            metric.samples += self._histogram(child, one) if isinstance(one, Histogram) else [self._plain(child, one)]
        yield metric

    def _plain(self, child: str, value: float) -> Sample:
        return Sample(self._spec.name, self._labels_of(child), value)

    def _histogram(self, child: str, histogram: Histogram) -> list[Sample]:
        labels = self._labels_of(child)
        if child not in self._buckets:
            edges = [*map(floatToGoString, histogram.edges), "+Inf"]
            self._buckets[child] = [{**labels, "le": edge} for edge in edges]
        counts = histogram.cumulative()
        name = self._spec.name
        samples = [Sample(f"{name}_bucket", le, n) for le, n in zip(self._buckets[child], counts, strict=True)]
        return [*samples, Sample(f"{name}_count", labels, counts[-1]), Sample(f"{name}_sum", labels, histogram.total)]

    def _labels_of(self, child: str) -> dict[str, str]:
        if child not in self._labels:
            more = {} if self._spec.label is None else {self._spec.label: child}
            self._labels[child] = {**self._base, **more}
        return self._labels[child]
