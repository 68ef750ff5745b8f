"""A token's logits, computed again between steps, are to the bit those that were sampled from, and nothing changes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from cutaway_server.edits import Add, Edit, Edits, Scale
from cutaway_server.engine.engine import Engine
from cutaway_server.engine.replay import Plan, Written, find_written, plan_of, replay
from cutaway_server.engine.retained import Retained
from cutaway_server.errors import InvalidField, NotFound, Unsupported
from cutaway_server.request import Request, SamplingParams
from cutaway_server.sampler import Followed
from engines import Answer, ask, make_engine, run
from networks import PLAIN

PROMPT = tuple(range(3, 53))


class Noting:
    """Notes the logits that each token is drawn from, by request, completion and position."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.seen = engine, {}
        self._draw, self._logits = engine._draw, engine.model.logits
        self._last: torch.Tensor | None = None
        engine._draw = self.draw  # type: ignore[method-assign]
        engine.model.logits = self.logits  # type: ignore[method-assign]

    def logits(self, residual: torch.Tensor) -> torch.Tensor:
        self._last = self._logits(residual)
        return self._last

    def draw(self, draws, residual):
        drawn = self._draw(draws, residual)
        for draw, row in zip(draws, self._last, strict=True):
            sequence = draw.completion.sequence
            self.seen[sequence.request.request_id, sequence.index, len(sequence.tokens)] = row.clone().numpy()
        return drawn


def again(engine: Engine, name: str, index: int, position: int) -> tuple[Written, Followed]:
    """Sample a token again, as its request asked."""
    written = find_written(engine, name, index, position)
    plan = plan_of(written, written.request.sampling, PLAIN.d_vocab, forced=written.override)
    (followed,) = replay(engine, written, [plan])
    return written, followed


def traffic() -> list[Request]:
    """Requests that share prefixes, draw in every way, and are more than the pool holds."""
    kinds = [
        {"temperature": 0.0}, {"temperature": 0.9}, {"temperature": 0.8, "top_k": 20, "top_p": 0.9},
        {"temperature": 1.2, "top_p": 0.8, "repetition_penalty": 1.3, "n": 2}, {"temperature": 0.7, "typical_p": 0.6},
    ]  # fmt: skip
    return [ask(f"r{i}", PROMPT[: 20 + i], max_tokens=30, seed=i, **kinds[i % 5]) for i in range(8)]


def test_replays_amid_traffic_have_the_bits_of_then_and_disturb_nobody() -> None:
    expected = {name: answer.said for name, answer in run(make_engine(blocks=24), *traffic()).items()}
    engine = make_engine(blocks=24)
    noting, done = Noting(engine), 0

    def between(step: int, answers: dict[str, Answer]) -> None:
        nonlocal done
        for live in list(engine.live.values()):
            for index, completion in live.completions.items():
                sequence = completion.sequence
                name, prompt, end = live.request.request_id, sequence.prompt_length, len(sequence.tokens)
                if not sequence.blocks or end == prompt or (step + index) % 3:
                    continue
                for position in {prompt, end - 1, (prompt + end) // 2}:
                    seen = noting.seen[name, index, position]
                    written, followed = again(engine, name, index, position)
                    assert np.array_equal(followed.noted["logits"], seen)
                    assert followed.token == written.token == sequence.tokens[position]
                    done += 1

    answers = run(engine, *traffic(), between=between)
    assert {name: answer.said for name, answer in answers.items()} == expected
    assert engine.observed.preemptions > 0, "the pool was too large"
    assert done > 100


def test_a_replay_writes_no_page_and_is_no_step() -> None:
    engine = make_engine()
    engine.retained = Retained(engine.scheduler.pool, 1, 40, 100.0)
    steer = Edit("blocks.{i}.hook_resid_post", (0, 1), Add(np.full((1, PLAIN.d_model), 0.5, np.float32)))
    turned = Edit("blocks.{i}.attn.hook_k", (1,), Scale(0.5))
    for name, edits in (("plain", Edits()), ("edited", Edits((steer, turned), salt=b"salt"))):
        noting = Noting(engine)
        request = ask(name, PROMPT, temperature=0.9)
        run(engine, replace(request, edits=edits) if edits.edits else request)
        keys, values, steps = engine.pages.keys.clone(), engine.pages.values.clone(), engine.steps
        for position in range(50, 58):
            written, followed = again(engine, name, 0, position)
            assert followed.token == written.token
            assert np.array_equal(followed.noted["logits"], noting.seen[name, 0, position])
        for before, after in ((keys, engine.pages.keys), (values, engine.pages.values)):
            assert torch.equal(before[:, 1:].nan_to_num(), after[:, 1:].nan_to_num())
        assert engine.steps == steps
        engine.scheduler.check()


def test_what_has_gone_is_refused() -> None:
    engine = make_engine(blocks=24)
    engine.retained = Retained(engine.scheduler.pool, 1, 20, 100.0)
    run(engine, ask("one", PROMPT))
    written = find_written(engine, "one", 0, 52)
    plans = [plan_of(written, written.request.sampling, PLAIN.d_vocab)]
    replay(engine, written, plans)
    run(engine, *(ask(f"r{i}", tuple((i + 7 * j) % 61 for j in range(80)), max_tokens=60) for i in range(4)))
    with pytest.raises(Unsupported, match="others needed the room"):
        replay(engine, written, plans)
    run(engine, ask("one", PROMPT))
    with pytest.raises(NotFound, match="no request 'one'"):
        replay(engine, written, plans)  # another of the same name


def test_a_preempted_request_is_refused_until_it_is_back() -> None:
    engine = make_engine()
    engine.add(ask("one", PROMPT))
    engine.step()
    engine.step()
    sequence = engine.live["one"].completions[0].sequence
    written = find_written(engine, "one", 0, -1)
    plan = Plan(plan_of(written, SamplingParams(seed=1, max_tokens=9), PLAIN.d_vocab).state)
    assert replay(engine, written, [plan])[0].valid
    blocks, stored = sequence.blocks, sequence.stored
    sequence.blocks, sequence.stored = [], 0
    with pytest.raises(Unsupported, match="was preempted"):
        replay(engine, written, [plan])
    sequence.blocks, sequence.stored = blocks, stored
    assert replay(engine, written, [plan])[0].valid


def test_before_the_first_token_there_is_nothing_to_replay() -> None:
    engine = make_engine()
    engine.add(ask("one", PROMPT))
    with pytest.raises(InvalidField, match="none yet"):
        find_written(engine, "one", 0, 50)


def test_an_engine_that_runs_ahead_replays_what_it_has_told() -> None:
    pytest.importorskip("triton")
    from test_ahead import make_ahead

    engine, graphs = make_ahead()
    engine.add(ask("one", PROMPT, temperature=0.9, logprobs=None, max_tokens=40))
    engine.add(ask("two", PROMPT[::-1], temperature=0.0, logprobs=None, max_tokens=40))
    told: dict[str, list[int]] = {"one": [], "two": []}
    replayed = 0
    while engine.has_work:
        for name, event in engine.step():
            if hasattr(event, "token"):
                told[name].append(event.token)
        for name, tokens in told.items():
            if name in engine.live and tokens:
                written, followed = again(engine, name, 0, 50 + len(tokens) - 1)
                assert written.token == followed.token == tokens[-1]
                replayed += 1
    assert graphs.ahead > 30
    assert replayed > 60
    expected = run(make_engine(), ask("one", PROMPT, temperature=0.9, logprobs=None, max_tokens=40))
    assert told["one"] == expected["one"].tokens[0]
