"""What watching costs: microseconds of the engine's thread and of the event loop a step, and tokens a second lost.

The first part times the code itself. The second starts a server and counts the tokens of streams that decode, in
windows with and without somebody who watches every step and every block, in turns of A B B A.

python bench/watching.py --rows 1 32 64
python bench/watching.py --model smollm2 --streams 16 --turns 4
"""

from __future__ import annotations

import argparse
import asyncio
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from cutaway import AsyncClient
from cutaway_server.cache.blocks import BlockPool
from cutaway_server.engine.watched import StepReport, Told, Watched
from cutaway_server.request import Request, Sampled, SamplingParams
from cutaway_server.scheduler import Schedule, Scheduler
from cutaway_server.service.machine_wire import steps_of
from measure import Spread

WINDOW_SECONDS = 2.5
PHASES = (0.0001, 0.0005, 0.02, 0.001, 0.0001)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 32, 64])
    parser.add_argument("--model", help="also serve this, and count tokens")
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--turns", type=int, default=4)
    options = parser.parse_args()
    for rows in options.rows:
        show_code(rows)
    if options.model:
        asyncio.run(show_tokens(options.model, options.streams, options.turns))


def show_code(rows: int) -> None:
    """Print what the code itself takes, for steps of so many decodes."""
    scheduler, schedule = decoding(rows)
    told: deque[Told] = deque(maxlen=1)
    watched = Watched(scheduler)
    events = [(w.sequence.request.request_id, Sampled(0, 5, 1, None)) for w in schedule.work]

    def step() -> None:
        watched.computed(schedule, 1)
        watched.over(events, PHASES)
        watched.flush()

    idle = microseconds(step)
    watched.watch(told.append, steps=True, blocks=True, tokens=False)
    writing = microseconds(step)
    report: StepReport = told[-1].steps[-1]

    def send() -> None:
        steps_of([report], "", lambda _: "", tokens=False).SerializeToString()

    print(
        f"{rows:>4} rows: nobody watches {idle:.2f} us; somebody: the engine's thread {writing:.1f} us, the event loop "
        f"{microseconds(send):.1f} us for each watcher"
    )


def decoding(rows: int) -> tuple[Scheduler, Schedule]:
    """A scheduler, and a step of it in which so many completions decode."""
    pool = BlockPool(rows * 4 + 1, 16, b"key")
    scheduler = Scheduler(pool, max_batch_tokens=8192, max_running=rows, max_queued=rows, max_context=4096)
    base = Request("", tuple(range(20)), SamplingParams(seed=1, max_tokens=100), time.monotonic())
    for number in range(rows):
        scheduler.add(replace(base, request_id=f"req-{number:016x}"))
    for _ in range(2):
        schedule = scheduler.schedule(0.0)
        scheduler.complete(schedule)
        for work in schedule.work:
            scheduler.append(work.sequence, 5)
    return scheduler, schedule


def microseconds(call: Callable[[], None], repeats: int = 400) -> float:
    """The median of five timings of a call."""
    taken = []
    for _ in range(5):
        began = time.perf_counter()
        for _ in range(repeats):
            call()
        taken.append(1e6 * (time.perf_counter() - began) / repeats)
    return sorted(taken)[2]


async def show_tokens(model: str, streams: int, turns: int) -> None:
    """Print tokens a second without and with a watcher."""
    with server(model) as address:
        async with AsyncClient(address) as client:
            count = Count()
            reading = [asyncio.ensure_future(read(client, count)) for _ in range(streams)]
            await asyncio.sleep(WINDOW_SECONDS)
            rates: dict[bool, list[float]] = {False: [], True: []}
            for turn in range(turns):
                for watched in (False, True) if turn % 2 == 0 else (True, False):
                    rates[watched].append(await window(client, count, watched))
            for task in reading:
                task.cancel()
            await asyncio.gather(*reading, return_exceptions=True)
    alone, beside = Spread.of(rates[False]), Spread.of(rates[True])
    ratio = Spread.of(b / a for a, b in zip(rates[False], rates[True], strict=True))
    print(f"{model}, {streams} streams: {alone} tok/s; watched {beside} tok/s; ratio {ratio}")


class Count:
    """Tokens that have come."""

    tokens = 0


async def read(client: AsyncClient, count: Count) -> None:
    """Decode without end."""
    while True:
        async for _ in client.generate("Once upon a time", max_tokens=600, ignore_eos=True):
            count.tokens += 1


async def window(client: AsyncClient, count: Count, watched: bool) -> float:
    """Tokens a second for a while."""

    async def watch() -> None:
        async with client.watch_steps() as steps, client.watch_cache() as blocks:
            await asyncio.gather(consume(steps), consume(blocks))

    async def consume(items: object) -> None:
        async for _ in items:  # type: ignore[attr-defined]
            pass

    watching = asyncio.ensure_future(watch()) if watched else None
    await asyncio.sleep(0.3)
    began, before = time.monotonic(), count.tokens
    await asyncio.sleep(WINDOW_SECONDS)
    rate = (count.tokens - before) / (time.monotonic() - began)
    if watching is not None:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
    return rate


@contextmanager
def server(model: str) -> Iterator[str]:
    """A server of its own process."""
    command = [sys.executable, "-m", "cutaway_server", "--model", model, "--listen", "127.0.0.1:0"]
    process = subprocess.Popen(
        [*command, "--metrics-listen", "none", "--log-level", "error"], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        yield process.stdout.readline().removeprefix("listening on ").strip()
    finally:
        process.terminate()
        process.wait(30)


if __name__ == "__main__":
    main()
