"""The client against a real gRPC server that plays scripts: what arrives, what is asked, what is raised."""

from __future__ import annotations

import asyncio
import gc
import inspect
import math
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import cutaway
import grpc
import pytest
from cutaway import AsyncClient, Client, errors
from cutaway.options import GenerateOptions, Sampling
from cutaway.v1 import inference_pb2 as pb
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from scripted import Scripted, delta, finished, hello, serve, started

PATIENCE = 10  # seconds until a test gives up waiting for what takes milliseconds


@pytest.fixture
def servicer() -> Scripted:
    return Scripted(hello)


@pytest.fixture
def address(servicer: Scripted) -> Iterator[str]:
    server, address = serve(servicer)
    yield address
    server.stop(None).wait()


@pytest.fixture
def client(address: str) -> Iterator[Client]:
    with Client(address, timeout=PATIENCE) as client:
        yield client


def aborting(code: grpc.StatusCode, details: str = "why", **metadata: str):
    def script(request, context):
        context.set_trailing_metadata([(key.replace("_", "-"), value) for key, value in metadata.items()])
        context.abort(code, details)
        yield

    return script


# What is exported.


def test_everything_exported_exists_and_is_sorted() -> None:
    assert sorted(cutaway.__all__) == cutaway.__all__
    assert all(getattr(cutaway, name) is not None for name in cutaway.__all__)
    with pytest.raises(AttributeError, match="Clint"):
        cutaway.Clint  # noqa: B018


def test_every_error_is_exported_and_drawn_in_the_tree() -> None:
    kinds = [kind for kind in vars(errors).values() if inspect.isclass(kind)]
    assert len(kinds) == 13
    for kind in kinds:
        assert issubclass(kind, errors.CutawayError)
        assert kind.__name__ in cutaway.__all__
        assert f" {kind.__name__} " in errors.__doc__.replace("\n", " ")


def test_importing_the_client_loads_neither_grpc_nor_the_server() -> None:
    check = (
        "import sys, cutaway, cutaway.cli; heavy = {'grpc', 'torch', 'cutaway_server', 'google.protobuf'};"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules);"
        "cutaway.Client; assert not {'torch', 'cutaway_server'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", check], check=True, timeout=60)


def test_the_asynchronous_client_has_the_same_calls() -> None:
    def calls(kind: type) -> dict[str, list[str]]:
        return {
            name: [str(p).split(":")[0] for p in inspect.signature(method).parameters.values()]
            for name, method in inspect.getmembers(kind, inspect.isfunction)
            if not name.startswith("_")
        }

    assert calls(Client) == calls(AsyncClient)
    assert set(calls(Client)) == {
        "abort", "attention", "attribution", "close", "complete", "detokenize", "estimate", "features", "fork",
        "generate", "health", "hidden_states", "list_points", "logit_lens", "model", "self_check", "tokenize", "trace",
        "blocks", "cache_stats", "predict_cache_hit", "read_cache", "replay_sample", "requests", "watch_cache",
        "watch_steps", "delete_vectors", "list_vectors", "put_run", "put_vectors", "nearest_tokens", "sweep", "weights",
    }  # fmt: skip
    assert inspect.signature(Client) == inspect.signature(AsyncClient)


# What arrives.


def test_tokens_come_one_by_one_with_all_that_was_told(client: Client) -> None:
    stream = client.generate("Hi")
    assert (stream.request_id, stream.started, stream.usage, stream.completions) == (None, None, None, None)
    first = next(stream)
    assert first == cutaway.Token(5, "Hel", -0.5, (cutaway.TopLogprob(5, -0.5),), 0, 11)
    assert stream.started == cutaway.Started("picked", 3, 1, "abc", "reference", "F32", 7)
    assert stream.request_id == "picked"
    assert stream.usage is None
    assert list(stream) == [
        cutaway.Token(6, "lo ", None, (), 0, 12),
        cutaway.Token(7, "wörld", None, (), 0, 13),
    ]
    assert stream.usage == cutaway.Usage(3, 1, 3)
    assert stream.timings == cutaway.Timings(0.5, 0.25, 0.125, 2)
    assert stream.prompt_logprobs is None
    assert list(stream) == []


def test_complete_returns_the_whole_answer(client: Client) -> None:
    answer = client.complete("Hi", request_id="mine")
    assert answer.text == "Hello wörld"
    assert answer.token_ids == (5, 6, 7)
    assert answer.finish_reason == "stop"
    assert answer.usage.completion_tokens == 3
    assert answer.request_id == "mine"
    assert [token.step for token in answer.tokens] == [11, 12, 13]


def test_several_completions_are_told_apart(client: Client, servicer: Scripted) -> None:
    def two(request, context):
        yield started(request)
        yield delta(pb.Token(id=1, text="a", step=1))
        yield delta(pb.Token(id=2, text="b", step=1), pb.Token(id=3, text="c", step=2), index=1)
        yield delta(pb.Token(id=4, text="d", step=2))
        yield finished(
            pb.Completion(index=0, finish_reason="FINISH_REASON_LENGTH", completion_tokens=2),
            pb.Completion(index=1, finish_reason="FINISH_REASON_STOP", completion_tokens=2, stop_token_id=0),
            tokens=4,
        )

    servicer.script = two
    answer = client.complete("Hi", n=2)
    assert [c.text for c in answer.completions] == ["ad", "bc"]
    assert [c.token_ids for c in answer.completions] == [(1, 4), (2, 3)]
    assert [c.finish_reason for c in answer.completions] == ["length", "stop"]
    assert [c.stop_token_id for c in answer.completions] == [None, 0]
    assert answer.text == "ad"


def test_prompt_logprobs_keep_their_positions_over_messages(client: Client, servicer: Scripted) -> None:
    def scored(request, context):
        yield started(request)
        for position in (1, 2):
            token = pb.Token(id=position, text="t", logprob=-position)
            yield pb.GenerateResponse(prompt_logprobs=pb.PromptLogprobs(position=position, tokens=[token]))
        yield finished(pb.Completion(index=0, finish_reason="FINISH_REASON_LENGTH"), tokens=0)

    servicer.script = scored
    answer = client.complete("Hi", max_tokens=0, prompt_logprobs=0)
    assert [(t.position, t.id, t.logprob) for t in answer.prompt_logprobs] == [(1, 1, -1.0), (2, 2, -2.0)]
    assert (answer.text, answer.token_ids) == ("", ())


def test_tokenize_detokenize_and_model(client: Client) -> None:
    tokens = client.tokenize("lowest", merges=True)
    assert (tokens.ids, tokens.pieces, tokens.offsets) == ((3, 4), ("low", "Ġest"), ((0, 3), (3, 7)))
    assert tokens.merges[0].steps[1] == cutaway.Merge("lo", "w", 9, 0)
    assert client.tokenize(messages=[{"role": "user", "content": "x"}]).rendered == "<laid out>"
    assert client.detokenize([3, 4]).token_bytes == (b"h", b"\xc3\xa9")
    model = client.model()
    assert model.architecture.windows == (0, 16)
    assert model.limits.max_context == 64
    assert model.text.bos_token_id is None
    assert model.default_sampling == {"temperature": 0.6, "stop": ("\n",), "logit_bias": {3: -1.0}}


async def test_the_asynchronous_client_gets_the_same(address: str, client: Client) -> None:
    async with AsyncClient(address, timeout=PATIENCE) as aclient:
        stream = aclient.generate("Hi")
        first = await anext(stream)
        assert [first] + [token async for token in stream] == list(client.generate("Hi"))
        assert stream.usage == cutaway.Usage(3, 1, 3)
        assert await aclient.complete("Hi") == client.complete("Hi")
        assert await aclient.tokenize("lowest") == client.tokenize("lowest")
        assert await aclient.detokenize([3]) == client.detokenize([3])
        assert await aclient.model() == client.model()
        with pytest.raises(errors.NotFound, match="nobody"):
            await aclient.abort("nobody")


def test_health_is_what_the_servers_health_service_says() -> None:
    server = grpc.server(ThreadPoolExecutor(2))
    says = health.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(says, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with Client(f"127.0.0.1:{port}", timeout=PATIENCE) as client:
            says.set("", health_pb2.HealthCheckResponse.NOT_SERVING)
            assert client.health() is cutaway.Health.NOT_SERVING
            says.set("", health_pb2.HealthCheckResponse.SERVING)
            assert client.health() is cutaway.Health.SERVING
            with pytest.raises(errors.NotFound):
                client.health("no.such.Service")
    finally:
        server.stop(None).wait()


# What is asked.

VALUES = {
    "temperature": 0.5, "top_k": 4, "top_p": 0.75, "min_p": 0.25, "typical_p": 0.125, "repetition_penalty": 1.5,
    "presence_penalty": -0.5, "frequency_penalty": 2.0, "logit_bias": {3: -1.5}, "bad_words": ["a", "b"],
    "seed": -(2**63), "stop": ["\n"], "stop_token_ids": [0, 9], "min_tokens": 0, "max_tokens": 0,
    "ignore_eos": False, "n": 2, "logprobs": 0, "prompt_logprobs": 1,
}  # fmt: skip


def test_every_sampling_keyword_reaches_the_wire_and_only_those_given(client: Client, servicer: Scripted) -> None:
    wire_fields = {field.name for field in pb.SamplingParams.DESCRIPTOR.fields}
    assert set(VALUES) == set(Sampling.__annotations__) == wire_fields
    for name, value in VALUES.items():
        client.complete("Hi", **{name: value})
        sampling = servicer.asked[-1].sampling
        assert [field.name for field, _ in sampling.ListFields()] == [name]
        told = getattr(sampling, name)
        told = dict(told) if name == "logit_bias" else list(told) if isinstance(value, list) else told
        assert told == value, name
    client.complete("Hi", **dict.fromkeys(VALUES))
    assert servicer.asked[-1] == pb.GenerateRequest(text="Hi", sampling={})


def test_every_other_field_of_the_wire_has_its_keyword(client: Client, servicer: Scripted) -> None:
    flags = ["parse_special_tokens", "add_special_tokens", "skip_special_tokens", "echo", "prefix_caching"]
    for flag in flags:
        client.complete("", **{flag: False})
        asked = servicer.asked[-1]
        assert asked.HasField(flag)
        assert not getattr(asked, flag)
        assert asked.text == ""
        assert asked.HasField("text")
    known = {f.name for f in pb.GenerateRequest.DESCRIPTOR.fields} - {"text", "chat", "sampling"}
    assert known <= set(GenerateOptions.__annotations__)


def test_prompts_of_all_three_kinds(client: Client, servicer: Scripted) -> None:
    client.complete(token_ids=range(3))
    assert list(servicer.asked[-1].token_ids.ids) == [0, 1, 2]
    client.complete(token_ids=[-1])
    assert list(servicer.asked[-1].token_ids.ids) == [-1]
    client.complete(token_ids=[])
    assert servicer.asked[-1].WhichOneof("prompt") == "token_ids"
    client.complete(messages=[{"role": "user", "content": "<b>"}], add_generation_prompt=False)
    chat = servicer.asked[-1].chat
    assert chat == pb.Chat(messages=[pb.Message(role="user", content="<b>")], add_generation_prompt=False)
    client.complete(messages=[])
    assert servicer.asked[-1].WhichOneof("prompt") == "chat"


def test_a_lone_text_is_one_stop_text_not_its_letters(client: Client, servicer: Scripted) -> None:
    client.complete("Hi", stop="END", bad_words="no")
    assert list(servicer.asked[-1].sampling.stop) == ["END"]
    assert list(servicer.asked[-1].sampling.bad_words) == ["no"]


@pytest.mark.parametrize(
    ("prompt", "options", "error", "says"),
    [
        (None, {}, errors.InvalidArgument, "exactly one"),
        ("Hi", {"token_ids": [1]}, errors.InvalidArgument, "exactly one"),
        ("Hi", {"max_tokens": 2**31}, errors.InvalidArgument, "max_tokens: 2147483648"),
        ("Hi", {"seed": 2**63}, errors.InvalidArgument, "seed"),
        ("Hi", {"stop_token_ids": [2**40]}, errors.InvalidArgument, "stop_token_ids"),
        ("Hi", {"logit_bias": {2**40: 1.0}}, errors.InvalidArgument, "logit_bias"),
        (None, {"token_ids": [2**63]}, errors.InvalidArgument, "ids"),
        ("\ud800", {}, errors.InvalidArgument, "text"),
        (None, {"messages": [{"role": "user"}]}, errors.InvalidArgument, r"messages\[0\]"),
        (None, {"messages": "Hi"}, TypeError, "messages: 'Hi'"),
        (None, {"messages": {"role": "user", "content": "Hi"}}, TypeError, "must be a list"),
        (None, {"messages": ["Hi"]}, TypeError, r"messages\[0\]: 'Hi': must be a mapping"),
        (None, {"messages": [{"role": "user", "content": None}]}, TypeError, r"messages\[0\].content: None: must be a"),
        ("Hi", {"logit_bias": [(5, 1.0)]}, TypeError, "logit_bias: .* must be a mapping"),
        ("Hi", {"timeout": math.nan}, errors.InvalidArgument, "timeout: nan"),
        ("Hi", {"temperatur": 0.5}, TypeError, "temperatur"),
        ("Hi", {"temperature": "hot"}, TypeError, "temperature"),
        ("Hi", {"max_tokens": 1.5}, TypeError, "max_tokens"),
    ],
)
def test_what_the_wire_cannot_carry_is_refused_by_name(client, servicer, prompt, options, error, says) -> None:
    with pytest.raises(error, match=says):
        client.generate(prompt, **options)
    assert servicer.asked == []


# What is raised.


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("INVALID_ARGUMENT", errors.InvalidArgument),
        ("NOT_FOUND", errors.NotFound),
        ("ALREADY_EXISTS", errors.AlreadyExists),
        ("FAILED_PRECONDITION", errors.FailedPrecondition),
        ("RESOURCE_EXHAUSTED", errors.ResourceExhausted),
        ("UNAUTHENTICATED", errors.Unauthenticated),
        ("PERMISSION_DENIED", errors.PermissionDenied),
        ("DEADLINE_EXCEEDED", errors.DeadlineExceeded),
        ("CANCELLED", errors.Cancelled),
        ("INTERNAL", errors.ServerError),
        ("UNKNOWN", errors.ServerError),
        ("DATA_LOSS", errors.ServerError),
        ("UNIMPLEMENTED", errors.ServerError),
    ],
)
async def test_every_status_has_its_exception(address, client, servicer, code, kind) -> None:
    servicer.script = aborting(grpc.StatusCode[code], "temperature: -1")
    with pytest.raises(errors.CutawayError) as caught:
        client.complete("Hi")
    assert type(caught.value) is kind
    assert "temperature: -1" in str(caught.value)
    async with AsyncClient(address, timeout=PATIENCE) as aclient:
        with pytest.raises(errors.CutawayError) as caught:
            await aclient.complete("Hi")
    assert type(caught.value) is kind


def test_a_full_queue_says_when_to_try_again(client: Client, servicer: Scripted) -> None:
    servicer.script = aborting(grpc.StatusCode.RESOURCE_EXHAUSTED, "4 wait", retry_after_ms="1500")
    with pytest.raises(errors.QueueFull, match="4 wait") as caught:
        client.complete("Hi")
    assert caught.value.retry_after == 1.5
    assert len(servicer.asked) == 1  # it is the caller's to decide


def test_a_timeout_is_deadline_exceeded_and_ends_the_request(client: Client, servicer: Scripted) -> None:
    servicer.script = servicer.endless
    with pytest.raises(errors.DeadlineExceeded):
        client.complete("Hi", timeout=0.2)
    assert servicer.cancelled.wait(PATIENCE)


@pytest.mark.parametrize("timeout", [math.inf, 1e20])
async def test_an_endless_timeout_is_none(address: str, client: Client, servicer: Scripted, timeout: float) -> None:
    assert client.complete("Hi", timeout=timeout).text == client.complete("Hi").text
    assert client.model(timeout=timeout).name == "tiny"
    async with AsyncClient(address, timeout=timeout) as aclient:
        assert (await aclient.complete("Hi")).text == client.complete("Hi").text


def test_the_clients_timeout_holds_where_a_call_names_none(address: str, servicer: Scripted) -> None:
    servicer.script = servicer.silent
    with Client(address, timeout=0.2) as client, pytest.raises(errors.DeadlineExceeded):
        client.complete("Hi")


def test_tokens_before_an_error_are_given_and_nothing_is_run_twice(client: Client, servicer: Scripted) -> None:
    def breaks(request, context):
        yield started(request)
        yield delta(pb.Token(id=1, text="a", step=1))
        context.abort(grpc.StatusCode.UNAVAILABLE, "the server is going down")

    servicer.script = breaks
    stream = client.generate("Hi")
    assert next(stream).text == "a"
    with pytest.raises(errors.Unavailable, match="going down"):
        next(stream)
    assert len(servicer.asked) == 1


def test_a_stream_without_its_last_message_is_an_error(client: Client, servicer: Scripted) -> None:
    def cut(request, context):
        yield started(request)
        yield delta(pb.Token(id=1, text="a", step=1))

    servicer.script = cut
    stream = client.generate("Hi")
    next(stream)
    with pytest.raises(errors.ServerError, match="last message"):
        next(stream)
    with pytest.raises(errors.ServerError):
        client.complete("Hi")


def test_a_closed_client_says_so(address: str) -> None:
    client = Client(address)
    client.close()
    for call in (lambda: client.generate("Hi"), client.model, client.health):
        with pytest.raises(RuntimeError, match="closed"):
            call()


async def test_a_closed_asynchronous_client_says_so(address: str) -> None:
    client = AsyncClient(address)
    await client.model()
    await client.close()
    with pytest.raises(RuntimeError, match="closed"):
        client.generate("Hi")
    with pytest.raises(RuntimeError, match="closed"):
        await client.model()


# Cancelling.


def test_leaving_the_loop_cancels_on_the_server(client: Client, servicer: Scripted) -> None:
    servicer.script = servicer.endless
    stream = client.generate("Hi")  # kept, so that it is not the collector that cancels
    for token in stream:
        if token.step == 3:
            break
    assert servicer.cancelled.wait(PATIENCE)
    with pytest.raises(errors.Cancelled):
        next(stream)


def test_an_exception_in_a_with_block_cancels_on_the_server(client: Client, servicer: Scripted) -> None:
    servicer.script = servicer.endless
    with pytest.raises(KeyError), client.generate("Hi") as stream:
        {}[next(stream)]
    assert servicer.cancelled.wait(PATIENCE)


def test_dropping_a_stream_cancels_on_the_server(client: Client, servicer: Scripted) -> None:
    servicer.script = servicer.endless
    stream = client.generate("Hi")
    next(stream)
    next(stream)
    assert not servicer.cancelled.is_set()
    del stream
    gc.collect()
    assert servicer.cancelled.wait(PATIENCE)


@pytest.mark.parametrize("script", ["endless", "silent"])
def test_closing_from_another_thread_wakes_the_reader(client: Client, servicer: Scripted, script: str) -> None:
    servicer.script = getattr(servicer, script)
    stream = client.generate("Hi")
    closer = threading.Timer(0.2, stream.close)
    closer.start()
    with pytest.raises(errors.Cancelled):
        for _ in stream:
            pass
    closer.join()
    assert servicer.cancelled.wait(PATIENCE)


def test_closing_the_client_cancels_what_runs(address: str, servicer: Scripted) -> None:
    servicer.script = servicer.endless
    client = Client(address)
    stream = client.generate("Hi")
    next(stream)
    client.close()
    with pytest.raises(errors.Cancelled):
        list(stream)
    assert servicer.cancelled.wait(PATIENCE)


def test_a_killed_client_is_noticed(address: str, servicer: Scripted) -> None:
    servicer.script = servicer.endless
    script = (
        "import sys; from cutaway import Client\nfor t in Client(sys.argv[1]).generate('Hi'): print(t.id, flush=True)"
    )
    process = subprocess.Popen([sys.executable, "-c", script, address], stdout=subprocess.PIPE)
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"1\n"
        process.kill()
    assert servicer.cancelled.wait(PATIENCE)


async def test_leaving_the_asynchronous_loop_cancels(address: str, servicer: Scripted) -> None:
    servicer.script = servicer.endless
    async with AsyncClient(address) as client:
        stream = client.generate("Hi")
        async for token in stream:
            if token.step == 3:
                break
        await until(servicer.cancelled)
        with pytest.raises(errors.Cancelled):
            await anext(stream)


async def test_dropping_an_asynchronous_stream_cancels(address: str, servicer: Scripted) -> None:
    servicer.script = servicer.endless
    async with AsyncClient(address) as client:
        stream = client.generate("Hi")
        await anext(stream)
        await anext(stream)
        assert not servicer.cancelled.is_set()
        del stream
        gc.collect()
        await until(servicer.cancelled)


@pytest.mark.parametrize("script", ["endless", "silent"])
async def test_cancelling_the_reading_task_cancels(address: str, servicer: Scripted, script: str) -> None:
    servicer.script = getattr(servicer, script)
    async with AsyncClient(address) as client:
        task = asyncio.create_task(client.complete("Hi"))
        while not servicer.asked:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(servicer.cancelled)


async def test_closing_from_another_task_wakes_the_reader(address: str, servicer: Scripted) -> None:
    servicer.script = servicer.silent
    async with AsyncClient(address) as client:
        stream = client.generate("Hi")
        reader = asyncio.create_task(anext(stream))
        while not servicer.asked:
            await asyncio.sleep(0.01)
        await stream.close()
        with pytest.raises(errors.Cancelled):
            await reader


async def until(event: threading.Event) -> None:
    assert await asyncio.to_thread(event.wait, PATIENCE)


# Trying again.


def free_address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_server_that_starts_late_is_waited_for(servicer: Scripted, kind: str) -> None:
    address = free_address()
    servers: list[grpc.Server] = []
    starter = threading.Timer(0.5, lambda: servers.append(serve(servicer, address)[0]))
    starter.start()
    try:
        assert complete(kind, address).text == "Hello wörld"
        assert len(servicer.asked) == 1
    finally:
        starter.join()
        servers[0].stop(None).wait()


def test_a_restarted_server_is_found_again(servicer: Scripted) -> None:
    server, address = serve(servicer)
    with Client(address, timeout=PATIENCE) as client:
        assert client.complete("Hi").text == "Hello wörld"
        server.stop(None).wait()
        with pytest.raises(errors.Unavailable), Client(address, retries=0) as impatient:
            impatient.model()
        again: list[grpc.Server] = []
        starter = threading.Timer(0.3, lambda: again.append(serve(servicer, address)[0]))
        starter.start()
        try:
            assert client.model().name == "tiny"
            assert client.complete("Hi").text == "Hello wörld"
        finally:
            starter.join()
            again[0].stop(None).wait()


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_unavailable_before_the_first_message_is_tried_again(address: str, servicer: Scripted, kind: str) -> None:
    def second_time(request, context):
        if len(servicer.asked) == 1:
            context.abort(grpc.StatusCode.UNAVAILABLE, "warming up")
        yield from hello(request, context)

    servicer.script = second_time
    assert complete(kind, address).text == "Hello wörld"
    assert len(servicer.asked) == 2


def test_trying_again_ends(client: Client, servicer: Scripted) -> None:
    servicer.script = aborting(grpc.StatusCode.UNAVAILABLE, "draining")
    with pytest.raises(errors.Unavailable, match="draining"):
        client.complete("Hi")
    assert len(servicer.asked) == 5


@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_an_address_says_its_port_or_is_another_way_that_grpc_knows(kind: type) -> None:
    for wrong in ("localhost", "localhost:", "localhost:http", "localhost:65536", "::1", "[::1]:0", "//x:1", "a b:1"):
        with pytest.raises(ValueError, match=f"^address: {re.escape(repr(wrong))} is not HOST:PORT"):
            kind(wrong)
    for right in (
        "localhost:1",
        "[::1]:50051",
        "h-1.example.org:65535",
        "unix:/tmp/s",
        "dns:///x:1",
        "ipv4:1.2.3.4:5",
    ):
        assert kind(right).address == right


def test_nobody_at_the_address_is_said_with_the_address(servicer: Scripted) -> None:
    address = free_address()
    began = time.monotonic()
    with Client(address) as client, pytest.raises(errors.Unavailable, match=address):
        client.model()
    assert time.monotonic() - began < PATIENCE


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_server_that_goes_away_before_its_first_message_is_not_waited_for(servicer: Scripted, kind: str) -> None:
    server, address = serve(servicer)

    def draining(request, context):
        threading.Timer(0.05, server.stop, [0]).start()
        context.abort(grpc.StatusCode.UNAVAILABLE, "draining")
        yield

    servicer.script = draining
    with pytest.raises(errors.Unavailable, match=address):
        complete(kind, address)


def test_closing_a_stream_ends_its_attempts(client: Client, servicer: Scripted) -> None:
    servicer.script = aborting(grpc.StatusCode.UNAVAILABLE, "draining")
    stream = client.generate("Hi")
    threading.Timer(0.5, stream.close).start()
    with pytest.raises(errors.Cancelled):
        next(stream)
    assert 2 <= len(servicer.asked) < 5


def test_attempts_share_the_timeout(client: Client, servicer: Scripted) -> None:
    servicer.script = aborting(grpc.StatusCode.UNAVAILABLE, "draining")
    began = time.monotonic()
    with pytest.raises(errors.Unavailable, match="draining"):
        client.complete("Hi", timeout=0.6)
    assert time.monotonic() - began < 0.6
    assert 2 <= len(servicer.asked) < 5


def test_abort_is_never_sent_twice(client: Client, servicer: Scripted) -> None:
    with pytest.raises(errors.Unavailable, match="going down"):
        client.abort("unlucky")
    assert len(servicer.asked) == 1


def test_retries_can_be_switched_off_and_are_bounded(address: str, servicer: Scripted) -> None:
    servicer.script = aborting(grpc.StatusCode.UNAVAILABLE)
    with Client(address, retries=0) as client, pytest.raises(errors.Unavailable):
        client.complete("Hi")
    assert len(servicer.asked) == 1
    with pytest.raises(ValueError, match="retries"):
        Client(address, retries=5)


def complete(kind: str, address: str) -> cutaway.Answer:
    if kind == "sync":
        with Client(address, timeout=PATIENCE) as client:
            return client.complete("Hi")

    async def asynchronously() -> cutaway.Answer:
        async with AsyncClient(address, timeout=PATIENCE) as client:
            return await client.complete("Hi")

    return asyncio.run(asynchronously())
