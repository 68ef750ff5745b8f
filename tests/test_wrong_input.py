"""Wrong input, each with its status and a message that names the field, the value and the rule."""

from __future__ import annotations

import math
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from cutaway.v1 import inference_pb2 as v1
from gguf import GGUFWriter
from serving import LiveServer, asking, eventually, serving, stub, tokens_of
from tiny import save_tiny

INVALID = grpc.StatusCode.INVALID_ARGUMENT
FLOATS = (
    "temperature", "top_p", "min_p", "typical_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
)  # fmt: skip
ONE = [40, 41, 42]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    save_tiny("llama", path)
    return path


@pytest.fixture(scope="module")
def live(tiny: Path) -> Iterator[LiveServer]:
    with serving(tiny, max_prompt_bytes=20_000) as server:
        yield server


@pytest.fixture(scope="module")
def client(live: LiveServer) -> Iterator[Any]:
    with stub(live.address) as inference:
        yield inference


def chat(*turns: tuple[str, str]) -> v1.GenerateRequest:
    return v1.GenerateRequest(chat=v1.Chat(messages=[v1.Message(role=r, content=c) for r, c in turns]))


REQUESTS: dict[str, tuple[v1.GenerateRequest, str]] = {
    "a text's flag with ids": (asking(ONE, ask_add_special_tokens=True), r"add_special_tokens: True .* with token_ids"),
    "a text's flag with a chat": (
        v1.GenerateRequest(chat=v1.Chat(messages=[v1.Message(role="user", content="x")]), parse_special_tokens=False),
        r"parse_special_tokens: False .* with chat",
    ),
    "no prompt": (v1.GenerateRequest(), r"prompt: None .* text, token_ids and chat"),
    "text of no tokens": (asking("", ask_add_special_tokens=False), r"prompt: '0 tokens' .* at least one token"),
    "empty ids": (asking([]), r"token_ids: '0 ids' .* at least one"),
    "empty chat": (chat(), r"chat.messages: '0 messages' .* at least one"),
    "negative id": (asking([40, -1]), r"token_ids.ids\[1\]: -1 .* \[0, 512\)"),
    "id past the vocabulary": (asking([512]), r"token_ids.ids\[0\]: 512 .* \[0, 512\)"),
    "huge id": (asking([40, 2**62]), r"token_ids.ids\[1\]: 4611686018427387904 .* \[0, 512\)"),
    "prompt of exactly the context": (asking([40] * 512), r"prompt: '512 tokens' .* context of 512: .*max_tokens"),
    "prompt of the context and one token": (
        asking([40] * 512, max_tokens=1),
        r"sampling.max_tokens: 1 .*prompt \(512 tokens\) and max_tokens must fit the context of 512",
    ),
    "prompt one over the context": (asking([40] * 513), r"token_ids: '513 ids' .* context has 512"),
    "text over the context": (asking("Ж" * 1000), r"prompt: '2001 tokens' .* context has 512"),
    "text over the bytes": (asking("a" * 20_001), r"text: '20001 bytes' .* at most 20000"),
    "chat over the bytes": (chat(("user", "a" * 20_000)), r"chat.messages: '20004 bytes' .* at most 20000"),
    "a chat of many turns": (chat(*[("user", "")] * 4097), r"chat.messages: '4097 messages' .* at most 4096"),
    "a name with spaces": (asking(ONE, ask_request_id="my request"), r"request_id: 'my request' .* 128 characters"),
    "a long name": (asking(ONE, ask_request_id="a" * 129), r"request_id: 'aaa.* 128 characters"),
    "n of 0": (asking(ONE, n=0), r"sampling.n: 0 .* \[1, 128\]"),
    "huge n": (asking(ONE, n=2**31 - 1), r"sampling.n: 2147483647 .* \[1, 128\]"),
    "n over what runs": (asking(ONE, n=100), r"sampling.n: 100 .* 64"),
    "negative max_tokens": (asking(ONE, max_tokens=-1), r"sampling.max_tokens: -1"),
    "huge max_tokens": (asking(ONE, max_tokens=2**31 - 1), r"sampling.max_tokens: 2147483647 .* context of 512"),
    "min_tokens over max_tokens": (asking(ONE, min_tokens=9, max_tokens=8), r"sampling.min_tokens: 9 .* \(8\)"),
    "top_k": (asking(ONE, top_k=-2), r"sampling.top_k: -2 .* \[-1, "),
    "logprobs": (asking(ONE, logprobs=129), r"sampling.logprobs: 129 .* \[0, 128\]"),
    "prompt_logprobs": (asking(ONE, prompt_logprobs=-1), r"sampling.prompt_logprobs: -1 .* \[0, 128\]"),
    "too many stops": (asking(ONE, stop=["a"] * 65), r"sampling.stop: '65 entries' .* at most 64"),
    "empty stop": (asking(ONE, stop=["a", ""]), r"sampling.stop\[1\]: '' .* 1 to 1024 bytes"),
    "huge stop": (asking(ONE, stop=["a" * 1025]), r"sampling.stop\[0\]: 'aaa.* 1 to 1024 bytes"),
    "too many stop ids": (asking(ONE, stop_token_ids=[1] * 1025), r"sampling.stop_token_ids: '1025 entries' .* 1024"),
    "stop id": (asking(ONE, stop_token_ids=[512]), r"sampling.stop_token_ids: 512 .* \[0, 512\)"),
    "too many biases": (
        asking(ONE, logit_bias=dict.fromkeys(range(1025), 1.0)),
        r"sampling.logit_bias: '1025 entries' .* at most 1024",
    ),
    "bias of no token": (asking(ONE, logit_bias={512: 1.0}), r"sampling.logit_bias: 512 .* \[0, 512\)"),
    "huge bias": (asking(ONE, logit_bias={5: 101.0}), r"sampling.logit_bias\[5\]: 101.0 .* \[-100, 100\]"),
    "bias NaN": (asking(ONE, logit_bias={5: math.nan}), r"sampling.logit_bias\[5\]: nan .* finite"),
    "bias infinite": (asking(ONE, logit_bias={5: -math.inf}), r"sampling.logit_bias\[5\]: -inf .* finite"),
    "too many bad words": (asking(ONE, bad_words=["a"] * 129), r"sampling.bad_words: '129 entries' .* at most 128"),
    "empty bad word": (asking(ONE, bad_words=[""]), r"sampling.bad_words\[0\]: '' .* 1 to 256 bytes"),
    "long bad word": (asking(ONE, bad_words=["x" * 257]), r"sampling.bad_words\[0\]: 'xxx.* 1 to 256 bytes"),
    "bad word of many tokens": (asking(ONE, bad_words=["ok", "Ж" * 100]), r"sampling.bad_words\[1\]: .* 64 tokens"),
    "echo of too much": (asking([40] * 500, n=64, ask_echo=True, prompt_logprobs=128), r"echo: True .* n=64"),
    **{
        f"{name} {value}": (asking(ONE, **{name: value}), rf"sampling.{name}: {value} .* finite number in [\[\(]")
        for name in FLOATS
        for value in (math.nan, math.inf, -math.inf, -3.0, 101.0)
    },
}


@pytest.mark.parametrize("case", REQUESTS)
def test_a_wrong_request_is_told_its_field_value_and_rule(client: Any, case: str) -> None:
    request, told = REQUESTS[case]
    with pytest.raises(grpc.RpcError) as raised:
        list(client.Generate(request))
    assert raised.value.code() is INVALID
    assert re.match(told, raised.value.details()), raised.value.details()
    assert len(raised.value.details()) < 300


def test_after_all_that_nothing_is_taken_and_the_next_answer_comes(client: Any, live: LiveServer) -> None:
    assert len(tokens_of(list(client.Generate(asking(ONE, max_tokens=5))))) == 5
    assert eventually(live.is_clean)


def test_a_prompt_of_exactly_the_context_can_be_scored(client: Any) -> None:
    responses = list(client.Generate(asking([40] * 512, max_tokens=0, prompt_logprobs=0)))
    assert sum(len(r.prompt_logprobs.tokens) for r in responses) == 511


def test_a_prompt_of_one_under_the_context_makes_one_token(client: Any) -> None:
    assert len(tokens_of(list(client.Generate(asking([40] * 511))))) == 1


@pytest.mark.parametrize(
    ("method", "request_", "told"),
    [
        ("Tokenize", v1.TokenizeRequest(), r"input: None .* text and chat"),
        ("Tokenize", v1.TokenizeRequest(text="a" * 20_001), r"text: '20001 bytes' .* at most 20000"),
        ("Detokenize", v1.DetokenizeRequest(token_ids=v1.TokenIds(ids=[5, 512])), r"token_ids.ids\[1\]: 512 .* 512\)"),
        (
            "Detokenize",
            v1.DetokenizeRequest(token_ids=v1.TokenIds(ids=[5] * (2**18 + 1))),
            r"token_ids: '262145 ids' .* at most 262144 .* in parts",
        ),
        ("Detokenize", v1.DetokenizeRequest(token_ids=v1.TokenIds(ids=[-1])), r"token_ids.ids\[0\]: -1 .* 512\)"),
    ],
)
def test_wrong_texts_and_ids_are_told_likewise(client: Any, method: str, request_: Any, told: str) -> None:
    with pytest.raises(grpc.RpcError) as raised:
        getattr(client, method)(request_)
    assert raised.value.code() is INVALID
    assert re.match(told, raised.value.details()), raised.value.details()


INFERENCE = "/cutaway.v1.Inference/"
METHODS = [
    *(INFERENCE + method.name for method in v1.DESCRIPTOR.services_by_name["Inference"].methods),
    *("/grpc.health.v1.Health/" + name for name in ("Check", "Watch")),
    "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
]
NO_MESSAGES = [(method, data) for method in METHODS for data in (b"\xff\xff\xff", b"\x12\x7f")]
NOT_UTF8 = [(INFERENCE + "Generate", b"\x12\x02\xff\xfe"), (INFERENCE + "Tokenize", b"\x0a\x02\xff\xfe")]


def test_bytes_that_are_no_message_are_refused_by_every_method_in_one_line_of_the_log(
    live: LiveServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    with grpc.insecure_channel(live.address) as channel:
        for method, data in NO_MESSAGES + NOT_UTF8:
            with pytest.raises(grpc.RpcError) as raised:
                list(channel.stream_stream(method)(iter([data]), timeout=20))
            told = (
                rf"message: '{len(data)} bytes' is not allowed: must be an encoded \S+Request with its texts in UTF-8"
            )
            assert raised.value.code() is INVALID, method
            assert re.fullmatch(told, raised.value.details()), raised.value.details()
    assert len(caplog.records) == len(NO_MESSAGES + NOT_UTF8)
    assert not any(record.exc_info for record in caplog.records)


def test_a_message_over_the_limit_is_refused(tiny: Path) -> None:
    with serving(tiny, max_message_bytes=10_000) as live, stub(live.address) as client:
        with pytest.raises(grpc.RpcError) as raised:
            list(client.Generate(asking("a" * 20_000)))
        assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_models_that_cannot_be_served_are_refused_at_start_in_one_line(tiny: Path, tmp_path: Path) -> None:
    truncated = shutil.copytree(tiny, tmp_path / "truncated")
    weights = truncated / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    gguf = tmp_path / "truncated.gguf"
    writer = GGUFWriter(gguf, "llama")
    writer.add_tensor("token_embd.weight", np.zeros((64, 64), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    gguf.write_bytes(gguf.read_bytes()[:-1000])
    expected = {
        "no-such-model": r"there is no model 'no-such-model'",
        str(truncated): r"model.safetensors.*",
        str(gguf): r"truncated.gguf.*",
    }
    command = [sys.executable, "-m", "cutaway_server", "--listen", "127.0.0.1:0", "--metrics-listen", "none"]
    command += ["--log-level", "error", "--model"]
    started = {
        model: subprocess.Popen([*command, model], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for model in expected
    }
    for model, process in started.items():
        output, log = process.communicate(timeout=120)
        assert (process.returncode, output) == (2, ""), log
        assert log.startswith("cutaway-server: ")
        assert re.search(expected[model], log), log
        assert log.count("\n") == 1, log
