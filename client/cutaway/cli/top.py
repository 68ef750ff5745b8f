"""`cutaway top`: requests, batch and cache of a server, live."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import click

from cutaway.cli.cache import bar, size
from cutaway.cli.connection import connect, connection_options
from cutaway.cli.screen import harmless
from cutaway.errors import CutawayError, ResourceExhausted

if TYPE_CHECKING:
    from rich.console import RenderableType

    from cutaway.client import Client
    from cutaway.machine import CacheStats, RequestInfo, Requests, Step

LEVELS = " ▁▂▃▄▅▆▇█"
STEPS_SHOWN = 60
SECONDS_COUNTED = 5.0
COLOURS = {"queued": "bright_black", "prefill": "cyan", "decode": "green", "preempted": "red", "finished": "blue"}


@dataclass(slots=True)
class Recent:
    """The steps of the last seconds; written by the thread that watches, read by the one that draws."""

    steps: deque[tuple[float, Step]] = field(default_factory=lambda: deque(maxlen=20_000))  # with when they came
    missed: bool = False  # steps came faster than they were read

    def add(self, step: Step) -> None:
        """Take one more step, and forget those that are too old."""
        now = time.monotonic()  # the server's clock may differ
        self.steps.append((now, step))
        while self.steps[0][0] < now - SECONDS_COUNTED:
            self.steps.popleft()

    def counted(self) -> list[Step]:
        """The steps of the last `SECONDS_COUNTED`."""
        since = time.monotonic() - SECONDS_COUNTED
        return [step for came, step in self.steps.copy() if came > since]


@click.command()
@click.option("--interval", type=float, default=1.0, show_default=True, metavar="SECONDS", help="How often to redraw.")
@click.option("--once", is_flag=True, help="Watch for one interval, print what there is, and end.")
@connection_options
def top(interval: float, once: bool) -> None:
    """Watch requests, batch and cache, live, until Ctrl-C. Asks for the scope observe."""
    from rich.console import Console
    from rich.live import Live

    if not 0.05 <= interval <= 3600:
        raise click.BadParameter("must be from 0.05 to 3600", param_hint="--interval")
    recent, stop = Recent(), threading.Event()
    console = Console()
    with connect(timeout=None) as client, watching(client, recent, stop):
        if once:
            time.sleep(interval)
            console.print(frame(client.requests(), client.cache_stats(), recent, client.address))
            return
        with Live(console=console, screen=console.is_terminal, auto_refresh=False) as live:
            while True:
                live.update(frame(client.requests(), client.cache_stats(), recent, client.address), refresh=True)
                time.sleep(interval)


class watching:  # noqa: N801 (used as a function)
    """While the block runs, a thread fills `recent`; it watches anew when it has missed something."""

    def __init__(self, client: Client, recent: Recent, stop: threading.Event) -> None:
        self._client = client
        self._recent = recent
        self._stop = stop
        self._watch = client.watch_steps()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._watch.close()
        self._thread.join(timeout=2)

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                for step in self._watch:
                    self._recent.add(step)
            except ResourceExhausted:
                self._recent.missed = True
                self._watch = self._client.watch_steps()
            except CutawayError:
                return  # the thread that draws asks the server, too, and tells what is wrong


def frame(requests: Requests, stats: CacheStats, recent: Recent, address: str) -> RenderableType:
    """All there is to see at one moment."""
    from rich.console import Group
    from rich.text import Text

    steps = recent.counted()
    lines = [*summary(requests, stats, steps, address), ""]
    if recent.missed:
        lines.append("some steps were missed: they came faster than this terminal reads them")
    return Group(*(Text(line) for line in lines), table(requests))


def summary(requests: Requests, stats: CacheStats, steps: list[Step], address: str) -> Iterator[str]:
    """The lines above the table."""
    yield (
        f"{address}   {requests.running} completions run, {requests.waiting} wait, "
        f"{requests.other_requests} requests are others'"
    )
    yield f"batch     {batch(steps)}"
    yield f"phases    {phases(steps)}"
    sizes = [sum(row.stop - row.start for row in step.rows) + step.other_rows for step in steps[-STEPS_SHOWN:]]
    yield f"rows      {sparks(sizes)} {sizes[-1] if sizes else 0}"
    used, cached = stats.blocks_used / stats.blocks_total, stats.blocks_cached / stats.blocks_total
    free = f"{stats.blocks_free:,} of {stats.blocks_total:,} blocks free"
    yield f"cache     {bar(used)} used, {cached:.1%} cached, {free}"
    yield (
        f"prefixes  {stats.hit_rate:.1%} of prompt tokens found, {stats.evictions:,} evictions, "
        f"{stats.preemptions:,} preemptions, {size(stats.bytes_used)} in use"
    )


def batch(steps: list[Step]) -> str:
    """How quickly steps go by, and what they compute."""
    timed = [step for step in steps if step.phases]
    if not timed:
        return "no steps of late"
    span = max(timed[-1].time - timed[0].time + timed[0].seconds, 1e-9)
    rows = sum(row.stop - row.start for step in timed for row in step.rows) + sum(step.other_rows for step in timed)
    tokens = sum(len(step.sampled) for step in steps)
    mean = 1000 * sum(step.seconds for step in timed) / len(timed)
    return (
        f"{len(timed) / span:.1f} steps/s of {mean:.1f} ms, {rows / span:.0f} rows/s, "
        f"{tokens / span:.1f} of your tokens/s"
    )


def phases(steps: list[Step]) -> str:
    """Where the time of steps goes."""
    spent: dict[str, float] = {}
    for step in steps:
        for phase, seconds in step.phases.items():
            spent[phase] = spent.get(phase, 0.0) + seconds
    total = sum(spent.values())
    return ", ".join(f"{phase} {seconds / total:.1%}" for phase, seconds in spent.items()) if total else "-"


def sparks(values: Iterable[int]) -> str:
    """Numbers as a line of bars."""
    values = list(values)
    most = max(values, default=0) or 1
    return "".join(LEVELS[-(-value * (len(LEVELS) - 1) // most)] for value in values)


def table(requests: Requests) -> RenderableType:
    """A line for each request, those that run first."""
    from rich.table import Table
    from rich.text import Text

    drawn = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("request", "stage", "prompt", "cached", "made", "blocks", "preempted", "age"):
        drawn.add_column(name, justify="left" if name in ("request", "stage") else "right", no_wrap=name != "request")
    live = [request for request in requests if request.stage != "finished"]
    finished = [request for request in requests if request.stage == "finished"]
    for request in [*live, *finished[::-1][:10]]:
        drawn.add_row(
            Text(harmless(request.request_id)), Text(request.stage, style=COLOURS.get(request.stage, "")),
            *map(str, _numbers(request)),
        )  # fmt: skip
    return drawn


def _numbers(request: RequestInfo) -> Iterator[int | str]:
    """The columns that are numbers."""
    reading = request.computed_tokens < request.prompt_tokens
    yield f"{request.computed_tokens}/{request.prompt_tokens}" if reading else request.prompt_tokens
    yield request.cached_tokens
    made = [completion.generated_tokens for completion in request.completions]
    yield "+".join(map(str, made)) if len(made) <= 4 else f"{sum(made)} in {len(made)}"
    yield sum(completion.blocks for completion in request.completions)
    yield request.preemptions or ""
    yield f"{request.age_seconds:.1f}s"
