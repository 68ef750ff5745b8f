"""What the service costs around the engine: decode tokens a second in process and over gRPC, and whose CPU time it is.

Starts `bench/step.py` (the engine alone), then a server and, in this process, a client that only counts messages. CPU
time is read from the system for each thread, from when every stream has its first token until the first one ends.

python bench/overhead.py --streams 1 16 64
python bench/overhead.py --json -- --dtype float32 --threads 1      (after -- come options of both)
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median

import grpc
import psutil
from cutaway.v1 import inference_pb2 as v1

GENERATE = "/cutaway.v1.Inference/Generate"
GET_MODEL = "/cutaway.v1.Inference/GetModel"


@dataclass(slots=True)
class Window:
    """What came, and what it cost, while every stream was decoding."""

    seconds: float = 0.0
    tokens: int = 0
    messages: int = 0
    loop: float = 0.0  # CPU seconds of the server's event loop
    server: float = 0.0  # of all its other threads: those that compute, and gRPC's own
    client: float = 0.0
    gaps: list[float] = field(default_factory=list)  # ms between two messages of a stream


@dataclass(frozen=True, slots=True)
class Result:
    """Medians over the repeats; CPU in microseconds a token."""

    streams: int
    engine_tokens_per_second: float
    served_tokens_per_second: float
    lost_percent: float
    loop_us: float
    client_us: float
    loop_percent: float  # of one core
    gap_p50_ms: float
    gap_p95_ms: float
    repeats: int


def cpu_seconds(process: psutil.Process) -> tuple[float, float]:
    """CPU seconds of the main thread, which runs the event loop, and of all other threads."""
    main = others = 0.0
    for thread in process.threads():
        spent = thread.user_time + thread.system_time
        main, others = (main + spent, others) if thread.id == process.pid else (main, others + spent)
    return main, others


class Meter:
    """Notes messages, and the CPU spent between the first moment that all streams decode and the first end."""

    def __init__(self, streams: int, server: psutil.Process) -> None:
        self._missing = streams
        self._server = server
        self._times: list[list[tuple[float, bytes]]] = [[] for _ in range(streams)]
        self._opened: tuple[float, tuple[float, float], float] | None = None
        self._closed: tuple[float, tuple[float, float], float] | None = None

    def _now(self) -> tuple[float, tuple[float, float], float]:
        return time.perf_counter(), cpu_seconds(self._server), time.process_time()

    def note(self, stream: int, data: bytes) -> None:
        """A message has come."""
        self._times[stream].append((time.perf_counter(), data))
        if len(self._times[stream]) == 2:  # the first says that it has started
            self._missing -= 1
            if self._missing == 0:
                self._opened = self._now()

    def ended(self) -> None:
        """A stream is over."""
        self._closed = self._closed or self._now()

    def window(self) -> Window:
        """What was noted between."""
        assert self._opened is not None, "a stream had no token"
        assert self._closed is not None, "no stream has ended"
        (start, (loop0, others0), client0), (stop, (loop1, others1), client1) = self._opened, self._closed
        window = Window(stop - start, 0, 0, loop1 - loop0, others1 - others0, client1 - client0)
        for stream in self._times:
            inside = [(when, data) for when, data in stream if start < when <= stop]
            window.messages += len(inside)
            window.tokens += sum(len(v1.GenerateResponse.FromString(data).delta.tokens) for _, data in inside)
            whens = [when for when, _ in inside]
            window.gaps += [1000 * (b - a) for a, b in pairwise(whens)]
        return window


async def measure(address: str, server: psutil.Process, asked: list[v1.GenerateRequest]) -> Window:
    """Run all requests at once."""
    meter = Meter(len(asked), server)

    async def read(stream: int, call: grpc.aio.UnaryStreamCall) -> None:
        async for data in call:
            meter.note(stream, data)
        meter.ended()

    async with grpc.aio.insecure_channel(address) as channel:
        generate = channel.unary_stream(GENERATE, request_serializer=lambda data: data)
        calls = [generate(request.SerializeToString()) for request in asked]
        await asyncio.gather(*(read(i, call) for i, call in enumerate(calls)))
    return meter.window()


@contextmanager
def serving(arguments: list[str]) -> Iterator[tuple[str, psutil.Process]]:
    """A server as a process of its own: its address, and the process."""
    command = [sys.executable, "-m", "cutaway_server", "--listen", "127.0.0.1:0", "--log-level", "warning", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line.startswith("listening on "):
                sys.exit(f"the server did not start: {line}")
            yield line.removeprefix("listening on ").strip(), psutil.Process(process.pid)
        finally:
            process.terminate()


def engine_alone(options: argparse.Namespace, rest: list[str]) -> dict[int, float]:
    """Decoded tokens a second by number of streams, of `bench/step.py` as a process of its own."""
    script = Path(__file__).with_name("step.py")
    command = [sys.executable, str(script), "--json", "--streams", *map(str, options.streams)]
    command += ["--contexts", str(options.prompt)]
    command += ["--output", str(options.output), "--repeats", str(options.repeats), "--model", options.model, *rest]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True)
    records = json.loads(done.stdout)
    return {record["streams"]: record["decode_tokens_per_second"] for record in records}


def served(options: argparse.Namespace, rest: list[str]) -> dict[int, list[Window]]:
    """The windows of every repeat, by number of streams."""
    source = random.Random(0)
    windows: dict[int, list[Window]] = {}
    context = ["--max-context", str(options.prompt + options.output)]
    with serving(["--model", options.model, *context, *rest]) as (address, process):
        with grpc.insecure_channel(address) as channel:
            told = channel.unary_unary(GET_MODEL)(b"")
        vocabulary = v1.GetModelResponse.FromString(told).architecture.d_vocab
        for streams in options.streams:
            for _ in range(options.repeats):
                asked = [request(source, vocabulary, options) for _ in range(streams)]
                windows.setdefault(streams, []).append(asyncio.run(measure(address, process, asked)))
    return windows


def request(source: random.Random, vocabulary: int, options: argparse.Namespace) -> v1.GenerateRequest:
    """A fresh random prompt, for so many tokens."""
    sampling = v1.SamplingParams(temperature=options.temperature, ignore_eos=True, max_tokens=options.output)
    ids = source.choices(range(vocabulary), k=options.prompt)
    return v1.GenerateRequest(token_ids=v1.TokenIds(ids=ids), sampling=sampling, prefix_caching=False)


def result(streams: int, engine: float, windows: list[Window]) -> Result:
    """The medians."""

    def middle(of: Callable[[Window], float]) -> float:
        return round(median(of(window) for window in windows), 3)

    rate = middle(lambda w: w.tokens / w.seconds)
    gaps = sorted(gap for window in windows for gap in window.gaps)
    return Result(
        streams, engine, rate, round(100 * (1 - rate / engine), 1), middle(lambda w: 1e6 * w.loop / w.tokens),
        middle(lambda w: 1e6 * w.client / w.tokens), middle(lambda w: 100 * w.loop / w.seconds),
        round(gaps[len(gaps) // 2], 2), round(gaps[len(gaps) * 95 // 100], 2), len(windows),
    )  # fmt: skip


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--prompt", type=int, default=32, help="tokens of each prompt")
    parser.add_argument("--output", type=int, default=128, help="tokens generated by each stream")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--json", action="store_true")
    options, rest = parser.parse_known_args()
    rest = [argument for argument in rest if argument != "--"]
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    alone = engine_alone(options, rest)
    results = [result(streams, alone[streams], windows) for streams, windows in served(options, rest).items()]
    if options.json:
        print(json.dumps([asdict(each) for each in results], indent=2))
        return
    print(f"{options.model}, {options.prompt}+{options.output} tokens, {options.repeats} repeats, medians")
    print("streams  engine tok/s  served tok/s  lost  loop us/token (% of a core)  client us/token  gap ms p50 / p95")
    for r in results:
        print(
            f"{r.streams:7}  {r.engine_tokens_per_second:12.1f}  {r.served_tokens_per_second:12.1f}  "
            f"{r.lost_percent:3.0f}%  {r.loop_us:13.0f} ({r.loop_percent:9.1f} %)  {r.client_us:15.0f}  "
            f"{r.gap_p50_ms:7.1f} / {r.gap_p95_ms:.1f}"
        )


if __name__ == "__main__":
    main()
