"""Real servers on real ports: one in a thread of this process, whose engine can be looked at, and one as a program."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from cutaway.v1 import inference_pb2 as v1
from cutaway.v1.inference_pb2_grpc import InferenceStub
from cutaway_server.__main__ import load
from cutaway_server.config import Config
from cutaway_server.engine.engine import Engine
from cutaway_server.engine.thread import EngineThread
from cutaway_server.errors import EngineFailed
from cutaway_server.service.server import Server


@dataclass(frozen=True, slots=True)
class LiveServer:
    """A server in a thread: its address, and its parts."""

    address: str
    engine: Engine
    engine_thread: EngineThread
    server: Server
    loop: asyncio.AbstractEventLoop

    def used_pages(self) -> int:
        """Pages that somebody owns."""
        return self.engine.scheduler.pool.used

    def is_clean(self) -> bool:
        """Whether nothing runs or waits anywhere, and every page is back."""
        idle = self.engine_thread.idle() and not self.engine.has_work and not self.server.desk.names
        if idle:
            self.engine.scheduler.pool.check()
        return idle and self.used_pages() == 0


@contextmanager
def serving(model: Path, *, pace: float = 0.0, **options: Any) -> Iterator[LiveServer]:
    """Serve `model` on a port of its own, in a thread, computing in fp32 on one thread; steps take `pace` s longer."""
    settings = {
        "listen": "127.0.0.1:0",
        "metrics_listen": "127.0.0.1:0",
        "dtype": "float32",
        "threads": 1,
        "kv_cache_memory": 2**23,
        **options,
    }
    config = Config(model=str(model), **settings)
    engine, facts, text = load(config)
    step = engine.step
    engine.step = lambda: (time.sleep(pace), step())[1]  # type: ignore[method-assign]
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="server", daemon=True)
    thread.start()

    def on_loop(coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, loop).result(60)

    async def start() -> tuple[Server, str, EngineThread]:
        server = Server(config)
        address = await server.listen()

        def on_death(_: BaseException) -> None:
            asyncio.run_coroutine_threadsafe(server.end(EngineFailed("the engine has failed")), loop)

        engine_thread = EngineThread(engine, server.desk.report, on_death)
        engine_thread.start()
        server.metrics.watch(engine_thread, facts)
        await server.serve(engine_thread, facts, text)
        return server, address, engine_thread

    server, address, engine_thread = on_loop(start())
    try:
        yield LiveServer(address, engine, engine_thread, server, loop)
    finally:
        engine_thread.stop()
        on_loop(server.stop())
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@contextmanager
def program(*arguments: str, code: str | None = None) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """`cutaway-server` as a process of its own, and its address; `code` runs in it before main()."""
    start = [
        *(["-c", f"{code}\nfrom cutaway_server.__main__ import main\nmain()"] if code else ["-m", "cutaway_server"])
    ]
    command = [
        sys.executable,
        *start,
        "--listen",
        "127.0.0.1:0",
        "--metrics-listen",
        "127.0.0.1:0",
        "--dtype",
        "float32",
        "--threads",
        "1",
        *arguments,
    ]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"}
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("listening on "), line + process.communicate(timeout=10)[1]
        yield line.removeprefix("listening on ").strip(), process
    finally:
        process.kill()
        process.communicate()


@contextmanager
def stub(address: str, *options: tuple[str, Any]) -> Iterator[InferenceStub]:
    """A client of its own connection."""
    with grpc.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1), *options]) as channel:
        yield InferenceStub(channel)


def asking(prompt: Any, **sampling: Any) -> v1.GenerateRequest:
    """A request: text or token ids, greedy unless `sampling` says otherwise; fields of the request by prefix `ask_`."""
    fields = {k.removeprefix("ask_"): sampling.pop(k) for k in list(sampling) if k.startswith("ask_")}
    body = {"text": prompt} if isinstance(prompt, str) else {"token_ids": v1.TokenIds(ids=prompt)}
    params = v1.SamplingParams(**{"temperature": 0, "ignore_eos": True, **sampling})
    return v1.GenerateRequest(**body, sampling=params, **fields)


def deltas(responses: list[v1.GenerateResponse], index: int = 0) -> list[v1.Delta]:
    return [r.delta for r in responses if r.WhichOneof("event") == "delta" and r.delta.index == index]


def tokens_of(responses: list[v1.GenerateResponse], index: int = 0) -> list[int]:
    return [token.id for delta in deltas(responses, index) for token in delta.tokens]


def text_of(responses: list[v1.GenerateResponse], index: int = 0) -> str:
    return "".join(delta.text for delta in deltas(responses, index))


def eventually(holds: Callable[[], bool], seconds: float = 10.0) -> bool:
    """Whether `holds` becomes true in time."""
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True
