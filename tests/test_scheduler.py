"""Whatever arrives, ends or is preempted: each completion reads its own tokens only, and gets exactly its own."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from cutaway_server.cache.blocks import BlockPool
from cutaway_server.errors import InvalidField, QueueFull
from cutaway_server.request import Request, SamplingParams
from cutaway_server.scheduler import Schedule, Scheduler, Sequence, Work
from cutaway_server.scheduler.invariants import check_writes
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

KEY = b"a key of this process"


def request_for(
    prompt: list[int],
    max_tokens: int = 4,
    *,
    n: int = 1,
    tenant: str = "",
    deadline: float | None = None,
    prompt_logprobs: int | None = None,
    prefix_caching: bool = True,
    name: str = "r",
    priority: int = 0,
    share: float = 1.0,
) -> Request:
    sampling = SamplingParams(seed=0, max_tokens=max_tokens, n=n, prompt_logprobs=prompt_logprobs)
    return Request(name, tuple(prompt), sampling, 0.0, deadline, tenant, prefix_caching, priority=priority, share=share)


def scheduler_with(capacity: int = 64, page_size: int = 4, **limits: float) -> Scheduler:
    options: dict[str, float] = {"max_batch_tokens": 64, "max_running": 16, "max_queued": 64, "max_context": 10_000}
    return Scheduler(BlockPool(capacity + 1, page_size, KEY), **{**options, **limits})  # type: ignore[arg-type]


# The oracle: a "model" whose K/V at a position is a hash of all tokens up to it, and of the tenant, so that a page
# that is another's, stale or half copied can't pass for one's own. It knows nothing of blocks or steps.


def keys_values(tenant: str, tokens: list[int]) -> list[int]:
    values, value = [], hash(tuple(tenant.encode()))  # of integers: the same in every process
    for token in tokens:
        value = hash((value, token))
        values.append(value)
    return values


def next_token(value: int, index: int) -> int:
    return hash((value, index, 77)) % 5


def answer(request: Request, index: int) -> list[int]:
    tokens = list(request.prompt)
    for _ in range(request.sampling.max_tokens):
        tokens.append(next_token(keys_values(request.tenant, tokens)[-1], index))
    return tokens


@dataclass
class Engine:
    """A fake engine over fake pages. It reads every position a row may attend to and compares it to the oracle."""

    scheduler: Scheduler
    gather_copies_first: bool = False
    ended: dict[Sequence, str] = field(default_factory=dict)
    scored: dict[Sequence, list[int]] = field(default_factory=dict)
    started: list[Sequence] = field(default_factory=list)
    all: list[Sequence] = field(default_factory=list)
    truth: dict[bytes, list[int]] = field(default_factory=dict)  # what a block under that digest must hold
    now: float = 0.0

    def __post_init__(self) -> None:
        pool = self.scheduler.pool
        self.pages = [[0] * pool.page_size for _ in range(pool.n_blocks)]

    def add(self, request: Request) -> Sequence:
        sequence = self.scheduler.add(request)
        self.all.append(sequence)
        return sequence

    def step(self) -> Schedule:
        schedule = self.scheduler.schedule(self.now)
        self.scheduler.check()
        check_writes(self.scheduler.pool, schedule)
        self.check_fairness(schedule)
        self.ended.update(dict.fromkeys(schedule.expired, "expired"))
        self.ended.update(dict.fromkeys(schedule.exhausted, "exhausted"))
        self.started += [sequence for sequence, _ in schedule.started]
        self.compute(schedule)
        sampling = [work.sequence for work in schedule.work if work.samples]
        for work in schedule.work:
            self.score(work)
        self.scheduler.complete(schedule)
        for sequence in sampling:
            self.sample(sequence)
        for work in schedule.work:
            if work.sequence.request.sampling.max_tokens == 0 and work.sequence.pending == 0:
                self.end(work.sequence, "done")
        self.scheduler.check()
        self.check_published()
        self.now += 1.0
        return schedule

    def compute(self, schedule: Schedule) -> None:
        if self.gather_copies_first:
            for (_, target), page in zip(
                schedule.copies, [list(self.pages[source]) for source, _ in schedule.copies], strict=True
            ):
                self.pages[target] = page
        else:
            for source, target in schedule.copies:
                self.pages[target] = list(self.pages[source])
        for work in schedule.work:  # all stores come before all reads, as in a layer of the real thing
            self.store(work)
        for work in schedule.work:
            truth = keys_values(work.sequence.request.tenant, work.sequence.tokens)
            assert [self.read(work.sequence, position) for position in range(work.stop)] == truth[: work.stop]

    def store(self, work: Work) -> None:
        sequence, size = work.sequence, self.scheduler.pool.page_size
        assert work.start == sequence.next
        assert work.start < work.stop <= len(sequence.tokens)
        assert work.start <= work.stored == sequence.stored, "positions are stored in order, each once"
        truth = keys_values(sequence.request.tenant, sequence.tokens)
        for position in range(max(work.start, work.stored), work.stop):
            block = sequence.blocks[position // size]
            assert block != 0
            assert self.scheduler.pool.references(block) == 1
            self.pages[block][position % size] = truth[position]

    def read(self, sequence: Sequence, position: int) -> int:
        size = self.scheduler.pool.page_size
        return self.pages[sequence.blocks[position // size]][position % size]

    def score(self, work: Work) -> None:
        """Deliver prompt log-probabilities as an engine does: the rows that were not delivered before."""
        sequence = work.sequence
        if sequence.request.sampling.prompt_logprobs is not None:
            delivered = self.scored.setdefault(sequence, [])
            delivered += range(max(work.start, sequence.scored), min(work.stop, sequence.prompt_length - 1))

    def sample(self, sequence: Sequence) -> None:
        value = self.read(sequence, len(sequence.tokens) - 1)
        completions = [sequence]
        if sequence.slots > 1:
            completions += [self.scheduler.fork(sequence, i) for i in range(1, sequence.request.sampling.n)]
            self.all += completions[1:]
        for completion in completions:
            self.scheduler.append(completion, next_token(value, completion.index))
            if len(completion.tokens) - completion.prompt_length == completion.request.sampling.max_tokens:
                self.end(completion, "done")

    def end(self, sequence: Sequence, why: str) -> None:
        if not sequence.finished:
            self.scheduler.finish(sequence)
            self.ended[sequence] = why

    def check_fairness(self, schedule: Schedule) -> None:
        rows = sum(work.stop - work.start for work in schedule.work)
        assert rows <= self.scheduler.max_batch_tokens
        served = {work.sequence for work in schedule.work}
        starved = [s for s in self.scheduler.running if s.pending == 1 and s not in served]
        if starved:
            assert rows == self.scheduler.max_batch_tokens, "a decode was left out though rows were left"
            assert all(work.stop - work.start == 1 for work in schedule.work), "a prompt's chunk stalled a decode"

    def check_published(self) -> None:
        """Every block that can be found holds what its digest says, by digests computed here, from scratch."""
        pool = self.scheduler.pool
        for sequence in self.scheduler.running + [s for s in self.all if s.finished]:
            parent, salt = bytes(16), sequence.request.tenant.encode()
            truth = keys_values(sequence.request.tenant, sequence.tokens)
            for start in range(0, len(truth) - pool.page_size + 1, pool.page_size):
                page = sequence.tokens[start : start + pool.page_size]
                data = parent + struct.pack(f"<{len(page)}q", *page) + salt
                parent, salt = hashlib.blake2b(data, key=KEY, digest_size=16).digest(), b""
                self.truth[parent] = truth[start : start + pool.page_size]
        for digest, block in pool._published.items():
            assert self.pages[block] == self.truth[digest]

    def run(self, most_steps: int = 2_000) -> None:
        for _ in range(most_steps):
            if not self.scheduler.has_work:
                break
            self.step()
        assert not self.scheduler.has_work, "no progress"
        assert self.scheduler.pool.used == 0


# ---- The simulation


@dataclass(frozen=True)
class Arrival:
    step: int
    request: Request
    abort_at: int | None


@st.composite
def arrivals(draw: st.DrawFn, longest: int) -> Arrival:
    # Prompts are beginnings of three long texts and a few odd tokens, so that many share prefixes.
    shared = draw(st.integers(0, longest))
    family = draw(st.integers(0, 2))
    tail = draw(st.lists(st.integers(0, 3), min_size=1 if shared == 0 else 0, max_size=max(1, longest - shared)))
    prompt = ([family, 3, 1, 4, 1, 5, 2, 6, 5, 3] * (longest // 10 + 1))[:shared] + tail
    step = draw(st.integers(0, 12))
    request = request_for(
        prompt[:longest],
        max_tokens=draw(st.integers(0, 9)),
        n=draw(st.sampled_from([1, 1, 1, 2, 3])),
        tenant=draw(st.sampled_from(["", "", "", "other"])),
        deadline=draw(st.sampled_from([None, None, None, None, step + 1.5, step + 7.5])),
        prompt_logprobs=draw(st.sampled_from([None, None, 0])),
        prefix_caching=draw(st.sampled_from([True, True, True, False])),
        priority=draw(st.sampled_from([0, 0, 0, 1])),
        share=draw(st.sampled_from([1.0, 1.0, 0.25])),
    )
    return Arrival(step, request, draw(st.sampled_from([None, None, None, None, step, step + 2, step + 6])))


@settings(max_examples=600, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(data=st.data())
def test_every_completion_gets_exactly_its_own_tokens_whatever_happens_around_it(data: st.DataObject) -> None:
    page_size = data.draw(st.integers(1, 4), "page size")
    load = data.draw(st.lists(arrivals(longest=24), min_size=1, max_size=10), "load")
    need = max(-(-(len(a.request.prompt) + 1) // page_size) for a in load)
    engine = Engine(
        scheduler_with(
            capacity=need + data.draw(st.sampled_from([0, 1, 2, 2, 5, 40]), "blocks over the need"),
            page_size=page_size,
            max_batch_tokens=data.draw(st.integers(1, 40), "budget"),
            max_running=data.draw(st.integers(3, 8), "max running"),
            prefix_caching=data.draw(st.sampled_from([True, True, True, False]), "prefix caching"),
        ),
        gather_copies_first=data.draw(st.booleans(), "gather copies first"),
    )
    for step in range(20):
        for arrival in load:
            if arrival.step == step:
                engine.add(arrival.request)
            if arrival.abort_at == step:
                for sequence in [s for s in engine.all if s.request is arrival.request]:
                    engine.end(sequence, "aborted")
        engine.step()
    engine.run()
    check_outcome(engine, page_size)


def check_outcome(engine: Engine, page_size: int) -> None:
    assert set(engine.ended) == set(engine.all)
    for line in {(s.request.tenant, s.request.priority) for s in engine.started}:
        orders = [s.order for s in engine.started if (s.request.tenant, s.request.priority) == line]
        assert orders == sorted(orders), "first come, first served"
    for sequence, why in engine.ended.items():
        expected = answer(sequence.request, sequence.index)
        event(why)
        event(f"preempted: {sequence.preemptions > 0}")
        if why == "done":
            assert sequence.tokens == expected
        else:
            assert sequence.tokens == expected[: len(sequence.tokens)]
        if why == "expired":
            assert sequence.request.deadline is not None
        if why == "exhausted":
            assert len(sequence.tokens) > engine.scheduler.pool.capacity * page_size
        if why == "done" and sequence.request.sampling.prompt_logprobs is not None and sequence.index == 0:
            assert engine.scored[sequence] == list(range(sequence.prompt_length - 1)), "each row once, in order"
    for sequence in engine.all:
        assert sequence.finished
        assert not sequence.blocks


# ---- One rule at a time


def rows_of(schedule: Schedule) -> list[tuple[str, int, int, int]]:
    return [(work.sequence.request.request_id, work.start, work.stop, work.stored) for work in schedule.work]


def test_a_long_prompt_never_stalls_those_who_decode() -> None:
    engine = Engine(scheduler_with(max_batch_tokens=10))
    for name in "abc":
        engine.add(request_for([ord(name)], 20, name=name))
    engine.step()
    engine.add(request_for([7] * 30, 1, name="long"))
    for start in (0, 7, 14, 21):
        rows = rows_of(engine.step())
        assert [name for name, *_ in rows] == ["a", "b", "c", "long"]
        assert rows[3] == ("long", start, start + 7, start)


def test_a_prompt_in_chunks_leaves_rows_to_decodes_and_to_those_who_wait() -> None:
    engine = Engine(scheduler_with(max_batch_tokens=8))
    engine.add(request_for([1], 30, name="first"))
    engine.step()
    engine.add(request_for([7] * 6, 30, name="old"))
    engine.add(request_for([8], 30, name="young"))
    assert rows_of(engine.step()) == [("first", 1, 2, 1), ("old", 0, 6, 0), ("young", 0, 1, 0)]
    engine.add(request_for([9] * 20, 30, name="long"))
    engine.add(request_for([5], 30, name="last"))
    assert rows_of(engine.step())[3:] == [("long", 0, 5, 0)]
    assert rows_of(engine.step())[3:] == [("last", 0, 1, 0), ("long", 5, 9, 5)]
    assert rows_of(engine.step())[3:] == [("last", 1, 2, 1), ("long", 9, 13, 9)]


def test_a_fully_cached_prompt_revisits_its_last_token_and_stores_nothing() -> None:
    engine = Engine(scheduler_with())
    engine.add(request_for([1, 2, 3, 4, 5, 6, 7, 8], 2, name="a"))
    engine.run()
    again = engine.add(request_for([1, 2, 3, 4, 5, 6, 7, 8], 2, name="b"))
    schedule = engine.step()
    assert schedule.started == ((again, 8),)
    assert rows_of(schedule) == [("b", 7, 8, 8)]
    assert again.stored == 8


def test_a_partly_cached_prompt_starts_at_its_first_unknown_block() -> None:
    engine = Engine(scheduler_with())
    engine.add(request_for([1, 2, 3, 4, 5, 6, 7, 8, 9], 1, name="a"))
    engine.run()
    other = engine.add(request_for([1, 2, 3, 4, 5, 6, 0, 0, 0], 1, name="b"))
    schedule = engine.step()
    assert schedule.started == ((other, 4),)
    assert rows_of(schedule) == [("b", 4, 9, 4)]


@pytest.mark.parametrize(
    ("how", "cached"),
    [
        ({}, 4),
        ({"tenant": "other"}, 0),
        ({"prefix_caching": False}, 0),
    ],
)
def test_the_prefix_cache_serves_the_same_tenant_and_who_wants_it(how: dict[str, str], cached: int) -> None:
    engine = Engine(scheduler_with())
    engine.add(request_for([1, 2, 3, 4, 5], 1))
    engine.run()
    engine.add(request_for([1, 2, 3, 4, 5], 1, **how))  # type: ignore[arg-type]
    assert engine.step().started[0][1] == cached


def test_a_server_without_prefix_caching_finds_nothing() -> None:
    engine = Engine(scheduler_with(prefix_caching=False))
    for _ in range(2):
        engine.add(request_for([1, 2, 3, 4, 5], 1))
        assert engine.step().started[0][1] == 0
    assert engine.scheduler.pool.cached == 0


def test_a_block_is_not_found_when_the_one_before_it_is_gone() -> None:
    engine = Engine(scheduler_with(capacity=6, page_size=1))
    engine.add(request_for([1], 1))
    engine.add(request_for([1, 2], 1))  # computed beside the first: its own copy of [1] can't be found, its [1, 2] can
    engine.step()
    engine.add(request_for([4] * 5, 1))  # takes all that is free, and evicts [1]
    engine.step()
    assert engine.scheduler.pool.evictions == 1
    engine.add(request_for([1, 2, 3], 1))
    assert engine.step().started[0][1] == 0


def test_the_head_of_a_finished_prompt_stays_in_the_cache_longer_than_its_tail() -> None:
    engine = Engine(scheduler_with(capacity=4))
    engine.add(request_for([1] * 12, 1))
    engine.run()
    engine.add(request_for([2] * 8, 1))  # one free block, and one evicted
    engine.run()
    engine.add(request_for([1] * 12, 1))
    assert engine.step().started[0][1] == 8


def test_who_wants_no_prefix_cache_does_not_feed_it_either() -> None:
    engine = Engine(scheduler_with())
    engine.add(request_for([1, 2, 3, 4, 5], 1, prefix_caching=False))
    engine.run()
    engine.add(request_for([1, 2, 3, 4, 5], 1))
    assert engine.step().started[0][1] == 0


def test_prompt_logprobs_revisit_what_the_cache_would_skip() -> None:
    engine = Engine(scheduler_with(max_batch_tokens=5))
    engine.add(request_for([1, 2, 3, 4, 5, 6, 7, 8, 9], 1, name="a"))
    engine.run()
    scored = engine.add(request_for([1, 2, 3, 4, 5, 6, 7, 8, 9], 1, prompt_logprobs=0, name="b"))
    first = engine.step()
    assert first.started == ((scored, 8),)
    assert rows_of(first) == [("b", 0, 5, 8)]
    assert rows_of(engine.step()) == [("b", 5, 9, 8)]
    assert engine.scored[scored] == list(range(8))


def test_prompt_rows_delivered_before_a_preemption_are_not_computed_for_their_logprobs_again() -> None:
    engine = Engine(scheduler_with(capacity=11, page_size=1, max_batch_tokens=3))
    old = engine.add(request_for([1], 4, name="old"))
    young = engine.add(request_for([2] * 9, 1, prompt_logprobs=0, name="young"))
    for _ in range(2):
        engine.step()
    assert engine.step().preempted == (young,)
    assert engine.scored[young] == list(range(4))
    while not old.finished:
        engine.step()
    assert rows_of(engine.step()) == [("young", 4, 7, 4)], "rows 0 to 3 are cached and were delivered"
    engine.run()
    assert engine.scored[young] == list(range(8))


def test_the_youngest_is_preempted_and_comes_back_first_with_its_tokens() -> None:
    engine = Engine(scheduler_with(capacity=4, max_running=2))
    old = engine.add(request_for([1, 1, 1], 9, name="old"))
    young = engine.add(request_for([2, 2, 2], 9, name="young"))
    third = engine.add(request_for([3, 3, 3], 2, name="third"))
    while not (schedule := engine.step()).preempted:
        assert third not in engine.started
    assert schedule.preempted == (young,)
    assert engine.scheduler.waiting == [young, third]
    assert len(young.tokens) > young.prompt_length
    engine.run()
    assert engine.started == [old, young, third], "coming back is not starting"
    for sequence in (old, young, third):
        assert sequence.tokens == answer(sequence.request, 0)


def test_who_is_preempted_comes_back_in_a_later_step_even_if_others_hold_all_its_prompt() -> None:
    engine = Engine(scheduler_with(capacity=9, page_size=1))
    for name in ("a", "b"):  # computed side by side: b holds copies of what a publishes
        engine.add(request_for([1] * 4, 3, name=name))
    engine.step()
    schedule = engine.step()
    assert [sequence.request.request_id for sequence in schedule.preempted] == ["b"]
    assert rows_of(schedule) == [("a", 4, 5, 4)]
    assert rows_of(engine.step())[-1] == ("b", 4, 5, 5), "all its tokens are found now"
    engine.run()


def test_a_newcomer_that_would_be_preempted_at_once_waits() -> None:
    engine = Engine(scheduler_with(capacity=8, page_size=1))
    old = engine.add(request_for([1] * 4, 3))
    new = engine.add(request_for([2] * 4, 3))
    engine.run()
    assert (old.preemptions, new.preemptions) == (0, 0)


def test_a_sequence_that_runs_alone_and_outgrows_the_pool_is_reported_and_gives_its_blocks_back() -> None:
    engine = Engine(scheduler_with(capacity=2))
    sequence = engine.add(request_for([1, 2, 3], 20))
    engine.run()
    assert engine.ended == {sequence: "exhausted"}
    assert len(sequence.tokens) == 9, "8 positions fit, and the token after them needs none"


def test_completions_share_the_prompt_and_copy_only_the_block_they_write() -> None:
    engine = Engine(scheduler_with())
    engine.add(request_for([1, 2, 3, 4, 5, 6], 4, n=3))
    engine.step()
    assert engine.scheduler.n_running == 3
    first, second, third = engine.scheduler.running
    assert first.blocks == second.blocks == third.blocks
    copies = engine.step().copies
    assert len(copies) == 2, "the last owner writes in place"
    assert {source for source, _ in copies} == {third.blocks[1]}
    assert len({s.blocks[1] for s in (first, second, third)}) == 3
    assert len({s.blocks[0] for s in (first, second, third)}) == 1
    assert engine.scheduler.pool.used == 4
    engine.run()
    assert [s.tokens for s in (first, second, third)] == [answer(first.request, i) for i in range(3)]


def test_completions_of_a_prompt_that_fills_its_blocks_copy_nothing() -> None:
    engine = Engine(scheduler_with())
    engine.add(request_for([1, 2, 3, 4], 3, n=2))
    engine.step()
    assert engine.step().copies == ()
    engine.run()


def test_a_request_for_n_waits_until_n_can_run() -> None:
    engine = Engine(scheduler_with(max_running=3))
    one = engine.add(request_for([1], 3))
    three = engine.add(request_for([2], 3, n=3))
    late = engine.add(request_for([3], 3))
    while not one.finished:
        engine.step()
        assert engine.started == [one], "nobody overtakes the one who waits for three"
    engine.run()
    assert engine.started == [one, three, late]


def test_what_is_past_its_deadline_ends_waiting_or_running() -> None:
    engine = Engine(scheduler_with(max_running=1))
    running = engine.add(request_for([1], 50, deadline=2.5))
    waiting = engine.add(request_for([2], 50, deadline=1.5))
    patient = engine.add(request_for([3], 2, deadline=99.0))
    expired = [engine.step().expired for _ in range(4)]
    assert expired == [(), (), (waiting,), (running,)]
    engine.run()
    assert engine.ended[patient] == "done"


def test_all_completions_of_a_request_share_its_deadline() -> None:
    engine = Engine(scheduler_with())
    engine.add(request_for([1], 50, n=3, deadline=2.5))
    assert [len(engine.step().expired) for _ in range(4)] == [0, 0, 0, 3]


def test_finishing_gives_all_blocks_back_in_every_state() -> None:
    engine = Engine(scheduler_with(capacity=4, max_batch_tokens=5))
    running = engine.add(request_for([1] * 4, 20))
    half = engine.add(request_for([2] * 6, 20))
    waiting = engine.add(request_for([3] * 4, 20))
    engine.step()
    assert half.next == 1
    unfinished_step = engine.scheduler.schedule(engine.now)
    assert unfinished_step.work
    for sequence in (waiting, half, running, running):
        engine.scheduler.finish(sequence)
        engine.scheduler.check()
    engine.scheduler.complete(unfinished_step)
    assert engine.scheduler.pool.used == 0
    assert not engine.scheduler.has_work


def test_a_prompt_that_cannot_fit_now_waits_and_nobody_overtakes_it() -> None:
    engine = Engine(scheduler_with(capacity=6))
    running = engine.add(request_for([1] * 8, 4))
    big = engine.add(request_for([2] * 20, 1))
    small = engine.add(request_for([3], 1))
    while not running.finished:
        engine.step()
        assert engine.started == [running]
    engine.run()
    assert engine.started == [running, big, small]


def test_who_waits_for_blocks_starts_when_one_of_several_ends() -> None:
    engine = Engine(scheduler_with(capacity=11, page_size=1))
    long = engine.add(request_for([1], 8))
    short = engine.add(request_for([2] * 5, 2))
    waiting = engine.add(request_for([3] * 4, 1))
    engine.step()
    assert engine.started == [long, short]
    for _ in range(2):
        engine.step()
    assert engine.started == [long, short, waiting]
    assert not long.finished


@pytest.mark.parametrize(
    ("request_", "field_", "message"),
    [
        (lambda: request_for([]), "prompt", "1 to 100"),
        (lambda: request_for([1] * 101), "prompt", "1 to 100"),
        (lambda: request_for([1], n=5), "sampling.n", "at most 4 completions"),
        (lambda: request_for([1] * 32, 1), "prompt", "need 9 blocks of 4 tokens, and the whole cache has 8"),
    ],
)
def test_what_can_never_run_is_refused(request_: Callable[[], Request], field_: str, message: str) -> None:
    scheduler = scheduler_with(capacity=8, max_running=4, max_context=100)
    with pytest.raises(InvalidField, match=message) as caught:
        scheduler.add(request_())
    assert caught.value.field == field_
    assert not scheduler.has_work


def test_what_just_fits_is_taken() -> None:
    for prompt, max_tokens in ((31, 1), (32, 0)):
        engine = Engine(scheduler_with(capacity=8))
        sequence = engine.add(request_for([1] * prompt, max_tokens))
        engine.run()
        assert engine.ended == {sequence: "done"}


def test_too_many_who_wait_are_refused_with_a_time_to_come_back() -> None:
    engine = Engine(scheduler_with(max_queued=2, max_running=1))
    for _ in range(3):
        engine.add(request_for([1]))  # one of them has a free place to go to
    for _ in range(2):
        with pytest.raises(QueueFull, match="are waiting") as caught:
            engine.add(request_for([1]))
        assert caught.value.retry_after_seconds > 0
        engine.step()
    assert engine.scheduler.n_waiting == 2
    while engine.scheduler.n_waiting == 2:
        engine.step()
    with pytest.raises(QueueFull):
        engine.scheduler.refuse(request_for([1]), arriving=1)
    engine.add(request_for([1]))
    engine.run()


class CountingPool(BlockPool):
    """Counts what is asked of it."""

    calls = 0

    def chain(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        self.calls += 1
        return super().chain(*args, **kwargs)

    def take(self, *args, **kwargs) -> int:  # type: ignore[no-untyped-def]
        self.calls += 1
        return super().take(*args, **kwargs)

    def find(self, digest: bytes) -> int | None:
        self.calls += 1
        return super().find(digest)

    def references(self, block: int) -> int:
        self.calls += 1
        return super().references(block)


def test_a_step_does_no_work_proportional_to_the_context_nor_to_a_prompt_that_waits() -> None:
    pool = CountingPool(4_100, 16, KEY)
    scheduler = Scheduler(pool, max_batch_tokens=65_536, max_running=8, max_queued=8, max_context=100_000)
    long = scheduler.add(request_for([1] * 60_000, 200))
    scheduler.add(request_for([1] * 30_000 + [2] * 30_000, 200))  # much of it is cached, and the rest does not fit
    schedules = []
    for step in range(101):
        schedules.append(scheduler.schedule(0.0))
        scheduler.complete(schedules[-1])
        scheduler.append(long, step)
        if step == 1:
            before = pool.calls
    assert scheduler.n_waiting == 1
    assert pool.calls - before <= 5 * 100, "a few calls for each of the 99 steps"
