"""An engine that launches a step before the last one's tokens are read says what the plain engine says, bit for bit.

Steps are replayed without a GPU: the recorded function is run again over the same tensors. It computes with the
reference, whose rows do not know how many others fill the size of a graph.
"""

from __future__ import annotations

import random
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from cutaway_server.engine.thread import EngineThread
from cutaway_server.request import FinishReason, RequestEnded
from cutaway_server.sampler import SamplerState, build_batch, sample
from engines import CONTEXT, Answer, ask, make_engine, run
from networks import PLAIN, flat, pages_for, random_weights
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from cutaway_server.engine.ahead import AheadEngine
from cutaway_server.engine.capture import EagerCapture
from cutaway_server.engine.draws import Draws, draw, plain_draws
from cutaway_server.engine.engine import Engine
from cutaway_server.engine.graphs import DecodeGraphs
from cutaway_server.engine.packed import Size
from cutaway_server.kernels.cuda.launch import interpreting
from cutaway_server.kernels.cuda.operations import CudaKernels
from cutaway_server.kernels.reference import ReferenceKernels
from cutaway_server.model.transformer import Transformer


class Replayable(ReferenceKernels):
    """The reference, which lays its work out itself whenever it is asked."""

    def plan_of(self, batch, work, prompts=None):
        return self.plan(batch)


class Counting(DecodeGraphs):
    """Counts the steps that were launched, and those launched ahead."""

    launched = ahead = 0

    def launch(self, batch, draws=None, previous=None):
        self.launched += 1
        self.ahead += previous is not None
        return super().launch(batch, draws, previous)


def make_ahead(**options: object) -> tuple[Engine, Counting]:
    plain = make_engine(**options)  # type: ignore[arg-type]
    kernels = Replayable(PLAIN, random_weights(PLAIN), CONTEXT)
    graphs = Counting(kernels, plain.pages, max_rows=plain.scheduler.max_running, capture=EagerCapture())
    return AheadEngine(graphs, plain.pages, plain.scheduler, plain.builder), graphs


def question(i: int, source: random.Random, **sampling: object) -> object:
    """A request of a random kind: greedy or drawn, of many lengths, some with stop tokens or completions beside it."""
    kind: dict[str, object] = {
        "max_tokens": source.randint(1, 30), "temperature": source.choice([0.0, 0.0, 0.7, 1.5]), "logprobs": None,
        "n": source.choice([1, 1, 1, 3]), "eos_token_ids": frozenset(source.choices(range(61), k=2)), "seed": i,
    }  # fmt: skip
    prompt = tuple(source.choices(range(61), k=source.randint(1, 60)))
    return ask(f"r{i}", prompt, **{**kind, **sampling})


def state(vocabulary: int, **sampling: object) -> SamplerState:
    """What a completion of the prompt 1 brings to the sampler."""
    return SamplerState(ask("r", (1,), **{"logprobs": None, **sampling}).sampling, (1,), vocabulary)


def said(answers: dict[str, Answer]) -> dict[str, object]:
    return {name: answer.said for name, answer in answers.items()}


@pytest.mark.parametrize("seed", range(3))
def test_everything_said_is_what_the_plain_engine_says(seed: int) -> None:
    source = random.Random(seed)
    requests = [question(i, source) for i in range(12)]
    engine, graphs = make_ahead()
    assert said(run(engine, *requests)) == said(run(make_engine(), *requests))
    assert graphs.ahead > 10
    assert graphs.ahead < graphs.launched < engine.steps + 1


@pytest.mark.parametrize(
    "odd",
    [{"top_k": 3}, {"logprobs": 2}, {"min_tokens": 9}, {"repetition_penalty": 1.3}, {"bad_words": ((7,), (3, 4))}],
)
def test_requests_that_look_at_their_past_or_at_the_whole_vocabulary_are_served_beside_the_others(
    odd: dict[str, object],
) -> None:
    source = random.Random(4)
    requests = [question(i, source, n=1, temperature=0.8) for i in range(4)]
    requests.append(question(4, source, n=1, temperature=0.8, max_tokens=12, **odd))
    engine, graphs = make_ahead()
    assert said(run(engine, *requests)) == said(run(make_engine(), *requests))
    assert graphs.ahead, "when the odd one has ended, the others run ahead"


@pytest.mark.parametrize("options", [{"blocks": 14}, {"max_running": 3}, {"max_batch_tokens": 5}, {"blocks": 3}])
def test_preemption_full_queues_and_small_steps_change_nothing(options: dict[str, object]) -> None:
    source = random.Random(5)
    requests = [question(i, source, n=1, max_tokens=source.randint(1, 12)) for i in range(8)]
    if options.get("blocks") == 3:
        requests = [ask(f"r{i}", tuple(range(10)), max_tokens=300, logprobs=None) for i in range(2)]
    engine, _ = make_ahead(**options)
    assert said(run(engine, *requests)) == said(run(make_engine(**options), *requests))


def test_whoever_comes_or_goes_while_a_step_is_on_its_way_is_dealt_with() -> None:
    engine, graphs = make_ahead()
    first = [ask(f"r{i}", (1, 2, i), max_tokens=40, logprobs=None, n=2 if i == 0 else 1) for i in range(3)]
    late = ask("late", (9, 9), max_tokens=5, logprobs=None)
    whole = said(run(make_engine(), *first, late))
    for request in first:
        engine.add(request)
    answers = {name: Answer() for name in ("r0", "r1", "r2", "late")}
    for step in range(200):
        events = []
        if step == 10:
            events += engine.abort("r0", 1)
        if step == 15:
            events += engine.abort("r1")
        if step == 20:
            engine.add(late)
        for name, event in [*events, *engine.step()]:
            answers[name].take(event)
        engine.scheduler.check()
        if not engine.has_work:
            break
    assert engine.scheduler.pool.used == 0
    assert answers["r1"].ended[0].reason == answers["r0"].ended[1].reason == FinishReason.ABORT
    assert answers["r2"].said == whole["r2"]
    assert answers["late"].said == whole["late"]
    assert answers["r0"].tokens[0] == whole["r0"][0][0]  # type: ignore[index]
    for name in ("r0", "r1"):  # what was said before the end is the beginning of the whole
        for index, tokens in answers[name].tokens.items():
            assert tokens == whole[name][0][index][: len(tokens)]  # type: ignore[index]
    assert graphs.ahead > 30
    engine.step()  # a step of nobody may still be on its way
    assert not engine.has_work


def test_a_deadline_that_passes_while_a_step_is_on_its_way_ends_the_request() -> None:
    engine, _ = make_ahead()
    engine.add(ask("r", (1, 2, 3), max_tokens=300, logprobs=None, deadline=time.monotonic() + 0.2))
    answer = Answer()
    while engine.has_work:
        for _, event in engine.step():
            answer.take(event)
        engine.scheduler.check()
    assert answer.error is not None
    assert "deadline" in str(answer.error)
    assert engine.scheduler.pool.used == 0


def test_answers_reach_the_end_of_the_context() -> None:
    request = ask("r", tuple(range(61)) * 5, max_tokens=CONTEXT - 305, logprobs=None)
    engine, _ = make_ahead()
    answers = run(engine, request)
    assert len(answers["r"].tokens[0]) == CONTEXT - 305
    assert said(answers) == said(run(make_engine(), request))


def test_on_its_own_thread_everything_is_told_and_in_order() -> None:
    source = random.Random(9)
    requests = [question(i, source, n=1) for i in range(8)]
    expected = said(run(make_engine(), *requests))
    engine, graphs = make_ahead()
    answers = {request.request_id: Answer() for request in requests}
    ended = threading.Semaphore(0)

    def report(events) -> None:
        for name, event in events:
            answers[name].take(event)
            if isinstance(event, RequestEnded):
                ended.release()

    thread = EngineThread(engine, report, on_death=lambda error: pytest.fail(str(error)))
    thread.start()
    for request in requests:
        thread.submit(request)
    for _ in requests:
        assert ended.acquire(timeout=60)
    thread.stop()
    assert said(answers) == expected
    assert graphs.ahead
    assert thread.idle()


class NothingReachesTheHost(TorchDispatchMode):
    """Refuses operations that would make the host wait for the device, which a graph cannot hold."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in {"_local_scalar_dense", "nonzero", "masked_select", "unique", "_unique2"}, name
        assert not (name in {"index", "index_put_"} and any(
            i is not None and i.dtype == torch.bool for i in args[1]
        )), "a boolean index has a size that only the device knows"  # fmt: skip
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(not interpreting(), reason="on a GPU, tests/test_gpu.py records real graphs")
def test_replayed_triton_steps_have_the_bits_of_plain_ones_whatever_fills_their_size() -> None:
    one = replace(PLAIN, layers=PLAIN.layers[:1])
    kernels = CudaKernels(one, random_weights(one), 1024, batch_invariant=True)
    source = random.Random(0)
    pages = pages_for(one, 9, 16)
    pages.keys.copy_(torch.randn(pages.keys.shape, generator=torch.Generator().manual_seed(0)))
    pages.values.copy_(torch.randn(pages.values.shape, generator=torch.Generator().manual_seed(1)))
    graphs = DecodeGraphs(kernels, pages, max_rows=4, capture=EagerCapture())
    states = [state(61, temperature=t) for t in (0.0, 0.9, 2.0)]
    for lengths in ((21, 40, 5), (30, 41, 6)):
        parts = [
            (source.choices(range(61), k=length), length - 1, length, blocks)
            for length, blocks in zip(lengths, ([3, 1], [5, 2, 7], [6]), strict=True)
        ]
        batch = flat(parts, 16)
        plain = Transformer(kernels).forward(batch, pages)
        logits = kernels.unembed(plain)
        draws = plain_draws(states, lengths)
        with NothingReachesTheHost():
            launched = graphs.launch(batch, draws)
        assert torch.equal(launched.residual, plain)
        expected = sample(logits, build_batch(states, lengths, 61, torch.device("cpu")))
        tokens, valid = launched.tokens()
        assert tokens == expected.tokens.tolist()
        assert all(valid)
    assert graphs.sizes == [Size(rows=4, items=4, width=4, drawing="plain")]


def test_a_step_finds_the_tokens_of_the_one_before_on_the_device() -> None:
    kernels = Replayable(PLAIN, random_weights(PLAIN), CONTEXT)
    pages = pages_for(PLAIN, 9, 16)
    graphs = DecodeGraphs(kernels, pages, max_rows=4, capture=EagerCapture())
    parts = [([7], 0, 1, [1]), ([9], 0, 1, [2]), ([11], 0, 1, [3])]
    greedy = plain_draws([state(61)] * 3, [1, 1, 1])
    assert greedy is not None
    first, _ = graphs.launch(flat(parts, 16), greedy).tokens()
    unknown = [([ids[0], 0], 1, 2, blocks) for ids, _, _, blocks in (parts[2], parts[0])] + [([5], 0, 1, [4])]
    found = graphs.launch(flat(unknown, 16), greedy, np.array([2, 0, -1])).residual.clone()
    known = [([11, first[2]], 1, 2, [3]), ([7, first[0]], 1, 2, [1]), ([5], 0, 1, [4])]
    assert torch.equal(found, Transformer(kernels).forward(flat(known, 16), pages))


def test_rows_draw_as_the_sampler_does_and_broken_logits_are_told() -> None:
    source = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 300, generator=source) * 3
    logits[3, 7] = torch.nan
    states = [state(300, temperature=t, seed=i) for i, t in enumerate((0.0, 1.0, 0.3, 1.0, 0.0))]
    positions = [3, 9, 27, 81, 243]
    draws = plain_draws(states, positions)
    assert isinstance(draws, Draws)
    assert not draws.greedy
    tokens, valid = draw(logits, torch.from_numpy(draws.numbers), greedy=False)
    expected = sample(logits, build_batch(states, positions, 300, torch.device("cpu")))
    assert torch.equal(tokens, expected.tokens)
    assert torch.equal(valid, expected.valid)
    assert valid.tolist() == [True, True, True, False, True]


@pytest.mark.parametrize(
    "odd",
    [
        {"top_p": 0.9}, {"logprobs": 0}, {"logit_bias": ((3, 1.0),)}, {"presence_penalty": 1.0},
        {"min_tokens": 2, "eos_token_ids": frozenset({3})}, {"bad_words": ((3, 4),)},
    ],
)  # fmt: skip
def test_whatever_a_graph_has_not_is_left_to_the_sampler(odd: dict[str, object]) -> None:
    assert plain_draws([state(61), state(61)], [1, 1]) is not None
    assert plain_draws([state(61), state(61, temperature=1.0, **odd)], [1, 1]) is None
