"""What happens to blocks, as whoever watches is told: one event for each change, in order."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple


@dataclass(frozen=True, slots=True)
class Owner:
    """Whom a block is given out to: completion `index` of a request. Blocks of one tenant never become another's."""

    tenant: str
    request_id: str
    index: int


NOBODY = Owner("", "", 0)


class BlockChange(IntEnum):
    """What can happen to a block."""

    TAKEN = 1  # given out for new contents
    COPIED = 2  # given out for a copy of `source`, which is about to be written by one of those who share it
    SHARED = 3  # one more holds it
    RELEASED = 4  # one less holds it
    PUBLISHED = 5  # full, and to be found by prompts that begin alike
    EVICTED = 6  # its contents gave way to others


class BlockEvent(NamedTuple):
    """One change. `references`: how many hold the block after it. `digest` is empty for a block that is not full."""

    change: BlockChange
    block: int
    owner: Owner  # who did it; of an eviction, whose contents they were
    references: int
    digest: bytes
    source: int = 0
