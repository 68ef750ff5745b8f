"""ReplaySample: a token's sampling, done again from the cached pages, is what it was, and a naive sampler's, too."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from cutaway import (
    Client,
    Edit,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    SampleReplay,
)  # fmt: skip
from cutaway.aio import AsyncClient
from cutaway.cli import main
from cutaway.v1.inference_pb2 import SamplingParams as WireParams
from cutaway.v1.introspection_pb2_grpc import IntrospectionStub
from cutaway.v1.replay_pb2 import ReplaySampleRequest
from cutaway_server.errors import Unsupported
from cutaway_server.request import SamplingParams
from cutaway_server.sampler import Followed, SamplerState, Stages, build_batch, follow, sample
from cutaway_server.service.replaying import Wanted, replay_response
from sampling_oracle import Way, number_of, way
from secured import write_keys
from serving import LiveServer, serving
from tiny import VOCAB, save_tiny

PROMPT = [7 * i % 400 + 50 for i in range(40)]
ALL = list(range(256))
LONG = {"temperature": 1.3, "top_p": 0.9, "min_p": 0.01, "typical_p": 0.8}
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "plain": {"temperature": 0.8},
    "short": {"temperature": 0.9, "top_k": 40, "top_p": 0.9, "min_p": 0.05},
    "short, typical": {"temperature": 1.1, "top_k": 100, "typical_p": 0.7},
    "long": LONG,
    "long, top_k": {"temperature": 1.0, "top_k": 300, "top_p": 0.95},
    "penalties": {
        **LONG, "repetition_penalty": 1.4, "presence_penalty": 0.5, "frequency_penalty": 0.3,
        "logit_bias": {60: 4.0, 61: -3.0, 62: 2.5},
    },
    "greedy, penalties": {"temperature": 0.0, "repetition_penalty": 1.5, "logit_bias": {60: 3.0}},
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    path = tmp_path_factory.mktemp("models") / "tiny"
    return SimpleNamespace(path=path, network=save_tiny("llama", path))


@pytest.fixture(scope="module")
def live(model: SimpleNamespace) -> Iterator[LiveServer]:
    with serving(model.path) as server:
        yield server


@pytest.fixture(scope="module")
def client(live: LiveServer) -> Iterator[Client]:
    with Client(live.address) as it:
        yield it


def make(client: Client, name: str, tokens: int, prompt: list[int] = PROMPT, **options: Any) -> list[int]:
    """The tokens made after a prompt."""
    answer = client.complete(
        token_ids=prompt, max_tokens=tokens, request_id=name, **{"seed": 5, "ignore_eos": True, **options}
    )
    return [token.id for token in answer.tokens]


def logits_of(model: SimpleNamespace, tokens: list[int]) -> np.ndarray[Any, Any]:
    """Logits [V] after tokens, by transformers."""
    with torch.no_grad():
        return model.network(torch.tensor([tokens])).logits[0, -1].double().numpy()


def compare(told: Any, expected: Way, logits: np.ndarray[Any, Any]) -> None:
    """Every stage of a `Replay` of which the tokens 0 to 255 are told."""
    assert told.token == expected.token
    p, adjusted = expected.probabilities, expected.adjusted
    assert [each.name for each in told.filters] == list(expected.left)
    for each in told.filters:
        assert each.kept == expected.left[each.name].sum()
        assert each.mass == pytest.approx(p[expected.left[each.name]].sum(), rel=1e-4)
    last = expected.left[told.filters[-1].name] if told.filters else np.ones(VOCAB, np.bool_)
    for token in ALL:
        each = told.candidate(token)
        assert each.logit == pytest.approx(logits[token], abs=1e-4)
        assert each.biased == pytest.approx(expected.biased[token], abs=1e-4)
        assert each.penalised == pytest.approx(expected.penalised[token], abs=1e-4)
        above = [(adjusted > adjusted[token] + margin).sum() for margin in (1e-4, -1e-4)]  # logits may be that far off
        assert above[0] <= each.rank <= above[1]
        assert each.probability == pytest.approx(p[token], rel=1e-3, abs=1e-12)
        assert (each.removed_by == "") == (last[token] and p[token] > 0)
        if told.uniform is not None:
            assert each.final == pytest.approx(p[token] * last[token] / p[last].sum(), rel=1e-3, abs=1e-12)
    if told.uniform is not None:
        assert told.lower - 1e-6 <= told.uniform < told.upper + 1e-6
        assert told.upper - told.lower == pytest.approx(told.candidate(told.token).final, rel=1e-5)


@pytest.mark.parametrize("asked", WAYS.values(), ids=WAYS.keys())
def test_every_stage_is_a_naive_samplers(client: Client, model: SimpleNamespace, asked: dict[str, Any]) -> None:
    made = make(client, "one", 5, **asked)
    for i in range(5):
        told = client.replay_sample("one", 40 + i, count=0, tokens=ALL, **LONG)
        assert (told.token, told.agrees, told.overridden, told.running) == (made[i], True, False, False)
        assert (told.cached_positions, told.recomputed_positions, told.dtype) == (40 + i, 1, "F32")
        number = number_of(5, 0, 40 + i)
        assert told.replay.uniform == (number if asked["temperature"] else None)
        logits = logits_of(model, PROMPT + made[:i])
        compare(told.replay, way(logits, number, PROMPT, made[:i], **asked), logits)
        assert told.changed is not None
        assert told.changed.uniform == number
        compare(told.changed, way(logits, number, PROMPT, made[:i], **{**asked, **LONG}), logits)


def test_other_parameters_pick_what_a_request_with_them_picks(client: Client) -> None:
    made = make(client, "one", 12, temperature=0.8)
    others: list[dict[str, Any]] = [{"temperature": 0.0}, {"temperature": 2.0, "top_k": 30}, {"typical_p": 0.4}]
    picked = set()
    for i in range(12):
        for other in others:
            changed = client.replay_sample("one", 40 + i, **other).changed
            assert changed is not None
            wanted = {"temperature": 0.8, **other}
            assert [changed.token] == make(client, "again", 1, PROMPT + made[:i], **wanted)
            picked.add(changed.token == made[i])
    assert picked == {True, False}


def test_bans_are_told_and_can_be_asked_for(client: Client) -> None:
    made = make(client, "one", 6, temperature=0.7, min_tokens=4, ignore_eos=False, seed=0)
    told = client.replay_sample("one", 41, tokens=[1])
    assert told.agrees
    assert (told.replay.banned, told.replay.candidate(1).removed_by) == (1, "ban")
    assert told.replay.candidate(1).scaled == -math.inf
    assert client.replay_sample("one", 44, tokens=[1]).replay.banned == 0, "four tokens are there"
    free = client.replay_sample("one", 41, tokens=[1], min_tokens=0).changed
    assert free is not None
    assert (free.banned, free.candidate(1).removed_by) == (0, "")
    other = client.replay_sample("one", 41, bad_words=[client.detokenize([made[1]]).text]).changed
    assert other is not None
    assert (other.banned, other.candidate(made[1]).removed_by) == (2, "ban")
    assert other.token != made[1]
    assert other.candidate(other.token).removed_by == ""


def test_an_edited_token_is_replayed_with_its_edits(client: Client) -> None:
    vector = np.linspace(-1, 1, 64, dtype=np.float32)
    edits = [
        Edit.add("blocks.1.hook_resid_post", vector, scale=3.0),
        Edit.scale("blocks.0.attn.hook_k", 0.5, positions="generated"),
        Edit.knock_out(layers=[2], queries=range(30, 60), keys=[0]),
    ]
    answer = client.complete(
        token_ids=PROMPT, max_tokens=6, ignore_eos=True, seed=5, temperature=0.8, logprobs=5, edits=edits,
        request_id="edited",
    )  # fmt: skip
    before = client.read_cache("edited")
    for i, token in enumerate(answer.tokens):
        told = client.replay_sample("edited", 40 + i)
        assert (told.agrees, told.token) == (True, token.id)
        top = token.top_logprobs or ()
        assert [each.token for each in told.replay.candidates[:5]] == [each.id for each in top]
        logits = np.array([each.logit for each in told.replay.candidates[:5]])
        np.testing.assert_allclose(np.diff(logits), np.diff([each.logprob for each in top]), atol=1e-5)
    after = client.read_cache("edited")
    assert np.array_equal(before.keys.values, after.keys.values)
    assert np.array_equal(before.values.values, after.values.values)


def test_an_override_is_told_and_what_would_have_been_sampled(client: Client) -> None:
    made = make(client, "plain", 3, temperature=0.8)
    forced = make(client, "forced", 3, temperature=0.8, edits=[Edit.override(1, 300)])
    assert forced[:2] == [made[0], 300]
    told = client.replay_sample("forced", 41, temperature=0.8)
    assert (told.agrees, told.overridden, told.token, told.replay.banned) == (True, True, 300, VOCAB - 1)
    assert told.changed is not None
    assert (told.changed.token, told.changed.banned) == (made[1], 0)
    assert not client.replay_sample("forced", 42).overridden


def test_completions_are_told_apart_and_positions_count_from_the_end_too(client: Client) -> None:
    answer = client.complete(
        token_ids=PROMPT, max_tokens=5, ignore_eos=True, seed=5, temperature=1.2, n=3, request_id="three"
    )
    for completion in answer.completions:
        for i, token in enumerate(completion.tokens):
            told = client.replay_sample("three", i - 5, index=completion.index, count=1)
            assert (told.position, told.token, told.agrees) == (40 + i, token.id, True)
            assert told.replay.uniform == number_of(5, completion.index, 40 + i)
            assert told.text == client.detokenize([token.id]).text


def test_a_running_request_is_replayed_while_it_runs(client: Client) -> None:
    options = {"token_ids": PROMPT, "max_tokens": 300, "ignore_eos": True, "seed": 5, "temperature": 0.9}
    with client.generate(**options, request_id="running") as stream:
        tokens = [next(stream).id for _ in range(3)]
        for i in range(3):
            told = client.replay_sample("running", 40 + i)
            assert (told.token, told.agrees) == (tokens[i], True)
        tokens += [token.id for token in stream]
    assert tokens == make(client, "alone", 300, temperature=0.9)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"count": 257}, "count: 257 is not allowed: must be at most 256"),
        ({"tokens": [VOCAB]}, f"tokens: {VOCAB} is not allowed: token ids are in"),
        ({"tokens": [-1]}, "tokens: -1 is not allowed: token ids are in"),
        ({"tokens": [1] * 257}, "tokens: '257 entries' is not allowed"),
        ({"temperature": -1.0}, "sampling.temperature: -1"),
        ({"top_p": math.nan}, "sampling.top_p: nan"),
        ({"typical_p": 0.0}, "sampling.typical_p: 0"),
        ({"logit_bias": {VOCAB: 1.0}}, "sampling.logit_bias"),
        ({"bad_words": [""]}, "sampling.bad_words"),
        ({"min_tokens": 10**6}, "sampling.min_tokens"),
    ],
)
def test_what_cannot_be_is_refused_by_name(client: Client, options: dict[str, Any], told: str) -> None:
    make(client, "one", 2)
    with pytest.raises(InvalidArgument, match=told):
        client.replay_sample("one", 40, **options)
    assert client.replay_sample("one", 40).agrees


@pytest.mark.parametrize("position", [39, 42, 0, -3, -43, 2**31])
def test_only_generated_tokens_are_replayed(client: Client, position: int) -> None:
    make(client, "one", 2)
    with pytest.raises(
        InvalidArgument, match=f"position: {position} is not allowed: must be that of a generated token.*40 to 41"
    ):
        client.replay_sample("one", position)


def test_a_prompt_alone_has_no_sampling(client: Client) -> None:
    make(client, "none", 0)
    with pytest.raises((InvalidArgument, NotFound)):
        client.replay_sample("none", 40)


def test_parameters_that_change_no_choice_are_refused(live: LiveServer, client: Client) -> None:
    make(client, "one", 2)
    with pytest.raises(TypeError, match="seed"):
        client.replay_sample("one", 40, seed=3)  # type: ignore[call-arg]
    with grpc.insecure_channel(live.address) as channel:
        for field, value in (("seed", 3), ("n", 2), ("stop", ["a"]), ("max_tokens", 5), ("logprobs", 1)):
            asked = ReplaySampleRequest(request_id="one", position=40, sampling=WireParams(**{field: value}))
            with pytest.raises(grpc.RpcError) as error:
                IntrospectionStub(channel).ReplaySample(asked)
            assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert f"sampling.{field}" in (error.value.details() or "")


def test_nobody_of_that_name_is_found(client: Client) -> None:
    make(client, "one", 2)
    for name in ("nobody", "", "a/b"):
        with pytest.raises(NotFound, match="request_id"):
            client.replay_sample(name, 40)
    with pytest.raises(NotFound, match="no completion 1"):
        client.replay_sample("one", 40, index=1)


def test_where_nothing_can_be_drawn_nothing_is_told() -> None:
    with pytest.raises(Unsupported, match="no token can be drawn"):
        replay_response(Wanted(None, 1, ()), None, [None], [Followed({}, 0, False)], None)  # type: ignore[arg-type, list-item]


def test_other_tenants_and_who_may_not_look_get_nothing(model: SimpleNamespace, tmp_path: Any) -> None:
    scopes = ["generate", "introspect"]
    who = {"anna": (scopes, "anna"), "berta": (scopes, "berta"), "eve": (["generate", "observe", "edit"], "anna")}
    keys = write_keys(tmp_path / "keys.toml", who)
    with serving(model.path, api_keys=str(tmp_path / "keys.toml")) as live, ExitStack() as stack:
        clients = {name: stack.enter_context(Client(live.address, api_key=key)) for name, key in keys.items()}
        made = make(clients["anna"], "secret", 3, temperature=0.8)
        other = make(clients["berta"], "theirs", 3, temperature=0.8, seed=9)
        assert [clients["anna"].replay_sample("secret", 40 + i).token for i in range(3)] == made
        assert [clients["berta"].replay_sample("theirs", 40 + i).token for i in range(3)] == other
        for name in ("secret", "anna/secret"):
            with pytest.raises(NotFound, match="no request"):
                clients["berta"].replay_sample(name, 40)
        with pytest.raises(PermissionDenied, match="ReplaySample asks for scope introspect"):
            clients["eve"].replay_sample("secret", 40)


async def test_the_asynchronous_client_tells_the_same(live: LiveServer, client: Client) -> None:
    make(client, "one", 2, temperature=0.9, top_p=0.8)
    async with AsyncClient(live.address) as other:
        told = await other.replay_sample("one", 41, temperature=0.5, count=3)
    assert told == client.replay_sample("one", 41, temperature=0.5, count=3)


def test_tables_are_printed_and_shown_in_notebooks(live: LiveServer, client: Client) -> None:
    made = make(client, "one", 2, temperature=0.9, top_k=50, top_p=0.8)
    told = client.replay_sample("one", 41, count=3, temperature=0.0)
    assert isinstance(told, SampleReplay)
    shown = repr(told).splitlines()
    assert shown[0] == f"token {made[1]} {told.text!r} at position 41"
    assert "number 0." in shown[1]
    assert shown[2].startswith("top_k 50: left 50 tokens")
    assert sum(line.startswith(">") for line in shown) == 2
    assert told._repr_html_().count("<table>") == 2
    assert told.replay.sampling["temperature"] == 0.9
    run = CliRunner(env={"CUTAWAY_ADDRESS": live.address})
    printed = run.invoke(main, ["inspect", "sample", "one", "-1", "--count", "3", "--temperature", "0"])
    assert printed.exit_code == 0, printed.output
    assert printed.output.splitlines() == shown
    assert "position: 7" in run.invoke(main, ["inspect", "sample", "one", "7"]).output


def test_sampling_is_followed_and_not_done_a_second_way() -> None:
    """Whatever is asked, the token followed is the one that a batch of others gets beside it."""
    source = random.Random(3)
    logits = torch.randn(60, VOCAB, generator=torch.Generator().manual_seed(4)) * 4
    states = []
    for i in range(60):
        params = SamplingParams(
            seed=i, max_tokens=9, temperature=source.choice([0.0, 0.5, 1.5]), top_k=source.choice([0, 0, 5, 400]),
            top_p=source.choice([1.0, 0.7]), min_p=source.choice([0.0, 0.02]), typical_p=source.choice([1.0, 0.6]),
            repetition_penalty=source.choice([1.0, 1.3]), logit_bias=source.choice([(), ((7, 5.0),)]),
        )  # fmt: skip
        states.append(SamplerState(params, (1, 2, 3), VOCAB))
    cpu = torch.device("cpu")
    together = sample(logits, build_batch(states, [5] * 60, VOCAB, cpu)).tokens.tolist()
    for i, state in enumerate(states):
        followed = follow(logits[i : i + 1], build_batch([state], [5], VOCAB, cpu))
        stages = Stages.of(followed)
        assert followed.valid
        assert followed.token == together[i]
        assert stages.removed_by(followed.token) == ""
        for count in (0, 1, 7, VOCAB, VOCAB + 1):
            top = stages.top(count)
            assert top == np.argsort(-stages.adjusted, kind="stable")[:count].tolist()
            assert [stages.rank(token) for token in top[:7]] == list(range(len(top[:7])))
        share = stages.share(followed.token)
        if share is not None and stages.uniform is not None:
            assert share[0] - 1e-6 <= stages.uniform < share[1] + 1e-6
