"""Metrics of introspection: a scrape says exactly what clients asked and got, and what it cost."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from cutaway.v1 import capture_pb2, machine_pb2
from cutaway.v1 import introspection_pb2 as inside
from cutaway.v1.inference_pb2_grpc import InferenceStub
from cutaway_server import errors
from cutaway_server.config import Config
from cutaway_server.service import status
from cutaway_server.service.metrics.inspections import RPCS, Inspections, reason_of
from cutaway_server.service.server import Server
from inspecting import SERVICE, Seen, capture, doubled, looking
from scraping import Scrape, scrape
from secured import write_keys
from serving import LiveServer, asking, eventually, serving, stub
from tiny import save_tiny

PROMPT = list(range(40, 75))
LENS = capture_pb2.Lens(top_k=3)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    save_tiny("llama", path)
    return path


@pytest.fixture
def live(tiny: Path) -> Iterator[LiveServer]:
    with serving(tiny, max_batch_tokens=24, max_running=16) as live:
        yield live


@pytest.fixture
def channel(live: LiveServer) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(live.address) as channel:
        yield channel


def settled(live: LiveServer) -> Scrape:
    """A scrape once every call is over: clients hear of the end before the server has closed the stream."""

    def over() -> bool:
        now = scrape(live.server.metrics.address)
        ended = sum(s.value for s in now.samples if s.name == "cutaway_introspection_request_seconds_count")
        begun = sum(now.by("cutaway_introspection_requests_total", "rpc").values())
        return live.is_clean() and not now.by("cutaway_grpc_streams_open", "method") and ended == begun

    assert eventually(over)
    return scrape(live.server.metrics.address)


def every_call(seen: Seen, channel: grpc.Channel, prompt: list[int]) -> None:
    """Each RPC that ends by itself, with captures of every shape."""
    wide = [capture("blocks.*.hook_resid_post"), capture("logits", dtype="F16"), capture("blocks.1.attn.hook_z")]
    small = [capture("blocks.*.attn.hook_pattern", top_k=capture_pb2.TopK(k=3)), capture("blocks.0.mlp.hook_post")]
    for rpc, request in (
        ("ListPoints", None),
        ("Estimate", inside.EstimateRequest(generate=looking(prompt, *wide, max_tokens=5))),
        ("Trace", inside.TraceRequest(generate=looking(prompt, *wide, max_tokens=5, n=2))),
        ("Trace", inside.TraceRequest(generate=looking(prompt, *small, max_tokens=0))),
        ("GetHiddenStates", inside.GetHiddenStatesRequest(generate=looking(prompt, max_tokens=0))),
        ("GetAttention", inside.GetAttentionRequest(generate=looking(prompt, max_tokens=3), top_k=2)),
        ("LogitLens", inside.LogitLensRequest(generate=looking(prompt, max_tokens=0), lens=LENS)),
        ("PredictCacheHit", machine_pb2.PredictCacheHitRequest(generate=asking(prompt))),
        ("GetCacheStats", None),
        ("GetBlocks", None),
        ("ListRequests", None),
    ):
        messages = seen.call(channel, rpc, request)
        assert messages, rpc
        if rpc == "Trace" and request.generate.sampling.max_tokens:  # a prompt alone is not kept
            name = messages[0].event.started.request_id
            seen.call(channel, "ReadCache", machine_pb2.ReadCacheRequest(request_id=name))


def test_counters_are_the_bytes_rows_and_calls_that_the_clients_saw(live: LiveServer) -> None:
    """Four clients at once, so that steps have rows of several requests; a step has 24 rows at most."""
    parts = [Seen() for _ in range(4)]
    with ThreadPoolExecutor(4) as pool, grpc.insecure_channel(live.address) as channel, stub(live.address) as client:
        list(pool.map(lambda i: every_call(parts[i], channel, list(range(40 + i, 75 + 3 * i))), range(4)))
        asked = looking(PROMPT, capture("blocks.*.hook_resid_pre"), max_tokens=4)
        parts[0].take(client.Generate(asked))
    now = settled(live)
    for metric, field in (
        ("requests_total", "begun"), ("received_bytes_total", "asked_bytes"), ("sent_bytes_total", "answered_bytes"),
        ("request_seconds_count", "begun"),
    ):  # fmt: skip
        expected = sum((getattr(part, field) for part in parts[1:]), getattr(parts[0], field))
        assert now.by(f"cutaway_introspection_{metric}", "rpc") == dict(expected), metric
    assert now("cutaway_captured_rows_total") == sum(part.captured_rows for part in parts) > 1000
    assert now("cutaway_captured_bytes_total") == sum(part.captured_bytes for part in parts) > 500_000
    usages = [usage for part in parts for usage in part.usages]
    assert now("cutaway_requests_finished_total", reason="length") == len(usages)
    assert now("cutaway_generation_tokens_total") == sum(usage.completion_tokens for usage in usages)
    assert now.by("cutaway_introspection_refused_total", "reason") == {}


def test_watches_are_counted_as_open_and_by_what_they_were_sent(live: LiveServer, channel: grpc.Channel) -> None:
    sizes: list[int] = []

    def arrived(data: bytes) -> bytes:
        sizes.append(len(data))
        return data

    watch = channel.unary_stream(f"/{SERVICE.full_name}/WatchSteps", response_deserializer=arrived)(b"")
    next(watch)
    watching = threading.Thread(target=until_the_end, args=(watch,))
    watching.start()
    with stub(live.address) as client:
        list(client.Generate(asking(PROMPT, max_tokens=6)))
    now = scrape(live.server.metrics.address)
    assert now("cutaway_grpc_streams_open", method=f"/{SERVICE.full_name}/WatchSteps") == 1
    assert now("cutaway_introspection_request_seconds_count", rpc="WatchSteps") == 0

    def told() -> float:
        return scrape(live.server.metrics.address)("cutaway_introspection_sent_bytes_total", rpc="WatchSteps")

    assert eventually(lambda: len(sizes) > 3 and told() == sum(sizes))
    watch.cancel()
    watching.join(10)
    now = settled(live)
    assert now("cutaway_introspection_request_seconds_count", rpc="WatchSteps") == 1
    assert now("cutaway_introspection_sent_bytes_total", rpc="WatchSteps") == sum(sizes)


def until_the_end(call: Any) -> None:
    with pytest.raises(grpc.RpcError):
        list(call)


def test_steps_are_told_apart_by_whether_they_are_read_changed_or_both(live: LiveServer) -> None:
    """35 rows of a prompt are two steps of at most 24; the edits are in the second."""
    last = capture("logits", positions=capture_pb2.Positions(list=[-1]))
    everywhere = capture("blocks.0.hook_resid_post")
    edit = doubled("blocks.1.hook_resid_post", 30)
    steps = []
    with stub(live.address) as client:
        for asked in (
            looking(PROMPT, max_tokens=4),
            looking(PROMPT, everywhere, max_tokens=4),
            looking(PROMPT, edits=[edit], max_tokens=4),
            looking(PROMPT, last, edits=[edit], max_tokens=4),
            looking(PROMPT, everywhere, edits=[edit], max_tokens=4),
        ):  # fmt: skip
            asked.prefix_caching = False
            list(client.Generate(asked))
            now = settled(live)
            steps.append(now.by("cutaway_introspection_steps_total", "what"))
    assert now("cutaway_steps_total") == 5 * 5
    assert steps[0] == {}, "a request that only generates"
    assert steps[1] == {"captures": 5}
    assert steps[2] == {"captures": 5, "edits": 1}
    assert steps[3] == {"captures": 5, "edits": 1, "both": 1}
    assert steps[4] == {"captures": 9, "edits": 1, "both": 2}
    assert now("cutaway_captured_rows_total") == 38 + 1 + 38
    seconds = now.by("cutaway_introspection_step_seconds_total", "what")
    phases = now.by("cutaway_step_duration_seconds_sum", "phase")
    assert seconds.keys() == steps[4].keys()
    assert now("cutaway_captured_seconds_total") < sum(seconds.values()) < sum(phases.values())
    assert 0 < now("cutaway_captured_seconds_total") < phases["sample"]


def code_of(call: Any) -> grpc.StatusCode:
    with pytest.raises(grpc.RpcError) as raised:
        list(call())
    return raised.value.code()


def test_each_refusal_is_counted_once_by_its_reason(tiny: Path, tmp_path: Path) -> None:
    everyone = {"all": (["generate", "introspect", "observe"], "t"), "g": (["generate"], "t")}
    keys = write_keys(tmp_path / "keys.toml", everyone)
    limits = {"max_capture_bytes": 2**18, "capture_memory": 2**17, "api_keys": str(tmp_path / "keys.toml")}
    seen, known, unread = Seen(), ("authorization", f"Bearer {keys['all']}"), ("authorization", f"Bearer {keys['g']}")
    much, more = (capture("logits", positions=capture_pb2.Positions(list=range(n))) for n in (100, 250))
    prompt = [40 + i % 400 for i in range(300)]
    with (
        serving(tiny, **limits) as live,
        grpc.insecure_channel(live.address) as channel,
        stub(live.address) as client,
    ):

        def trace(*captures: Any, who: Any = known) -> Any:
            request = inside.TraceRequest(generate=looking(prompt, *captures, max_tokens=0))
            return lambda: seen.call(channel, "Trace", request, *who and [who])

        def generate(*captures: Any, who: Any = known) -> Any:
            return lambda: client.Generate(looking(prompt, *captures, max_tokens=1), metadata=[who])

        absent = machine_pb2.ReadCacheRequest(request_id="nobody")
        assert code_of(trace(capture("no.such.point"))) is grpc.StatusCode.INVALID_ARGUMENT
        assert code_of(trace(more)) is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert code_of(trace(much)) is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert code_of(trace(who=unread)) is grpc.StatusCode.PERMISSION_DENIED
        assert code_of(trace(who=())) is grpc.StatusCode.UNAUTHENTICATED
        assert code_of(lambda: seen.call(channel, "ListPoints")) is grpc.StatusCode.UNAUTHENTICATED
        assert code_of(lambda: seen.call(channel, "ReadCache", absent, known)) is grpc.StatusCode.NOT_FOUND
        # Generate: what looks inside counts, and nothing else.
        assert code_of(generate(capture("no.such.point"))) is grpc.StatusCode.INVALID_ARGUMENT
        assert code_of(generate(much, who=unread)) is grpc.StatusCode.PERMISSION_DENIED
        nonsense = asking(prompt, temperature=-1)
        assert code_of(lambda: client.Generate(nonsense, metadata=[known])) is grpc.StatusCode.INVALID_ARGUMENT
        now = settled(live)
    reasons = {"invalid": 2, "budget": 1, "memory": 1, "denied": 4, "missing": 1}
    assert now.by("cutaway_introspection_refused_total", "reason") == reasons
    assert now.by("cutaway_introspection_requests_total", "rpc") == dict(seen.begun)
    assert now("cutaway_captured_rows_total") == 0 == sum(seen.answered_bytes.values())
    assert now.by("cutaway_requests_failed_total", "code") == {"INVALID_ARGUMENT": 2, "PERMISSION_DENIED": 1}


def test_a_tenants_own_limit_on_captures_is_a_refusal_for_memory() -> None:
    full = errors.QueueFull("", 1.0, "captures")
    assert [reason_of(error) for error in (full, errors.QueueFull("", 1.0), ValueError(), None)] == [
        "memory", "busy", "internal", "internal",
    ]  # fmt: skip


def test_every_error_of_the_table_of_status_codes_has_a_reason_that_is_there_from_the_start() -> None:
    there = Inspections().refused
    ours = {errors.EngineFailed, errors.ModelError}
    for kind in status.CODES:
        reason = reason_of(kind.__new__(kind)) if kind is not errors.QueueFull else "busy"
        assert reason in there
        assert (reason == "internal") == (kind in ours), kind


def test_what_is_held_for_captures_is_told_until_it_is_given_back(tiny: Path) -> None:
    with serving(tiny, pace=0.01, capture_memory=2**22) as live, stub(live.address) as client:
        after = capture_pb2.Positions(spans=[capture_pb2.PositionSpan(region=capture_pb2.REGION_GENERATED)])
        call = client.Generate(looking(PROMPT, capture("logits", positions=after), max_tokens=200))
        next(call)
        now = scrape(live.server.metrics.address)
        held = 199 * 4 * 512  # a row less than tokens, of F32 for each word of the vocabulary
        assert now("cutaway_capture_memory_bytes", state="held") == held
        assert now("cutaway_capture_memory_bytes", state="free") == 2**22 - held
        call.cancel()
        now = settled(live)
        assert now("cutaway_capture_memory_bytes", state="held") == 0


def test_kept_requests_are_told_as_the_cache_tells_them(live: LiveServer, channel: grpc.Channel) -> None:
    with stub(live.address) as client:
        for i in range(3):
            list(client.Generate(asking(list(range(40 + i, 80)), max_tokens=4)))
    now = settled(live)
    [told] = Seen().call(channel, "GetCacheStats")
    assert now("cutaway_retained_requests") == told.requests_retained == 3
    assert now("cutaway_retained_bytes") == told.blocks_retained * told.block_bytes > 0


def test_what_the_server_captures_for_its_own_answer_is_cost_too(live: LiveServer, channel: grpc.Channel) -> None:
    seen = Seen()
    [told] = seen.call(channel, "SelfCheck", inside.SelfCheckRequest(generate=asking(PROMPT)))
    assert told.holds
    now = settled(live)
    assert now.by("cutaway_introspection_sent_bytes_total", "rpc") == dict(seen.answered_bytes)
    assert now("cutaway_captured_rows_total") % len(PROMPT) == 0
    assert now("cutaway_captured_bytes_total") > now("cutaway_captured_rows_total") > 0


def test_before_a_model_is_loaded_calls_are_counted_and_refused_as_unavailable() -> None:
    async def refused() -> Scrape:
        server = Server(Config(listen="127.0.0.1:0", metrics_listen="127.0.0.1:0"))
        address = await server.listen()
        try:
            async with grpc.aio.insecure_channel(address) as channel:
                with pytest.raises(grpc.RpcError):
                    await channel.unary_unary(f"/{SERVICE.full_name}/ListPoints")(b"")
                for asked in (looking(PROMPT, capture("logits")), asking(PROMPT)):
                    with pytest.raises(grpc.RpcError):
                        await InferenceStub(channel).Generate(asked).read()
            return await asyncio.to_thread(scrape, server.metrics.address)
        finally:
            await server.stop()

    now = asyncio.run(refused())
    assert now.by("cutaway_introspection_requests_total", "rpc") == {"ListPoints": 1}
    assert now.by("cutaway_introspection_refused_total", "reason") == {"unavailable": 2}
    assert {s.labels["rpc"] for s in now.samples if s.name == "cutaway_introspection_requests_total"} == set(
        RPCS.values()
    )
