"""What the engine writes down while it is watched: every row and every token once, by both kinds of engines."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable

import pytest
import torch
from cutaway_server.cache.events import BlockChange, BlockEvent
from cutaway_server.engine.engine import Engine
from cutaway_server.engine.retained import Retained
from cutaway_server.engine.stored import find_stored, read_stored
from cutaway_server.engine.watched import StepReport, Told
from engines import Answer, ask, make_engine
from test_ahead import make_ahead, question

ENGINES: dict[str, Callable[..., Engine]] = {
    "plain": make_engine,
    "ahead": lambda **options: make_ahead(**options)[0],
}


def watch(engine: Engine, *requests: object) -> tuple[list[StepReport], list[BlockEvent], dict[str, Answer]]:
    """Run requests to their end, watched from before they come."""
    told: list[Told] = []
    engine.watched.watch(told.append, steps=True, blocks=True, tokens=True)
    answers = {request.request_id: Answer() for request in requests}  # type: ignore[attr-defined]
    for request in requests:
        engine.add(request)  # type: ignore[arg-type]
    while engine.has_work:
        events = engine.step()
        for name, event in events:
            answers[name].take(event)
        engine.watched.over(events, engine.observed.reported())
        engine.watched.flush()
        engine.scheduler.check()
    return [s for each in told for s in each.steps], [e for each in told for e in each.blocks], answers


@pytest.mark.parametrize("kind", ENGINES)
@pytest.mark.parametrize("blocks", [200, 8])
def test_every_token_and_every_row_is_told_once(kind: str, blocks: int) -> None:
    source = random.Random(8)
    long = {"n": 1, "max_tokens": 60, "eos_token_ids": frozenset()}
    requests = [question(i, source, **(long if blocks == 8 else {"n": 2})) for i in range(6)]
    engine = ENGINES[kind](blocks=blocks)
    steps, _, answers = watch(engine, *requests)
    tokens: dict[tuple[str, int], list[int]] = defaultdict(list)
    for step in steps:
        for new in step.sampled:
            tokens[new.owner.request_id, new.owner.index].append(new.token)
    assert tokens == {(name, i): t for name, answer in answers.items() for i, t in answer.tokens.items()}
    numbers = [step.step for step in steps if step.rows]
    assert numbers == sorted(set(numbers)) == list(range(1, engine.steps + 1))
    for step in steps:
        for row in step.rows:
            whole = [*engine_prompt(requests, row.owner.request_id), *tokens[row.owner.request_id, row.owner.index]]
            assert list(row.tokens) == whole[row.start : row.stop][: len(row.tokens)]
    assert sum(len(step.preempted) for step in steps) == engine.observed.preemptions
    assert (engine.observed.preemptions > 0) == (blocks == 8)


def engine_prompt(requests: list[object], name: str) -> tuple[int, ...]:
    return next(request.prompt for request in requests if request.request_id == name)  # type: ignore[attr-defined,no-any-return]


@pytest.mark.parametrize("kind", ENGINES)
def test_block_events_replayed_give_the_pool(kind: str) -> None:
    source = random.Random(9)
    engine = ENGINES[kind](blocks=12)
    _, events, _ = watch(engine, *(question(i, source, n=source.choice([1, 3]), max_tokens=12) for i in range(8)))
    references: dict[int, int] = defaultdict(int)
    found: dict[int, bytes] = {}
    for event in events:
        if event.change in (BlockChange.TAKEN, BlockChange.COPIED):
            assert references[event.block] == 0
            references[event.block] = 1
            assert (event.source != 0) == (event.change is BlockChange.COPIED)
        elif event.change is BlockChange.SHARED:
            references[event.block] += 1
        elif event.change is BlockChange.RELEASED:
            references[event.block] -= 1
        elif event.change is BlockChange.PUBLISHED:
            found[event.block] = event.digest
        else:
            assert found.pop(event.block) == event.digest
            assert references[event.block] == 0
        assert references[event.block] == event.references
    pool = engine.scheduler.pool
    assert [references[block] for block in range(pool.n_blocks)] == [pool.references(b) for b in range(pool.n_blocks)]
    assert found == pool.books().digests
    assert {BlockChange.COPIED, BlockChange.SHARED, BlockChange.EVICTED} <= {event.change for event in events}


def test_watching_changes_no_number() -> None:
    source = random.Random(10)
    requests = [question(i, source) for i in range(6)]
    _, _, watched = watch(make_engine(blocks=20), *requests)
    alone = make_engine(blocks=20)
    answers = {request.request_id: Answer() for request in requests}  # type: ignore[attr-defined]
    for request in requests:
        alone.add(request)  # type: ignore[arg-type]
    while alone.has_work:
        for name, event in alone.step():
            answers[name].take(event)
    assert {n: a.said for n, a in answers.items()} == {n: a.said for n, a in watched.items()}


def test_an_engine_that_runs_ahead_keeps_what_the_plain_one_keeps() -> None:
    kept = []
    for kind in ENGINES.values():
        engine = kind()
        engine.retained = Retained(engine.scheduler.pool, 1, 40, 100.0)
        for i in range(4):
            engine.add(ask(f"r{i}", tuple(range(i, 30 + i)), max_tokens=5 + 4 * i, logprobs=None))
        for _ in range(7):
            engine.step()
        engine.abort("r3")  # perhaps while its next token is being drawn
        while engine.has_work:
            engine.step()
        engine.scheduler.check()
        kept.append([(find_stored(engine, f"r{i}", 0), engine) for i in range(4)])
    for (plain, one), (ahead, other) in zip(*kept, strict=True):
        if plain.request.request_id != "r3":
            assert (plain.tokens, plain.stored) == (ahead.tokens, ahead.stored)
        n = min(plain.stored, ahead.stored)
        for layer in range(len(one.pages.keys)):
            for a, b in zip(
                read_stored(one, plain, layer, range(n)), read_stored(other, ahead, layer, range(n)), strict=True
            ):
                assert torch.equal(a, b)
