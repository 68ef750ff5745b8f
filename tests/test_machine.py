"""The machine at work, told over the wire: exact for scripted work, its tenant's own, and free while nobody looks."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import grpc
import numpy as np
import pytest
import torch
import transformers
from cutaway import (
    Client,
    Edit,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    Unavailable,
)
from cutaway.aio import AsyncClient
from cutaway.machine import Step
from cutaway.machine_calls import Watch, steps
from cutaway.v1.introspection_pb2_grpc import IntrospectionStub
from cutaway.v1.machine_pb2 import WatchStepsRequest
from secured import write_keys
from serving import LiveServer, eventually, serving
from tiny import VOCAB, save_tiny

PAGE = 16
PROMPT = [7 * i % 400 + 50 for i in range(40)]  # 2 blocks and a half
OTHER = [11 * i % 400 + 60 for i in range(40)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    path = tmp_path_factory.mktemp("models")
    networks = {family: save_tiny(family, path / family) for family in ("llama", "gpt2", "gemma3")}
    return SimpleNamespace(networks=networks, path=path)


@pytest.fixture
def live(models: SimpleNamespace) -> Iterator[LiveServer]:
    with serving(models.path / "llama") as server:
        yield server


@pytest.fixture
def client(live: LiveServer) -> Iterator[Client]:
    with Client(live.address) as it:
        yield it


def make(client: Client, prompt: list[int], tokens: int, **options: Any) -> list[int]:
    """The tokens made after a prompt."""
    answer = client.complete(token_ids=prompt, max_tokens=tokens, ignore_eos=True, temperature=0, **options)
    return [token.id for token in answer.tokens]


def test_the_cache_in_numbers_is_exact_through_a_scripted_workload(live: LiveServer, client: Client) -> None:
    before = client.cache_stats()
    total, block = live.engine.scheduler.pool.capacity, live.engine.pages.page_bytes
    assert (before.blocks_total, before.blocks_used, before.blocks_cached, before.blocks_free) == (total, 0, 0, total)
    assert (before.page_size, before.block_bytes, before.dtype) == (PAGE, block, "F32")
    assert before.block_bytes == 2 * 3 * 2 * PAGE * 16 * 4, "K and V, 3 layers, 2 heads of 16, fp32"
    make(client, PROMPT, 9)  # stores 48 positions: 3 blocks
    stats = client.cache_stats()
    assert (stats.blocks_used, stats.blocks_cached, stats.blocks_retained) == (0, 3, 3)
    assert (stats.prefix_queried_tokens, stats.prefix_hit_tokens, stats.hit_rate) == (40, 0, 0.0)
    make(client, PROMPT, 1)  # finds 32 positions, and stores 40: a block of its own
    stats = client.cache_stats()
    assert (stats.blocks_cached, stats.blocks_retained, stats.blocks_free) == (4, 4, total - 4)
    assert (stats.prefix_queried_tokens, stats.prefix_hit_tokens, stats.hit_rate) == (80, 32, 0.4)
    assert (stats.own_blocks_used, stats.own_blocks_cached, stats.requests_retained) == (0, 4, 2)
    with client.generate(token_ids=OTHER, max_tokens=400, ignore_eos=True) as stream:
        next(stream)
        during = client.cache_stats()
        assert during.blocks_used == during.own_blocks_used >= 3
        assert during.blocks_used + during.blocks_cached + during.blocks_free == total
        assert 0 <= during.fragmentation < PAGE / (PAGE * during.blocks_used)
        assert during.bytes_used == during.blocks_used * block
    assert eventually(live.is_clean)


def test_blocks_tell_their_holders_their_fill_and_their_hash(live: LiveServer, client: Client) -> None:
    make(client, PROMPT, 9, request_id="first")
    make(client, PROMPT, 1, request_id="second")
    told = client.blocks()
    assert [block.use for block in told] == ["retained"] * 4
    assert (told.stats.blocks_cached, len(told)) == (4, 4)
    by_place = {(h.request_id, h.position): block for block in told for h in block.holders}
    assert by_place["first", 0] is by_place["second", 0]
    assert by_place["first", 16] is by_place["second", 16]
    assert by_place["first", 32] is not by_place["second", 32]
    assert [by_place["first", start].filled for start in (0, 16, 32)] == [16, 16, 16]
    assert by_place["second", 32].filled == 8
    assert [len(by_place["first", start].hash) for start in (0, 16, 32)] == [16, 16, 16]
    assert by_place["second", 32].hash == b"", "it is not full"
    assert {block.made_by for block in told} == {"first", "second"}
    assert all(block.references == 0 and 0 <= block.idle_seconds <= block.age_seconds < 60 for block in told)
    assert all(block.tokens == () and block.text == "" for block in told), "nobody said that these may be told"
    assert [block.filled for block in client.blocks("second")] == [16, 16, 8]
    assert len(client.blocks("nobody")) == 0
    with client.generate(token_ids=PROMPT, max_tokens=400, ignore_eos=True, request_id="third") as stream:
        next(stream)
        used = [block for block in client.blocks("third") if block.use == "used"]
        assert len(used) >= 3
        assert all(block.references == 1 and block.idle_seconds == 0 for block in used)


def test_tokens_and_texts_are_told_by_a_server_that_was_started_so(models: SimpleNamespace) -> None:
    with serving(models.path / "llama", inspect_text=True) as live, Client(live.address) as client:
        with client.watch_steps() as watch:
            made = make(client, PROMPT, 9, request_id="first")
            text = client.detokenize(made).text
            steps = [next(watch) for _ in range(9)]
        assert [t for step in steps for row in step.rows for t in row.tokens] == PROMPT + made[:-1]
        assert [token.token for step in steps for token in step.sampled] == made
        assert steps[0].rows[0].text == client.detokenize(PROMPT).text
        (request,) = client.requests()
        assert request.prompt == client.detokenize(PROMPT).text
        assert (list(request.completions[0].tokens), request.completions[0].text) == (made, text)
        blocks = sorted(client.blocks("first"), key=lambda block: block.holders[0].position)
        assert [token for block in blocks for token in block.tokens] == PROMPT + made[:-1]


def test_requests_are_told_with_how_far_they_have_come(models: SimpleNamespace) -> None:
    options = {"max_running": 2, "max_batch_tokens": 16, "pace": 0.02}
    with serving(models.path / "llama", **options) as live, Client(live.address) as client, ExitStack() as stack:
        assert len(client.requests()) == 0
        make(client, PROMPT[:5], 3, request_id="done")
        streams = {}
        for name, prompt, n in (("decoding", PROMPT[:3], 1), ("reading", OTHER * 8, 1), ("waiting", OTHER, 2)):
            streams[name] = stack.enter_context(
                client.generate(token_ids=prompt, max_tokens=100, ignore_eos=True, request_id=name, n=n)
            )
            assert eventually(lambda name=name: name in live.engine.live)  # type: ignore[misc]
            if name == "decoding":
                next(streams[name])
        told = client.requests()
        assert [request.request_id for request in told] == ["done", "decoding", "reading", "waiting"]
        assert [request.stage for request in told] == ["finished", "decode", "prefill", "queued"]
        done, decoding, reading, waiting = told
        assert (done.completions[0].generated_tokens, done.completions[0].finish_reason) == (3, "length")
        assert (done.completions[0].stored, done.completions[0].blocks) == (7, 1)
        assert done.ended_seconds is not None
        assert decoding.ended_seconds is None
        assert decoding.completions[0].generated_tokens >= 1
        assert (reading.prompt_tokens, reading.max_tokens) == (320, 100)
        assert 0 <= reading.computed_tokens < 320
        assert (waiting.n, waiting.ahead, waiting.completions[0].blocks) == (2, 0, 0)
        assert (told.running, told.waiting, told.other_requests, told.other_retained) == (2, 1, 0, 0)


def test_the_hit_predicted_is_the_hit_that_comes(live: LiveServer, client: Client) -> None:
    text = "the quick brown fox jumps over the lazy dog and runs away into the deep dark wood"
    cold = client.predict_cache_hit(text)
    assert (cold.cached_tokens, cold.page_size) == (0, PAGE)
    assert cold.new_blocks == -(-cold.prompt_tokens // PAGE)
    client.complete(text, max_tokens=1)
    for prompt in (text, text + " and never comes back again", "a" + text):
        predicted = client.predict_cache_hit(prompt)
        started = client.complete(prompt, max_tokens=1).started
        assert (predicted.cached_tokens, predicted.prompt_tokens) == (started.cached_tokens, started.prompt_tokens)
    assert predicted.cached_tokens == 0
    assert client.predict_cache_hit(text).cached_tokens > 0
    assert client.predict_cache_hit(text, prefix_caching=False).cached_tokens == 0
    with pytest.raises(InvalidArgument, match="token_ids: '0 ids'"):
        client.predict_cache_hit(token_ids=[])
    assert client.cache_stats().prefix_queried_tokens == live.engine.observed.prefix_queries


def test_the_hit_of_an_edited_request_is_predicted_with_its_edits(client: Client) -> None:
    asked: dict[str, Any] = {"token_ids": PROMPT, "edits": [Edit.zero("blocks.1.hook_mlp_out", positions=[20])]}
    make(client, PROMPT, 1)
    before = client.predict_cache_hit(**asked)
    assert before.cached_tokens == client.complete(**asked, max_tokens=1).started.cached_tokens == PAGE
    after = client.predict_cache_hit(**asked)
    assert after.cached_tokens == client.complete(**asked, max_tokens=1).started.cached_tokens == 2 * PAGE
    assert client.predict_cache_hit(token_ids=PROMPT).cached_tokens == 2 * PAGE


def test_a_prediction_leaves_no_trace(live: LiveServer, client: Client) -> None:
    make(client, PROMPT, 1)
    pool = live.engine.scheduler.pool
    before = pool.hits, pool.free, tuple(pool._last), live.engine.steps
    assert client.predict_cache_hit(token_ids=PROMPT).cached_tokens == 32
    assert (pool.hits, pool.free, tuple(pool._last), live.engine.steps) == before


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_keys_and_values_read_are_those_of_transformers(models: SimpleNamespace, family: str) -> None:
    with serving(models.path / family) as live, Client(live.address) as client:
        made = make(client, PROMPT, 9, request_id="one")
        read = client.read_cache("one")
        network = models.networks[family]
        cache = transformers.DynamicCache()  # keeps what is outside a window, too
        with torch.no_grad():
            network(torch.tensor([PROMPT + made[:-1]]), past_key_values=cache, use_cache=True)
        for i, layer in enumerate(cache.layers):
            for ours, theirs in ((read.keys, layer.keys), (read.values, layer.values)):
                np.testing.assert_allclose(ours[i], theirs[0].transpose(0, 1).numpy(), atol=1e-4, rtol=0)
        assert read.keys.axes == read.values.axes == ("layer", "pos", "kv_head", "d_head")
        assert (read.keys.name, read.values.name) == ("blocks.*.attn.hook_rot_k", "blocks.*.attn.hook_v")
        assert read.keys.positions == tuple(range(48))
        assert (read.prompt_tokens, read.tokens, read.stored, read.running) == (40, 49, 48, False)
        assert (read.stored_dtype, read.quantization) == ("F32", "none")
        assert read.model_hash == client.model().model_hash


def test_keys_and_values_read_are_those_captured(client: Client) -> None:
    points = ["blocks.*.attn.hook_rot_k", "blocks.*.attn.hook_v"]
    make(client, PROMPT, 1, request_id="one")
    captured, read = client.trace(token_ids=PROMPT, points=points), client.read_cache("one")
    for name, array in zip(points, (read.keys, read.values), strict=True):
        for layer in range(3):
            ours = captured[name.replace("*", str(layer))]
            assert ("layer", *ours.axes) == array.axes
            assert np.array_equal(ours, array[layer])


def test_keys_and_values_are_read_by_layer_head_and_position(live: LiveServer, client: Client) -> None:
    make(client, PROMPT, 9, request_id="one")
    everything = client.read_cache("one")
    part = client.read_cache("one", layers=[-1, 0], heads=[1], positions=[3, -1, 47])
    assert (part.keys.at["layer"], part.keys.at["kv_head"], part.keys.positions) == ((0, 2), (1,), (3, 39, 47))
    assert np.array_equal(part.keys.values, everything.keys[np.ix_([0, 2], [3, 39, 47], [1])])
    assert np.array_equal(part.values.values, everything.values[np.ix_([0, 2], [3, 39, 47], [1])])
    for positions, expected in (("prompt", range(40)), ("generated", range(40, 48)), ("last", [39])):
        assert client.read_cache("one", positions=positions).keys.positions == tuple(expected)
    half = client.read_cache("one", dtype="BF16").keys
    assert np.array_equal(half.values, torch.tensor(everything.keys.values).bfloat16().float().numpy())


def test_a_running_request_is_read_as_far_as_it_has_come(models: SimpleNamespace) -> None:
    with serving(models.path / "llama", pace=0.005) as live, Client(live.address) as client:
        with client.generate(token_ids=PROMPT, max_tokens=200, ignore_eos=True, n=2, request_id="two") as stream:
            for _ in range(20):
                next(stream)
            reads = [client.read_cache("two", index=index, positions="prompt") for index in (0, 1)]
            assert all(read.running and read.stored >= 40 for read in reads)
            assert np.array_equal(reads[0].keys, reads[1].keys)
            with pytest.raises(NotFound, match="index: request 'two' has no completion 2"):
                client.read_cache("two", index=2)
        make(client, PROMPT, 1, request_id="alone", prefix_caching=False)
        assert np.array_equal(client.read_cache("alone").values, reads[0].values)


def test_what_cannot_be_read_is_refused_with_the_reason(models: SimpleNamespace) -> None:
    with serving(models.path / "llama", max_capture_bytes=10_000) as live, Client(live.address) as client:
        make(client, PROMPT, 9, request_id="one")
        for options, error, told in (
            ({"layers": [3]}, InvalidArgument, r"layers: 3 .* the model has 3 layers"),
            ({"layers": []}, InvalidArgument, r"layers: \[\]"),
            ({"heads": [0, -3]}, InvalidArgument, r"heads: -3 .* 2 heads"),
            ({"positions": [48]}, InvalidArgument, r"positions.list: 48 .* rows 0 to 47"),
            ({"positions": range(60, 70)}, InvalidArgument, r"positions: .* selects no row"),
            ({"positions": "middle"}, InvalidArgument, r"positions: 'middle'"),
            ({"dtype": "F64"}, InvalidArgument, r"dtype: 'F64' .* F32, BF16, F16"),
            ({"positions": [0], "max_bytes": 10}, ResourceExhausted, r"are 768 bytes, and max_bytes is 10"),
            ({}, ResourceExhausted, r"are 36864 bytes, and the server allows a request 10000"),
        ):
            with pytest.raises(error, match=told):
                client.read_cache("one", **options)  # type: ignore[arg-type]
        for name in ("two", "", "a/one"):
            with pytest.raises(NotFound, match="request_id: no request"):
                client.read_cache(name)
        with pytest.raises(TypeError, match="unexpected keyword argument 'layer'"):
            client.read_cache("one", layer=3)  # type: ignore[call-arg]


def test_nothing_is_kept_by_a_server_that_is_told_so(models: SimpleNamespace) -> None:
    with serving(models.path / "llama", retain_bytes=0) as live, Client(live.address) as client:
        make(client, PROMPT, 9, request_id="one")
        with pytest.raises(NotFound):
            client.read_cache("one")
        assert (client.cache_stats().blocks_cached, client.cache_stats().blocks_retained) == (3, 0)
        assert len(client.requests()) == 0


def test_the_room_of_what_is_kept_goes_to_who_needs_it(models: SimpleNamespace) -> None:
    options = {"kv_cache_memory": 33 * 12 * 1024 + 1, "retain_bytes": "1GiB"}
    with serving(models.path / "llama", **options) as live, Client(live.address) as client:
        assert client.cache_stats().blocks_total == 32
        make(client, PROMPT, 9, request_id="one")
        make(client, OTHER, 470, prefix_caching=False)
        with pytest.raises(FailedPrecondition, match="others needed the room"):
            client.read_cache("one")
        assert client.cache_stats().evictions >= 1


def test_every_block_event_of_a_scripted_request_in_order(live: LiveServer, client: Client) -> None:
    with client.watch_cache() as watch:
        assert watch.stats.blocks_cached == 0
        make(client, PROMPT, 9, request_id="one")
        events = [next(watch) for _ in range(9)]
    assert [event.change for event in events] == ["taken"] * 3 + ["published"] * 3 + ["released"] * 3
    first = [event.block for event in events[:3]]
    assert [event.block for event in events[3:6]] == first
    assert [event.block for event in events[6:]] == first[::-1], "the tail before the head"
    assert {(event.request_id, event.index) for event in events} == {("one", 0)}
    assert [event.references for event in events] == [1] * 6 + [0] * 3
    hashes = {block.block: block.hash for block in client.blocks()}
    assert [event.hash for event in events[3:6]] == [hashes[block] for block in first]
    with client.watch_cache() as watch:
        assert watch.stats.blocks_cached == 3
        make(client, PROMPT, 1, request_id="two")
        events = [next(watch) for _ in range(6)]
    assert [event.change for event in events] == ["shared"] * 2 + ["taken"] + ["released"] * 3
    assert [event.block for event in events[:2]] == first[:2]


def test_a_copy_on_write_is_told_with_what_was_copied(live: LiveServer, client: Client) -> None:
    with client.watch_cache() as watch, client.watch_steps() as stepping:
        make(client, PROMPT, 4, n=2, request_id="twins")
        client.complete(token_ids=OTHER, max_tokens=1, request_id="end")
        events = []
        while not events or events[-1].request_id != "end":
            events.append(next(watch))
        seen = []
        while not seen or seen[-1].rows[0].request_id != "end":
            seen.append(next(stepping))
    changes = Counter(event.change for event in events[:-1])
    (copied,) = [event for event in events if event.change == "copied"]
    taken = [event.block for event in events if event.change == "taken" and event.request_id == "twins"]
    assert copied.source == taken[2], "the block that is half full"
    assert changes["taken"] == 3
    assert changes["shared"] == 3, "the second completion shares all blocks of the prompt"
    assert sum(step.copies for step in seen) == 1
    assert [len(step.rows) for step in seen] == [1, 2, 2, 2, 1]


def test_a_preemption_is_told_and_what_evictions_cost(models: SimpleNamespace) -> None:
    options = {"kv_cache_memory": 33 * 12 * 1024 + 1, "retain_bytes": 0}
    with serving(models.path / "llama", **options) as live, Client(live.address) as client:
        assert client.cache_stats().blocks_total == 32
        with client.watch_steps() as stepping, client.watch_cache() as cache:
            threads = [
                threading.Thread(target=make, args=(client, prompt, 250), kwargs={"request_id": name})
                for name, prompt in (("one", PROMPT), ("two", OTHER))
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            make(client, PROMPT[:3], 1, request_id="end")
            seen: list[Step] = []
            while not seen or "end" not in {row.request_id for row in seen[-1].rows}:
                seen.append(next(stepping))
            events = []
            while not events or (events[-1].request_id, events[-1].change) != ("end", "released"):
                events.append(next(cache))
        preempted = [name for step in seen for name in step.preempted]
        assert len(preempted) == live.engine.observed.preemptions == client.cache_stats().preemptions >= 1
        evictions = sum(event.change == "evicted" for event in events)
        assert evictions == live.engine.scheduler.pool.evictions
        taken = sum(event.change in ("taken", "copied") for event in events)
        shared = sum(event.change == "shared" for event in events)
        assert taken + shared == sum(event.change == "released" for event in events), "what is taken is given back"


def test_steps_tell_who_was_in_them_with_what(models: SimpleNamespace) -> None:
    with serving(models.path / "llama", max_batch_tokens=16, max_running=4) as live, Client(live.address) as client:
        with client.watch_steps() as watch:
            make(client, PROMPT, 9, request_id="one", prefix_caching=False)
            steps = [next(watch) for _ in range(11)]
        rows = [(row.start, row.stop) for step in steps for row in step.rows]
        assert rows == [(0, 16), (16, 32), (32, 40), *((i, i + 1) for i in range(40, 48))]
        assert [row.cached_tokens for step in steps for row in step.rows] == [0] + [None] * 10
        assert [len(step.sampled) for step in steps] == [0, 0] + [1] * 9
        assert [step.step for step in steps] == list(range(live.engine.steps - 10, live.engine.steps + 1))
        assert all(token.step == step.step for step in steps for token in step.sampled)
        assert all(token.token is None and row.tokens == () for s in steps for token in s.sampled for row in s.rows)
        for step in steps:
            assert set(step.phases) == {"schedule", "prepare", "forward", "sample", "report"}
            assert 0 < step.seconds < 5
            assert abs(step.time - time.time()) < 60
        assert (steps[0].running, steps[-1].running, steps[0].blocks_used) == (1, 0, 3)


def test_a_watcher_that_begins_later_is_told_nothing_from_before(live: LiveServer, client: Client) -> None:
    with client.watch_steps() as first:
        make(client, PROMPT, 3, request_id="before")
        with client.watch_steps() as second:
            make(client, PROMPT, 3, request_id="after")
            assert [row.request_id for _ in range(3) for row in next(second).rows] == ["after"] * 3
        names = [row.request_id for _ in range(6) for row in next(first).rows]
    assert names == ["before"] * 3 + ["after"] * 3


def test_nothing_is_written_down_while_nobody_watches(live: LiveServer, client: Client) -> None:
    watched, pool = live.engine.watched, live.engine.scheduler.pool
    with client.watch_steps(), client.watch_cache():
        assert pool.log is not None
        assert watched._steps
    assert eventually(lambda: pool.log is None and not watched._steps)
    make(client, PROMPT, 3)
    assert (watched._reports, watched._sampled, watched._rows, pool.log) == ([], [], (), None)


def test_a_slow_watcher_fails_alone_and_is_told_what_it_missed(models: SimpleNamespace, monkeypatch: Any) -> None:
    monkeypatch.setattr("cutaway_server.service.watching.MOST_UNREAD", 4000)
    with ExitStack() as stack:
        live = stack.enter_context(serving(models.path / "llama", inspect_text=True, pace=0.005))
        client = stack.enter_context(Client(live.address))
        narrow = [("grpc.http2.bdp_probe", 0), ("grpc.use_local_subchannel_pool", 1)]  # it holds 64 KiB, and not more
        channel = stack.enter_context(grpc.insecure_channel(live.address, options=narrow))
        call = IntrospectionStub(channel).WatchSteps(WatchStepsRequest())
        stuck, quick = Watch(call, steps, live.address), stack.enter_context(client.watch_steps())
        watchers = live.server._machine.watchers._steps
        seen: list[int] = []
        reading = threading.Thread(target=lambda: seen.extend(step.step for step in quick))
        reading.start()
        for _ in range(40):
            client.complete(token_ids=PROMPT, max_tokens=20, ignore_eos=True, n=60)
            if any(watcher.failed for watcher in watchers):
                break
        make(client, PROMPT, 3)
        assert eventually(lambda: seen[-1:] == [live.engine.steps])
        assert seen == list(range(seen[0], live.engine.steps + 1)), "the quick one has missed nothing"
        quick.close()
        reading.join()
        got = []
        with pytest.raises(ResourceExhausted, match=r"the watch is not read: \d+ steps were dropped unread"):
            got.extend(step.step for step in stuck)
        assert got == list(range(seen[0], seen[0] + len(got))), "what it got is whole up to there"


@pytest.fixture(scope="module")
def shared(models: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """A server that tells texts, and clients of two tenants who may do everything."""
    file = tmp_path_factory.mktemp("keys") / "keys.toml"
    scopes = ["generate", "observe", "introspect"]
    keys = write_keys(file, {"anna": (scopes, "anna"), "berta": (scopes, "berta"), "eve": (["observe"], "anna")})
    with (
        serving(models.path / "llama", api_keys=str(file), inspect_text=True, pace=0.002) as live,
        ExitStack() as stack,
    ):
        clients = {name: stack.enter_context(Client(live.address, api_key=key)) for name, key in keys.items()}
        yield SimpleNamespace(live=live, **clients)


def test_other_tenants_appear_only_as_counts(shared: SimpleNamespace) -> None:
    anna, berta = shared.anna, shared.berta
    with anna.watch_steps() as stepping, anna.watch_cache() as cache:
        make(berta, PROMPT, 9, request_id="secret")
        make(anna, OTHER, 9, request_id="mine")
        seen = [next(stepping) for _ in range(18)]
        events = [next(cache) for _ in range(9)]
        assert {event.request_id for event in events} == {"mine"}
        assert cache.other_events == 9
    theirs, ours = seen[:9], seen[9:]
    assert all(step.rows == () and step.sampled == () and step.other_completions == 1 for step in theirs)
    assert sum(step.other_rows for step in theirs) == 48
    assert [row.request_id for step in ours for row in step.rows] == ["mine"] * 9
    assert "secret" not in repr((seen, events))
    assert {r.request_id for r in anna.requests()} == {"mine"}
    assert anna.requests().other_retained == 1
    told = anna.blocks()
    assert (len(told), told.stats.blocks_cached, told.stats.own_blocks_cached) == (3, 6, 3)
    assert {block.made_by for block in told} == {"mine"}
    assert len(anna.blocks("secret")) == 0
    for name in ("secret", "berta/secret"):
        with pytest.raises(NotFound, match="no request"):
            anna.read_cache(name)
    assert anna.predict_cache_hit(token_ids=PROMPT).cached_tokens == 0
    assert berta.predict_cache_hit(token_ids=PROMPT).cached_tokens == 32
    assert np.array_equal(berta.read_cache("secret").keys.shape, (3, 48, 2, 16))


def test_who_observes_may_not_read_values(shared: SimpleNamespace) -> None:
    make(shared.anna, OTHER, 2, request_id="ours")
    assert "ours" in {request.request_id for request in shared.eve.requests()}
    with pytest.raises(PermissionDenied, match="ReadCache asks for scope introspect"):
        shared.eve.read_cache("ours")
    shared.eve.predict_cache_hit("a text")


async def test_the_asynchronous_client_tells_the_same(live: LiveServer) -> None:
    with Client(live.address) as client:
        async with AsyncClient(live.address) as other:
            async with other.watch_steps() as stepping, other.watch_cache() as cache:
                await other.complete(token_ids=PROMPT, max_tokens=9, ignore_eos=True, request_id="one", temperature=0)
                assert [len((await anext(stepping)).rows) for _ in range(9)] == [1] * 9
                assert (await anext(cache)).change == "taken"
                assert cache.stats.blocks_used == 0
            assert await other.cache_stats() == client.cache_stats()
            blocks = await other.blocks()
            assert [block.hash for block in blocks] == [block.hash for block in client.blocks()]
            assert [request.request_id for request in await other.requests()] == ["one"]
            assert await other.predict_cache_hit(token_ids=PROMPT) == client.predict_cache_hit(token_ids=PROMPT)
            read = await other.read_cache("one", layers=[1])
            assert np.array_equal(read.keys, client.read_cache("one", layers=[1]).keys)
            with pytest.raises(NotFound):
                await other.read_cache("nobody")
            later = other.watch_steps()
            with pytest.raises(RuntimeError, match="has not begun"):
                _ = later.stats
            reading = asyncio.ensure_future(anext(later))
            await asyncio.sleep(0.2)
            await other.complete(token_ids=PROMPT, max_tokens=1)
            assert (await reading).rows[0].stop == 40
            await later.close()
            with pytest.raises(StopAsyncIteration):
                await anext(later)


def test_watches_end_when_the_server_goes_down(models: SimpleNamespace) -> None:
    with ExitStack() as stack:
        with serving(models.path / "llama") as live:
            client = stack.enter_context(Client(live.address))
            watch = client.watch_steps()
            began = time.monotonic()
        assert time.monotonic() - began < 1.5, "nobody waited for the watch"
        with pytest.raises(Unavailable, match="the server is going down"):
            next(watch)


def test_looks_at_a_dead_engine_are_answered(models: SimpleNamespace) -> None:
    with serving(models.path / "llama") as live:
        live.engine_thread.stop()
        with pytest.raises(Exception, match="the engine has stopped"):
            live.engine_thread.look(lambda engine: engine.steps).result(5)
        with Client(live.address) as client, pytest.raises(Exception, match="the engine has stopped"):
            client.cache_stats()


def test_many_long_looks_take_a_tenth_of_the_time_and_no_more(models: SimpleNamespace) -> None:
    with serving(models.path / "llama", pace=0.005) as live, Client(live.address) as client:
        stop, looks = threading.Event(), []

        def look() -> None:
            while not stop.is_set():
                live.engine_thread.look(lambda _: looks.append(time.sleep(0.005))).result()

        threads = [threading.Thread(target=look) for _ in range(8)]
        with client.generate(token_ids=PROMPT, max_tokens=400, ignore_eos=True) as stream:
            next(stream)
            for thread in threads:
                thread.start()
            before, began = len(looks), time.perf_counter()
            for _ in range(150):
                next(stream)
            took, made = time.perf_counter() - began, len(looks) - before
            stop.set()
        for thread in threads:
            thread.join()
        assert made > 0
        assert made * 0.005 < 0.1 * took + 8 * 0.005, "8 threads ask without end"


def test_fuzzed_questions_hurt_nobody(live: LiveServer, client: Client) -> None:
    made = make(client, PROMPT, 9, request_id="one")
    chance = np.random.default_rng(1)
    refused = 0
    for _ in range(300):
        options: dict[str, Any] = {
            "index": int(chance.integers(0, 2)),
            "layers": chance.integers(-4, 4, chance.integers(1, 3)).tolist(),
            "heads": chance.integers(-2, 3, chance.integers(1, 3)).tolist(),
            "positions": chance.integers(-45, 55, chance.integers(1, 4)).tolist(),
            "dtype": str(chance.choice(["", "F16", "BF16", "F32", "I8"])),
        }
        try:
            read = client.read_cache(str(chance.choice(["one", "two"])), **options)
            assert np.isfinite(read.keys.values).all()
        except (InvalidArgument, NotFound):
            refused += 1
    assert 50 < refused < 295
    assert make(client, PROMPT, 9) == made
    assert max(made) < VOCAB
    assert eventually(live.is_clean)
