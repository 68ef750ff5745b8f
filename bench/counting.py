"""What metrics cost: CPU time in the code that counts, beside that of the steps it counts, and of a scrape.

Every call that the engine makes to its counters is timed, so the cost of the timing is in the figure, too.

python bench/counting.py --streams 64
python bench/counting.py --json -- --dtype float32      (after -- come the server's options)
"""

from __future__ import annotations

import argparse
import json
import random
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from cutaway_server.config import Config, read_config
from cutaway_server.engine.build import build_engine
from cutaway_server.engine.thread import EngineThread
from cutaway_server.model.open import open_model
from cutaway_server.request import Event, Request, Sampled, SamplingParams
from cutaway_server.service.metrics.catalog import ENGINE
from cutaway_server.service.metrics.collector import SpecCollector
from cutaway_server.service.metrics.sources import Sources
from prometheus_client import CollectorRegistry, generate_latest

COUNTING = ("begin", "mark", "step", "reported", "arrived", "started", "stopped", "take")


class Stopwatch:
    """CPU seconds of the engine's thread in functions, calls within calls counted once."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.calls = 0
        self._inside = False

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, timed."""

        def timed(*arguments: Any, **options: Any) -> Any:
            if self._inside:
                return function(*arguments, **options)
            self._inside, self.calls = True, self.calls + 1
            began = time.thread_time()
            try:
                return function(*arguments, **options)
            finally:
                self.seconds += time.thread_time() - began
                self._inside = False

        return timed


class Decoding:
    """Waits until every stream decodes, and then for so many steps' events."""

    def __init__(self, streams: int, steps: int) -> None:
        self._missing, self._tokens = streams, streams * steps
        self._begun: set[str] = set()
        self.all_decode, self.over = threading.Event(), threading.Event()

    def report(self, events: Sequence[tuple[str, Event]]) -> None:
        """Take a step's events."""
        sampled = [name for name, event in events if isinstance(event, Sampled)]
        if self.all_decode.is_set():
            self._tokens -= len(sampled)
            if self._tokens <= 0:
                self.over.set()
            return
        self._begun.update(sampled)
        if len(self._begun) == self._missing:
            self.all_decode.set()


def measure(config: Config, options: argparse.Namespace) -> dict[str, float | str]:
    """Seconds a step: of the clock, of all CPUs, of the engine's own thread in its counters; and of a scrape."""
    engine, facts = build_engine(config, open_model(config.model))
    watch, decoding, source = Stopwatch(), Decoding(options.streams, options.steps), random.Random(0)
    for name in COUNTING:
        setattr(engine.observed, name, watch.timed(getattr(engine.observed, name)))
    thread = EngineThread(engine, decoding.report, lambda _: decoding.over.set())
    thread.start()
    for i in range(options.streams):
        prompt = tuple(source.choices(range(engine.model.config.d_vocab), k=options.prompt))
        sampling = SamplingParams(seed=0, max_tokens=1_000_000, temperature=0.0)
        thread.submit(Request(f"bench-{i}", prompt, sampling, time.monotonic(), prefix_caching=False))
    decoding.all_decode.wait()
    steps, cpu, began, counted, calls = (
        engine.steps, time.process_time(), time.perf_counter(), watch.seconds, watch.calls,
    )  # fmt: skip
    decoding.over.wait()
    steps = engine.steps - steps
    record: dict[str, float | str] = {
        "streams": options.streams,
        "kernels": facts.kernels,
        "dtype": facts.dtype,
        "step_ms": 1e3 * (time.perf_counter() - began) / steps,
        "step_cpu_ms": 1e3 * (time.process_time() - cpu) / steps,
        "counting_us": 1e6 * (watch.seconds - counted) / steps,
        "calls": (watch.calls - calls) / steps,
    }
    thread.stop()
    return record | {"scrape_cpu_ms": 1e3 * scrape_seconds(config, facts, thread, options.scrapes)}


def scrape_seconds(config: Config, facts: Any, thread: EngineThread, count: int) -> float:
    """CPU seconds to read every metric of the engine and write it in Prometheus's format."""
    registry, sources = CollectorRegistry(), Sources.of(config, facts, thread)
    registry.register(SpecCollector(ENGINE, lambda: sources, {"model_name": config.name, "engine": "0"}))
    generate_latest(registry)
    began = time.thread_time()
    for _ in range(count):
        generate_latest(registry)
    return (time.thread_time() - began) / count


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=64, help="tokens of each prompt")
    parser.add_argument("--steps", type=int, default=200, help="decode steps to measure")
    parser.add_argument("--scrapes", type=int, default=20)
    parser.add_argument("--json", action="store_true")
    options, rest = parser.parse_known_args()
    arguments = ["--model", options.model, "--max-running", str(max(64, options.streams))]
    arguments += [argument for argument in rest if argument != "--"]
    record = measure(read_config(arguments, {}), options)
    if options.json:
        print(json.dumps(record))
        return
    share = [float(record["counting_us"]) / 10 / float(record[key]) for key in ("step_ms", "step_cpu_ms")]
    print(f"{options.model}, {record['dtype']}, {record['kernels']} kernels, {options.streams} streams")
    print(f"a step: {record['step_ms']:.1f} ms, {record['step_cpu_ms']:.1f} ms of all CPUs")
    print(f"counting: {record['counting_us']:.0f} us of CPU in {record['calls']:.0f} calls a step", end=", ")
    print(f"{share[0]:.2f} % of its time, {share[1]:.2f} % of its CPU time")
    print(f"a scrape: {record['scrape_cpu_ms']:.1f} ms of CPU")


if __name__ == "__main__":
    main()
