"""Who may call what, on a real server with TLS: every method, every scope, every way to be nobody."""

from __future__ import annotations

import importlib
import pkgutil
import re
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cutaway.v1
import grpc
import pytest
from certificates import Authority
from cutaway import Capture, Client, NotFound, PermissionDenied, QueueFull, Unauthenticated
from cutaway.v1 import inference_pb2 as v1
from cutaway_server import errors
from cutaway_server.service.access import KNOWN, METHODS
from cutaway_server.service.caller import Caller
from cutaway_server.service.credentials import digest, new_key
from cutaway_server.service.quotas import Quotas
from google.protobuf.descriptor_pool import Default
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from secured import DENIED, EVERY_SCOPE, bearer, outcome, write_keys
from serving import asking, eventually, program, serving
from tiny import save_tiny

UNAUTHENTICATED, PERMISSION_DENIED = DENIED
GENERATE = v1.GenerateRequest(text="Hi", sampling=v1.SamplingParams(max_tokens=1)).SerializeToString()
# Written by hand, not read from the table under test: what each scope opens.
ALL_MAY = {
    "/cutaway.v1.Inference/GetModel",
    "/grpc.health.v1.Health/Check",
    "/grpc.health.v1.Health/List",
    "/grpc.health.v1.Health/Watch",
    "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
}
GENERATORS_MAY = {f"/cutaway.v1.Inference/{name}" for name in ("Generate", "Abort")}
BOTH_MAY = {f"/cutaway.v1.Inference/{name}" for name in ("Tokenize", "Detokenize")}
LOW = new_key()
INTROSPECTION = "/cutaway.v1.Introspection/"
OBSERVERS_MAY = {
    INTROSPECTION + name for name in ("GetCacheStats", "GetBlocks", "WatchCache", "WatchSteps", "ListRequests")
}
LOOKERS_MAY = {
    INTROSPECTION + name
    for name in (
        "ListPoints",
        "Trace",
        "GetHiddenStates",
        "GetAttention",
        "LogitLens",
        "SelfCheck",
        "Estimate",
        "Attribution",
        "ReadCache",
        "ReplaySample",
    )
}
MAY = {
    **dict.fromkeys(ALL_MAY, EVERY_SCOPE),
    **dict.fromkeys(GENERATORS_MAY, ("generate",)),
    **dict.fromkeys(BOTH_MAY, ("generate", "introspect")),
    **dict.fromkeys(OBSERVERS_MAY, ("observe",)),
    INTROSPECTION + "PredictCacheHit": ("generate", "observe"),
    **dict.fromkeys(LOOKERS_MAY, ("introspect",)),
    INTROSPECTION + "Fork": ("generate",),
    **{INTROSPECTION + name: ("weights",) for name in ("GetWeights", "GetNearestTokens")},
    **{INTROSPECTION + name: ("edit", "introspect") for name in ("PutVectors", "ListVectors", "DeleteVectors")},
}
METHODS_BY_HAND = sorted(MAY)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    save_tiny("llama", path)
    return path


@pytest.fixture(scope="module")
def secured(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """A server that asks for a certificate of its authority, and for a key or a name that it knows."""
    directory = tmp_path_factory.mktemp("security")
    authority = Authority(directory)
    server = authority.sign("server")
    named = '\n[[certificate]]\nname = "gateway.test"\nscopes = ["generate"]\ntenant = "g"\n'
    keys = write_keys(directory / "keys.toml", {scope: ([scope], "t") for scope in EVERY_SCOPE}, named)
    files = {"tls_cert": server.cert, "tls_key": server.key, "tls_client_ca": authority.file}
    with serving(tiny, api_keys=str(directory / "keys.toml"), **files) as live:
        yield SimpleNamespace(live=live, keys=keys, authority=authority)


def channel_of(secured: SimpleNamespace, name: str = "nobody", **settings: Any) -> grpc.Channel:
    pair = secured.authority.sign(f"client-{name}", name, sans=(), **settings)
    read = [Path(file).read_bytes() for file in (secured.authority.file, pair.key, pair.cert)]
    return grpc.secure_channel(secured.live.address, grpc.ssl_channel_credentials(*read))


def test_every_method_that_is_served_is_in_the_table_and_no_other(secured: SimpleNamespace) -> None:
    with channel_of(secured) as channel:
        with_key = grpc.intercept_channel(channel, WithKey(secured.keys["observe"]))
        served = ProtoReflectionDescriptorDatabase(with_key).get_services()
    methods = {f"/{name}/{method.name}" for name in served for method in Default().FindServiceByName(name).methods}
    assert methods == set(METHODS)
    assert sorted(methods) == METHODS_BY_HAND, "what a new method needs is written here, too"


def test_every_method_of_the_contract_has_a_scope_before_it_is_served() -> None:
    names = [module.name for module in pkgutil.iter_modules(cutaway.v1.__path__) if module.name.endswith("_pb2")]
    files = [importlib.import_module(f"cutaway.v1.{name}").DESCRIPTOR for name in names]
    services = [service for file in files for service in file.services_by_name.values()]
    methods = {f"/{service.full_name}/{method.name}" for service in services for method in service.methods}
    assert "/cutaway.v1.Inference/Generate" in methods
    assert methods <= set(METHODS), "service/access.py: which scope opens it?"
    assert all(METHODS[method] and METHODS[method] <= set(EVERY_SCOPE) for method in methods)


def test_the_page_on_security_tells_what_each_scope_opens() -> None:
    page = (Path(__file__).parents[1] / "docs" / "security.md").read_text()
    rows = dict(re.findall(r"^\| `?(\w+)`? \| (.*?) \|", page[page.index("## Scopes") :], re.MULTILINE))
    for scope in ("any", *EVERY_SCOPE):
        told = set(re.findall(r"`(\w+/\w+)`", rows[scope]))
        opened = {
            method.split(".")[-1]
            for method, scopes in METHODS.items()
            if (scopes == KNOWN if scope == "any" else scope in scopes < KNOWN)
        }
        assert told == opened, scope


class WithKey(grpc.StreamStreamClientInterceptor):  # type: ignore[misc]
    def __init__(self, key: str) -> None:
        self.key = key

    def intercept_stream_stream(self, continuation: Any, details: Any, requests: Any) -> Any:
        return continuation(details._replace(metadata=bearer(self.key)), requests)


@pytest.mark.parametrize("scope", EVERY_SCOPE)
def test_a_scope_opens_its_methods_and_no_others(secured: SimpleNamespace, scope: str) -> None:
    with channel_of(secured) as channel:
        for method in METHODS_BY_HAND:
            message = GENERATE if method.endswith("/Generate") else b""
            code, details = outcome(channel, method, bearer(secured.keys[scope]), message)
            may = scope in MAY[method]
            assert (code not in DENIED) == may, (method, code)
            if not may:
                assert code is PERMISSION_DENIED
                assert details == f"{method} asks for scope {' or '.join(MAY[method])}, and {scope!r} has {scope}"


def test_who_is_not_known_may_call_nothing(secured: SimpleNamespace) -> None:
    key = secured.keys["generate"]
    wrong = [
        bearer(None),
        bearer(key[:-1] + ("A" if key[-1] != "A" else "B")),
        bearer(""),
        [("authorization", key)],
        [("authorization", f"Basic {key}")],
        [("api-key", key)],
        [*bearer(key), *bearer(key)],
    ]
    with channel_of(secured) as channel:
        for method in METHODS_BY_HAND:
            for metadata in wrong:
                code, details = outcome(channel, method, metadata)
                assert code is UNAUTHENTICATED, (method, metadata)
                assert key not in details
        assert outcome(channel, METHODS_BY_HAND[0], [("authorization", f"bearer  {key}")])[0] not in DENIED


def test_a_certificates_name_opens_what_its_entry_says(secured: SimpleNamespace) -> None:
    with channel_of(secured, "gateway.test") as channel:
        assert outcome(channel, "/cutaway.v1.Inference/Generate", message=GENERATE)[0] is grpc.StatusCode.OK
        wrong = bearer("cutaway_" + "A" * 43)
        assert outcome(channel, "/cutaway.v1.Inference/GetModel", wrong)[0] is UNAUTHENTICATED, "the key decides"
        observer = bearer(secured.keys["observe"])
        assert outcome(channel, "/cutaway.v1.Inference/Generate", observer)[0] is PERMISSION_DENIED


def test_an_expired_or_foreign_certificate_or_none_opens_nothing(secured: SimpleNamespace, tmp_path: Path) -> None:
    stranger = Authority(tmp_path, "stranger").sign("client", "gateway.test")
    ours = Path(secured.authority.file).read_bytes()
    foreign = grpc.ssl_channel_credentials(ours, Path(stranger.key).read_bytes(), Path(stranger.cert).read_bytes())
    for channel in (
        channel_of(secured, "gateway.test", days=-1),
        grpc.secure_channel(secured.live.address, foreign),
        grpc.secure_channel(secured.live.address, grpc.ssl_channel_credentials(ours)),
        grpc.insecure_channel(secured.live.address),
    ):
        with channel:
            for method in METHODS_BY_HAND:
                code, _ = outcome(channel, method, bearer(secured.keys["generate"]))
                assert code is grpc.StatusCode.UNAVAILABLE, method


def test_a_method_that_is_not_served_is_unimplemented_for_who_is_known_only(secured: SimpleNamespace) -> None:
    with channel_of(secured) as channel:
        for method in ("/cutaway.v1.Inference/Obey", "/grpc.reflection.v2.ServerReflection/ServerReflectionInfo"):
            assert outcome(channel, method, bearer("cutaway_guess"))[0] is UNAUTHENTICATED
            assert outcome(channel, method, bearer(secured.keys["admin"]))[0] is grpc.StatusCode.UNIMPLEMENTED


def test_a_served_method_in_no_table_is_denied_to_every_scope(tiny: Path, tmp_path: Path) -> None:
    keys = write_keys(tmp_path / "keys.toml", {"all": (EVERY_SCOPE, "t")})

    async def backdoor(request: bytes, context: Any) -> bytes:
        return b"open"

    with serving(tiny, api_keys=str(tmp_path / "keys.toml")) as live:
        handler = grpc.unary_unary_rpc_method_handler(backdoor)  # type: ignore[arg-type]
        added = grpc.method_handlers_generic_handler("cutaway.v1.Backdoor", {"Open": handler})
        live.server._grpc.add_generic_rpc_handlers([added])
        with grpc.insecure_channel(live.address) as channel:
            code, details = outcome(channel, "/cutaway.v1.Backdoor/Open", bearer(keys["all"]))
            assert (code, details) == (PERMISSION_DENIED, "/cutaway.v1.Backdoor/Open is open to no scope")


def test_a_message_is_not_read_before_its_sender_is_known(tiny: Path, tmp_path: Path) -> None:
    write_keys(tmp_path / "keys.toml", {})
    with (
        serving(tiny, api_keys=str(tmp_path / "keys.toml")) as live,
        grpc.insecure_channel(live.address) as channel,
    ):
        never = threading.Event()

        def silent() -> Iterator[bytes]:
            never.wait(20)
            yield b""

        call: Any = channel.stream_stream("/cutaway.v1.Inference/Generate")(silent(), timeout=10)
        assert call.code() is UNAUTHENTICATED
        never.set()


def test_the_client_says_what_is_missing(tiny: Path, tmp_path: Path) -> None:
    keys = write_keys(tmp_path / "keys.toml", {"eye": (["observe"], "t")})
    with serving(tiny, api_keys=str(tmp_path / "keys.toml")) as live:
        with Client(live.address) as client, pytest.raises(Unauthenticated, match="asks for an API key"):
            client.model()
        with Client(live.address, api_key=keys["eye"]) as client:
            assert client.model().architecture.n_layers == 3
            assert client.health().name == "SERVING"
            with pytest.raises(PermissionDenied, match="asks for scope generate, and 'eye' has observe"):
                client.complete("Hi")


def test_a_tenants_calls_are_counted_and_given_back_and_other_tenants_have_their_own(
    tiny: Path, tmp_path: Path
) -> None:
    limit = '[[tenant]]\nname = "small"\nmax_calls = 2\n'
    keys = write_keys(
        tmp_path / "keys.toml",
        {"a": (["generate"], "small"), "b": (["generate"], "small"), "c": (["generate"], "free")},
        limit,
    )
    with (
        serving(tiny, api_keys=str(tmp_path / "keys.toml"), pace=0.01) as live,
        Client(live.address, api_key=keys["a"]) as a,
        Client(live.address, api_key=keys["b"]) as b,
        Client(live.address, api_key=keys["c"]) as c,
    ):
        streams = [a.generate("Hi", ignore_eos=True), b.generate("Hi", ignore_eos=True)]
        for stream in streams:
            next(stream)
        with pytest.raises(
            QueueFull, match=r"^2 calls of tenant 'small' are open, 1 more are asked for, and 2 may be"
        ) as raised:
            b.tokenize("Hi")
        assert raised.value.retry_after == 1.0
        assert c.complete("Hi", max_tokens=2, ignore_eos=True).usage.completion_tokens == 2
        for stream in streams:
            stream.close()
        assert eventually(live.is_clean)
        assert b.tokenize("Hi").ids


def test_bytes_of_captures_are_held_for_a_tenant_and_given_back() -> None:
    quotas = Quotas()
    one, two = (Caller(name, "key", "t", frozenset(), max_capture_bytes=100) for name in ("one", "two"))
    free = Caller("free", "key", "other", frozenset())
    with quotas.captures(one, 70):
        told = r"^70 bytes of captures are held for tenant 't', 31 more"
        with pytest.raises(errors.QueueFull, match=told) as raised, quotas.captures(two, 31):
            pass
        assert raised.value.retry_after_seconds > 0
        with quotas.captures(two, 30), quotas.captures(free, 10**12):
            pass
    with pytest.raises(ZeroDivisionError), quotas.captures(two, 100):
        _ = 1 // 0
    with quotas.captures(one, 100):
        pass


def test_what_captures_may_come_to_counts_for_the_tenant_once_and_is_given_back(tiny: Path, tmp_path: Path) -> None:
    file, scopes = tmp_path / "keys.toml", ["generate", "introspect"]
    keys = write_keys(file, {"one": (scopes, "t"), "other": (scopes, "free")})
    asked = {"captures": [Capture("blocks.1.hook_resid_post")], "ignore_eos": True}
    with (
        serving(tiny, api_keys=str(file), pace=0.005) as live,
        Client(live.address, api_key=keys["one"]) as one,
        Client(live.address, api_key=keys["other"]) as other,
    ):
        size = one.estimate("Hi", points=["blocks.1.hook_resid_post"], max_tokens=100).bytes
        write_keys(file, {"one": (scopes, "t"), "other": (scopes, "free")}, limit_of(size), keys)
        live.loop.call_soon_threadsafe(live.server.reload)
        first = one.generate("Hi", max_tokens=100, **asked)
        next(first)
        with pytest.raises(QueueFull, match=f"^{size} bytes of captures are held for tenant 't', .* {size} may be"):
            one.complete("Hi", max_tokens=1, **asked)
        assert other.complete("Hi", max_tokens=100, **asked).token_ids
        list(first)
        assert one.complete("Hi", max_tokens=100, **asked).token_ids


def limit_of(size: int) -> str:
    return f'[[tenant]]\nname = "t"\nmax_capture_bytes = {size}\n'


def test_a_key_of_more_priority_takes_a_place_and_who_had_it_goes_on_as_if_nothing_had_been(
    tiny: Path, tmp_path: Path
) -> None:
    later = f'priority = 5\n[[key]]\nname = "low"\nsha256 = "{digest(LOW)}"\nscopes = ["generate"]\ntenant = "t"\n'
    keys = write_keys(tmp_path / "keys.toml", {"high": (["generate"], "t")}, later)
    with (
        serving(tiny, api_keys=str(tmp_path / "keys.toml"), pace=0.005, max_running=1) as live,
        Client(live.address, api_key=LOW) as low,
        Client(live.address, api_key=keys["high"]) as high,
    ):
        asked = {"max_tokens": 200, "ignore_eos": True, "temperature": 0}
        alone = low.complete("Hello", **asked).token_ids
        stream = low.generate("Hello", **asked)
        begun = [next(stream).id]
        assert len(high.complete("Hi", max_tokens=5, ignore_eos=True).token_ids) == 5
        assert stream.completions is None, "it has not ended before"
        assert begun + [token.id for token in stream] == list(alone)
        assert stream.answer().timings.preemptions == 1


def test_sighup_reads_the_keys_again_and_cuts_no_stream(tiny: Path, tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    keys = write_keys(file, {"old": (["generate"], "t")})
    options = ("--model", str(tiny), "--api-keys", str(file))
    unhurried = "import time\nfrom cutaway_server.engine.engine import Engine\nstep = Engine.step\n"
    unhurried += "Engine.step = lambda engine: (time.sleep(0.005), step(engine))[1]"
    with program(*options, code=unhurried) as (address, process), Client(address, api_key=keys["old"]) as old:
        stream = old.generate("Hi", max_tokens=150, ignore_eos=True)
        next(stream)
        keys |= write_keys(file, {"new": (["generate"], "t")})
        process.send_signal(signal.SIGHUP)

        def is_shut() -> bool:
            try:
                old.tokenize("Hi")
            except Unauthenticated:
                return True
            return False

        assert eventually(is_shut)
        with Client(address, api_key=keys["new"]) as new:
            assert new.tokenize("Hi").ids
        assert len(list(stream)) == 149
        file.write_text("broken")
        process.send_signal(signal.SIGHUP)
        with Client(address, api_key=keys["new"]) as new:
            assert new.tokenize("Hi").ids, "a broken file changes nothing"
        assert process.poll() is None


def test_requests_are_names_of_a_tenants_own(tiny: Path, tmp_path: Path) -> None:
    keys = write_keys(tmp_path / "keys.toml", {"a": (["generate"], "a"), "b": (["generate"], "b")})
    with (
        serving(tiny, api_keys=str(tmp_path / "keys.toml"), pace=0.005) as live,
        Client(live.address, api_key=keys["a"]) as a,
        Client(live.address, api_key=keys["b"]) as b,
    ):
        mine = a.generate("Hi", request_id="one", ignore_eos=True)
        next(mine)
        for guess in ("one", "a/one"):
            with pytest.raises(NotFound, match=f"no request '{guess}' is queued or running"):
                b.abort(guess)
        theirs = b.generate("Hi", request_id="one", ignore_eos=True, max_tokens=3)
        assert len(list(theirs)) == 3, "the name is not taken for them"
        assert theirs.started is not None
        assert theirs.started.request_id == "one"
        a.abort("one")
        list(mine)
        assert mine.answer().finish_reason == "abort"
        assert eventually(live.is_clean)


def test_without_credentials_the_server_asks_nobody(tiny: Path) -> None:
    with serving(tiny) as live, Client(live.address, api_key="cutaway_whatever") as client:
        assert client.complete("Hi", max_tokens=1).request_id


def test_a_prompts_pages_are_its_tenants(tiny: Path, tmp_path: Path) -> None:
    keys = write_keys(
        tmp_path / "keys.toml", {"a": (["generate"], "t"), "b": (["generate"], "t"), "c": (["generate"], "other")}
    )
    prompt = list(range(40, 104))
    with serving(tiny, api_keys=str(tmp_path / "keys.toml")) as live:
        cached = {}
        for name in ("a", "b", "c"):
            with Client(live.address, api_key=keys[name]) as client:
                answer = client.complete(token_ids=prompt, max_tokens=1)
                cached[name] = answer.usage.cached_tokens
        assert cached == {"a": 0, "b": 64, "c": 0}


def test_the_foreign_client_needs_a_key_too(tiny: Path, tmp_path: Path) -> None:
    """gRPC's own way to send a token, as other languages' clients do."""
    authority = Authority(tmp_path)
    server = authority.sign("server")
    keys = write_keys(tmp_path / "keys.toml", {"a": (["generate"], "t")})
    with serving(tiny, api_keys=str(tmp_path / "keys.toml"), tls_cert=server.cert, tls_key=server.key) as live:
        tls = grpc.ssl_channel_credentials(Path(authority.file).read_bytes())
        token = grpc.access_token_call_credentials(keys["a"])
        with grpc.secure_channel(live.address, grpc.composite_channel_credentials(tls, token)) as channel:
            call: Any = channel.unary_stream("/cutaway.v1.Inference/Generate")
            assert len(list(call(asking("Hi", max_tokens=1).SerializeToString()))) >= 2
