"""The attempts at one synchronous stream: begun again while nobody answers, until its first message has come.

gRPC's own retries leave a synchronous stream waiting for ever, deaf to `cancel`, if an attempt reached a server and the
last one finds none (1.85).
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Protocol, cast

import grpc

from cutaway.channel import PAUSES

if TYPE_CHECKING:
    from cutaway.transcript import Response


class Call(Protocol):
    """One attempt: gRPC's call of a stream."""

    def __iter__(self) -> Iterator[Response]: ...

    def cancel(self) -> object:
        """End it."""


GLANCE_SECONDS = 0.05  # how often a pause looks whether the stream was cancelled


class Attempts:
    """Iterates over the messages of the attempt that is answered. `cancel` may come from any thread, or a signal."""

    def __init__(self, begin: Callable[[float | None], Call], timeout: float | None, retries: int) -> None:
        """Make the first attempt.

        Args:
            begin: makes an attempt that may take so many seconds.
            timeout: seconds that all attempts together may take.
            retries: how often to begin again.
        """
        self._begin = begin
        self._end = None if timeout is None else time.monotonic() + timeout
        self._pauses = iter(PAUSES[:retries])
        self._answered = False
        self._cancelled = False
        self._make(timeout)

    def __next__(self) -> Response:
        """The next message.

        Raises:
            StopIteration: there are no more.
            grpc.RpcError: the last attempt failed.
        """
        while True:
            try:
                message = next(self._messages)
            except grpc.RpcError as error:
                if not self._tried_again(error):
                    raise
            else:
                self._answered = True
                return message

    def cancel(self) -> None:
        """Cancel the attempt that is under way, and make no other."""
        self._cancelled = True  # a flag and no Event: a signal may come while this very thread holds an Event's lock
        self._stop()

    def _make(self, timeout: float | None) -> None:
        call = self._begin(timeout)
        self._messages: Iterator[Response] = iter(call)
        self._stop: Callable[[], object] = call.cancel

    def _tried_again(self, error: grpc.RpcError) -> bool:
        if self._answered or cast("grpc.Call", error).code() is not grpc.StatusCode.UNAVAILABLE:
            return False
        pause = next(self._pauses, None)
        if pause is None or not self._slept(pause * random.uniform(0.8, 1.2)):  # noqa: S311 (no secret)
            return False
        self._make(None if self._end is None else self._end - time.monotonic())
        if self._cancelled:  # while it began
            self._stop()
        return True

    def _slept(self, seconds: float) -> bool:
        """Whether the pause is over, with time left and nobody having cancelled."""
        until = time.monotonic() + seconds
        if self._end is not None and until >= self._end:
            return False
        while not self._cancelled and time.monotonic() < until:
            time.sleep(GLANCE_SECONDS)
        return not self._cancelled
