"""The correctness contract: nothing around a request ever changes its tokens or a bit of its numbers."""

from __future__ import annotations

import random
import threading
import time
from dataclasses import replace

import pytest
import torch
from cutaway_server.architecture import LayerConfig, Rope, RopeScaling
from cutaway_server.engine.build import longest_context
from cutaway_server.engine.memory import available_bytes, count_pages
from cutaway_server.engine.scoring import score
from cutaway_server.engine.thread import EngineThread
from cutaway_server.errors import AlreadyExists, DeadlineExceeded, EngineFailed, InvalidField, ModelError, QueueFull
from cutaway_server.request import FinishReason, RequestEnded, RequestFailed, Sampled
from cutaway_server.sampler import SamplerState
from engines import ABORTED, alone, ask, make_engine, run
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import PLAIN, SHAPES, random_weights
from oracle import dense_logits


def prompt(n: int, seed: int = 0) -> tuple[int, ...]:
    return tuple(random.Random(seed).choices(range(60), k=n))


def greedy(tokens: tuple[int, ...], n: int) -> list[int]:
    weights, sequence = random_weights(PLAIN), list(tokens)
    for _ in range(n):
        sequence.append(int(dense_logits(PLAIN, weights, sequence)[-1].argmax()))
    return sequence[len(tokens) :]


MANY = [
    ask("short", prompt(3, 1)),
    ask("long", prompt(70, 2), max_tokens=20),
    ask("sampled", prompt(20, 3), temperature=1.3, top_p=0.9, seed=5),
    ask("filtered", prompt(33, 4), temperature=0.8, top_k=9, min_p=0.05, typical_p=0.9, seed=6),
    ask("penalised", prompt(16, 5), repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.4),
    ask("three", prompt(21, 6), temperature=1.0, n=3, max_tokens=12),
    ask("scored", prompt(50, 7), prompt_logprobs=2),
    ask(
        "biased", prompt(10, 8), logit_bias=((3, 5.0),), bad_words=((3, 3),), min_tokens=4, eos_token_ids=frozenset({3})
    ),
    ask("only the prompt", prompt(40, 9), prompt_logprobs=0, max_tokens=0),
]


def test_greedy_tokens_are_those_of_the_dense_model() -> None:
    answer = alone(ask("a", prompt(30)))
    assert answer.tokens[0] == greedy(prompt(30), 8)
    assert answer.ended[0].reason is FinishReason.LENGTH


@pytest.mark.parametrize("name", ["plain", "windows", "qk-norm full, post-norm only", "layernorm, learned positions"])
def test_batched_is_alone(name: str) -> None:
    config = SHAPES[name]
    together = run(make_engine(config), *MANY)
    for request in MANY:
        assert together[request.request_id].said == alone(request, config=config).said, request.request_id


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_preempted_is_undisturbed(dtype: torch.dtype) -> None:
    growing = [replace(r, sampling=replace(r.sampling, max_tokens=60)) for r in MANY if r.sampling.max_tokens]
    need = max(-(-(len(r.prompt) + r.sampling.max_tokens) // 16) * r.sampling.n for r in growing)
    crowded = run(make_engine(blocks=need + 2, dtype=dtype), *growing)
    assert sum(a.done.timings.preemptions for a in crowded.values() if a.done) > 0, "nothing was preempted"
    for request in growing:
        assert crowded[request.request_id].said == alone(request, dtype=dtype).said, request.request_id


@pytest.mark.parametrize("budget", [1, 7, 64])
def test_chunked_is_whole(budget: int) -> None:
    chunked = run(make_engine(max_batch_tokens=budget), *MANY)
    for request in MANY:
        assert chunked[request.request_id].said == alone(request).said, request.request_id


@pytest.mark.parametrize("page_size", [16, 32, 256])
def test_a_cached_prefix_is_recomputed_to_the_bit(page_size: int) -> None:
    engine = make_engine(page_size=page_size, blocks=60)
    first = run(engine, *MANY)
    second = run(engine, *MANY)
    for request in MANY:
        assert second[request.request_id].said == first[request.request_id].said, request.request_id
        full = len(request.prompt) // page_size * page_size
        assert second[request.request_id].cached_tokens == full
        assert first[request.request_id].cached_tokens == 0


def test_a_wholly_cached_prompt_starts_with_its_last_token() -> None:
    engine, request = make_engine(), ask("a", prompt(64), prompt_logprobs=1)
    first, second = run(engine, request), run(engine, request)
    assert second["a"].cached_tokens == 64
    assert second["a"].said == first["a"].said


def test_a_cached_prefix_belongs_to_its_tenant() -> None:
    engine, request = make_engine(), ask("a", prompt(64))
    run(engine, request)
    assert run(engine, replace(request, tenant="other"))["a"].cached_tokens == 0
    assert run(engine, replace(request, prefix_caching=False))["a"].cached_tokens == 0
    assert run(engine, request)["a"].cached_tokens == 64


def test_evicted_prefixes_are_not_found_again() -> None:
    engine = make_engine(blocks=8)
    run(engine, ask("a", prompt(64, 1)))
    run(engine, ask("b", prompt(100, 2)))
    again = run(engine, ask("a", prompt(64, 1)))["a"]
    assert again.cached_tokens is not None
    assert again.cached_tokens < 64
    assert again.said == alone(ask("a", prompt(64, 1))).said


def test_completions_of_one_prompt_share_its_pages_and_differ_only_by_index() -> None:
    request = ask("a", prompt(40), n=4, temperature=1.0, max_tokens=6)
    engine = make_engine()
    used: list[int] = []
    answer = run(engine, request, between=lambda *_: used.append(engine.scheduler.pool.used))["a"]
    assert max(used) < 4 * 3, "the prompt's pages were not shared"
    assert len({tuple(tokens) for tokens in answer.tokens.values()}) > 1
    assert answer.tokens[0] == alone(replace(request, sampling=replace(request.sampling, n=1))).tokens[0]


def test_prompt_log_probabilities_are_those_of_the_dense_model() -> None:
    tokens = prompt(50)
    answer = alone(ask("a", tokens, prompt_logprobs=4, max_tokens=0), max_batch_tokens=9)
    assert sorted(answer.prompt) == list(range(1, 50))
    oracle = torch.log_softmax(dense_logits(PLAIN, random_weights(PLAIN), list(tokens)), -1)
    for position, scored in answer.prompt.items():
        assert abs(scored.logprob - oracle[position - 1, tokens[position]]) < 1e-4
        best = oracle[position - 1].topk(4)
        assert [token for token, _ in scored.top] == best.indices.tolist()
        assert max(abs(a - b) for (_, a), b in zip(scored.top, best.values.tolist(), strict=True)) < 1e-4


def test_stop_tokens_and_end_tokens_end_a_completion_but_not_before_min_tokens() -> None:
    tokens = alone(ask("a", prompt(30))).tokens[0]
    third = tokens[2]
    assert third not in tokens[:2]
    stopped = alone(ask("a", prompt(30), stop_token_ids=frozenset({third})))
    assert stopped.tokens[0] == tokens[:3]
    assert (stopped.ended[0].reason, stopped.ended[0].stop_token) == (FinishReason.STOP, third)
    ended = alone(ask("a", prompt(30), eos_token_ids=frozenset({third})))
    assert (ended.ended[0].reason, ended.ended[0].stop_token) == (FinishReason.STOP, None)
    later = alone(ask("a", prompt(30), eos_token_ids=frozenset({third}), min_tokens=5))
    assert later.tokens[0][:2] == tokens[:2]
    assert len(later.tokens[0]) >= 5
    assert third not in later.tokens[0][:5]


@pytest.mark.parametrize("step", [0, 1, 4])
def test_abort_gives_every_block_back_at_once_and_leaves_neighbours_alone(step: int) -> None:
    engine = make_engine(max_batch_tokens=24, max_running=4)
    others = [ask("b", prompt(30, 1), max_tokens=15), ask("c", prompt(9, 2), max_tokens=15)]
    doomed = [ask("a", prompt(60), max_tokens=30), ask("n", prompt(20, 3), n=3, temperature=1.0)]

    def between(now: int, answers: dict) -> None:
        if now == step:
            for request in doomed:
                for name, event in engine.abort(request.request_id):
                    answers[name].take(event)
                assert request.request_id not in engine.live
            owners = {s.request.request_id for s in engine.scheduler.running + engine.scheduler.waiting}
            assert owners <= {"b", "c"}

    answers = run(engine, *doomed, *others, between=between)
    assert [answers["n"].ended[i].reason for i in range(3)] == [ABORTED] * 3
    for request in others:
        assert answers[request.request_id].said == alone(request).said


@pytest.mark.parametrize("step", [0, 2])
def test_one_of_several_completions_can_be_aborted(step: int) -> None:
    request = ask("a", prompt(20), n=3, temperature=1.0)
    for index in range(3):
        engine = make_engine()

        def between(now: int, answers: dict, engine=engine, index=index) -> None:
            if now == step:
                for name, event in engine.abort("a", index):
                    answers[name].take(event)

        answer = run(engine, request, between=between)["a"]
        whole = alone(request)
        assert answer.ended[index].reason is ABORTED
        for other in {0, 1, 2} - {index}:
            assert answer.tokens[other] == whole.tokens[other]


def test_a_deadline_ends_waiting_and_running_requests() -> None:
    engine = make_engine(max_running=1)
    soon = time.monotonic() + 0.05
    answers = run(
        engine, ask("runs", prompt(5), max_tokens=300, deadline=soon), ask("waits", prompt(5), deadline=soon),
        ask("after", prompt(5)), between=lambda *_: time.sleep(0.01),
    )  # fmt: skip
    assert isinstance(answers["runs"].error, DeadlineExceeded)
    assert isinstance(answers["waits"].error, DeadlineExceeded)
    assert answers["after"].said == alone(ask("after", prompt(5))).said


def test_a_request_whose_numbers_are_not_finite_fails_alone_and_its_pages_do_no_harm() -> None:
    weights = random_weights(PLAIN)
    weights.embed[60] = torch.nan  # prompts here use tokens below 60
    engine = make_engine(weights=weights, blocks=12)
    bad = ask("bad", (*prompt(20), 60))
    good = [ask(f"good-{i}", prompt(30 + i, i)) for i in range(4)]
    for _ in range(3):
        answers = run(engine, good[0], bad, *good[1:])
        assert isinstance(answers["bad"].error, EngineFailed)
        for request in good:
            assert answers[request.request_id].said == alone(request).said


def test_one_request_that_breaks_our_code_ends_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(SamplerState):
        def banned(self):
            raise RuntimeError("a bug of ours")

    def breaks(model, sequence, *rest):
        if sequence.request.request_id == "scored":
            raise RuntimeError("another")
        return score(model, sequence, *rest)

    monkeypatch.setattr("cutaway_server.engine.engine.score", breaks)
    engine = make_engine()
    good = [ask("a", prompt(30, 1)), ask("b", prompt(9, 2), temperature=1.0), ask("c", prompt(9, 3), prompt_logprobs=1)]
    bad = [ask("scored", prompt(20, 4), prompt_logprobs=1), ask("banned", prompt(20, 5), bad_words=((3,),))]

    def between(now: int, answers: dict) -> None:
        if now == 0:
            live = engine.live["banned"]
            live.prompt = replace(live.prompt, sampler=Broken(live.request.sampling, live.request.prompt, 61))

    answers = run(engine, good[0], bad[0], good[1], bad[1], good[2], between=between)
    for request in bad:
        assert isinstance(answers[request.request_id].error, EngineFailed)
        assert "bug" not in str(answers[request.request_id].error)
    for request in good:
        assert answers[request.request_id].said == alone(request).said


def test_a_prompt_whose_numbers_are_not_finite_is_not_scored() -> None:
    weights = random_weights(PLAIN)
    weights.embed[60] = torch.nan
    answers = run(make_engine(weights=weights), ask("a", (*prompt(20), 60, 5), prompt_logprobs=1, max_tokens=0))
    assert isinstance(answers["a"].error, EngineFailed)


def test_a_short_question_does_not_wait_for_a_long_prompt() -> None:
    engine, first = make_engine(max_batch_tokens=32), {}

    def between(now: int, answers: dict) -> None:
        for name, answer in answers.items():
            if answer.tokens:
                first.setdefault(name, now)

    run(engine, ask("long", prompt(320)), ask("short", prompt(7)), between=between)
    assert first["short"] <= 3
    assert 10 <= first["long"] <= 12


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_whatever_happens_each_answer_is_the_one_it_would_be_alone(data: st.DataObject) -> None:
    shared = prompt(48, 99)
    requests = []
    for i in range(data.draw(st.integers(1, 7))):
        n = data.draw(st.integers(1, 3))
        tokens = shared[: data.draw(st.integers(0, 48))] + prompt(data.draw(st.integers(1, 40)), i)
        requests.append(
            ask(
                f"r{i}", tokens, n=n, seed=i, temperature=data.draw(st.sampled_from([0.0, 1.0])),
                max_tokens=data.draw(st.integers(0, 12)),
                prompt_logprobs=data.draw(st.sampled_from([None, None, 1])),
            )
        )  # fmt: skip
    need = max(-(-(len(r.prompt) + r.sampling.max_tokens) // 16) * r.sampling.n for r in requests)
    engine = make_engine(blocks=need + 2, max_batch_tokens=data.draw(st.sampled_from([5, 40, 512])), max_running=4)
    aborts = {r.request_id: data.draw(st.integers(1, 60)) for r in requests if data.draw(st.integers(0, 3)) == 0}

    def between(now: int, answers: dict) -> None:
        for name, when in aborts.items():
            if when == now:
                for _, event in engine.abort(name):
                    answers[name].take(event)

    answers = run(engine, *requests, between=between)
    for request in requests:
        whole, answer = alone(request), answers[request.request_id]
        if any(end.reason is ABORTED for end in answer.ended.values()):
            for index, tokens in answer.tokens.items():
                assert tokens == whole.tokens[index][: len(tokens)]
        else:
            assert answer.said == whole.said


def test_prompts_that_can_never_fit_are_refused_and_say_why() -> None:
    engine = make_engine(blocks=4)
    with pytest.raises(InvalidField, match="need 5 blocks of 16 tokens, and the whole cache has 4"):
        engine.add(ask("a", prompt(70)))
    with pytest.raises(InvalidField, match=r"sampling\.n: 17"):
        engine.add(ask("a", prompt(7), n=17))
    assert not engine.has_work


class Collector:
    """What a thread reports."""

    def __init__(self) -> None:
        self.events: list = []
        self.death: BaseException | None = None
        self.changed = threading.Condition()

    def report(self, events) -> None:
        with self.changed:
            self.events += events
            self.changed.notify_all()

    def on_death(self, error: BaseException) -> None:
        with self.changed:
            self.death = error
            self.changed.notify_all()

    def wait(self, condition) -> None:
        with self.changed:
            assert self.changed.wait_for(condition, 30), "nothing came"

    def ended(self) -> set[str]:
        return {name for name, event in self.events if isinstance(event, RequestEnded | RequestFailed)}


def test_a_thread_takes_requests_from_anywhere_and_refuses_what_it_must() -> None:
    seen = Collector()
    engine = make_engine(max_running=2)
    engine.scheduler.max_queued = 3
    thread = EngineThread(engine, seen.report, seen.on_death)
    for i in range(5):
        thread.submit(ask(f"r{i}", prompt(9, i)))
    with pytest.raises(QueueFull, match="are waiting"):
        thread.submit(ask("r5", prompt(9)))
    with pytest.raises(AlreadyExists, match="'r3'"):
        thread.submit(ask("r3", prompt(9)))
    thread.start()
    seen.wait(lambda: len(seen.ended()) == 5)
    assert thread.idle()
    thread.submit(ask("r3", prompt(9, 3)))
    seen.wait(lambda: sum(isinstance(e, RequestEnded) for _, e in seen.events) == 6)
    tokens = [event.token for name, event in seen.events if name == "r3" and isinstance(event, Sampled)]
    assert tokens == alone(ask("r3", prompt(9, 3))).tokens[0] * 2
    thread.submit(ask("r9", prompt(9), max_tokens=300))
    assert thread.abort("r9")
    seen.wait(lambda: "r9" in seen.ended())
    assert not thread.abort("r9")
    thread.stop()
    assert engine.scheduler.pool.used == 0


def test_what_a_step_brought_is_told_before_the_next_is_computed_and_once() -> None:
    seen, engine, told = Collector(), make_engine(), []
    kernels = engine.model.kernels
    layers = kernels.layers

    def noting(*arguments):
        told.append([event.step for _, event in seen.events if isinstance(event, Sampled)])
        return layers(*arguments)

    kernels.layers = noting  # type: ignore[method-assign]
    thread = EngineThread(engine, seen.report, seen.on_death)
    thread.submit(ask("a", prompt(9), max_tokens=6))
    thread.start()
    seen.wait(lambda: seen.ended())
    thread.stop()
    assert told == [list(range(1, step)) for step in range(1, 7)]
    assert [event.step for _, event in seen.events if isinstance(event, Sampled)] == [1, 2, 3, 4, 5, 6]


def test_an_engine_that_dies_says_so_and_takes_nothing_more(caplog: pytest.LogCaptureFixture) -> None:
    seen = Collector()
    engine = make_engine()
    engine.pages.keys.resize_(0)  # the next store is out of bounds
    thread = EngineThread(engine, seen.report, seen.on_death)
    thread.start()
    thread.submit(ask("a", prompt(9)))
    seen.wait(lambda: seen.death is not None)
    with pytest.raises(EngineFailed):
        thread.submit(ask("b", prompt(9)))
    assert "the engine failed in step 1" in caplog.text
    thread.stop()


def test_the_pool_is_sized_from_memory_and_containers_limits(tmp_path) -> None:
    own, slice_ = tmp_path / "own", tmp_path / "system.slice"
    own.write_text("0::/system.slice/cutaway.service\n")
    (slice_ / "cutaway.service").mkdir(parents=True)

    def limit(group, most: str) -> None:
        (group / "memory.max").write_text(most)
        (group / "memory.current").write_text("900000\n")
        (group / "memory.stat").write_text("anon 5\ninactive_file 50000\n")

    def available() -> int:
        return available_bytes(torch.device("cpu"), tmp_path, own)

    whole = available()
    limit(slice_ / "cutaway.service", "1000000\n")
    assert available() == 150_000 < whole
    limit(slice_ / "cutaway.service", "max\n")
    assert available() > 150_000
    limit(slice_, "950000\n")  # a limit above it holds as well
    assert available() == 100_000
    limit(slice_, "max\n")
    limit(tmp_path, "930000\n")  # where a container sees its own
    assert available() == 80_000
    (tmp_path / "memory.max").unlink()
    (tmp_path / "memory" / "job").mkdir(parents=True)
    own.write_text("5:cpu,memory:/job\n")  # version 1
    (tmp_path / "memory" / "job" / "memory.limit_in_bytes").write_text("70000")
    (tmp_path / "memory" / "job" / "memory.usage_in_bytes").write_text("50000")
    assert available() == 20_000
    sizes = {"page_bytes": 1000, "page_size": 16, "max_context": 160, "max_running": 4, "kv_cache_memory": None}
    assert count_pages(available=100_000, utilization=0.3, **sizes) == 30
    assert count_pages(available=10_000_000, utilization=0.3, **sizes) == 41, "more than can ever be used"
    assert count_pages(available=0, utilization=0.3, **{**sizes, "kv_cache_memory": 20_000}) == 20
    with pytest.raises(ModelError, match="--kv-cache-memory"):
        count_pages(available=10_000, utilization=0.5, **sizes)


def test_the_context_is_what_the_model_was_made_for() -> None:
    assert longest_context(PLAIN) == 1024
    stretched = LayerConfig(None, Rope(1e4, 8, scaling=RopeScaling("linear", factor=4.0)))
    assert longest_context(replace(PLAIN, layers=(stretched,))) == 4096
