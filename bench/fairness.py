"""A long prompt beside running streams, in one engine without the wire: how long each waits for the other.

Streams decode undisturbed; the long prompt runs alone; then it arrives beside the streams. Also: the first token of a
prompt that begins like an earlier one.

python bench/fairness.py --streams 8 --prompt 1500
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from itertools import pairwise

from cutaway_server.config import read_config
from cutaway_server.engine.build import build_engine
from cutaway_server.engine.engine import Engine
from cutaway_server.model.open import open_model
from cutaway_server.request import Request, Sampled, SamplingParams


class Run:
    """Requests on one engine, and when each of their tokens came."""

    def __init__(self, engine: Engine, source: random.Random) -> None:
        self.engine = engine
        self.source = source
        self.times: dict[str, list[float]] = {}
        self.added: dict[str, float] = {}

    def prompt(self, length: int) -> tuple[int, ...]:
        """A fresh random prompt."""
        return tuple(self.source.choices(range(self.engine.model.config.d_vocab), k=length))

    def add(self, name: str, prompt: tuple[int, ...], tokens: int, *, cached: bool = False) -> None:
        """Queue a greedy request."""
        self.added[name] = time.monotonic()
        self.times[name] = []
        sampling = SamplingParams(seed=0, max_tokens=tokens, temperature=0.0)
        self.engine.add(Request(name, prompt, sampling, self.added[name], prefix_caching=cached))

    def step(self) -> None:
        """One step."""
        events = self.engine.step()
        now = time.monotonic()
        for name, event in events:
            if isinstance(event, Sampled):
                self.times[name].append(now)

    def first_token(self, name: str) -> float:
        """Run until `name` has a token: seconds since it was added."""
        while not self.times[name]:
            self.step()
        return self.times[name][0] - self.added[name]

    def drain(self) -> None:
        """Run to the end."""
        for name in list(self.engine.live):
            self.engine.abort(name)
        while self.engine.has_work:
            self.step()


def beside(engine: Engine, source: random.Random, streams: int, prompt: int) -> dict[str, float]:
    """Milliseconds: gaps between tokens without and with the prompt, its first token alone and beside the streams."""
    run = Run(engine, source)
    run.add("alone", run.prompt(prompt), 1)
    alone = run.first_token("alone")
    for i in range(streams):
        run.add(f"stream-{i}", run.prompt(128), 100_000)
    for i in range(streams):
        run.first_token(f"stream-{i}")
    start = time.monotonic()
    for _ in range(40):
        run.step()
    quiet = gaps(run, start, time.monotonic())
    run.add("late", run.prompt(prompt), 1)
    start = time.monotonic()
    late = run.first_token("late")
    disturbed = gaps(run, start, time.monotonic())
    run.drain()
    return {
        "gap_p95_ms": 1e3 * p95(quiet), "gap_p95_beside_ms": 1e3 * p95(disturbed), "first_token_ms": 1e3 * alone,
        "first_token_beside_ms": 1e3 * late,
    }  # fmt: skip


def shared(engine: Engine, source: random.Random, prefix: int) -> dict[str, float]:
    """Milliseconds to the first token of a prompt, and of another that shares its first `prefix` tokens."""
    run = Run(engine, source)
    common = run.prompt(prefix)
    run.add("first", common + run.prompt(16), 1, cached=True)
    first = run.first_token("first")
    run.add("second", common + run.prompt(16), 1, cached=True)
    return {"prefix_first_ms": 1e3 * first, "prefix_second_ms": 1e3 * run.first_token("second")}


def gaps(run: Run, start: float, stop: float) -> list[float]:
    """Seconds between two tokens of a stream, for those that end within a time."""
    streams = [times for name, times in run.times.items() if name.startswith("stream")]
    return [b - a for times in streams for a, b in pairwise(times) if start < b <= stop]


def p95(values: list[float]) -> float:
    """Nearest-rank 95th percentile."""
    return sorted(values)[-(-len(values) * 95 // 100) - 1]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=1500)
    parser.add_argument("--prefix", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options, rest = parser.parse_known_args()
    arguments = ["--model", options.model, *(argument for argument in rest if argument != "--")]
    engine, facts = build_engine(read_config(arguments, {}), open_model(options.model))
    source = random.Random(0)
    beside(engine, source, 2, 64)
    runs = [
        beside(engine, source, options.streams, options.prompt) | shared(engine, source, options.prefix)
        for _ in range(options.repeats)
    ]
    record = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
    if options.json:
        print(json.dumps({"model": options.model, "dtype": facts.dtype, "kernels": facts.kernels, **record}))
        return
    gap, gap_beside, first, first_beside, once, again = record.values()
    print(f"{options.model}, {facts.dtype}, {facts.kernels} kernels, medians of {options.repeats}")
    print(
        f"{options.streams} streams, p95 between tokens: {gap:.1f} ms; beside {options.prompt} prompt tokens", end=" "
    )
    print(f"{gap_beside:.1f} ms ({gap_beside / gap:.2f} x)")
    print(
        f"that prompt's first token: {first:.0f} ms; beside them {first_beside:.0f} ms ({first_beside / first:.2f} x)"
    )
    print(f"{options.prefix} shared tokens, first token: {once:.0f} ms, again {again:.0f} ms ({again / once:.2f} x)")


if __name__ == "__main__":
    main()
