"""TLS on real ports: who trusts whom, certificates that are replaced, connections that age, ports for probes."""

from __future__ import annotations

import asyncio
import socket
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from certificates import Authority, Pair, serial
from cutaway import AsyncClient, Client, Unavailable
from cutaway_server.service.tls import CertificateError, Certificates
from google.protobuf.wrappers_pb2 import Int32Value, StringValue
from secured import outcome, write_keys
from serving import LiveServer, eventually, serving
from tiny import save_tiny

SERVING = b"\x08\x01"  # a HealthCheckResponse, as bytes


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    save_tiny("llama", path)
    return path


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "ca")


def shown_by(address: str) -> int:
    """The serial number of the certificate that a new connection is shown."""
    host, _, port = address.rpartition(":")
    return serial(ssl.get_server_certificate((host, int(port)), timeout=10))


def files(pair: Pair) -> dict[str, str]:
    return {"tls_cert": pair.cert, "tls_key": pair.key}


def test_a_stream_over_tls_from_both_clients(tiny: Path, authority: Authority) -> None:
    with serving(tiny, **files(authority.sign("server"))) as live:
        with Client(live.address, tls=authority.file) as client:
            tokens = [token.id for token in client.generate("Hi", max_tokens=8, temperature=0, ignore_eos=True)]

        async def ask() -> list[int]:
            async with AsyncClient(live.address, tls=Path(authority.file)) as client:
                assert (await client.health()).name == "SERVING"
                stream = client.generate("Hi", max_tokens=8, temperature=0, ignore_eos=True)
                return [token.id async for token in stream]

        assert asyncio.run(ask()) == tokens
        assert len(tokens) == 8


def test_a_client_hears_only_a_server_it_trusts(tiny: Path, authority: Authority, tmp_path: Path) -> None:
    stranger = Authority(tmp_path / "stranger", "stranger")
    with serving(tiny, **files(authority.sign("server"))) as live:
        for tls in (stranger.file, True, None):
            with Client(live.address, tls=tls, retries=0) as client, pytest.raises(Unavailable):
                client.model(timeout=10)
    for pair in (authority.sign("old", days=-1), authority.sign("else", sans=("elsewhere.test",))):
        with (
            serving(tiny, **files(pair)) as live,
            Client(live.address, tls=authority.file, retries=0) as client,
            pytest.raises(Unavailable),
        ):
            client.model(timeout=10)


def test_a_new_certificate_is_shown_to_new_connections_and_cuts_no_stream(
    tiny: Path, authority: Authority, tmp_path: Path
) -> None:
    first, second = authority.sign("server"), authority.sign("next")
    serials = [serial(Path(pair.cert).read_text()) for pair in (first, second)]
    with (
        serving(tiny, pace=0.005, **files(first)) as live,
        Client(live.address, tls=authority.file) as client,
    ):
        stream = client.generate("Hi", max_tokens=100, ignore_eos=True)
        next(stream)
        assert shown_by(live.address) == serials[0]
        Path(first.key).write_bytes(Path(second.key).read_bytes())
        assert shown_by(live.address) == serials[0], "a key without its certificate is not taken"
        second.moved_to(first)
        assert shown_by(live.address) == serials[1]
        Path(first.cert).unlink()
        assert shown_by(live.address) == serials[1]
        assert len(list(stream)) == 99


def test_a_new_client_authority_is_asked_for_too(tiny: Path, authority: Authority, tmp_path: Path) -> None:
    later = Authority(tmp_path / "later")
    keys = tmp_path / "keys.toml"
    write_keys(keys, {}, '[[certificate]]\nname = "me"\nscopes = ["observe"]\ntenant = "t"\n')
    options = {**files(authority.sign("server")), "tls_client_ca": authority.file, "api_keys": str(keys)}
    before, after = (each.sign("client", "me").both() for each in (authority, later))
    trusted = tmp_path / "trusted.pem"
    trusted.write_bytes(Path(authority.file).read_bytes())
    with serving(tiny, **options) as live:
        with Client(live.address, tls=str(trusted), cert=before, retries=0) as client:
            client.model()
        with Client(live.address, tls=str(trusted), cert=after, retries=0) as client, pytest.raises(Unavailable):
            client.model(timeout=10)
        Path(later.file).replace(authority.file)
        with Client(live.address, tls=str(trusted), cert=after, retries=0) as client:
            client.model()


def test_wrong_files_are_named_at_start(authority: Authority, tmp_path: Path) -> None:
    one, two = authority.sign("one"), authority.sign("two")
    with pytest.raises(CertificateError, match="--tls-cert and --tls-key are no certificate and its key: KEY_VALUES"):
        Certificates(one.cert, two.key, None)
    with pytest.raises(CertificateError, match=r"--tls-key: '.*/none' cannot be read: No such file"):
        Certificates(one.cert, str(tmp_path / "none"), None)
    with pytest.raises(CertificateError, match="--tls-client-ca has no certificate"):
        Certificates(one.cert, one.key, one.key)
    with pytest.raises(CertificateError, match="are no certificate and its key"):
        Certificates(one.key, one.key, None)


class Balancer:
    """A TCP balancer, as a cluster has one: each connection goes to the next of its servers, and stays there."""

    def __init__(self, *targets: str) -> None:
        self._targets = [target.rpartition(":") for target in targets]
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.connections = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            host, _, port = self._targets[min(self.connections, len(self._targets) - 1)]
            self.connections += 1
            far = socket.create_connection((host, int(port)))
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=self._pump, args=(source, sink), daemon=True).start()

    @staticmethod
    def _pump(source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            pass
        finally:
            if source.fileno() != -1:
                source.close()


@contextmanager
def balancing(*servers: LiveServer) -> Iterator[Balancer]:
    balancer = Balancer(*(server.address for server in servers))
    try:
        yield balancer
    finally:
        balancer.close()


def test_connections_that_age_reach_new_replicas_and_their_streams_go_on(tiny: Path) -> None:
    with (
        serving(tiny, served_name="first", pace=0.01, max_connection_age=1) as first,
        serving(tiny, served_name="second") as second,
        balancing(first, second) as balancer,
        Client(balancer.address) as client,
    ):
        stream = client.generate("Hi", max_tokens=250, ignore_eos=True)
        next(stream)
        names = []

        def has_moved() -> bool:
            names.append(client.model().name)
            return names[-1] == "second"

        assert eventually(has_moved)
        assert names[0] == "first"
        assert balancer.connections == 2
        assert stream.completions is None, "the stream outlives its connection's age"
        assert len(list(stream)) == 249
        assert eventually(first.is_clean)


def test_after_the_grace_a_stream_is_cut(tiny: Path) -> None:
    options = {"max_connection_age": 1, "max_connection_age_grace": 0.2}
    with serving(tiny, pace=0.01, **options) as live, Client(live.address, retries=0) as client:
        began = time.monotonic()
        with pytest.raises(Unavailable):
            list(client.generate("Hi", max_tokens=400, ignore_eos=True))
        assert 1.0 < time.monotonic() - began < 3
        assert eventually(live.is_clean)


def test_the_health_port_speaks_health_in_plain_text_and_nothing_else(
    tiny: Path, authority: Authority, tmp_path: Path
) -> None:
    write_keys(tmp_path / "keys.toml", {})
    options = {**files(authority.sign("server")), "api_keys": str(tmp_path / "keys.toml")}
    with serving(tiny, health_listen="127.0.0.1:0", **options) as live:
        assert live.server.health_address is not None
        with grpc.insecure_channel(live.server.health_address) as channel:
            check: Any = channel.unary_unary(
                "/grpc.health.v1.Health/Check",
                request_serializer=StringValue.SerializeToString,
                response_deserializer=Int32Value.FromString,
            )
            assert check(StringValue(value="cutaway.v1.Inference")).value == 1
            for other in ("/cutaway.v1.Inference/GetModel", "/grpc.reflection.v1alpha.ServerReflection/Info"):
                assert outcome(channel, other)[0] is grpc.StatusCode.UNIMPLEMENTED
            with pytest.raises(grpc.RpcError, match="larger than max"):
                check(StringValue(value="x" * 5000))


def get(address: str, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://{address}{path}", timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def test_livez_and_readyz_stand_beside_the_metrics(tiny: Path) -> None:
    with serving(tiny) as live:
        metrics = live.server.metrics.address
        assert metrics is not None
        assert get(metrics, "/livez") == get(metrics, "/readyz") == (200, "ok\n")
        assert get(metrics, "/metrics")[0] == 200
        stuck = threading.Event()
        live.loop.call_soon_threadsafe(stuck.wait, 3)
        assert get(metrics, "/livez") == (503, "no\n"), "a loop that hangs does not live"
        stuck.set()
        assert get(metrics, "/livez")[0] == 200

        async def drain() -> None:
            await live.server.drain()

        asyncio.run_coroutine_threadsafe(drain(), live.loop).result(10)
        assert [get(metrics, path)[0] for path in ("/livez", "/readyz")] == [200, 503]


def test_metrics_and_probes_name_no_caller_and_no_request(tiny: Path) -> None:
    with serving(tiny) as live, Client(live.address) as client:
        client.complete("a secret prompt", max_tokens=1, request_id="telling")
        assert live.server.metrics.address is not None
        text = get(live.server.metrics.address, "/metrics")[1]
        assert "secret" not in text
        assert "telling" not in text
