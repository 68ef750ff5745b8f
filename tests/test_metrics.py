"""Metrics of a real server: what a scrape says is what its clients saw."""

from __future__ import annotations

import asyncio
import socket
import time
import urllib.error
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest
from cutaway.v1 import inference_pb2 as v1
from cutaway_server.__main__ import main
from cutaway_server.config import Config
from cutaway_server.request import CompletionEnded, FinishReason, RequestEnded, Sampled, Timings
from cutaway_server.service.metrics.listener import MAX_CONNECTIONS, HttpListener
from cutaway_server.service.server import Server
from engines import ask
from scraping import Scrape, fetch, scrape
from serving import LiveServer, asking, eventually, serving, stub, text_of
from tiny import save_tiny

PAGE = 16


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    save_tiny("llama", path)
    return path


@pytest.fixture
def live(tiny: Path) -> Iterator[LiveServer]:
    with serving(tiny, served_name="tiny", metrics_compat="vllm") as live:
        yield live


def scraped(live: LiveServer) -> Scrape:
    return scrape(live.server.metrics.address)


def settled(live: LiveServer) -> Scrape:
    """A scrape once nothing runs: clients hear of the end before the last stream is closed."""
    assert eventually(lambda: live.is_clean() and scraped(live)("cutaway_grpc_streams_open", method=GENERATE) == 0)
    return scraped(live)


GENERATE = "/cutaway.v1.Inference/Generate"


def usage_of(call: Any) -> v1.Usage:
    return next(r.finished.usage for r in call if r.WhichOneof("event") == "finished")


def code_of(call: Any) -> grpc.StatusCode:
    with pytest.raises(grpc.RpcError) as raised:
        list(call)
    return raised.value.code()


def test_tokens_requests_and_lengths_are_those_that_the_clients_saw(live: LiveServer) -> None:
    with stub(live.address) as client:
        questions = [asking(list(range(40, 60 + 9 * i)), max_tokens=5 + i, n=1 + i % 3) for i in range(12)]
        calls = [client.Generate(question) for question in questions]  # together
        usages = [usage_of(call) for call in calls]
        usages += [usage_of(client.Generate(question)) for question in questions[:6]]  # now from the cache
    now = settled(live)
    n = [q.sampling.n for q in questions + questions[:6]]
    prompt = sum(u.prompt_tokens for u in usages)
    cached = sum(u.cached_tokens for u in usages)
    generated = sum(u.completion_tokens for u in usages)
    assert cached > 0
    assert now("cutaway_requests_received_total") == 18
    assert now.by("cutaway_requests_finished_total", "reason") == {"length": 18}
    assert now.by("cutaway_completions_finished_total", "reason") == {"length": sum(n)}
    assert now("cutaway_prompt_tokens_total") == prompt == now("cutaway_prefix_cache_queries_total")
    assert now("cutaway_cached_tokens_total") == cached == now("cutaway_prefix_cache_hits_total")
    assert now("cutaway_generation_tokens_total") == generated
    assert now("cutaway_request_prompt_tokens_sum") == prompt
    assert now("cutaway_request_generation_tokens_sum") == generated
    assert now("cutaway_request_generation_tokens_count") == sum(n)
    assert now("cutaway_request_n_sum") == sum(n)
    assert now("cutaway_inter_token_seconds_count") == generated - sum(n)
    for once in ("time_to_first_token", "request_queue", "request_prefill", "request_decode", "request_duration"):
        assert now(f"cutaway_{once}_seconds_count") == 18, once
    assert now.by("cutaway_requests_failed_total", "code") == {}


def test_the_parts_of_a_request_add_up_to_what_its_client_was_told(live: LiveServer) -> None:
    with stub(live.address) as client:
        *_, last = client.Generate(asking(list(range(40, 90)), max_tokens=30))
    now, told = settled(live), last.finished.timings
    for name, seconds in (
        ("queue", told.queue_seconds),
        ("prefill", told.prefill_seconds),
        ("decode", told.decode_seconds),
    ):
        assert now(f"cutaway_request_{name}_seconds_sum") == pytest.approx(seconds, abs=0.02), name
    parts = [now(f"cutaway_request_{name}_seconds_sum") for name in ("queue", "prefill", "decode")]
    assert now("cutaway_request_duration_seconds_sum") == pytest.approx(sum(parts), abs=1e-9)
    assert now("cutaway_time_to_first_token_seconds_sum") == pytest.approx(parts[0] + parts[1], abs=1e-9)
    assert now("cutaway_inter_token_seconds_sum") == pytest.approx(parts[2], abs=1e-3)
    assert now("cutaway_time_per_output_token_seconds_sum") == pytest.approx(parts[2] / 29, abs=1e-9)


def test_steps_say_how_many_rows_they_had_and_where_their_time_went(live: LiveServer) -> None:
    with stub(live.address) as client:
        usage = usage_of(client.Generate(asking(list(range(40, 90)), max_tokens=30)))
    now = settled(live)
    assert now("cutaway_steps_total") == 30 == now("cutaway_step_sequences_count")
    assert now("cutaway_computed_tokens_total") == usage.prompt_tokens + 29 == now("cutaway_step_tokens_sum")
    phases = now.by("cutaway_step_duration_seconds_sum", "phase")
    assert list(phases) == ["schedule", "prepare", "forward", "sample", "report"]
    assert set(now.by("cutaway_step_duration_seconds_count", "phase").values()) == {30}
    assert sum(phases.values()) <= now("cutaway_request_inference_seconds_sum") + 0.05


def test_each_way_to_end_is_counted_as_what_it_is(tiny: Path) -> None:
    with serving(tiny, pace=0.01) as live, stub(live.address) as client:
        ids = list(range(40, 60))
        said = text_of(list(client.Generate(asking(ids, max_tokens=12))))
        list(client.Generate(asking(ids, max_tokens=100, stop=[said[2:5]])))
        call = client.Generate(asking(ids, max_tokens=400))
        next(call)
        call.cancel()
        call = client.Generate(asking(ids, max_tokens=400, ask_request_id="told"))
        next(call), next(call)
        client.Abort(v1.AbortRequest(request_id="told"))
        assert [r.finished for r in call][-1].completions[0].finish_reason == v1.FINISH_REASON_ABORT
        assert code_of(client.Generate(asking(ids, temperature=-1))) is grpc.StatusCode.INVALID_ARGUMENT
        for _ in range(3):
            late = client.Generate(asking(ids, max_tokens=400), timeout=0.3)
            assert code_of(late) is grpc.StatusCode.DEADLINE_EXCEEDED
        now = settled(live)
    ended = now.by("cutaway_requests_finished_total", "reason")
    assert (ended["length"], ended["stop"]) == (1, 1)
    assert ended["abort"] + ended.get("deadline", 0) == 5  # a deadline is seen by the engine or by gRPC first
    assert sum(now.by("cutaway_requests_cancelled_total", "phase").values()) == ended["abort"]
    assert now.by("cutaway_requests_cancelled_total", "phase")["decode"] >= 1
    failed = now.by("cutaway_requests_failed_total", "code")
    assert set(failed) == {"INVALID_ARGUMENT", "DEADLINE_EXCEEDED"}
    assert failed["INVALID_ARGUMENT"] == 1
    assert 1 <= failed["DEADLINE_EXCEEDED"] <= 3  # on a machine so busy that calls arrive late, some look cancelled


def test_what_runs_and_what_waits_is_told_while_it_does(tiny: Path) -> None:
    with serving(tiny, pace=0.05, max_running=2) as live, stub(live.address) as client:
        calls = [client.Generate(asking(list(range(40, 70)), max_tokens=300)) for _ in range(5)]
        assert eventually(lambda: scraped(live)("cutaway_requests_running") == 2)
        now = scraped(live)
        assert now("cutaway_grpc_streams_open", method=GENERATE) == 5
        assert now("cutaway_requests_waiting", reason="capacity") == 3
        blocks = {state: now("cutaway_kv_cache_blocks", state=state) for state in ("used", "cached", "free")}
        total = float(next(s for s in now.samples if s.name == "cutaway_cache_config_info").labels["num_blocks"])
        assert sum(blocks.values()) == total
        assert now("cutaway_kv_cache_usage_ratio") > 0
        assert 0 < now("cutaway_kv_cache_fragmentation_ratio") < 1
        for call in calls:
            call.cancel()
        now = settled(live)
        assert now("cutaway_requests_running") == 0 == now("cutaway_kv_cache_usage_ratio")
        assert now.by("cutaway_requests_cancelled_total", "phase")["queued"] >= 3
        assert live.engine.observed.watched == 0


def test_preemptions_and_evictions_are_counted(tiny: Path) -> None:
    with serving(tiny, kv_cache_memory=42 * 12288) as live, stub(live.address) as client:  # 41 blocks
        calls = [client.Generate(asking(list(range(40 + i, 140 + i)), max_tokens=200)) for i in range(4)]
        told = sum(list(call)[-1].finished.timings.preemptions for call in calls)
        now = settled(live)
    assert now("cutaway_preemptions_total") == told > 0
    assert now("cutaway_computed_tokens_total") > now("cutaway_prompt_tokens_total")
    evicted = now("cutaway_kv_cache_evictions_total")
    assert now("cutaway_kv_block_lifetime_seconds_count") == evicted > 0
    idle = now("cutaway_kv_block_idle_before_eviction_seconds_sum")
    assert 0 <= idle <= now("cutaway_kv_block_lifetime_seconds_sum")


def test_vllms_names_have_the_same_values(live: LiveServer) -> None:
    with stub(live.address) as client:
        for _ in range(2):
            list(client.Generate(asking(list(range(40, 90)), max_tokens=10)))
    now = settled(live)
    for ours, theirs in (
        ("cutaway_prompt_tokens_total", "vllm:prompt_tokens_total"),
        ("cutaway_generation_tokens_total", "vllm:generation_tokens_total"),
        ("cutaway_prefix_cache_hits_total", "vllm:prefix_cache_hits_total"),
        ("cutaway_time_to_first_token_seconds_sum", "vllm:time_to_first_token_seconds_sum"),
        ("cutaway_inter_token_seconds_count", "vllm:inter_token_latency_seconds_count"),
        ("cutaway_request_duration_seconds_sum", "vllm:e2e_request_latency_seconds_sum"),
        ("cutaway_step_tokens_sum", "vllm:iteration_tokens_total_sum"),
    ):
        assert now(theirs) == now(ours) > 0, theirs
    assert now("vllm:request_success_total", finished_reason="length") == 2
    assert now("vllm:num_requests_waiting") == 0 == now("vllm:num_requests_running") == now("vllm:kv_cache_usage_perc")
    for edge in ("0.01", "0.025", "0.075", "2.5"):  # what dashboards made for vLLM ask for
        assert now("vllm:inter_token_latency_seconds_bucket", le=edge) >= 0
    assert now("vllm:cache_config_info", block_size="16") == 1


def test_vllms_names_are_there_only_if_asked_for(tiny: Path) -> None:
    with serving(tiny) as live:
        assert not [name for name in scraped(live).series if name.startswith("vllm")]


def test_weights_and_pool_are_counted_where_they_lie(tiny: Path) -> None:
    with serving(tiny, kernels="reference") as live:
        now = scraped(live)
        pages = live.engine.pages
    tensors = 512 * 64 * 2 + 3 * (64 * 128 + 64 * 64 + 64 * 224 + 112 * 64) + 3 * 2 * 64 + 64
    tables = now("cutaway_weights_bytes") - 4 * tensors
    assert 0 <= tables < 1000, "frequencies of the rotations, and nothing else"
    assert now("cutaway_kv_pool_bytes") == pages.keys.nbytes + pages.values.nbytes


@pytest.mark.gpu
def test_a_gpus_memory_is_told(tiny: Path) -> None:
    with serving(tiny, device="cuda") as live, stub(live.address) as client:
        list(client.Generate(asking(list(range(40, 90)), max_tokens=5)))
        now = scraped(live)
    held = now("cutaway_weights_bytes") + now("cutaway_kv_pool_bytes")
    assert held <= now("cutaway_torch_allocated_bytes") <= now("cutaway_torch_reserved_bytes")
    assert now("cutaway_torch_reserved_bytes") <= now("cutaway_gpu_memory_bytes", state="used")
    assert now("cutaway_gpu_memory_bytes", state="free") == pytest.approx(
        now("cutaway_memory_available_bytes"), rel=0.05
    )
    assert now("cutaway_activations_peak_bytes") > 0


def test_ten_thousand_requests_do_not_make_a_scrape_slow(live: LiveServer) -> None:
    """The engine's own events, so that it takes a second; test_prometheus.py has real requests."""
    observed = live.engine.observed
    for i in range(10_000):
        request = ask(f"r{i}", tuple(range(20)))
        observed.arrived(request)
        observed.started(request, 16, looked_up=True)
        name = request.request_id
        observed.take([(name, Sampled(0, 5, 1, None))])
        observed.take([(name, Sampled(0, 6, 2, None)), (name, CompletionEnded(0, FinishReason.LENGTH))])
        observed.take([(name, RequestEnded(Timings(0.0, 0.0, 0.0, 0)))])
    assert (observed.watched, observed.finished["length"]) == (0, 10_000)
    times = []
    for _ in range(20):
        start = time.perf_counter()
        text = fetch(live.server.metrics.address)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.020, "the machine may be busy: the best counts"
    assert "cutaway_requests_received_total" in text


def test_counting_a_step_of_64_streams_takes_less_than_half_a_millisecond(live: LiveServer) -> None:
    observed = live.engine.observed
    requests = [ask(f"r{i}", tuple(range(20))) for i in range(64)]
    for request in requests:
        observed.arrived(request)
        observed.started(request, 0, looked_up=True)
    events = [(request.request_id, Sampled(0, 5, 1, None)) for request in requests]
    times = []
    for _ in range(50):
        start = time.perf_counter()
        observed.take(events)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.0005


def test_until_the_model_is_loaded_a_scrape_says_not_ready_and_nothing_of_an_engine() -> None:
    async def first_scrape() -> Scrape:
        server = Server(Config(listen="127.0.0.1:0", metrics_listen="127.0.0.1:0"))
        await server.listen()
        try:
            return await asyncio.to_thread(scrape, server.metrics.address)
        finally:
            await server.stop()

    now = asyncio.run(first_scrape())
    assert now("cutaway_ready") == 0
    assert "cutaway_steps_total" not in now.series
    assert now("process_resident_memory_bytes") > 2**20


def test_ready_follows_the_servers_life(live: LiveServer) -> None:
    assert scraped(live)("cutaway_ready") == 1
    asyncio.run_coroutine_threadsafe(live.server.drain(), live.loop).result(10)
    assert scraped(live)("cutaway_ready") == 0


def test_none_serves_no_metrics(tiny: Path) -> None:
    with serving(tiny, metrics_listen="none") as live:
        assert live.server.metrics.address is None
        with stub(live.address) as client:
            assert usage_of(client.Generate(asking([40, 41], max_tokens=2))).completion_tokens == 2


def test_a_taken_port_is_the_operators_mistake(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        arguments = ["cutaway-server", "--listen", "127.0.0.1:0", "--metrics-listen", address]
        monkeypatch.setattr("sys.argv", arguments)
        with pytest.raises(SystemExit) as exit_code:
            main()
    assert exit_code.value.code == 2
    assert f"--metrics-listen: '{address}' cannot be listened on: Address already in use" in capsys.readouterr().err


def test_other_paths_are_not_found(live: LiveServer) -> None:
    with pytest.raises(urllib.error.HTTPError) as error:
        fetch(live.server.metrics.address, "/")
    with error.value as answer:
        assert (answer.code, answer.read()) == (404, b"there are /livez, /metrics, /readyz\n")


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]"])
def test_connections_that_say_nothing_do_not_keep_others_out_for_long(host: str) -> None:
    def hello(_: Any, respond: Any) -> list[bytes]:
        respond("200 OK", [])
        return [b"hello"]

    listener = HttpListener(host, 0, {"/": hello})
    where = (host.strip("[]"), int(listener.address.rpartition(":")[2]))
    try:
        with ExitStack() as silent:
            for _ in range(MAX_CONNECTIONS):
                silent.enter_context(socket.create_connection(where))
            with socket.create_connection(where) as one_too_many:
                assert one_too_many.recv(1) == b"", "it is closed at once"
        assert eventually(lambda: answers(listener.address))
    finally:
        listener.stop()


def answers(address: str) -> bool:
    try:
        return fetch(address, "/") == "hello"
    except OSError:  # no place is free yet
        return False
