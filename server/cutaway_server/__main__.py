"""The program: reads its options, builds the parts, serves, and goes down when told to.

torch and gRPC are imported once the options are known to be right, so that `--help` and mistakes answer at once.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import sys
from collections.abc import Awaitable
from typing import TYPE_CHECKING, NoReturn, TypeVar

if TYPE_CHECKING:
    from cutaway_server.config import Config
    from cutaway_server.engine.build import EngineFacts
    from cutaway_server.engine.engine import Engine
    from cutaway_server.service.server import Server
    from cutaway_server.text.tokenizer import TextModel

Loaded = TypeVar("Loaded")

log = logging.getLogger("cutaway_server")  # __name__ is __main__ here

SWITCH_SECONDS = 0.0005
CLEAN_UP_SECONDS = 1.0
FAILED, MISTAKEN, SIGNALLED = 1, 2, 128  # exit codes: cut short; the caller's mistake; plus the signal's number


def main() -> None:
    """Run the server.

    It exits with 0 when drained, 1 if the engine failed or a second signal came, and 2 for wrong options or models.
    """
    try:
        from cutaway_server.config import ConfigError, read_config
        from cutaway_server.exposure import check_exposure
        from cutaway_server.service.logs import start_logging
    except ModuleNotFoundError as error:  # the client alone is installed, and this command with it
        _refuse(f"{error.name} is missing: install the server with `pip install 'cutaway[server]'`")
    if sys.argv[1:2] == ["keys"]:
        from cutaway_server.service.keys import keys

        keys(sys.argv[2:], "cutaway-server keys")  # exits
    try:
        config = read_config(sys.argv[1:], os.environ)
        check_exposure(config)
    except ConfigError as error:
        _refuse(error)
    start_logging(config)
    # Read when torch is loaded. Threads that wait for each other must not spin: where anything else wants a core (the
    # event loop does), a spinning thread keeps the one it waits for from running, and a step takes 20 times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # A step gives the interpreter's lock up some 150 times, and waits this long for it each time a long text is being
    # tokenised beside it: Python's own 5 ms stop everybody's tokens for 0.7 s.
    sys.setswitchinterval(SWITCH_SECONDS)
    from cutaway_server.errors import ModelError
    from cutaway_server.service.audit import AuditError
    from cutaway_server.service.credentials import CredentialsError
    from cutaway_server.service.server import ListenError
    from cutaway_server.service.tls import CertificateError

    try:
        code = asyncio.run(serve(config))
    except (ModelError, ListenError, CredentialsError, CertificateError, AuditError) as error:
        _refuse(error)
    sys.exit(code)


def _refuse(why: Exception | str) -> NoReturn:
    print(f"cutaway-server: {why}", file=sys.stderr)
    sys.exit(MISTAKEN)


async def serve(config: Config) -> int:
    """Listen, load, and serve until a signal comes or the engine fails; the exit code."""
    from cutaway_server.service.server import Server

    loading = Loading()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, loading.stop, SIGNALLED + number)
    server = Server(config)
    if config.api_keys is not None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, server.reload)
    address = await server.listen()
    try:
        engine, facts, text = await loading.ended(asyncio.to_thread(load, config))
        return await _serve_engine(server, address, engine, facts, text)
    finally:
        await server.stop()


class Loading:
    """Ends the program while it loads: at once, or as soon as a download under way has cleaned up after itself."""

    def __init__(self) -> None:
        self._code: int | None = None

    def stop(self, code: int) -> None:
        """End the program with `code`, and its children."""
        import psutil

        children = psutil.Process().children(recursive=True)
        if self._code is not None or not children:
            os._exit(code)
        self._code = code
        for child in children:
            child.terminate()
        asyncio.get_running_loop().call_later(CLEAN_UP_SECONDS, os._exit, code)

    async def ended(self, load: Awaitable[Loaded]) -> Loaded:
        """What `load` gives."""
        try:
            return await load
        finally:
            if self._code is not None:
                os._exit(self._code)


def load(config: Config) -> tuple[Engine, EngineFacts, TextModel]:
    """The model, ready to compute.

    Raises:
        ModelError: it cannot be found, read, or fitted.
    """
    from cutaway_server.engine.build import build_engine
    from cutaway_server.model.open import open_model
    from cutaway_server.progress import bar

    checkpoint = open_model(config.model)
    log.info("loading %s", config.name)
    with bar(f"loading {config.name}") as progress:
        engine, facts = build_engine(config, checkpoint, progress)
    return engine, facts, checkpoint.text


async def _serve_engine(server: Server, address: str, engine: Engine, facts: EngineFacts, text: TextModel) -> int:
    from cutaway_server.engine.thread import EngineThread

    loop = asyncio.get_running_loop()
    dead = asyncio.Event()

    def on_death(_: BaseException) -> None:
        loop.call_soon_threadsafe(dead.set)

    thread = EngineThread(engine, server.desk.report, on_death)
    thread.start()
    try:
        server.metrics.watch(thread, facts)
        await server.serve(thread, facts, text)
        settle()
        print(f"listening on {address}", flush=True)
        return await _until_told(server, dead)
    finally:
        thread.stop()


def settle() -> None:
    """Let the garbage collector forget what has been loaded: it stays, and need not be looked through at each turn."""
    gc.collect()
    gc.freeze()


async def _until_told(server: Server, dead: asyncio.Event) -> int:
    """Wait for a signal or the engine's death, and end the streams as is right for each; the exit code."""
    from cutaway_server.errors import Draining, EngineFailed
    from cutaway_server.service.health import first_of

    told, again = asyncio.Event(), asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, lambda: again.set() if told.is_set() else told.set())
    await first_of(told.wait(), dead.wait())
    if not dead.is_set():
        log.info("draining: no new requests, running ones may finish")
        await server.drain(again, dead)
    if dead.is_set():
        await server.end(EngineFailed("the engine has failed; the server is going down"))
        return FAILED
    await server.end(Draining("the server went down before the request was finished"))
    return FAILED if again.is_set() else 0


if __name__ == "__main__":
    main()
