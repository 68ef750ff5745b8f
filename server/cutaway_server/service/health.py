"""grpc.health.v1: whether the server serves, told once or for as long as somebody watches."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable

from grpc_health.v1.health import aio  # type: ignore[attr-defined]  # the stubs lack it
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse

from cutaway_server.errors import NotFound
from cutaway_server.service.status import Context


class Health(aio.HealthServicer):  # type: ignore[misc]
    """The health of `names`, one and the same. Watches end with the server, not by being cut off."""

    def __init__(self, names: Iterable[str]) -> None:
        super().__init__()
        self._names = tuple(names)
        self._over = asyncio.Event()

    async def Check(self, request: HealthCheckRequest, context: Context) -> HealthCheckResponse:  # noqa: N802
        """Tell the state.

        Raises:
            NotFound: the service is not one of the names.
        """
        if request.service not in self._names:
            raise NotFound(f"service: {request.service!r} is not served; there are {', '.join(map(repr, self._names))}")
        return await super().Check(request, context)

    async def Watch(self, request: HealthCheckRequest, context: Context) -> None:  # noqa: N802
        """Tell the state, and each change of it."""
        await first_of(super().Watch(request, context), self._over.wait())

    async def tell(self, *, serving: bool) -> None:
        """Set the state."""
        state = HealthCheckResponse.SERVING if serving else HealthCheckResponse.NOT_SERVING
        for name in self._names:
            await self.set(name, state)

    def end_watches(self) -> None:
        """End every Watch."""
        self._over.set()


async def first_of(*waits: Coroutine[object, object, object], timeout: float | None = None) -> None:
    """Wait until one of `waits` is over, at most `timeout` seconds."""
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    try:
        done, _ = await asyncio.wait(tasks, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()  # raises what it raised
    finally:
        for task in tasks:
            task.cancel()
