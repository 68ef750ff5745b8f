"""Turns: by priority, then by what a tenant has been given for its share; within a tenant, first come, first served."""

from __future__ import annotations

from collections import Counter

import pytest
from cutaway_server.errors import QueueFull
from test_scheduler import Engine, request_for, scheduler_with


def rows_given(engine: Engine, steps: int) -> Counter[str]:
    """Rows by tenant."""
    rows: Counter[str] = Counter()
    for _ in range(steps):
        for work in engine.step().work:
            rows[work.sequence.request.tenant] += work.stop - work.start
    return rows


def flood(engine: Engine, tenant: str, count: int, prompt: int, tokens: int, share: float = 1.0) -> None:
    for i in range(count):
        engine.add(
            request_for([len(tenant), i, *[7] * prompt], tokens, tenant=tenant, share=share, name=f"{tenant}{i}")
        )


@pytest.mark.parametrize("share", [1.0, 3.0])
def test_tenants_that_both_send_long_prompts_are_given_rows_by_their_shares(share: float) -> None:
    engine = Engine(scheduler_with(capacity=4000, max_batch_tokens=32, max_queued=1000))
    flood(engine, "many", 200, prompt=100, tokens=1)
    engine.step()
    flood(engine, "few", 60, prompt=100, tokens=1, share=share)
    rows = rows_given(engine, 100)
    assert rows.total() == 3200, "nothing is left idle"
    assert rows["few"] / rows["many"] == pytest.approx(share, rel=0.1)


def test_a_short_question_does_not_wait_behind_another_tenants_queue() -> None:
    engine = Engine(scheduler_with(capacity=4000, max_batch_tokens=32, max_queued=1000))
    flood(engine, "many", 200, prompt=100, tokens=1)
    for _ in range(3):
        engine.step()
    question = engine.add(request_for([1, 2, 3], 1, tenant="few"))
    for _ in range(2):
        engine.step()
    assert question.finished


def test_a_tenant_that_fills_every_place_makes_way_up_to_its_share_and_no_further() -> None:
    engine = Engine(scheduler_with(capacity=4000, max_running=16, max_queued=1000))
    flood(engine, "gone", 2, prompt=3, tokens=2)  # who has left has no share
    flood(engine, "many", 40, prompt=3, tokens=400)
    for _ in range(5):
        engine.step()
    flood(engine, "few", 20, prompt=3, tokens=400)
    preempted = [len(engine.step().preempted) for _ in range(200)]
    running = Counter(sequence.request.tenant for sequence in engine.scheduler.running)
    assert running == {"many": 8, "few": 8}
    assert sum(preempted) == 8, "each place is given up once"


def test_a_tenant_that_fills_the_cache_makes_way() -> None:
    engine = Engine(scheduler_with(capacity=64, max_running=16, max_queued=1000))
    flood(engine, "many", 4, prompt=50, tokens=100)  # 13 blocks each, and more
    for _ in range(5):
        engine.step()
    assert engine.scheduler.pool.available < 13
    question = engine.add(request_for([1, 2, 3] * 16, 8, tenant="few"))
    for _ in range(60):
        engine.step()
    assert question.finished
    engine.run()


def test_a_tenant_does_not_fill_the_queue_for_others() -> None:
    engine = Engine(scheduler_with(max_running=1, max_queued=100))
    engine.add(request_for([1], 50, tenant="many"))
    engine.step()
    with pytest.raises(QueueFull, match="50 of your requests are waiting, and what is left of the queue is for others"):
        flood(engine, "many", 100, prompt=3, tokens=1)
    flood(engine, "few", 25, prompt=3, tokens=1)
    with pytest.raises(QueueFull, match="25 of your"):
        flood(engine, "few", 1, prompt=3, tokens=1)
    with pytest.raises(QueueFull, match=r"^100 requests are waiting"):
        flood(engine, "", 100, prompt=3, tokens=1)  # on a server that asks nobody who they are, all may be one's
    engine.run()


def test_two_tenants_that_ask_for_all_there_is_both_get_done() -> None:
    engine = Engine(scheduler_with(capacity=40, page_size=1, max_running=6, max_batch_tokens=12))
    for tenant in ("a", "b", "c"):
        flood(engine, tenant, 8, prompt=5, tokens=20)
    engine.run()
    assert Counter(engine.ended.values()) == {"done": 24}
    assert sum(sequence.preemptions for sequence in engine.all) < 24 * 4, "they do not drive each other out for ever"


def test_who_is_alone_saves_up_no_debt() -> None:
    engine = Engine(scheduler_with(capacity=4000, max_batch_tokens=32, max_queued=1000))
    flood(engine, "early", 10, prompt=100, tokens=1)
    engine.run()
    flood(engine, "early", 100, prompt=100, tokens=1)
    flood(engine, "late", 100, prompt=100, tokens=1)
    rows = rows_given(engine, 40)
    assert rows["early"] / rows["late"] == pytest.approx(1, rel=0.15)


def test_who_asked_for_little_for_long_does_not_shut_others_out_later() -> None:
    engine = Engine(scheduler_with(capacity=6000, max_batch_tokens=32, max_queued=1000))
    engine.add(request_for([1], 390, tenant="little"))  # one row a step
    flood(engine, "much", 400, prompt=100, tokens=1)
    rows = rows_given(engine, 300)
    assert rows["little"] == 300
    flood(engine, "little", 100, prompt=100, tokens=1)
    rows = rows_given(engine, 40)
    assert rows["much"] > 0.3 * rows["little"], "8 steps behind at most, and not 300"


def test_priority_goes_first_and_takes_places_from_those_who_have_less() -> None:
    engine = Engine(scheduler_with(max_running=2))
    low = [engine.add(request_for([i], 40, name=f"low{i}")) for i in range(3)]
    engine.step()
    high = engine.add(request_for([9], 5, priority=1, name="high"))
    schedules = [engine.step(), engine.step(), engine.step()]
    assert [s for schedule in schedules for s in schedule.preempted] == [low[1]]
    assert engine.started == [low[0], low[1], high]
    engine.run()
    assert [engine.ended[s] for s in (*low, high)] == ["done"] * 4


def test_between_tenants_too_priority_goes_before_shares() -> None:
    engine = Engine(scheduler_with(capacity=4000, max_batch_tokens=32, max_queued=1000))
    flood(engine, "low", 50, prompt=100, tokens=1)
    for i in range(10):
        engine.add(request_for([i, *[5] * 100], 1, tenant="high", priority=1))
    assert rows_given(engine, 30) == {"high": 960}, "of 10 times 101"
