"""Ctrl-C while gRPC waits: cancels the call, and is raised when gRPC has let go of its locks.

A KeyboardInterrupt raised inside gRPC's own waiting can leave a lock of the call taken; the thread that serves the
whole channel then waits for it, and every later call on that channel hangs.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def cancelling(cancel: Callable[[], object]) -> Iterator[None]:
    """While the block runs, let SIGINT only call `cancel`; what SIGINT did before, it does when the block is over."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    interrupted: list[FrameType | None] = []

    def note(_: int, frame: FrameType | None) -> None:
        interrupted.append(frame)
        cancel()

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if interrupted:
            before(signal.SIGINT, interrupted[0])
