"""Finished requests stay while nobody needs the room, each tenant's within its own bounds, and hinder nobody."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch
from cutaway_server.engine.engine import Engine
from cutaway_server.engine.retained import Retained, Run
from cutaway_server.engine.stored import find_stored, read_stored
from cutaway_server.errors import NotFound, Unsupported
from cutaway_server.request import FinishReason
from engines import alone, ask, make_engine, run

PROMPT = tuple(range(3, 53))  # 3 blocks and 2 tokens of a fourth
SIZE = 16


def keeping(blocks: int = 200, kept: int = 20, seconds: float = 100.0, **options: object) -> Engine:
    engine = make_engine(blocks=blocks, **options)  # type: ignore[arg-type]
    engine.retained = Retained(engine.scheduler.pool, 1, kept, seconds)
    return engine


def text(start: int, length: int) -> tuple[int, ...]:
    return tuple((start + 7 * i) % 61 for i in range(length))


def kept(engine: Engine, name: str) -> Run:
    found = engine.retained.find(name, time.monotonic())
    assert found is not None
    return found


def test_a_finished_request_stays_with_its_tokens_and_a_block_for_each_page() -> None:
    engine = keeping()
    answer = run(engine, ask("one", PROMPT, max_tokens=8))["one"]
    (ended,) = kept(engine, "one").completions
    assert ended.tokens == PROMPT + tuple(answer.tokens[0])
    assert ended.stored == len(PROMPT) + 7, "nobody has computed the last token"
    assert (len(ended.leases), ended.reason) == (4, FinishReason.LENGTH)
    pool = engine.scheduler.pool
    assert (pool.used, pool.cached, pool.retained) == (0, 4, 4)


def test_the_completions_of_one_request_keep_their_common_blocks_once() -> None:
    engine = keeping()
    run(engine, ask("three", PROMPT, n=3, temperature=1.0, max_tokens=4))
    found = kept(engine, "three")
    assert [ended.index for ended in found.completions] == [0, 1, 2]
    assert found.blocks == 3 + 3 == engine.scheduler.pool.retained


def test_a_completion_that_ends_before_its_twins_keeps_what_it_had_when_they_write_on() -> None:
    engine = keeping()
    engine.add(ask("twins", PROMPT, n=2, max_tokens=12))
    engine.step()
    engine.abort("twins", 0)  # nothing is written yet behind the prompt that they share
    while engine.has_work:
        engine.step()
    first, second = kept(engine, "twins").completions
    assert (first.stored, second.stored) == (50, 61)
    assert first.leases[3] == second.leases[3], "alone with it, the second wrote behind what the first had"
    short, long = find_stored(engine, "twins", 0), find_stored(engine, "twins", 1)
    for a, b in zip(read_stored(engine, short, 1, range(50)), read_stored(engine, long, 1, range(50)), strict=True):
        assert torch.equal(a, b)


def test_each_tenant_keeps_its_own_bytes_and_the_oldest_go_first() -> None:
    engine = keeping(kept=8)
    for i in range(4):
        for tenant in ("anna", "berta"):
            request = ask(f"{tenant}/{i}", tuple(range(i, 30 + i)), max_tokens=2)
            run(engine, replace(request, tenant=tenant, prefix_caching=False))
    now = time.monotonic()
    for tenant in ("anna", "berta"):
        names = [found.request.request_id for found in engine.retained.of(tenant, now)]
        assert names == [f"{tenant}/{i}" for i in range(4)], "4 runs of 2 blocks"
    run(engine, replace(ask("anna/long", PROMPT, max_tokens=2), tenant="anna", prefix_caching=False))
    assert [r.request.request_id for r in engine.retained.of("anna", now)] == ["anna/2", "anna/3", "anna/long"]
    assert len(engine.retained.of("berta", now)) == 4


def test_a_request_too_large_to_keep_pushes_nobody_out() -> None:
    engine = keeping(kept=3)
    run(engine, ask("small", (1, 2, 3)))
    run(engine, ask("large", PROMPT))
    assert engine.retained.find("large", time.monotonic()) is None
    kept(engine, "small")
    assert engine.scheduler.pool.retained == 1


def test_all_tenants_together_keep_a_quarter_of_the_pool_and_who_has_most_gives_way() -> None:
    engine = keeping(blocks=40, kept=100)
    for name in ("anna/0", "anna/1", "anna/2", "berta/0", "anna/3", "berta/1"):
        request = ask(name, tuple(range(30)), max_tokens=2)
        run(engine, replace(request, tenant=name.partition("/")[0], prefix_caching=False))
    assert engine.scheduler.pool.retained == 10
    now = time.monotonic()
    assert [r.request.request_id for r in engine.retained.of("anna", now)] == ["anna/1", "anna/2", "anna/3"]
    assert [r.request.request_id for r in engine.retained.of("berta", now)] == ["berta/0", "berta/1"]


def test_what_has_been_kept_long_enough_is_let_go() -> None:
    engine = keeping(seconds=10.0)
    run(engine, ask("one", PROMPT))
    now = time.monotonic()
    assert engine.retained.find("one", now + 9) is not None
    assert engine.retained.find("one", now + 11) is None
    pool = engine.scheduler.pool
    assert (pool.cached, pool.retained, pool.free) == (3, 0, 197), "full blocks stay to be found, the rest is free"


@pytest.mark.parametrize("options", [{"kept": 0}, {"seconds": 0.0}])
def test_a_server_told_to_keep_nothing_keeps_nothing(options: dict[str, float]) -> None:
    engine = keeping(**options)  # type: ignore[arg-type]
    run(engine, ask("one", PROMPT))
    assert engine.retained.find("one", time.monotonic()) is None
    assert (engine.scheduler.pool.cached, engine.scheduler.pool.retained) == (3, 0)


def test_a_failed_request_is_not_kept() -> None:
    engine = keeping()
    engine.add(ask("bad", PROMPT, n=2))
    engine.step()
    engine.abort("bad", 0)
    engine.fail("bad", RuntimeError("a fault"))
    assert engine.retained.find("bad", time.monotonic()) is None
    assert engine.scheduler.pool.retained == 0
    engine.scheduler.check()


def test_a_name_used_again_stands_for_the_request_that_ended_last() -> None:
    engine = keeping()
    run(engine, ask("one", PROMPT))
    run(engine, ask("one", PROMPT[:20], max_tokens=1))
    assert kept(engine, "one").request.prompt == PROMPT[:20]
    assert engine.scheduler.pool.retained == 2


def test_keeping_hinders_nobody() -> None:
    """A pool full of kept requests preempts no more, and answers the same, as one that keeps nothing."""
    requests = [ask(f"r{i}", text(i, 60), max_tokens=40, temperature=0.8, seed=i) for i in range(6)]
    told = {}
    for kept_blocks in (0, 100):
        engine = keeping(blocks=24, kept=kept_blocks)
        engine.retained._most_blocks = engine.retained._most_in_all = kept_blocks  # even the whole pool
        run(engine, *(ask(f"old{i}", text(20 + i, 60)) for i in range(4)))
        assert engine.scheduler.pool.retained == (20 if kept_blocks else 0)
        answers = run(engine, *requests)
        told[kept_blocks] = {name: answer.said for name, answer in answers.items()}, engine.observed.preemptions
    assert told[0] == told[100]
    assert told[0][1] > 0, "the pool was too small"


def test_blocks_that_others_needed_are_refused_and_not_read() -> None:
    engine = keeping(blocks=24)
    run(engine, ask("one", PROMPT))
    stored = find_stored(engine, "one", 0)
    run(engine, *(ask(f"r{i}", text(i, 80), max_tokens=60) for i in range(4)))
    with pytest.raises(Unsupported, match="others needed the room"):
        read_stored(engine, stored, 0, range(50))
    kept(engine, "one")  # its tokens are still there: it can be computed again


def test_a_read_never_takes_another_request_of_the_same_name_for_its_own() -> None:
    engine = keeping()
    run(engine, ask("one", PROMPT))
    stored = find_stored(engine, "one", 0)
    run(engine, ask("one", PROMPT[::-1]))
    with pytest.raises(NotFound, match="no request 'one'"):
        read_stored(engine, stored, 0, range(50))


def test_what_is_kept_is_what_was_computed_whatever_happens_beside() -> None:
    engine = keeping(kept=50)
    answers = run(engine, *(ask(f"r{i}", tuple(range(i, i + 40)), max_tokens=20) for i in range(8)))
    for i in range(8):
        request = ask(f"r{i}", tuple(range(i, i + 40)), max_tokens=20)
        assert answers[f"r{i}"].said == alone(request).said
        single = keeping()
        run(single, request)
        for layer in range(len(engine.pages.keys)):
            ours = read_stored(engine, find_stored(engine, f"r{i}", 0), layer, range(59))
            theirs = read_stored(single, find_stored(single, f"r{i}", 0), layer, range(59))
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
            assert all(torch.isfinite(part).all() for part in ours)
