"""Clients that mean harm: connections that say nothing, floods of pings, heavy metadata. Others hardly notice."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import grpc
import pytest
from certificates import Authority
from cutaway import Client, CutawayError
from cutaway_server.service.bounds import HANDSHAKE_MS, METADATA_BYTES, MOST_METADATA_BYTES
from secured import outcome
from serving import program, serving
from tiny import save_tiny

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SETTINGS, PING, GOAWAY = 4, 6, 7
MAX_CONCURRENT_STREAMS, ENHANCE_YOUR_CALM = 3, 11
GET_MODEL = "/cutaway.v1.Inference/GetModel"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    save_tiny("llama", path)
    return path


def frame(kind: int, payload: bytes = b"") -> bytes:
    return struct.pack(">I", len(payload))[1:] + bytes([kind, 0]) + bytes(4) + payload


def frames(connection: socket.socket) -> Iterator[tuple[int, bytes]]:
    """The frames that the server sends, until it closes."""
    reader = connection.makefile("rb")
    with reader:
        while len(head := reader.read(9)) == 9:
            yield head[3], reader.read(int.from_bytes(head[:3], "big"))


@contextmanager
def connected(address: str) -> Iterator[socket.socket]:
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port)), 30) as connection:
        yield connection


def test_a_flood_of_pings_is_cut_off(tiny: Path) -> None:
    with serving(tiny) as live:
        with connected(live.address) as connection:
            connection.sendall(PREFACE + frame(SETTINGS) + frame(PING, bytes(8)) * 10)
            farewells = [payload for kind, payload in frames(connection) if kind == GOAWAY]
        assert farewells
        assert struct.unpack(">II", farewells[-1][:8])[1] == ENHANCE_YOUR_CALM
        with Client(live.address) as client:
            client.model()


def test_a_connection_may_open_so_many_streams(tiny: Path) -> None:
    with serving(tiny, max_streams=7) as live, connected(live.address) as connection:
        connection.sendall(PREFACE + frame(SETTINGS))
        told = next(payload for kind, payload in frames(connection) if kind == SETTINGS)
        assert (MAX_CONCURRENT_STREAMS, 7) in struct.iter_unpack(">HI", told)


def test_so_many_connections_are_taken_and_places_are_given_back(tiny: Path) -> None:
    with serving(tiny, max_connections=3) as live:
        with ExitStack() as stack:
            taken = [stack.enter_context(connected(live.address)) for _ in range(3)]
            for connection in taken:
                connection.sendall(PREFACE + frame(SETTINGS))
                assert next(frames(connection))[0] == SETTINGS
            with connected(live.address) as one_more:
                assert one_more.recv(1) == b"", "closed at once"
        with Client(live.address, timeout=20) as client:
            client.model()


def test_heavy_metadata_is_refused(tiny: Path) -> None:
    with serving(tiny) as live, grpc.insecure_channel(live.address) as channel:
        light, heavy = (("x", "y" * size) for size in (METADATA_BYTES // 2, MOST_METADATA_BYTES))
        assert outcome(channel, GET_MODEL, [light])[0] is grpc.StatusCode.OK
        assert outcome(channel, GET_MODEL, [heavy])[0] is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert outcome(channel, GET_MODEL)[0] is grpc.StatusCode.OK


@pytest.mark.slow
def test_a_connection_that_says_nothing_is_closed(tiny: Path, tmp_path: Path) -> None:
    server = Authority(tmp_path).sign("server")
    with serving(tiny) as plain, serving(tiny, tls_cert=server.cert, tls_key=server.key) as secured:
        began = time.monotonic()
        with ExitStack() as stack:
            opened = [stack.enter_context(connected(live.address)) for live in (plain, secured) for _ in range(20)]
            for connection in opened[::2]:
                connection.sendall(PREFACE[:5])
            for connection in opened:
                while connection.recv(4096):
                    pass
        assert HANDSHAKE_MS / 1000 - 1 < time.monotonic() - began < HANDSHAKE_MS / 1000 + 5


UNHURRIED = "import time\nfrom cutaway_server.engine.engine import Engine\nstep = Engine.step\n"
UNHURRIED += "Engine.step = lambda engine: (time.sleep(0.015), step(engine))[1]"


def slow_loris(address: str) -> None:
    with ExitStack() as stack:
        opened = [stack.enter_context(connected(address)) for _ in range(50)]
        for connection in opened:
            connection.sendall(PREFACE[:10])
        time.sleep(0.5)


def ping_flood(address: str) -> None:
    with connected(address) as connection:
        connection.sendall(PREFACE + frame(SETTINGS) + frame(PING, bytes(8)) * 1000)
        for _ in frames(connection):
            pass


def heavy_metadata(address: str) -> None:
    with grpc.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        for _ in range(10):
            outcome(channel, GET_MODEL, [("x", "y" * 60_000)])


def long_prompts(address: str) -> None:
    with Client(address, retries=0) as client:
        for ask in (client.tokenize, client.complete):
            with suppress(CutawayError):
                ask("x " * 2**19, timeout=20)


def attacking(attack: Callable[[str], None], address: str, over: threading.Event) -> None:
    while not over.is_set():
        with suppress(OSError, CutawayError):  # cut off, as it should be
            attack(address)
        time.sleep(0.2)


def late_gap(address: str) -> float:
    """The 99th percentile of the seconds between two tokens of a stream."""
    with Client(address) as client:
        stream = client.generate("Hi", max_tokens=400, ignore_eos=True)
        next(stream)
        times = [time.monotonic() for _ in stream]
    gaps = sorted(after - before for before, after in pairwise(times))
    return gaps[int(0.99 * len(gaps))]


@pytest.mark.slow
def test_other_streams_go_on_while_many_attack(tiny: Path) -> None:
    attacks: tuple[Any, ...] = (slow_loris, ping_flood, heavy_metadata, long_prompts)
    with program("--model", str(tiny), code=UNHURRIED) as (address, _):
        late_gap(address)
        told = []
        for _ in range(3):  # the machine may be busy with other things
            calm, over = late_gap(address), threading.Event()
            threads = [threading.Thread(target=attacking, args=(attack, address, over)) for attack in attacks]
            for thread in threads:
                thread.start()
            time.sleep(0.5)
            told.append((calm, late_gap(address)))
            over.set()
            for thread in threads:
                thread.join()
            if told[-1][1] < 2 * calm:
                return
        pytest.fail(f"seconds between two tokens, calm and attacked: {told}")
