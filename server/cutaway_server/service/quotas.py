"""What each tenant holds of what is bounded for it: calls in progress, bytes of captures. Used on the event loop."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from cutaway_server.errors import QueueFull
from cutaway_server.service.caller import Caller

RETRY_AFTER_SECONDS = 1.0


class Quotas:
    """Counts by tenant, whoever of it calls. Whoever takes, gives back at the end of the block, however that ends."""

    def __init__(self) -> None:
        self._calls: Counter[str] = Counter()
        self._bytes: Counter[str] = Counter()

    @contextmanager
    def call(self, caller: Caller) -> Iterator[None]:
        """Count a call for as long as the block lasts.

        Raises:
            QueueFull: as many are in progress as may be.
        """
        with _held(self._calls, caller.tenant, 1, caller.max_calls, "calls", "calls of tenant {} are open"):
            yield

    @contextmanager
    def captures(self, caller: Caller, n_bytes: int) -> Iterator[None]:
        """Hold `n_bytes` of captures, those that a request may make at most, for as long as the block lasts.

        Raises:
            QueueFull: with them the tenant would hold more than it may. Waiting helps if others of its own end.
        """
        most, told = caller.max_capture_bytes, "bytes of captures are held for tenant {}"
        with _held(self._bytes, caller.tenant, n_bytes, most, "captures", told):
            yield


@contextmanager
def _held(held: Counter[str], tenant: str, amount: int, most: int | None, what: str, told: str) -> Iterator[None]:
    if most is not None and held[tenant] + amount > most:
        now = f"{held[tenant]} {told.format(repr(tenant))}"
        rule = f"{now}, {amount} more are asked for, and {most} may be"
        raise QueueFull(rule, RETRY_AFTER_SECONDS, what)
    held[tenant] += amount
    try:
        yield
    finally:
        held[tenant] -= amount
        if not held[tenant]:
            del held[tenant]
