"""The counters below the metrics: buckets as Prometheus means them, ages of blocks, and bytes of tensors."""

from __future__ import annotations

import random
import time

import pytest
import torch
from cutaway_server.cache.blocks import BlockPool
from cutaway_server.engine.footprint import tensor_bytes
from cutaway_server.histogram import Histogram, one_two_five
from cutaway_server.request import FinishReason
from engines import ask, make_engine
from prometheus_client import CollectorRegistry
from prometheus_client import Histogram as Theirs

EDGES = (0.001, 0.01, 0.1, 1, 10)


def test_a_histogram_counts_as_prometheus_clients_own_does() -> None:
    chance, ours, registry = random.Random(3), Histogram(EDGES), CollectorRegistry()
    theirs = Theirs("theirs", "as an oracle", buckets=EDGES, registry=registry)
    for value in [*EDGES, 0.0, 11.0, *(10 ** chance.uniform(-4, 2) for _ in range(500))]:
        ours.observe(value)
        theirs.observe(value)
    (family,) = registry.collect()
    assert ours.cumulative() == [s.value for s in family.samples if s.name == "theirs_bucket"]
    assert ours.count == registry.get_sample_value("theirs_count")
    assert ours.total == registry.get_sample_value("theirs_sum")


def test_lengths_go_up_by_1_2_5_to_the_context() -> None:
    assert one_two_five(100) == (1, 2, 5, 10, 20, 50, 100)
    assert one_two_five(101)[-2:] == (100, 200)
    assert one_two_five(131_072)[-1] == 200_000


def test_blocks_tell_how_long_they_lived_lay_idle_and_were_away() -> None:
    pool = BlockPool(3, 16, b"key")
    ages = pool.statistics
    ages.now = 100.0
    first, second = pool.take(), pool.take()
    pool.publish(first, b"1" * 16)
    ages.now = 107.0
    pool.release(first)
    ages.now = 110.0
    pool.share(first)
    assert (ages.reuse_gap.count, ages.reuse_gap.total) == (1, 3.0)
    ages.now = 120.0
    pool.release(first)
    pool.release(second)  # published nowhere: it becomes free, and that is no eviction
    pool.take()
    assert ages.lifetime.count == 0
    ages.now = 125.0
    pool.take()
    assert (ages.lifetime.count, ages.lifetime.total) == (1, 25.0)
    assert (ages.idle.count, ages.idle.total) == (1, 5.0)


def test_tensors_are_counted_once_wherever_they_hang() -> None:
    engine = make_engine(blocks=20)
    pages = engine.pages.keys.nbytes + engine.pages.values.nbytes
    assert tensor_bytes(engine.pages) == pages
    assert tensor_bytes([engine.pages, {"again": engine.pages.keys[0]}]) == pages
    weights = sum(t.nbytes for t in engine.model.kernels.weights.tensors())  # type: ignore[attr-defined]
    assert weights <= tensor_bytes(engine.model.kernels) <= weights + 1000  # and the rotations' frequencies
    assert tensor_bytes(engine.model, apart_from=engine.model) == 0
    assert tensor_bytes(torch.zeros(3, dtype=torch.float64)) == 24


def test_a_request_that_is_aborted_counts_as_far_as_it_had_come() -> None:
    engine = make_engine(max_batch_tokens=32, max_running=2)
    observed = engine.observed
    prompt = tuple(range(100))
    for name in ("decoding", "reading", "queued"):
        engine.add(ask(name, prompt if name == "reading" else prompt[:5], n=2 if name == "queued" else 1))
    observed.take(engine.step())
    for name in ("decoding", "reading", "queued"):
        observed.take(engine.abort(name))
    assert observed.cancelled == {"queued": 1, "prefill": 1, "decode": 1}
    assert observed.finished["abort"] == 3
    assert observed.completions["abort"] == 4
    assert observed.duration.count == 0, "how long a client waits before it leaves is no latency of ours"
    assert observed.watched == 0


def test_a_deadline_is_told_from_other_failures() -> None:
    engine = make_engine()
    engine.add(ask("late", (1, 2, 3), deadline=time.monotonic() - 1))
    engine.add(ask("broken", (1, 2, 3), n=3))
    engine.observed.take(engine.step())
    engine.observed.take(engine.fail("broken", RuntimeError("a fault")))
    ended = engine.observed.finished
    assert (ended["deadline"], ended["error"]) == (1, 1)
    assert engine.observed.completions["error"] == 3
    assert engine.observed.watched == 0


def test_a_completion_ended_by_its_stop_text_has_stopped() -> None:
    engine = make_engine()
    engine.add(ask("two", (1, 2, 3), n=2))
    engine.observed.take(engine.step())
    for index in (0, 1):
        engine.observed.stopped("two", index)
        engine.observed.take(engine.abort("two", index))
    assert engine.observed.completions == {"stop": 2, "length": 0, "abort": 0, "deadline": 0, "error": 0}
    assert engine.observed.finished[FinishReason.STOP.value] == 1
    assert sum(engine.observed.cancelled.values()) == 0


@pytest.mark.parametrize("looked_up", [True, False])
def test_prompts_that_are_not_looked_up_are_no_misses(looked_up: bool) -> None:
    engine = make_engine(prefix_caching=looked_up)
    engine.add(ask("one", tuple(range(40))))
    engine.step()
    assert engine.observed.prefix_queries == (40 if looked_up else 0)
    assert engine.observed.prompt_tokens == 40
