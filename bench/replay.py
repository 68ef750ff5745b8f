"""Sends requests to a server at a given concurrency and notes when each message of an answer comes.

A client shares the machine with the server, so it does as little as it can while the clock runs: requests are
serialised before, answers are kept as bytes and read after.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

from measure import percentile
from workload import Ask

Arrivals = list[tuple[float, bytes]]  # when a message came, by time.perf_counter, and its bytes


class RequestError(Exception):
    """A request was refused or broken off; the message is a short name, to be counted."""


class Door(Protocol):
    """One way into a server."""

    async def open(self) -> None:
        """Connect; once, on the event loop that sends."""

    def written(self, ask: Ask) -> bytes:
        """The request as it travels."""

    async def send(self, request: bytes, arrivals: Arrivals) -> None:
        """Send it and add all of its answer to `arrivals`, as it comes. Raises RequestError."""

    def read(self, arrivals: Arrivals) -> tuple[list[float], int]:
        """When messages with tokens came, and how many tokens they brought. Raises RequestError."""

    async def close(self) -> None:
        """Disconnect."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """One request: seconds to its first token and between its messages, or what went wrong."""

    tokens: int
    first: float
    gaps: tuple[float, ...]
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Replay:
    """All requests of one run."""

    outcomes: tuple[Outcome, ...]
    seconds: float  # from the first request sent to the last answer's end
    client_seconds: float  # CPU time that sending and receiving took


@dataclass(frozen=True, slots=True)
class Summary:
    """What is told of a run. Latencies are in milliseconds: p50, p95, p99."""

    output_tokens_per_second: float
    first_token_ms: tuple[float, float, float]
    between_tokens_ms: tuple[float, float, float]
    requests: int
    errors: dict[str, int]
    client_share: float  # of one core, that the client used

    @classmethod
    def of(cls, replay: Replay) -> Summary:
        """The figures of a run; zeros where nothing came back."""
        good = [outcome for outcome in replay.outcomes if outcome.error is None]
        return cls(
            sum(outcome.tokens for outcome in replay.outcomes) / replay.seconds,
            _milliseconds([outcome.first for outcome in good]),
            _milliseconds([gap for outcome in good for gap in outcome.gaps]),
            len(replay.outcomes),
            dict(Counter(outcome.error for outcome in replay.outcomes if outcome.error is not None)),
            replay.client_seconds / replay.seconds,
        )


def _milliseconds(seconds: Sequence[float]) -> tuple[float, float, float]:
    if not seconds:
        return 0.0, 0.0, 0.0
    low, middle, high = (round(1e3 * percentile(seconds, p), 3) for p in (50, 95, 99))
    return low, middle, high


def replay(door: Door, asks: Sequence[Ask], concurrency: int) -> Replay:
    """Send all of `asks`, oldest first, at most `concurrency` at once: the next as soon as one is answered."""
    return asyncio.run(_replay(door, asks, concurrency))


async def _replay(door: Door, asks: Sequence[Ask], concurrency: int) -> Replay:
    requests = iter([(i, door.written(ask)) for i, ask in enumerate(asks)])
    answers: list[tuple[float, Arrivals, str | None]] = [(0.0, [], "not sent")] * len(asks)

    async def work() -> None:
        for i, request in requests:
            arrivals: Arrivals = []
            sent = time.perf_counter()
            try:
                await door.send(request, arrivals)
                answers[i] = (sent, arrivals, None)
            except RequestError as error:
                answers[i] = (sent, [], str(error))

    await door.open()
    try:
        start, cpu = time.perf_counter(), time.process_time()
        await asyncio.gather(*(work() for _ in range(min(concurrency, len(asks)))))
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    finally:
        await door.close()
    outcomes = tuple(_outcome(door, ask, *answer) for ask, answer in zip(asks, answers, strict=True))
    return Replay(outcomes, seconds, cpu)


def _outcome(door: Door, ask: Ask, sent: float, arrivals: Arrivals, error: str | None) -> Outcome:
    if error is not None:
        return Outcome(0, 0.0, (), error)
    try:
        times, tokens = door.read(arrivals)
    except RequestError as failure:
        return Outcome(0, 0.0, (), str(failure))
    if tokens != ask.output or not times:
        return Outcome(tokens, 0.0, (), f"{tokens} tokens, not {ask.output}")
    gaps = tuple(later - earlier for earlier, later in pairwise(times))
    return Outcome(tokens, times[0] - sent, gaps)
