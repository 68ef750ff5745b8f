"""/livez and /readyz, for probes that speak HTTP: no keys, no TLS, and nothing to learn but yes or no."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterable, Mapping
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

ANSWER_SECONDS = 1.0  # an event loop that is this late does not live


def probes(loop: asyncio.AbstractEventLoop, ready: Callable[[], bool]) -> Mapping[str, WSGIApplication]:
    """The applications by path. `/livez`: the event loop answers. `/readyz`: it does, and requests are taken."""
    return {
        "/livez": _told_by(lambda: _answers(loop)),
        "/readyz": _told_by(lambda: ready() and _answers(loop)),
    }


def _answers(loop: asyncio.AbstractEventLoop) -> bool:
    answered = threading.Event()
    try:
        loop.call_soon_threadsafe(answered.set)
    except RuntimeError:  # the loop is closed
        return False
    return answered.wait(ANSWER_SECONDS)


def _told_by(holds: Callable[[], bool]) -> WSGIApplication:
    def application(_: WSGIEnvironment, respond: StartResponse) -> Iterable[bytes]:
        good = holds()
        respond("200 OK" if good else "503 Service Unavailable", [("Content-Type", "text/plain; charset=utf-8")])
        return [b"ok\n" if good else b"no\n"]

    return application
