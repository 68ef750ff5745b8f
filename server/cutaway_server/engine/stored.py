"""K and V of a request's positions, read out of the pages in parts, between steps.

A position's bits depend on the tokens up to it alone, so parts that are read at different times fit together, even if
the request was preempted and computed again meanwhile.
"""

from __future__ import annotations

import time
from collections.abc import Sequence as Items
from dataclasses import dataclass

import torch
from torch import Tensor

from cutaway_server.cache.blocks import Lease
from cutaway_server.engine.engine import Engine
from cutaway_server.engine.retained import Ended
from cutaway_server.errors import NotFound, Unsupported
from cutaway_server.request import Request
from cutaway_server.scheduler import Sequence


@dataclass(frozen=True, slots=True)
class Stored:
    """What is stored of a completion: K and V of positions [0, stored)."""

    request: Request
    index: int
    tokens: int  # of prompt and output
    stored: int
    live: bool


def find_stored(engine: Engine, name: str, index: int) -> Stored:
    """What is stored of completion `index` of a request; before its prompt is computed, it has just one, 0.

    Raises:
        NotFound: no such request, or completion.
    """
    request, found = find(engine, name, index)
    if isinstance(found, Sequence):
        return Stored(request, index, len(found.tokens) - found.promised, found.stored, True)
    return Stored(request, index, len(found.tokens), found.stored, False)


def tokens_of(engine: Engine, name: str, index: int) -> tuple[Request, tuple[int, ...]]:
    """A request, and the tokens of its completion `index` so far: prompt and output.

    Raises:
        NotFound: no such request, or completion.
    """
    request, found = find(engine, name, index)
    if isinstance(found, Sequence):
        return request, tuple(found.tokens[: len(found.tokens) - found.promised])
    return request, found.tokens


def read_stored(
    engine: Engine, of: Stored, layer: int, positions: Items[int], heads: Items[int] | None = None
) -> tuple[Tensor, Tensor]:
    """Keys (rotated) and values [n, heads, d_head] of a layer at `positions`, all of them below `of.stored`: copies.

    They are as stored; of a cache in 8 bits, in fp32. `heads`: of which of the heads that keys have; None: of all.

    Raises:
        NotFound: the request has ended meanwhile and is not kept.
        Unsupported: it was preempted, or its blocks have been given to others.
    """
    request, found = find(engine, of.request.request_id, of.index)
    if request is not of.request:
        raise gone(of.request.request_id)
    blocks = blocks_of(engine, found, positions)
    size = engine.pages.page_size
    slots = torch.tensor([blocks[position // size] * size + position % size for position in positions])
    keys, values = engine.pages.gather(layer, slots.to(engine.pages.keys.device))
    if heads is not None:
        keys, values = keys[:, list(heads)], values[:, list(heads)]
    return keys.cpu(), values.cpu()


def find(engine: Engine, name: str, index: int) -> tuple[Request, Sequence | Ended]:
    """A completion that runs, or has ended and is kept, and its request.

    Raises:
        NotFound: no such request, or completion.
    """
    live = engine.live.get(name)
    if live is not None:
        if live.prompt is not None and index == 0:
            return live.request, live.prompt.sequence
        if index in live.completions:
            return live.request, live.completions[index].sequence
        request, ended = live.request, live.ended
    elif (run := engine.retained.find(name, time.monotonic())) is not None:
        request, ended = run.request, list(run.completions)
    else:
        raise gone(name)
    for completion in ended:
        if completion.index == index:
            return request, completion
    raise NotFound(f"index: request {_own(name)!r} has no completion {index} now")


def blocks_of(engine: Engine, found: Sequence | Ended, positions: Items[int]) -> Items[int]:
    """The completion's blocks, those of `positions` with their keys and values.

    Raises:
        Unsupported: it was preempted, or they have been given to others.
    """
    if isinstance(found, Sequence):
        if positions and max(positions) >= found.stored:
            raise Unsupported("the request was preempted: its keys and values are computed again later; try again")
        return found.blocks
    pool, size = engine.scheduler.pool, engine.pages.page_size
    needed: set[Lease] = {found.leases[position // size] for position in positions}
    if not all(map(pool.holds, needed)):
        raise Unsupported("the request has ended, and others needed the room of its keys and values")
    return [lease.block for lease in found.leases]


def gone(name: str) -> NotFound:
    """There is no such request."""
    return NotFound(f"request_id: no request {_own(name)!r} is running, or has ended and is kept")


def _own(name: str) -> str:
    """The name as its tenant knows it."""
    return name.rpartition("/")[2]
