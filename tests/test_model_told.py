"""What GetModel tells is what holds: every limit is kept to by the server, and one more is refused by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from cutaway import Capture, Client, Edit, InvalidArgument, Limits, Model, ResourceExhausted
from cutaway.cli import main
from secured import write_keys
from serving import LiveServer, serving
from tiny import save_tiny

IDS = [40, 41, 42]
Ask = Callable[[Client, int], Any]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    save_tiny("llama", path)
    return path


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    file = tmp_path_factory.mktemp("keys") / "keys.toml"
    made = write_keys(
        file,
        {"ann": (["generate", "introspect", "edit"], "physics")},
        '\n[[tenant]]\nname = "physics"\nmax_calls = 3\n',
    )
    return str(file), made["ann"]


@pytest.fixture(scope="module")
def live(tiny: Path, key: tuple[str, str]) -> Iterator[LiveServer]:
    bounds = {"max_prompt_bytes": 400, "max_message_bytes": 3 * 2**20, "max_running": 16, "max_streams": 17}
    with serving(tiny, api_keys=key[0], kv_dtype="int8", kv_cache_memory=2**25, **bounds) as server:
        yield server


@pytest.fixture(scope="module")
def client(live: LiveServer, key: tuple[str, str]) -> Iterator[Client]:
    with Client(live.address, api_key=key[1]) as connected:
        yield connected


@pytest.fixture(scope="module")
def told(client: Client) -> Model:
    return client.model()


def short(client: Client, **options: Any) -> Any:
    return client.complete(token_ids=IDS, max_tokens=1, **options)


HELD: dict[str, tuple[str, Ask]] = {
    "max_context": ("token_ids", lambda c, n: c.complete(token_ids=[40] * n, max_tokens=0)),
    "max_n": ("sampling.n", lambda c, n: short(c, n=n)),
    "max_logprobs": ("sampling.logprobs", lambda c, n: short(c, logprobs=n)),
    "max_prompt_bytes": ("text", lambda c, n: c.complete("a" * n, max_tokens=1)),
    "max_chat_messages": (
        "chat.messages", lambda c, n: c.tokenize(messages=[{"role": "", "content": ""}] * n)
    ),
    "max_stops": ("sampling.stop", lambda c, n: short(c, stop=[f"{i}!" for i in range(n)])),
    "max_stop_bytes": ("sampling.stop", lambda c, n: short(c, stop=["a" * n])),
    "max_stop_token_ids": ("sampling.stop_token_ids", lambda c, n: short(c, stop_token_ids=[7] * n)),
    "max_bad_words": ("sampling.bad_words", lambda c, n: short(c, bad_words=["zq"] * n)),
    "max_bad_word_bytes": ("sampling.bad_words", lambda c, n: short(c, bad_words=[("the harbour " * 99)[:n]])),
    "max_bad_word_tokens": ("sampling.bad_words", lambda c, n: short(c, bad_words=["\x00" * (n - 1)])),
    "max_logit_biases": ("sampling.logit_bias", lambda c, n: short(c, logit_bias={7 + i: 1.0 for i in range(n)})),
    "max_captures": ("captures", lambda c, n: short(c, captures=[Capture("ln_final.hook_scale")] * n)),
    "max_edits": ("edits", lambda c, n: short(c, edits=[Edit.zero("blocks.0.hook_attn_out")] * n)),
    "max_detokenized": ("token_ids", lambda c, n: c.detokenize([4] * n)),
}  # fmt: skip


def refusal(ask: Callable[[], Any]) -> str:
    """What is wrong with it; empty: nothing."""
    try:
        ask()
    except InvalidArgument as error:
        return str(error)
    return ""


@pytest.mark.parametrize("limit", HELD)
def test_as_many_as_told_are_taken_and_one_more_is_refused(client: Client, told: Model, limit: str) -> None:
    field, ask = HELD[limit]
    most = getattr(told.limits, limit)
    assert str(most) not in refusal(lambda: ask(client, most))
    assert field in (why := refusal(lambda: ask(client, most + 1)))
    assert str(most) in why


def test_larger_messages_and_more_calls_than_told_are_refused(client: Client, told: Model) -> None:
    assert told.limits.max_message_bytes == 3 * 2**20
    with pytest.raises(ResourceExhausted, match="3145728"):
        client.complete("a" * 2**22)
    assert told.limits.max_calls == 3
    streams = [client.generate(token_ids=IDS, ignore_eos=True) for _ in range(told.limits.max_calls)]
    for stream in streams:
        next(stream)
    with pytest.raises(ResourceExhausted, match="3"):
        client.tokenize("x")
    for stream in streams:
        stream.close()


def test_every_limit_of_the_wire_is_told_and_has_a_test(told: Model) -> None:
    tested = {*HELD, "max_message_bytes", "max_calls"}
    of_the_server = {"max_running", "max_queued", "max_batch_tokens", "page_size", "total_pages", "max_answer_bytes"}
    elsewhere = {"max_backlog_bytes", "max_streams", "max_capture_bytes"}  # where slow readers, abuse, captures are
    assert {*Limits.__annotations__} == tested | of_the_server | elsewhere
    assert all(getattr(told.limits, name) for name in Limits.__annotations__)
    assert (told.limits.max_streams, told.limits.max_n) == (17, 16)


def test_what_the_cache_and_the_weights_hold_is_told_by_the_model_and_by_every_stream(
    client: Client, told: Model, live: LiveServer, key: tuple[str, str]
) -> None:
    assert (told.dtype, told.quantization, told.kv_dtype) == ("F32", "none", "I8")
    started = short(client).started
    assert (started.dtype, started.quantization, started.kv_dtype) == ("F32", "none", "I8")
    shown = CliRunner().invoke(main, ["--address", live.address, "--api-key", key[1], "model"]).output
    for line in ("not rounded", "tokens in I8", "400 bytes of text", "3,145,728 bytes", "17 on a connection, 3 in all"):
        assert line in shown


def test_patterns_over_rounded_pages_are_those_of_the_attention_that_ran(client: Client) -> None:
    wanted = [Capture("blocks.*.attn.hook_pattern")]
    with client.generate(token_ids=[*range(40, 60)], max_tokens=3, ignore_eos=True, captures=wanted) as stream:
        list(stream)
    arrays = [np.asarray(array) for array in stream.captures.values()]
    assert arrays
    assert all(abs(array.sum(-1) - 1).max() < 1e-4 for array in arrays)


def test_a_server_without_keys_tells_no_limit_of_calls(tiny: Path) -> None:
    with serving(tiny, quantize="int8") as server, Client(server.address) as connected:
        served = connected.model()
    assert served.limits.max_calls is None
    assert (served.quantization, served.kv_dtype) == ("int8", "F32")
