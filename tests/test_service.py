"""The service against a real server on a real port, a tiny random model behind it, transformers as the oracle."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from cutaway.v1 import inference_pb2 as v1
from cutaway_server.errors import CutawayError, EngineFailed, QueueFull
from cutaway_server.service.status import CODES, status_of
from google.protobuf import descriptor_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from serving import LiveServer, asking, deltas, eventually, serving, stub, text_of, tokens_of
from tiny import save_tiny

PROMPT = list(range(40, 60))
SLOW_READER = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 65_535)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    path = tmp_path_factory.mktemp("models") / "tiny"
    return path, save_tiny("llama", path)


@pytest.fixture(scope="module")
def live(tiny: tuple[Path, Any]) -> Iterator[LiveServer]:
    with serving(tiny[0], served_name="tiny") as server:
        yield server


@pytest.fixture
def client(live: LiveServer) -> Iterator[Any]:
    with stub(live.address) as inference:
        yield inference
    assert eventually(live.is_clean), "a test leaves no page taken"


def greedy(model: Any, prompt: list[int], n: int) -> list[int]:
    """What transformers says, token by token, with no cache of its own."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(n):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def kinds(responses: list[v1.GenerateResponse]) -> list[str]:
    return [str(response.WhichOneof("event")) for response in responses]


def status(call: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as raised:
        list(call)
    return raised.value.code(), raised.value.details()


def test_a_stream_starts_with_started_ends_with_finished_and_says_what_transformers_says(
    client: Any, tiny: tuple[Path, Any]
) -> None:
    responses = list(client.Generate(asking(PROMPT, max_tokens=24)))
    assert kinds(responses) == ["started", *["delta"] * (len(responses) - 2), "finished"]
    assert tokens_of(responses) == greedy(tiny[1], PROMPT, 24)
    started, finished = responses[0].started, responses[-1].finished
    assert (started.prompt_tokens, started.dtype) == (20, "F32")
    assert started.kernels == "reference" or started.kernels.startswith("cpu-")
    assert len(started.model_hash) == 32
    assert finished.completions[0].finish_reason == v1.FINISH_REASON_LENGTH
    assert finished.completions[0].completion_tokens == finished.usage.completion_tokens == 24
    assert finished.usage.prompt_tokens == 20
    assert 0 < finished.timings.prefill_seconds < 30
    steps = [token.step for delta in deltas(responses) for token in delta.tokens]
    assert steps == sorted(set(steps))


def test_deltas_join_to_the_text_of_their_tokens(client: Any) -> None:
    responses = list(client.Generate(asking("The capital of France", max_tokens=32, temperature=1.5, seed=7)))
    whole = client.Detokenize(
        v1.DetokenizeRequest(token_ids=v1.TokenIds(ids=tokens_of(responses)), skip_special_tokens=True)
    )
    assert text_of(responses) == whole.text
    for delta in deltas(responses):
        assert delta.text == "".join(token.text for token in delta.tokens)


def test_the_model_is_described(client: Any, live: LiveServer, tiny: tuple[Path, Any]) -> None:
    model = client.GetModel(v1.GetModelRequest())
    assert model.name == "tiny"
    assert (model.architecture.family, model.architecture.n_layers, model.architecture.d_vocab) == ("llama", 3, 512)
    assert (model.architecture.n_heads, model.architecture.n_kv_heads) == (4, 2)
    assert model.architecture.n_parameters == sum(p.numel() for p in tiny[1].parameters())
    assert list(model.architecture.windows) == [0, 0, 0]
    assert (model.limits.max_context, model.limits.page_size, model.limits.max_n) == (512, 16, 64)
    assert model.limits.total_pages == live.engine.scheduler.pool.capacity
    assert (model.text.bos_token_id, list(model.text.eos_token_ids)) == (0, [1])
    assert "im_start" in model.text.chat_template
    assert not model.default_sampling.HasField("temperature")


def test_health_is_told_for_the_server_and_the_service(live: LiveServer) -> None:
    with grpc.insecure_channel(live.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for name in ("", "cutaway.v1.Inference", "cutaway.v1.Introspection"):
            assert health.Check(health_pb2.HealthCheckRequest(service=name)).status == 1  # SERVING
        with pytest.raises(grpc.RpcError) as raised:
            health.Check(health_pb2.HealthCheckRequest(service="nobody"))
        assert raised.value.code() is grpc.StatusCode.NOT_FOUND
        known = "'', 'cutaway.v1.Inference', 'cutaway.v1.Introspection'"
        assert raised.value.details() == f"service: 'nobody' is not served; there are {known}"


def test_reflection_lists_the_services_and_hands_out_the_contract(live: LiveServer) -> None:
    asked = [
        reflection_pb2.ServerReflectionRequest(list_services=""),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol="cutaway.v1.Inference"),
    ]
    with grpc.insecure_channel(live.address) as channel:
        answers = list(reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter(asked)))
    names = {service.name for service in answers[0].list_services_response.service}
    assert {"cutaway.v1.Inference", "grpc.health.v1.Health"} <= names
    file = descriptor_pb2.FileDescriptorProto.FromString(answers[1].file_descriptor_response.file_descriptor_proto[0])
    assert file.service[0].method[0].name == "Generate"


def test_n_completions_come_by_index_and_repeat_with_their_seed(client: Any) -> None:
    request = asking(PROMPT, n=4, max_tokens=12, temperature=1.0, seed=11)
    first, second = (list(client.Generate(request)) for _ in range(2))
    completions = [tokens_of(first, index) for index in range(4)]
    assert completions == [tokens_of(second, index) for index in range(4)]
    assert len({tuple(tokens) for tokens in completions}) == 4
    assert [c.index for c in first[-1].finished.completions] == [0, 1, 2, 3]
    assert first[-1].finished.usage.completion_tokens == 48
    assert first[0].started.seed == 11


def test_a_seed_is_drawn_and_told_if_none_is_given(client: Any) -> None:
    first = list(client.Generate(asking(PROMPT, max_tokens=8, temperature=1.0)))
    again = list(client.Generate(asking(PROMPT, max_tokens=8, temperature=1.0, seed=first[0].started.seed)))
    assert tokens_of(first) == tokens_of(again)


def test_log_probabilities_are_those_of_transformers(client: Any, tiny: tuple[Path, Any]) -> None:
    responses = list(client.Generate(asking(PROMPT, max_tokens=3, logprobs=5, prompt_logprobs=2)))
    assert kinds(responses)[:2] == ["started", "prompt_logprobs"]
    ids = PROMPT + tokens_of(responses)
    with torch.no_grad():
        expected = torch.log_softmax(tiny[1](torch.tensor([ids])).logits[0], -1)
    scored = [token for r in responses for token in r.prompt_logprobs.tokens]
    assert [token.id for token in scored] == PROMPT[1:]
    assert responses[1].prompt_logprobs.position == 1
    made = [token for delta in deltas(responses) for token in delta.tokens]
    for position, (token, n_top) in enumerate([(t, 2) for t in scored] + [(t, 5) for t in made]):
        assert math.isclose(token.logprob, expected[position, token.id], abs_tol=1e-4)
        values, top = expected[position].topk(n_top)
        assert [likely.id for likely in token.top_logprobs] == top.tolist()
        assert torch.allclose(torch.tensor([t.logprob for t in token.top_logprobs]), values, atol=1e-4)


def test_echo_is_the_first_delta_of_every_completion(client: Any) -> None:
    request = asking("What is the capital?", max_tokens=4, n=2, temperature=1.0, ask_echo=True, prompt_logprobs=0)
    responses = list(client.Generate(request))
    prompt = list(client.Tokenize(v1.TokenizeRequest(text="What is the capital?")).ids)
    for index in range(2):
        echo = deltas(responses, index)[0]
        assert [token.id for token in echo.tokens] == prompt
        assert echo.text == "What is the capital?"  # BOS is a special token
        assert {token.step for token in echo.tokens} == {0}
        assert [token.HasField("logprob") for token in echo.tokens] == [False, *[True] * (len(prompt) - 1)]
        assert len(tokens_of(responses, index)) == len(prompt) + 4
    assert responses[-1].finished.usage.completion_tokens == 8


@pytest.mark.parametrize("echo", [True, False])
def test_a_character_that_begins_in_the_prompt_ends_in_the_completion(client: Any, echo: bool) -> None:
    tokens = [client.Tokenize(v1.TokenizeRequest(text=text, add_special_tokens=False)).ids for text in ("è", "x")]
    (lead, grave), (x,) = tokens
    request = asking([x, lead], max_tokens=2, logit_bias={grave: 100}, ask_echo=echo, n=2)
    responses = list(client.Generate(request))
    for index in range(2):
        made = tokens_of(responses, index)
        assert made == [*([x, lead] if echo else []), grave, grave]
        assert text_of(responses, index) == ("xè\ufffd" if echo else "è\ufffd")


def test_max_tokens_0_scores_the_prompt_and_says_nothing(client: Any) -> None:
    responses = list(client.Generate(asking(PROMPT, max_tokens=0, prompt_logprobs=1)))
    assert "delta" not in kinds(responses)
    assert sum(len(r.prompt_logprobs.tokens) for r in responses) == 19
    assert responses[-1].finished.completions[0].finish_reason == v1.FINISH_REASON_LENGTH


def test_a_stop_text_ends_its_completion_is_cut_off_and_frees_the_rest(client: Any, live: LiveServer) -> None:
    plain = list(client.Generate(asking(PROMPT, max_tokens=400)))
    text = text_of(plain)
    stop = next(text[at : at + 3] for at in range(30, len(text)) if text[at : at + 3].isascii())
    responses = list(client.Generate(asking(PROMPT, max_tokens=400, stop=["never said", stop])))
    ended = responses[-1].finished.completions[0]
    assert text_of(responses) == text[: text.index(stop)]
    assert (ended.finish_reason, ended.stop) == (v1.FINISH_REASON_STOP, stop)
    assert ended.completion_tokens == len(tokens_of(responses)) < 100
    assert tokens_of(responses) == tokens_of(plain)[: ended.completion_tokens]


def test_a_stop_token_ends_its_completion_and_is_told(client: Any) -> None:
    tokens = tokens_of(list(client.Generate(asking(PROMPT, max_tokens=20))))
    stop = tokens[10]
    responses = list(client.Generate(asking(PROMPT, max_tokens=20, stop_token_ids=[stop])))
    ended = responses[-1].finished.completions[0]
    assert (ended.finish_reason, ended.WhichOneof("stopped_by")) == (v1.FINISH_REASON_STOP, "stop_token_id")
    assert (ended.stop_token_id, tokens_of(responses)) == (stop, tokens[: tokens.index(stop) + 1])
    assert deltas(responses)[-1].tokens[-1].text == ""


def test_abort_ends_a_running_stream_with_abort(client: Any) -> None:
    call = client.Generate(asking(PROMPT, ask_request_id="one"))
    responses = [next(call), next(call)]
    client.Abort(v1.AbortRequest(request_id="one"))
    responses += list(call)
    assert responses[-1].finished.completions[0].finish_reason == v1.FINISH_REASON_ABORT
    assert responses[-1].finished.usage.completion_tokens == len(tokens_of(responses)) < 480
    with pytest.raises(grpc.RpcError) as raised:
        client.Abort(v1.AbortRequest(request_id="one"))
    assert raised.value.code() is grpc.StatusCode.NOT_FOUND


def test_abort_ends_a_request_whose_prompt_is_still_being_tokenised(client: Any, live: LiveServer) -> None:
    workers, busy = live.server._workers, threading.Event()
    for _ in range(2):  # as many as there are threads
        asyncio.run_coroutine_threadsafe(workers.run(busy.wait), live.loop)
    call = client.Generate(asking(PROMPT, n=2, ask_request_id="early"))
    try:
        assert eventually(lambda: workers._taken.total() == 3)
        code, message = status(client.Generate(asking(PROMPT, ask_request_id="early")))
        assert (code, "'early' is already running" in message) == (grpc.StatusCode.ALREADY_EXISTS, True)
        client.Abort(v1.AbortRequest(request_id="early"))
        client.Abort(v1.AbortRequest(request_id="early"))
    finally:
        busy.set()
    responses = list(call)
    assert kinds(responses) == ["started", "finished"]
    assert responses[0].started.prompt_tokens == len(PROMPT)
    reasons = [completion.finish_reason for completion in responses[1].finished.completions]
    assert reasons == [v1.FINISH_REASON_ABORT] * 2
    with pytest.raises(grpc.RpcError) as raised:
        client.Abort(v1.AbortRequest(request_id="early"))
    assert raised.value.code() is grpc.StatusCode.NOT_FOUND
    refused = client.Generate(asking([9999], ask_request_id="early"))
    assert status(refused)[0] is grpc.StatusCode.INVALID_ARGUMENT
    assert not live.server.desk._arriving, "a request that was refused keeps no name"


def test_a_running_name_is_refused_and_free_again_afterwards(client: Any) -> None:
    call = client.Generate(asking(PROMPT, ask_request_id="mine"))
    next(call)
    code, message = status(client.Generate(asking(PROMPT, ask_request_id="mine")))
    assert (code, "'mine' is already running" in message) == (grpc.StatusCode.ALREADY_EXISTS, True)
    call.cancel()
    assert eventually(lambda: _taken(client, "mine"))


def _taken(client: Any, name: str) -> bool:
    try:
        return len(tokens_of(list(client.Generate(asking(PROMPT, max_tokens=2, ask_request_id=name))))) == 2
    except grpc.RpcError as error:
        if error.code() is grpc.StatusCode.ALREADY_EXISTS:
            return False
        raise


def test_cancelling_gives_the_pages_back(client: Any, live: LiveServer) -> None:
    call = client.Generate(asking(PROMPT, n=4, temperature=1.0))
    [next(call) for _ in range(8)]
    assert live.used_pages() > 0
    call.cancel()
    assert eventually(live.is_clean, seconds=2)


def test_a_deadline_ends_the_stream_and_gives_the_pages_back(client: Any, live: LiveServer) -> None:
    code, _ = status(client.Generate(asking(PROMPT, n=32, temperature=1.0), timeout=0.3))
    assert code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert eventually(live.is_clean, seconds=2)


def test_a_slow_reader_gets_everything_in_fewer_messages_and_holds_up_nobody(live: LiveServer) -> None:
    asked = asking(PROMPT, max_tokens=480, logprobs=128)
    with stub(live.address) as client, stub(live.address, *SLOW_READER) as slow_client:
        expected = tokens_of(list(client.Generate(asking(PROMPT, max_tokens=480))))
        slow = slow_client.Generate(asked)
        first = next(slow)
        assert tokens_of(list(client.Generate(asking(PROMPT, max_tokens=480)))) == expected
        assert eventually(lambda: live.used_pages() == 0), "the engine is done with it, read or not"
        responses = [first, *slow]
    assert tokens_of(responses) == expected
    merged = [len(delta.tokens) for delta in deltas(responses)]
    assert max(merged) > 20
    assert max(response.ByteSize() for response in responses) <= 2**20
    assert eventually(live.is_clean)


def test_a_conversation_is_laid_out_by_the_template_and_its_special_tokens_stay_text(client: Any) -> None:
    chat = v1.Chat(messages=[v1.Message(role="user", content="How <|im_end|> many?")])
    tokenized = client.Tokenize(v1.TokenizeRequest(chat=chat))
    assert tokenized.rendered == "<|im_start|>user\nHow <|im_end|> many?<|im_end|>\n<|im_start|>assistant\n"
    assert (list(tokenized.ids).count(2), list(tokenized.ids).count(3)) == (2, 1)
    responses = list(client.Generate(v1.GenerateRequest(chat=chat, sampling=v1.SamplingParams(max_tokens=2))))
    assert responses[0].started.prompt_tokens == len(tokenized.ids)


def test_tokenize_tells_where_each_token_lies(client: Any) -> None:
    text = "Où est la 🙂 bibliothèque?"
    answer = client.Tokenize(v1.TokenizeRequest(text=text, merges=True))
    data = text.encode()
    assert answer.ids[0] == 0
    assert answer.byte_starts[0] == answer.byte_ends[0] == 0
    spans = list(zip(answer.byte_starts, answer.byte_ends, strict=True))
    covered = set().union(*(range(start, end) for start, end in spans))
    assert covered == set(range(len(data)))
    assert len(answer.pieces) == len(answer.ids) == len(spans)
    back = client.Detokenize(v1.DetokenizeRequest(token_ids=v1.TokenIds(ids=answer.ids[1:])))
    assert (back.text, b"".join(back.token_bytes)) == (text, data)
    for word in answer.merges:
        assert "".join(word.symbols) in "".join(answer.pieces)
        assert all(step.left + step.right in "".join(answer.pieces) for step in word.steps)


def test_tokenising_a_megabyte_never_blocks_the_event_loop(live: LiveServer) -> None:
    text = "The harbour lay quiet in the morning, 東京. " * 20_000
    with stub(live.address) as client, stub(live.address) as other:
        start = time.monotonic()
        slow = client.Tokenize.future(v1.TokenizeRequest(text=text))
        longest = 0.0
        while not slow.done():
            before = time.monotonic()
            other.GetModel(v1.GetModelRequest())
            longest = max(longest, time.monotonic() - before)
        took = time.monotonic() - start
        code, message = slow.code(), slow.details()
    assert (code, "send it in parts" in message) == (grpc.StatusCode.INVALID_ARGUMENT, True)
    print(f"tokenised for {took:.2f} s; the longest call beside it took {longest:.3f} s")
    assert longest < took / 4


def test_requests_over_the_queue_are_refused_with_a_time_to_wait(tiny: tuple[Path, Any]) -> None:
    with serving(tiny[0], pace=0.004, max_running=1, max_queued=2) as live, stub(live.address) as client:
        calls = []
        for i in range(3):
            calls.append(client.Generate(asking(PROMPT, ask_request_id=f"r{i}")))
            assert eventually(lambda: f"r{len(calls) - 1}" in live.server.desk.names)
        with pytest.raises(grpc.RpcError) as raised:
            list(client.Generate(asking(PROMPT)))
        assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert int(dict(raised.value.trailing_metadata())["retry-after-ms"]) > 0

        calls[1].cancel()  # while it waits
        client.Abort(v1.AbortRequest(request_id="r2"))  # likewise
        waited = list(calls[2])
        assert kinds(waited) == ["started", "finished"]
        assert waited[-1].finished.completions[0].finish_reason == v1.FINISH_REASON_ABORT
        assert eventually(lambda: live.server.desk.names == {"r0"})
        assert len(tokens_of(list(calls[0]))) == 512 - len(PROMPT)
        assert eventually(live.is_clean)


def test_texts_wait_to_be_tokenised_in_as_many_places_as_requests_may_run_and_wait(tiny: tuple[Path, Any]) -> None:
    options = {"max_running": 8, "max_queued": 1, "tokenizer_threads": 1}
    with serving(tiny[0], **options) as live, stub(live.address) as client:
        busy, workers = threading.Event(), live.server._workers
        blocked = asyncio.run_coroutine_threadsafe(workers.run(busy.wait), live.loop)
        calls = [client.Generate(asking("hello", max_tokens=4)) for _ in range(8)]
        try:
            assert eventually(lambda: workers._taken.total() == 9)
            with pytest.raises(grpc.RpcError) as raised:
                client.Tokenize(v1.TokenizeRequest(text="one too many"))
        finally:
            busy.set()
        assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert int(dict(raised.value.trailing_metadata())["retry-after-ms"]) > 0
        assert [len(tokens_of(list(call))) for call in calls] == [4] * 8, "as many as run at once"
        assert blocked.result(10)
        assert client.GetModel(v1.GetModelRequest()).limits.max_n == 8


def test_empty_text_has_the_tokens_that_are_added_and_no_more(client: Any) -> None:
    assert list(client.Tokenize(v1.TokenizeRequest(text="")).ids) == [0]
    nothing = client.Tokenize(v1.TokenizeRequest(text="", add_special_tokens=False, merges=True))
    assert (list(nothing.ids), list(nothing.merges)) == ([], [])
    assert next(iter(client.Generate(asking("", max_tokens=1)))).started.prompt_tokens == 1


def test_a_reader_who_never_reads_is_cut_off_at_the_backlog(tiny: tuple[Path, Any]) -> None:
    with serving(tiny[0], max_backlog=2**17) as live, stub(live.address, *SLOW_READER) as client:
        call = client.Generate(asking(PROMPT, logprobs=128))
        next(call)
        assert eventually(lambda: live.used_pages() == 0)
        code, message = status(call)
        assert (code, "not read" in message) == (grpc.StatusCode.RESOURCE_EXHAUSTED, True)
        assert eventually(live.is_clean)


def test_an_engine_that_fails_ends_every_stream_with_internal_and_takes_no_more(tiny: tuple[Path, Any]) -> None:
    with serving(tiny[0]) as live, stub(live.address) as client:
        calls = [client.Generate(asking(PROMPT)) for _ in range(3)]
        [next(call) for call in calls]

        def explode(*_: object) -> None:
            raise RuntimeError("a secret of the engine room")

        live.engine.model.forward = explode  # type: ignore[method-assign,assignment]
        for call in calls:
            code, message = status(call)
            assert code is grpc.StatusCode.INTERNAL
            assert "secret" not in message
        code, message = status(client.Generate(asking(PROMPT)))
        assert (code, "secret" in message) == (grpc.StatusCode.INTERNAL, False)


def test_every_error_has_a_status_and_surprises_keep_their_words() -> None:
    def heirs(kind: type[CutawayError]) -> set[type[CutawayError]]:
        return {kind}.union(*(heirs(heir) for heir in kind.__subclasses__()))

    assert heirs(CutawayError) - {CutawayError} == set(CODES)
    surprise = status_of(KeyError("password"))
    assert (surprise.code, "password" in surprise.message) == (grpc.StatusCode.INTERNAL, False)
    assert status_of(EngineFailed("told")).message == "told"
    assert status_of(QueueFull("full", 1.5)).trailing == (("retry-after-ms", "1500"),)
