"""The client and the command line against Cutaway's own server, serving a tiny model: what they promise together."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from cutaway import AsyncClient, Client, Health, errors
from cutaway.cli import main
from serving import LiveServer, eventually, serving
from tiny import save_tiny

PROMPT = list(range(40, 77))
TEXT = "The lighthouse köeper 🙂 said hello."


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    path = tmp_path_factory.mktemp("models") / "tiny"
    return path, save_tiny("llama", path)


@pytest.fixture(scope="module")
def live(tiny: tuple[Path, Any]) -> Iterator[LiveServer]:
    with serving(tiny[0], pace=0.003) as live:  # a tiny model is too quick to be caught at work
        yield live


@pytest.fixture
def client(live: LiveServer) -> Iterator[Client]:
    with Client(live.address, timeout=30) as client:
        yield client
    assert eventually(live.is_clean), "pages were not given back"


@torch.no_grad()
def greedy(model: Any, prompt: list[int], n: int) -> tuple[int, ...]:
    ids = torch.tensor([prompt])
    for _ in range(n):
        ids = torch.cat([ids, model(ids).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    return tuple(ids[0, len(prompt) :].tolist())


async def test_both_clients_and_the_command_line_get_what_transformers_says(live, client, tiny) -> None:
    expected = greedy(tiny[1], PROMPT, 12)
    options: dict[str, Any] = {"max_tokens": 12, "temperature": 0, "ignore_eos": True}
    assert client.complete(token_ids=PROMPT, **options).token_ids == expected
    assert tuple(token.id for token in client.generate(token_ids=PROMPT, **options)) == expected
    async with AsyncClient(live.address, timeout=30) as aclient:
        assert (await aclient.complete(token_ids=PROMPT, **options)).token_ids == expected
    args = ["--max-tokens", "12", "--temperature", "0", "--ignore-eos", "--json"]
    ids = ",".join(map(str, PROMPT))
    result = CliRunner(env={"CUTAWAY_ADDRESS": live.address}).invoke(main, ["generate", "--token-ids", ids, *args])
    assert tuple(json.loads(result.stdout)["token_ids"]) == expected


def test_a_second_request_finds_the_prompt_in_the_cache(client: Client) -> None:
    prompt = [*reversed(PROMPT), 9]
    first, second = (client.complete(token_ids=prompt, max_tokens=2, temperature=0) for _ in range(2))
    assert (first.usage.cached_tokens, second.usage.cached_tokens) == (0, 32)  # two full pages of 16
    assert second.started.cached_tokens == 32
    assert first.token_ids == second.token_ids
    third = client.complete(token_ids=prompt, max_tokens=2, prefix_caching=False)
    assert third.usage.cached_tokens == 0


def test_steps_and_figures_are_told(client: Client) -> None:
    answer = client.complete(TEXT, max_tokens=6, ignore_eos=True, seed=4, logprobs=2, prompt_logprobs=1)
    steps = [token.step for token in answer.tokens]
    assert steps == list(range(steps[0], steps[0] + 6))
    assert answer.started.seed == 4
    assert answer.usage.prompt_tokens == len(client.tokenize(TEXT).ids) == len(answer.prompt_logprobs or ()) + 1
    assert all(len(token.top_logprobs) == 2 for token in answer.tokens)
    assert answer.finish_reason == "length"
    assert answer.timings.prefill_seconds > 0


def test_several_completions_repeat_with_their_seed(client: Client) -> None:
    first, second = (client.complete(TEXT, n=3, seed=11, max_tokens=8, temperature=2) for _ in range(2))
    assert [c.token_ids for c in first.completions] == [c.token_ids for c in second.completions]
    assert len({c.token_ids for c in first.completions}) == 3
    assert [c.index for c in first.completions] == [0, 1, 2]


def test_the_server_takes_every_keyword_at_once(client: Client) -> None:
    answer = client.complete(
        messages=[{"role": "user", "content": "Hi"}],
        temperature=0.7, top_k=50, top_p=0.9, min_p=0.01, typical_p=0.95, repetition_penalty=1.1,
        presence_penalty=0.1, frequency_penalty=0.1, logit_bias={5: -1.0}, bad_words=["bad"], seed=1, stop=["\0"],
        stop_token_ids=[7], min_tokens=2, max_tokens=4, ignore_eos=False, n=2, logprobs=1, prompt_logprobs=1,
        add_generation_prompt=True, echo=True, skip_special_tokens=False, prefix_caching=True, request_id="all.of-it:1",
    )  # fmt: skip
    assert answer.request_id == "all.of-it:1"
    echoed = [token for token in answer.tokens if token.step == 0]
    assert len(echoed) == answer.usage.prompt_tokens
    assert answer.text.startswith("<|im_start|>user\nHi")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"temperature": float("nan")}, "temperature"),
        ({"n": 0}, r"sampling\.n"),
        ({"max_tokens": 10_000}, "max_tokens"),
        ({"stop": [""]}, "stop"),
        ({"logit_bias": {-1: 1.0}}, "logit_bias"),
        ({"request_id": "a b"}, "request_id"),
    ],
)
def test_what_breaks_a_rule_is_refused_by_name(client: Client, options: dict[str, Any], says: str) -> None:
    with pytest.raises(errors.InvalidArgument, match=says):
        client.complete("Hi", **options)


@pytest.mark.parametrize("leave", ["break", "close", "drop"])
def test_whoever_leaves_gives_the_pages_back(live: LiveServer, client: Client, leave: str) -> None:
    stream = client.generate(token_ids=PROMPT, max_tokens=400, ignore_eos=True)
    next(stream)
    assert live.used_pages() > 0
    if leave == "break":
        for _ in stream:
            break
    elif leave == "close":
        stream.close()
    else:
        del stream
        gc.collect()
    assert eventually(live.is_clean, 2)


def test_abort_ends_a_stream_that_says_so(client: Client) -> None:
    stream = client.generate(token_ids=PROMPT, max_tokens=400, ignore_eos=True, request_id="mine")
    next(stream)
    with pytest.raises(errors.AlreadyExists):
        client.complete("Hi", request_id="mine")
    client.abort("mine")
    assert len(list(stream)) < 400
    assert stream.completions is not None
    assert stream.completions[0].finish_reason == "abort"
    with pytest.raises(errors.NotFound):
        client.abort("mine")


def test_tokens_lie_where_they_say_and_turn_back_into_the_text(client: Client) -> None:
    tokens = client.tokenize(TEXT, add_special_tokens=False, merges=True)
    told = client.detokenize(tokens.ids)
    assert told.text == TEXT
    data = TEXT.encode()
    assert tuple(data[start:end] for start, end in tokens.offsets) == told.token_bytes
    assert sum(len(word.symbols) - len(word.steps) for word in tokens.merges) == len(tokens.ids)
    drawn = CliRunner().invoke(main, ["tokenize", TEXT, "--merges", "--address", client.address])
    assert drawn.exit_code == 0, drawn.stderr


def test_the_model_is_the_one_that_is_served(client: Client, tiny: tuple[Path, Any]) -> None:
    model = client.model()
    assert model.architecture.n_parameters == sum(p.numel() for p in tiny[1].parameters())
    assert (model.architecture.n_layers, model.limits.max_context, model.dtype) == (3, 512, "F32")
    assert model.text.bos_token_id == 0
    assert client.health() is client.health("cutaway.v1.Inference") is Health.SERVING
    with pytest.raises(errors.NotFound):
        client.health("no.such.Service")
    shown = CliRunner().invoke(main, ["model", "--address", client.address]).stdout
    assert f"{model.architecture.n_parameters:,}" in shown


def test_chat_goes_through_the_template(live: LiveServer) -> None:
    arguments = ["chat", "--max-tokens", "4", "--temperature", "0", "--address", live.address]
    result = CliRunner().invoke(main, arguments, input="Hi\nMore\n")
    assert result.exit_code == 0, result.stderr


async def test_an_aborted_streams_tokens_join_to_its_text_whatever_it_held_back(live: LiveServer) -> None:
    with Client(live.address, timeout=30) as client:
        (token,) = client.tokenize("a", add_special_tokens=False).ids
        held: Any = {"stop": "a" * 1000, "logit_bias": {token: 100}, "temperature": 0, "ignore_eos": True}
        stream = client.generate(token_ids=PROMPT, request_id="held", **held)
        tokens = [next(stream) for _ in range(5)]
        client.abort("held")
        tokens += list(stream)
        answer = stream.answer()
    assert answer.finish_reason == "abort"
    assert "".join(each.text for each in tokens) == stream.text == answer.text == "a" * len(tokens)
    assert answer.completions[0].completion_tokens == len(tokens)
    assert {each.id for each in tokens} == {token}
