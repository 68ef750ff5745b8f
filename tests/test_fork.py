"""Completions continued from any of their tokens, on a real server: the same pages, the same numbers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
from cutaway import AsyncClient, Client, Edit, InvalidArgument, NotFound, PermissionDenied
from secured import write_keys
from serving import eventually, serving

PROMPT = list(range(40, 77))
ASK = {"token_ids": PROMPT, "max_tokens": 40, "temperature": 0.9, "seed": 11, "ignore_eos": True, "logprobs": 2}
HOW: Any = {"temperature": 0.9, "seed": 11, "ignore_eos": True, "logprobs": 2}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    path = tmp_path_factory.mktemp("models") / "tiny"
    tiny.save_tiny("gemma3", path)
    with serving(path, max_batch_tokens=64, max_running=16) as live, Client(live.address) as client:
        yield SimpleNamespace(client=client, live=live)


def numbers(answer: Any, start: int = 0) -> list[Any]:
    return [(token.id, token.logprob, token.top_logprobs) for token in answer.completions[0].tokens[start:]]


def finished(stream: Any) -> Any:
    list(stream)
    return stream.answer()


@pytest.mark.parametrize("at", [0, 1, 11, 12, 27, 39])
def test_a_fork_goes_on_as_the_request_did_and_shares_its_pages(served: SimpleNamespace, at: int) -> None:
    whole = served.client.complete(request_id=f"whole-{at}", **ASK)
    fork = finished(served.client.fork(f"whole-{at}", at=at, max_tokens=40 - at, **HOW))
    assert numbers(fork) == numbers(whole, at), "the same bits"
    assert fork.usage.prompt_tokens == len(PROMPT) + at
    shared = (len(PROMPT) + at - 1) // 16 * 16
    assert fork.usage.cached_tokens >= shared


def test_a_running_request_is_forked_and_not_disturbed(served: SimpleNamespace) -> None:
    alone = served.client.complete(**ASK)
    stream = served.client.generate(request_id="running", **ASK)
    for _ in range(6):
        next(stream)
    fork = finished(served.client.fork("running", at=5, max_tokens=35, **HOW))
    other = finished(served.client.fork("running", at=5, max_tokens=8, temperature=0, ignore_eos=True))
    list(stream)
    assert numbers(stream.answer()) == numbers(alone)
    assert numbers(fork) == numbers(alone, 5)
    greedy = served.client.complete(
        token_ids=[*PROMPT, *alone.token_ids[:5]], max_tokens=8, temperature=0, ignore_eos=True
    )
    assert other.token_ids == greedy.token_ids
    assert eventually(served.live.is_clean)


def test_every_completion_can_be_forked_from_its_end(served: SimpleNamespace) -> None:
    both = served.client.complete(request_id="two", n=2, **ASK)
    for index, completion in enumerate(both.completions):
        ids = [*PROMPT, *(token.id for token in completion.tokens)]
        fork = finished(served.client.fork("two", index=index, max_tokens=3, temperature=0, ignore_eos=True))
        assert fork.usage.prompt_tokens == len(ids)
        plain = served.client.complete(token_ids=ids, max_tokens=3, temperature=0, ignore_eos=True)
        assert fork.token_ids == plain.token_ids


def test_edits_go_on_unless_others_are_given(served: SimpleNamespace) -> None:
    vector = np.random.default_rng(1).normal(size=64)
    steered = Edit.add("resid_post.1", vector, scale=3, positions="generated")
    whole = served.client.complete(request_id="steered", edits=[steered, Edit.override(20, 9)], **ASK)
    assert whole.token_ids[20] == 9
    fork = finished(served.client.fork("steered", at=12, max_tokens=28, **HOW))
    assert numbers(fork) == numbers(whole, 12)
    assert fork.usage.cached_tokens >= 48
    later = finished(served.client.fork("steered", at=25, max_tokens=15, **HOW))
    assert numbers(later) == numbers(whole, 25), "what was overridden before is not overridden again"
    other = Edit.scale("resid_post.1", 1.0)
    plain = finished(served.client.fork("steered", at=12, max_tokens=4, edits=[other], **HOW))
    ids = [*PROMPT, *whole.token_ids[:12]]
    assert numbers(plain) == numbers(served.client.complete(**{**ASK, "token_ids": ids, "max_tokens": 4}))


def test_rows_set_one_by_one_cannot_go_on_past_their_values(served: SimpleNamespace) -> None:
    values = np.ones((len(PROMPT) + 39, 64))
    served.client.complete(request_id="set", edits=[Edit.set("resid_post.2", values)], **ASK)
    finished(served.client.fork("set", at=10, max_tokens=30, **HOW))
    with pytest.raises(InvalidArgument, match=r"max_tokens: 31.*values for rows up to 75"):
        finished(served.client.fork("set", at=10, max_tokens=31, **HOW))


@pytest.mark.parametrize(
    ("name", "options", "error", "words"),
    [
        ("nobody", {}, NotFound, "no request 'nobody' is running"),
        ("", {}, NotFound, "no request ''"),
        ("t/known", {}, NotFound, "no request 't/known'"),
        ("known", {"at": 41}, InvalidArgument, "at: 41 is not allowed: the completion has 40 tokens"),
        ("known", {"index": 1}, NotFound, "no completion 1"),
        ("known", {"at": -1}, InvalidArgument, "at: -1 cannot be sent"),
        ("known", {"token_ids": [1]}, TypeError, "token_ids"),
    ],
)
def test_what_is_impossible_is_refused(
    served: SimpleNamespace, name: str, options: dict[str, Any], error: type[Exception], words: str
) -> None:
    served.client.complete(request_id="known", **ASK)
    with pytest.raises(error, match=words):
        finished(served.client.fork(name, max_tokens=2, **options))


def test_forks_are_of_ones_own_requests_and_their_edits_ask_for_the_scope(tmp_path: Path) -> None:
    tiny.save_tiny("llama", tmp_path / "tiny")
    keys = write_keys(
        tmp_path / "keys.toml",
        {"a": (["generate", "edit"], "one"), "g": (["generate"], "one"), "b": (["generate"], "two")},
    )
    with serving(tmp_path / "tiny", api_keys=str(tmp_path / "keys.toml")) as live:
        with Client(live.address, api_key=keys["a"]) as a:
            a.complete(request_id="plain", **ASK)
            a.complete(request_id="edited", edits=[Edit.zero("mlp_out.1")], **ASK)
        with Client(live.address, api_key=keys["g"]) as g:
            assert finished(g.fork("plain", at=3, max_tokens=2)).token_ids
            with pytest.raises(PermissionDenied, match="ask for scope edit"):
                finished(g.fork("edited", at=3, max_tokens=2))
        with Client(live.address, api_key=keys["b"]) as b, pytest.raises(NotFound):
            finished(b.fork("plain", at=3, max_tokens=2))


async def test_the_asynchronous_client_forks_too(served: SimpleNamespace) -> None:
    whole = served.client.complete(request_id="aio", **ASK)
    async with AsyncClient(served.live.address) as client, client.fork("aio", at=30, max_tokens=10, **HOW) as stream:
        assert [token.id async for token in stream] == list(whole.token_ids[30:])
