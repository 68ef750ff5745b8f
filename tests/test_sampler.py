"""The sampler against transformers' processors, an inverse CDF in numpy, and itself alone."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from cutaway_server.request import SamplingParams
from cutaway_server.sampler import (
    BatchMaker,
    SampledBatch,
    SamplerState,
    build_batch,
    choose,
    log_probabilities,
    sample,
    uniforms,
)  # fmt: skip
from cutaway_server.sampler.adjust import adjust
from cutaway_server.sampler.draw import distances, invert
from cutaway_server.sampler.filters import Filters, keep, keep_k
from cutaway_server.sampler.order import least, nearest
from cutaway_server.sampler.philox import philox
from cutaway_server.sampler.state import SeenTokens
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

CPU = torch.device("cpu")
VOCAB = 700  # not a multiple of a block, nor of a vector


def params(**changes: Any) -> SamplingParams:
    return replace(SamplingParams(seed=1, max_tokens=100), **changes)


def logits(rows: int, vocab: int = VOCAB, seed: int = 0, scale: float = 3.0) -> Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale


def batch_of(states: list[SamplerState], vocab: int = VOCAB, position: int = 5, masks: Tensor | None = None) -> Any:
    return build_batch(states, [position + row for row in range(len(states))], vocab, CPU, masks)


def draw(
    values: Tensor, *asked: SamplingParams, prompt: tuple[int, ...] = (1, 2, 3), position: int = 5
) -> SampledBatch:
    vocab = values.shape[1]
    return sample(values, batch_of([SamplerState(one, prompt, vocab) for one in asked], vocab, position))


# --- random numbers


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # Random123's known answers
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_gives_the_published_answers(counter: str, key: str, expected: str) -> None:
    words = [torch.tensor([[int(w, 16)] for w in text.split()]) for text in (counter, key, expected)]
    assert torch.equal(philox(words[0], words[1]), words[2])
    many = philox(words[0].expand(4, 33), words[1].expand(2, 33))  # vectorised multiplication wraps alike
    assert torch.equal(many, words[2].expand(4, 33))


def test_random_numbers_depend_on_every_bit_of_seed_index_and_position() -> None:
    bits = torch.tensor([1 << b for b in range(63)] + [-(2**63)])
    zeros = torch.zeros_like(bits)
    small = bits[:32]  # an index has 32 bits
    numbers = torch.cat(
        [
            uniforms(bits, zeros, zeros),
            uniforms(zeros[:32], small, zeros[:32]),
            uniforms(zeros[:63], zeros[:63], bits[:63]),
            uniforms(zeros[:1], zeros[:1], zeros[:1]),
        ]
    )
    assert len(set(numbers.tolist())) == len(numbers)
    assert 0.0 <= numbers.min() <= numbers.max() < 1.0


@pytest.mark.parametrize("walks", ["seeds", "indices", "positions"])
def test_random_numbers_are_uniform_and_consecutive_ones_independent(walks: str) -> None:
    n = 200_000
    fixed, walking = torch.zeros(n, dtype=torch.int64), torch.arange(n)
    numbers = uniforms(*(walking if name == walks else fixed for name in ("seeds", "indices", "positions")))
    cells = (numbers * 16).long()
    pairs = torch.bincount(cells[:-1] * 16 + cells[1:], minlength=256)
    assert chi_square(pairs, torch.full((256,), 1 / 256, dtype=torch.float64)) < 350  # 255 degrees: p = 7e-5


def chi_square(counts: Tensor, probabilities: Tensor) -> float:
    expected = probabilities.double() * counts.sum()
    return float(((counts - expected) ** 2 / expected).sum())


# --- what requests change about the logits


def adjusted(values: Tensor, asked: SamplingParams, prompt: tuple[int, ...], output: list[int]) -> Tensor:
    state = SamplerState(asked, prompt, values.shape[1])
    for token in output:
        state.append(token)
    return adjust(values, batch_of([state], values.shape[1]))


PROMPT = (7, 8, 9, 7, 300)
OUTPUT = [4, 7, 4, 4, 11]
CONTEXT = torch.tensor([[*PROMPT, *OUTPUT]])


@pytest.mark.parametrize("penalty", [0.5, 1.3, 100.0])
def test_repetition_penalty_is_that_of_transformers(penalty: float) -> None:
    theirs = transformers.RepetitionPenaltyLogitsProcessor(penalty)(CONTEXT, logits(1))
    ours = adjusted(logits(1), params(repetition_penalty=penalty), PROMPT, OUTPUT)
    torch.testing.assert_close(ours, theirs)
    assert not torch.equal(ours, logits(1))


def test_presence_and_frequency_penalties_count_the_output_only() -> None:
    expected = logits(1).double()
    for token, count in Counter(OUTPUT).items():
        expected[0, token] -= 0.7 + count * -0.4
    ours = adjusted(logits(1), params(presence_penalty=0.7, frequency_penalty=-0.4), PROMPT, OUTPUT)
    torch.testing.assert_close(ours, expected.float())


def test_penalties_together_repeat_first_then_subtract() -> None:
    theirs = transformers.RepetitionPenaltyLogitsProcessor(1.5)(CONTEXT, logits(1))
    for token, count in Counter(OUTPUT).items():
        theirs[0, token] -= 1.0 + 0.5 * count
    asked = params(repetition_penalty=1.5, presence_penalty=1.0, frequency_penalty=0.5)
    torch.testing.assert_close(adjusted(logits(1), asked, PROMPT, OUTPUT), theirs)


@pytest.mark.parametrize("output", [[], [4], [4, 7], [4, 7, 4], [4, 7, 4, 4], OUTPUT])
def test_bad_words_are_those_of_transformers(output: list[int]) -> None:
    words = [(3,), (11, 5), (4, 4, 6), (4, 6), (4, 7, 4), (300, 4, 7, 1), (9, 7, 300, 2), (1, 2, 3, 4, 5, 6, 7, 8, 9)]
    theirs = transformers.NoBadWordsLogitsProcessor([list(word) for word in words], eos_token_id=None)
    context = torch.tensor([[*PROMPT, *output]])
    ours = adjusted(logits(1), params(bad_words=tuple(words)), PROMPT, output)
    assert torch.equal(ours, theirs(context, logits(1)))
    assert ours[0, 3] == -torch.inf


def test_end_and_stop_tokens_are_banned_until_min_tokens_are_out() -> None:
    asked = params(min_tokens=5, eos_token_ids=frozenset({2, 90_000}), stop_token_ids=frozenset({5, 6}))
    theirs = transformers.MinNewTokensLengthLogitsProcessor(len(PROMPT), 5, [2, 5, 6])
    for n in range(6):
        context = torch.tensor([[*PROMPT, *OUTPUT][: len(PROMPT) + n]])
        ours = adjusted(logits(1), asked, PROMPT, OUTPUT[:n])
        assert torch.equal(ours, theirs(context, logits(1)))
        assert bool(ours[0, 2].isinf()) == (n < 5)


def test_biases_are_added_before_penalties_and_never_lift_a_ban() -> None:
    asked = params(logit_bias=((3, 100.0), (7, -2.5)), bad_words=((3,),), repetition_penalty=2.0)
    theirs = transformers.SequenceBiasLogitsProcessor({(3,): 100.0, (7,): -2.5})(CONTEXT, logits(1))
    theirs = transformers.RepetitionPenaltyLogitsProcessor(2.0)(CONTEXT, theirs)
    theirs[0, 3] = -torch.inf
    torch.testing.assert_close(adjusted(logits(1), asked, PROMPT, OUTPUT), theirs)


def test_a_mask_allows_the_tokens_whose_bits_are_set() -> None:
    words = np.random.default_rng(0).integers(0, 2**32, (2, 22), dtype=np.uint32)
    allowed = np.unpackbits(words.view(np.uint8), axis=1, bitorder="little")[:, :VOCAB].astype(bool)
    states = [SamplerState(params(), (), VOCAB) for _ in range(2)]
    ours = adjust(logits(2), batch_of(states, masks=torch.from_numpy(words.view(np.int32))))
    assert np.array_equal(ours.isfinite().numpy(), allowed)


def test_sampling_leaves_the_logits_as_they_are() -> None:
    values = logits(3)
    draw(values, params(logit_bias=((3, 5.0),)), params(top_p=0.5, bad_words=((4,),)), params(top_k=3, temperature=0.1))
    assert torch.equal(values, logits(3))


# --- which tokens may be drawn

FILTERS: list[dict[str, Any]] = [
    {"top_k": 1}, {"top_k": 2}, {"top_k": 40}, {"top_k": 256}, {"top_k": 400}, {"top_k": 700},
    {"top_p": 0.01}, {"top_p": 0.5}, {"top_p": 0.9}, {"top_p": 0.9999},
    {"min_p": 0.001}, {"min_p": 0.1}, {"min_p": 1.0},
    {"typical_p": 0.05}, {"typical_p": 0.5}, {"typical_p": 0.95},
    {"top_k": 40, "top_p": 0.8}, {"top_k": 300, "top_p": 0.97, "min_p": 0.01},
    {"top_p": 0.95, "min_p": 0.02, "typical_p": 0.7}, {"top_k": 50, "top_p": 0.9, "min_p": 0.01, "typical_p": 0.6},
    {"top_k": 20, "typical_p": 0.3}, {"min_p": 0.001, "typical_p": 0.2},
]  # fmt: skip


def warped(values: Tensor, asked: SamplingParams) -> Tensor:
    """transformers' scores after its warpers, in the order in which its generate() applies them."""
    warpers: list[Any] = [transformers.TemperatureLogitsWarper(asked.temperature)]
    if asked.top_k:
        warpers.append(transformers.TopKLogitsWarper(asked.top_k))
    if asked.top_p < 1.0:
        warpers.append(transformers.TopPLogitsWarper(asked.top_p))
    if asked.min_p > 0.0:
        warpers.append(transformers.MinPLogitsWarper(asked.min_p))
    if asked.typical_p < 1.0:
        warpers.append(transformers.TypicalLogitsWarper(asked.typical_p))
    for warper in warpers:
        values = warper(None, values)
    return values


def kept_set(values: Tensor, asked: SamplingParams, *, by_candidates: bool) -> Tensor:
    """Our kept sets, bool [R, V], by either of the two ways there are."""

    def every(value: float) -> Tensor:
        return torch.full((len(values),), value, dtype=torch.float64)

    below = distances(values, values.amax(1), every(asked.temperature))
    filters = Filters(every(asked.top_p), every(asked.min_p), every(asked.typical_p))
    if not by_candidates:
        return keep(below, keep_k(below, every(asked.top_k).long()), filters)
    candidates, places = least(below, VOCAB)  # more candidates than k change nothing
    inside = (torch.arange(VOCAB) < (asked.top_k or VOCAB)).expand(len(values), -1)
    return torch.zeros_like(inside).scatter(1, places, keep(candidates, inside, filters))


@pytest.mark.parametrize("by_candidates", [False, True])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("asked", FILTERS, ids=str)
def test_filters_keep_the_sets_of_transformers(asked: dict[str, Any], temperature: float, by_candidates: bool) -> None:
    one = params(temperature=temperature, **asked)
    values = torch.cat([logits(8, seed=3), logits(8, seed=4, scale=0.3), logits(8, seed=5, scale=12.0)])
    theirs = warped(values, one).isfinite()
    ours = kept_set(values, one, by_candidates=by_candidates)
    # fp32 sums there, integers here: a token right on the edge may differ, in few rows and one token in each.
    differing = (ours != theirs).sum(1)
    assert differing.max() <= 1
    assert (differing > 0).sum() <= 2
    assert ours.any(1).all()


@pytest.mark.parametrize("by_candidates", [False, True])
def test_ties_at_the_edge_go_to_the_lowest_ids(by_candidates: bool) -> None:
    flat = torch.zeros(1, VOCAB)
    for asked, kept in [({"top_k": 10}, 10), ({"top_p": 0.5}, 350), ({"typical_p": 0.1}, 70), ({"min_p": 0.5}, 700)]:
        ours = kept_set(flat, params(**asked), by_candidates=by_candidates)
        assert ours.nonzero()[:, 1].tolist() == list(range(kept))


@pytest.mark.parametrize(
    ("asked", "kept"), [({"top_k": 10}, 10), ({"top_k": 300}, 300), ({"top_p": 0.5}, 350), ({"typical_p": 0.1}, 70)]
)
def test_what_a_filter_takes_out_is_never_drawn(asked: dict[str, Any], kept: int) -> None:
    tokens = draw(torch.zeros(300, VOCAB), *[params(**asked)] * 300).tokens
    assert tokens.max() < kept
    assert tokens.max() >= 0.9 * kept - 1


@pytest.mark.parametrize("name", ["top_k", "top_p", "min_p", "typical_p"])
def test_a_filter_that_keeps_all_keeps_even_what_is_hardly_possible(name: str) -> None:
    values = torch.linspace(0.0, -80.0, VOCAB)[None]
    everything = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "typical_p": 1.0}
    assert kept_set(values, params(**{name: everything[name]}), by_candidates=False).all()


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=30), st.integers(1, 40))
@settings(deadline=None, max_examples=200)
def test_the_least_are_sorted_by_value_then_place(values: list[float], k: int) -> None:
    expected = sorted(enumerate(values), key=lambda pair: (pair[1], pair[0]))[:k]
    ours, places = least(torch.tensor([values]), k)
    assert places[0].tolist() == [place for place, _ in expected]
    assert ours[0].tolist() == [value for _, value in expected]


@given(
    st.lists(st.tuples(st.floats(0, width=32), st.integers(0, 2**42)), min_size=1, max_size=30).filter(
        lambda pairs: any(weight for _, weight in pairs)
    ),
    st.floats(0, 1),
)
@settings(deadline=None, max_examples=200)
def test_the_nearest_are_the_shortest_prefix_that_weighs_enough(pairs: list[tuple[float, int]], share: float) -> None:
    target = max(1, int(share * sum(weight for _, weight in pairs)))
    expected, weight = set(), 0
    for place, (_, more) in sorted(enumerate(pairs), key=lambda item: (item[1][0], item[0])):
        if weight >= target:
            break
        weight += more
        expected.add(place)
    distance, weights = torch.tensor([[d for d, _ in pairs]]), torch.tensor([[w for _, w in pairs]])
    ours = nearest(distance, weights, torch.tensor([target]))
    assert set(ours.nonzero()[:, 1].tolist()) == expected


# --- draws


@pytest.mark.parametrize("asked", [{}, *FILTERS], ids=str)
def test_draws_invert_the_cdf_of_transformers_scores(asked: dict[str, Any]) -> None:
    one = params(temperature=0.8, **asked)
    values = logits(64, seed=6)
    tokens = draw(values, *[one] * 64).tokens.numpy()
    numbers = uniforms(torch.full((64,), 1), torch.zeros(64, dtype=torch.int64), torch.arange(64) + 5).numpy()
    scores = warped(values, one).double()
    descending = 0 < one.top_k <= 256
    agreed = 0
    for row in range(64):
        order = np.argsort(-scores[row].numpy(), kind="stable") if descending else np.arange(VOCAB)
        running = np.cumsum(scores[row].softmax(0).numpy()[order])
        expected = order[np.searchsorted(running, numbers[row], side="right")]
        agreed += int(expected == tokens[row])
    assert agreed >= 63  # a set that differs at its edge by rounding moves the draws of one row


def test_inverting_never_lands_on_a_weight_of_zero() -> None:
    weights = torch.tensor([[0.0, 1e-30, 0.0, 3e-30, 0.0, 0.0]]).expand(4, -1)
    place, into = invert(weights, torch.tensor([0.0, 0.2499, 0.26, 1.0], dtype=torch.float64))  # 1: rounding got there
    assert place.tolist() == [1, 1, 3, 3]
    torch.testing.assert_close(into.float(), torch.tensor([0.0, 0.9996, 0.04 / 3, 1.0]), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("vocab", [1, 2, 255, 256, 257, 5000])
def test_draws_are_inside_the_vocabulary_whatever_its_size(vocab: int) -> None:
    values = logits(40, vocab)
    for asked in ({}, {"top_k": 1}, {"top_k": 3}, {"top_p": 0.9}, {"temperature": 0.0}, {"typical_p": 0.5}):
        result = draw(values, *[params(logprobs=5, **asked)] * 40)
        assert 0 <= result.tokens.min() <= result.tokens.max() < vocab
        assert result.valid.all()
        assert result.top_tokens is not None
        assert result.top_tokens.shape == (40, min(5, vocab))


@pytest.mark.parametrize("asked", [{}, {"top_k": 12}, {"top_p": 0.9}, {"min_p": 0.02}, {"typical_p": 0.8}], ids=str)
def test_draws_follow_the_distribution(asked: dict[str, Any]) -> None:
    one = params(temperature=1.3, **asked)
    values = logits(1, 300, scale=1.5)
    rows = 400
    state = [SamplerState(one, (), 300)] * rows
    counts = torch.zeros(300, dtype=torch.int64)
    for start in range(0, 20_000, rows):
        batch = build_batch(state, list(range(start, start + rows)), 300, CPU)
        counts += torch.bincount(sample(values.expand(rows, -1), batch).tokens, minlength=300)
    probabilities = warped(values, one).softmax(1)[0]
    inside = probabilities > 0
    assert counts[~inside].sum() == 0
    degrees = int(inside.sum()) - 1
    assert chi_square(counts[inside], probabilities[inside]) < degrees + 4.5 * (2 * degrees) ** 0.5


def test_greedy_takes_the_likeliest_and_the_lowest_id_among_equals() -> None:
    values = logits(2)
    values[1, [13, 14, 650]] = values.max() + 1
    greedy = params(temperature=0.0, top_k=5, top_p=0.1)
    assert draw(values, greedy, greedy).tokens.tolist() == [int(values[0].argmax()), 13]


def test_the_same_seed_repeats_and_another_seed_index_or_position_does_not() -> None:
    values = logits(1, scale=0.5)

    def drawn(one: SamplingParams, index: int, first: int) -> list[int]:
        state = SamplerState(one, (1,), VOCAB).fork(index)
        places = range(first, first + 20)
        return [int(sample(values, build_batch([state], [place], VOCAB, CPU)).tokens) for place in places]

    base = drawn(params(), 0, 0)
    assert drawn(params(), 0, 0) == base
    others = [drawn(params(seed=-1), 0, 0), drawn(params(), 1, 0), drawn(params(), 2, 0), drawn(params(), 0, 20)]
    assert len({tuple(tokens) for tokens in [base, *others]}) == 5


# --- rows do not know each other

asked_rows = st.builds(
    params,
    temperature=st.sampled_from([0.0, 1e-6, 0.7, 1.0, 100.0]),
    top_k=st.sampled_from([0, 0, 1, 5, 50, 256, 257, 500]),
    top_p=st.sampled_from([1.0, 1.0, 0.3, 0.95]),
    min_p=st.sampled_from([0.0, 0.0, 0.05]),
    typical_p=st.sampled_from([1.0, 1.0, 0.4]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.2]),
    presence_penalty=st.sampled_from([0.0, 0.0, 0.5]),
    logit_bias=st.sampled_from([(), ((5, 4.0), (6, -3.0))]),
    bad_words=st.sampled_from([(), ((8,), (3, 9))]),
    logprobs=st.sampled_from([None, None, 0, 3, 20]),
    seed=st.integers(-(2**63), 2**63 - 1),
)


def assert_rows_are_as_alone(values: Tensor, asked: list[SamplingParams]) -> None:
    states = [SamplerState(one, (1, 2, 3), values.shape[1], index) for index, one in enumerate(asked)]
    for state in states:
        state.append(40)
    together = sample(values, batch_of(states, values.shape[1]))
    for row, state in enumerate(states):
        alone = sample(values[row : row + 1], build_batch([state], [5 + row], values.shape[1], CPU))
        assert alone.tokens[0] == together.tokens[row]
        assert alone.valid[0] == together.valid[row]
        if (k := state.sampling.logprobs) is not None:
            assert alone.logprobs is not None
            assert together.logprobs is not None
            assert torch.equal(alone.logprobs[0], together.logprobs[row])
            for mine, ours in [(alone.top_tokens, together.top_tokens), (alone.top_logprobs, together.top_logprobs)]:
                assert mine is not None
                assert ours is not None
                assert torch.equal(mine[0], ours[row, :k])


@given(st.lists(asked_rows, min_size=2, max_size=10), st.integers(0, 2**16), st.booleans())
@settings(deadline=None, max_examples=60)
def test_a_row_is_the_same_to_the_bit_in_any_company(asked: list[SamplingParams], seed: int, coarse: bool) -> None:
    values = logits(len(asked), seed=seed)
    assert_rows_are_as_alone(values.bfloat16().float() if coarse else values, asked)  # coarse: full of ties


def test_a_row_is_the_same_to_the_bit_where_threads_share_the_work() -> None:
    kinds = [{}, {"top_k": 20}, {"top_p": 0.9}, {"top_k": 2000, "typical_p": 0.9}, {"temperature": 0.0}]
    asked = [params(seed=row, logprobs=4, **kinds[row % 5]) for row in range(15)]
    assert_rows_are_as_alone(logits(15, 50_257, scale=1.0), asked)


def test_filtering_in_parts_changes_no_row(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = [params(seed=row, top_p=0.9, typical_p=0.8) for row in range(10)]
    whole = draw(logits(10), *asked).tokens
    monkeypatch.setattr(choose, "ON_CPU", 3 * 2**11)  # three rows at a time, then one that is left
    assert torch.equal(draw(logits(10), *asked).tokens, whole)


def test_a_neighbour_that_is_not_valid_changes_nothing() -> None:
    values = logits(6)
    asked = [params(seed=row, **kind) for row, kind in enumerate([{}, {"top_k": 5}, {"top_p": 0.8}] * 2)]
    clean = draw(values, *asked)
    values[:3, 17] = torch.tensor([torch.nan, torch.inf, torch.nan])
    result = draw(values, *asked)
    assert result.valid.tolist() == [False] * 3 + [True] * 3
    assert torch.equal(result.tokens[3:], clean.tokens[3:])


# --- extremes

EVERY_PATH: list[dict[str, Any]] = [
    {}, {"temperature": 0.0}, {"top_k": 5}, {"top_k": 300}, {"top_p": 0.9}, {"min_p": 0.1}, {"typical_p": 0.5},
    {"repetition_penalty": 1e-300}, {"repetition_penalty": 100.0, "frequency_penalty": 2.0},
]  # fmt: skip


@pytest.mark.parametrize("temperature", [1e-300, 1e-6, 1.0, 100.0])
@pytest.mark.parametrize("asked", EVERY_PATH, ids=str)
def test_extreme_logits_draw_a_possible_token(asked: dict[str, Any], temperature: float) -> None:
    one = params(**{"temperature": temperature, **asked})
    only = torch.full((1, VOCAB), -torch.inf)
    only[0, 123] = -5.0
    huge = logits(1) * 1e30
    huge[0, 2] = 1e30  # a token of the prompt, which a penalty may divide by nearly nothing
    widest = torch.full((1, VOCAB), -3.4e38)
    widest[0, 123] = 3.4e38
    values = torch.cat([only, huge, widest, torch.zeros(1, VOCAB)])
    result = draw(values, *[one] * 4)
    assert result.valid.all()
    assert result.tokens[0] == result.tokens[2] == 123
    if asked.get("repetition_penalty") == 1e-300:
        assert result.tokens[1] in (1, 2, 3)  # the prompt's: divided up to the largest float, not to infinity
    elif "repetition_penalty" not in asked and "typical_p" not in asked:
        assert result.tokens[1] == huge.argmax()


@pytest.mark.parametrize("asked", EVERY_PATH, ids=str)
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_a_row_with_nan_or_infinity_is_not_valid(asked: dict[str, Any], poison: float) -> None:
    values = logits(3)
    values[1, 600] = poison
    banned = params(**{**asked, "bad_words": ((600,),)})
    result = draw(values, params(**asked), banned, params(**asked))  # a ban does not hide it
    assert result.valid.tolist() == [True, False, True]
    assert result.tokens[1] == 0


@pytest.mark.parametrize("asked", EVERY_PATH, ids=str)
def test_a_row_in_which_everything_is_banned_is_not_valid(asked: dict[str, Any]) -> None:
    everything = params(**{**asked, "bad_words": tuple((token,) for token in range(VOCAB))})
    all_but_one = params(**{**asked, "bad_words": tuple((token,) for token in range(VOCAB) if token != 77)})
    result = draw(logits(2), everything, all_but_one)
    assert result.valid.tolist() == [False, True]
    assert result.tokens.tolist() == [0, 77]


# --- log-probabilities


@pytest.mark.parametrize("k", [0, 1, 20, 1000])
def test_log_probabilities_are_those_of_log_softmax(k: int) -> None:
    values, tokens = logits(7), torch.arange(7) * 90
    expected = values.double().log_softmax(1)
    chosen, top_tokens, top = log_probabilities(values, tokens, k)
    torch.testing.assert_close(chosen, expected.gather(1, tokens[:, None])[:, 0].float())
    assert torch.equal(top_tokens, expected.argsort(1, descending=True)[:, :k])
    torch.testing.assert_close(top, expected.gather(1, top_tokens).float())


def test_log_probabilities_are_the_models_own_whatever_is_asked_for() -> None:
    asked = params(
        temperature=0.2, top_k=2, logit_bias=((9, 50.0),), repetition_penalty=2.0, bad_words=((3,),), logprobs=4
    )
    result = draw(logits(3), asked, params(), replace(asked, logprobs=0))
    assert result.logprobs is not None
    assert result.top_tokens is not None
    assert result.tokens[0] == 9
    expected = logits(3).log_softmax(1)
    torch.testing.assert_close(result.logprobs[[0, 2]], expected[[0, 2], result.tokens[[0, 2]]])
    assert torch.equal(result.top_tokens[0], expected[0].topk(4).indices)


def test_nobody_asks_for_log_probabilities_and_none_come() -> None:
    result = draw(logits(2), params(), params(temperature=0.0))
    assert (result.logprobs, result.top_tokens, result.top_logprobs) == (None, None, None)


# --- the past of a completion


@given(st.lists(st.integers(0, 200)), st.lists(st.integers(0, 200), max_size=300))
@settings(deadline=None, max_examples=100)
def test_seen_tokens_are_counted_as_they_come(prompt: list[int], output: list[int]) -> None:
    seen = SeenTokens(prompt)
    for token in output:
        seen.add(token)
    counts = dict(zip(seen.tokens.tolist(), seen.counts.tolist(), strict=True))
    assert counts == {token: output.count(token) for token in {*prompt, *output}}


def test_forks_share_the_past_and_not_the_future() -> None:
    asked = params(frequency_penalty=2.0, bad_words=((4, 5),), min_tokens=2, eos_token_ids=frozenset({2}))
    trunk = SamplerState(asked, (1, 2), VOCAB)
    trunk.append(7)
    twin = trunk.fork(1)
    trunk.append(4)
    theirs, ours = (adjust(torch.zeros(1, VOCAB), batch_of([state]))[0] for state in (trunk, twin))
    assert theirs.nonzero()[:, 0].tolist() == [4, 5, 7]  # two tokens are out: the end token is free
    assert ours.nonzero()[:, 0].tolist() == [2, 7]
    assert trunk.numbers[-1] == 0
    assert twin.numbers[-1] == 1


@given(st.data())
@settings(deadline=None, max_examples=60)
def test_a_step_laid_out_from_the_one_before_samples_as_one_laid_out_afresh(data: st.DataObject) -> None:
    kinds = [{"temperature": 0.0}, {}, {"top_k": 3}, {"frequency_penalty": 1.0}, {"min_tokens": 3, "temperature": 0.0}]
    kinds += [{"bad_words": ((3,), (4, 5))}, {"logprobs": 2}]
    states = [
        SamplerState(params(**{"eos_token_ids": frozenset({2}), **data.draw(st.sampled_from(kinds))}), (1, 2), VOCAB, i)
        for i in range(6)
    ]
    maker = BatchMaker(VOCAB, CPU)
    chosen = states
    for step in range(6):
        if data.draw(st.booleans()):
            chosen = data.draw(st.lists(st.sampled_from(states), min_size=1, max_size=6, unique_by=id))
        values, positions = logits(len(chosen), seed=step), [10 + step] * len(chosen)
        ours = sample(values, maker.make(list(chosen), positions))
        fresh = sample(values, build_batch(chosen, positions, VOCAB, CPU))
        assert ours.tokens.tolist() == fresh.tokens.tolist()
        assert (ours.logprobs is None) == (fresh.logprobs is None)
        for state, token in zip(chosen, ours.tokens.tolist(), strict=True):
            state.append(token)


# --- cost


@pytest.mark.parametrize("asked", EVERY_PATH, ids=str)
def test_a_step_never_waits_for_the_device(asked: dict[str, Any]) -> None:
    # A tensor on this device has no data: whatever would read it (item, nonzero, a Python branch) raises.
    device = torch.device("meta")
    states = [SamplerState(params(**{"logprobs": 3, **asked}), (1, 2), VOCAB) for _ in range(3)]
    states.append(SamplerState(params(temperature=0.0, bad_words=((3,),)), (), VOCAB))
    result = sample(logits(4).to(device), build_batch(states, range(4), VOCAB, device))
    assert result.tokens.shape == (4,)
    with pytest.raises(RuntimeError, match="meta"):
        result.tokens[0].item()


PEAK = """
import resource, torch
from cutaway_server.request import SamplingParams
from cutaway_server.sampler import SamplerState, build_batch, sample
torch.set_num_threads(2)
asked = SamplingParams(seed=1, max_tokens=9)
def step(logits):
    states = [SamplerState(asked, (), logits.shape[1])] * len(logits)
    return sample(logits, build_batch(states, range(len(logits)), logits.shape[1], logits.device))
step(torch.randn(2, 1000))
logits = torch.empty(64, 262_144).normal_()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert step(logits).valid.all()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / logits.nbytes)
"""


def test_plain_sampling_of_a_large_vocabulary_takes_about_one_copy_of_the_logits() -> None:
    result = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, timeout=120, check=True)
    assert float(result.stdout) < 1.5
