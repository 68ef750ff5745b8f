"""Two things that only a server shows: a prefix that is asked for again, and a long prompt beside running streams."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from itertools import pairwise

from measure import percentile
from replay import Arrivals, Door, RequestError, Summary, replay
from workload import Ask, drawn

STREAMS, UNDISTURBED = 8, 2.0  # seconds in which their pace is learned


def shared_prefix(door: Door, asks: Sequence[Ask], prefix: int, source: random.Random) -> dict[str, float]:
    """Two requests one after the other, `prefix` tokens the same and 16 of their own; the door must allow caching."""
    common = drawn(asks, 1, prefix, 8, source)[0].prompt
    tails = drawn(asks, 3, 16, 8, source)
    bodies = (common[::-1], common, common)  # the first only warms up
    requests = [Ask(body + tail.prompt, 8) for body, tail in zip(bodies, tails, strict=True)]
    _, first, second = (Summary.of(replay(door, [request], 1)).first_token_ms[0] for request in requests)
    return {"first_ms": first, "second_ms": second, "of_first": second / first}


def long_prompt(door: Door, asks: Sequence[Ask], prompt: int, source: random.Random) -> dict[str, float]:
    """Eight streams, and after a while a prompt of `prompt` tokens; each against itself undisturbed."""
    alone = drawn(asks, 2, prompt, 4, source)  # the first only warms up
    first_alone = [Summary.of(replay(door, [ask], 1)).first_token_ms[0] for ask in alone][1]
    return asyncio.run(_beside(door, asks, prompt, source, first_alone))


async def _beside(
    door: Door, asks: Sequence[Ask], prompt: int, source: random.Random, first_alone: float
) -> dict[str, float]:
    await door.open()
    try:
        arrivals: list[Arrivals] = [[] for _ in range(STREAMS)]
        streams = [
            asyncio.create_task(door.send(door.written(ask), arrived))
            for ask, arrived in zip(drawn(asks, STREAMS, 128, 1024, source), arrivals, strict=True)
        ]
        while not all(len(arrived) > 8 for arrived in arrivals):  # every prompt is computed
            check(streams)
            await asyncio.sleep(0.05)
        begun = time.perf_counter()
        await asyncio.sleep(UNDISTURBED)
        check(streams)
        sent = time.perf_counter()
        long: Arrivals = []
        await door.send(door.written(drawn(asks, 1, prompt, 4, source)[0]), long)
        check(streams)
        for stream in streams:
            stream.cancel()
        await asyncio.gather(*streams, return_exceptions=True)
    finally:
        await door.close()
    first = door.read(long)[0][0]
    pairs = [pair for arrived in arrivals for pair in pairwise(door.read(arrived)[0])]
    before = [b - a for a, b in pairs if begun <= a and b <= sent]
    during = [b - a for a, b in pairs if b > sent and a < first]
    between = [1e3 * percentile(part, 95) for part in (before, during)]
    return {
        "between_p95_ms": between[0], "between_p95_beside_ms": between[1],
        "between_p95_of_undisturbed": between[1] / between[0],
        "first_token_alone_ms": first_alone, "first_token_beside_ms": 1e3 * (first - sent),
        "first_token_of_undisturbed": 1e3 * (first - sent) / first_alone,
    }  # fmt: skip


def check(streams: Sequence[asyncio.Task[None]]) -> None:
    """Raise if one has ended, which none should while this is measured."""
    for stream in streams:
        if stream.done():
            stream.result()
            raise RequestError("a stream ended before the long prompt was computed")
