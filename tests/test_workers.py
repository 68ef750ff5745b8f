"""The threads that tokenise: tenants take turns, and none takes every place."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextvars import copy_context
from typing import Any

import pytest
from cutaway_server.errors import QueueFull
from cutaway_server.service.caller import CALL, Call, Caller
from cutaway_server.service.workers import Workers


@pytest.fixture
def held() -> Iterator[threading.Event]:
    """What the only thread waits for."""
    event = threading.Event()
    yield event
    event.set()


def run(workers: Workers, function: Callable[[], Any], tenant: str) -> asyncio.Task[Any]:
    """A task that runs `function` in a call of `tenant`, begun."""
    context = copy_context()
    context.run(CALL.set, Call("", Caller("", "key", tenant, frozenset())))
    return asyncio.get_running_loop().create_task(workers.run(function), context=context)


async def started(workers: Workers, held: threading.Event) -> asyncio.Task[bool]:
    began = threading.Event()
    task = run(workers, lambda: (began.set(), held.wait(20))[1], "many")
    while not began.is_set():
        await asyncio.sleep(0.001)
    return task


async def test_tenants_take_turns_however_much_one_has_sent(held: threading.Event) -> None:
    workers, done = Workers(1, 100), []
    await started(workers, held)
    tasks = [run(workers, lambda i=i: done.append(f"many {i}"), "many") for i in range(20)]
    await asyncio.sleep(0)
    tasks += [run(workers, lambda i=i: done.append(f"few {i}"), "few") for i in range(2)]
    await asyncio.sleep(0)
    held.set()
    await asyncio.gather(*tasks)
    assert done[:5] == ["many 0", "few 0", "many 1", "few 1", "many 2"]
    workers.stop()


async def test_a_tenant_leaves_places_to_others(held: threading.Event) -> None:
    workers = Workers(1, 10)
    first = await started(workers, held)
    tasks = [run(workers, int, "many") for _ in range(5)]
    await asyncio.sleep(0)
    with pytest.raises(QueueFull, match="5 of your texts"):
        await tasks[-1]
    few = run(workers, int, "few")
    await asyncio.sleep(0)
    held.set()
    assert await first
    assert await few == 0
    assert await run(workers, int, "many") == 0, "places are given back"
    workers.stop()


async def test_what_nobody_waits_for_any_more_is_not_done(held: threading.Event) -> None:
    workers, done = Workers(1, 10), []
    first = await started(workers, held)
    left = run(workers, lambda: done.append("left"), "many")
    stays = run(workers, lambda: done.append("stays"), "many")
    await asyncio.sleep(0)
    left.cancel()
    await asyncio.sleep(0)
    held.set()
    await asyncio.gather(first, stays)
    assert done == ["stays"]
    assert not workers._taken
    workers.stop()
