"""The reference operations against the naive dense model, and the promise that rows do not know each other."""

from __future__ import annotations

import random

import pytest
import torch
from cutaway_server.kernels.linear import linear, rows_per_tile
from cutaway_server.kernels.reference import ReferenceKernels
from cutaway_server.model.transformer import Transformer
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import PLAIN, SHAPES, flat, pages_for, random_weights
from oracle import dense_logits

LONG = 300  # more than one split of the keys


def tokens(n: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(61), k=n)


def shuffled_blocks(n: int, page_size: int, seed: int = 0) -> list[int]:
    return random.Random(seed).sample(range(1, 41), -(-n // page_size))


def logits(model: Transformer, batch, pages) -> torch.Tensor:
    return model.logits(model.forward(batch, pages))


@pytest.mark.parametrize("name", SHAPES)
def test_logits_equal_the_dense_model(name: str) -> None:
    config = SHAPES[name]
    weights = random_weights(config)
    ids = tokens(40)
    blocks = shuffled_blocks(40, 16)
    pages = pages_for(config, 41, 16)
    ours = logits(Transformer(ReferenceKernels(config, weights, 1024)), flat([(ids, 0, 40, blocks)], 16), pages)
    oracle = dense_logits(config, weights, ids)
    assert (ours.double() - oracle).abs().max() < 1e-4 * max(1.0, float(oracle.abs().max()))


@pytest.mark.parametrize("page_size", [16, 64, 256])
def test_context_over_several_splits_equals_the_dense_model(page_size: int) -> None:
    config = SHAPES["windows"]
    weights, ids = random_weights(config), tokens(LONG)
    blocks = shuffled_blocks(LONG, page_size)
    pages = pages_for(config, 41, page_size)
    batch = flat([(ids, 0, LONG, blocks)], page_size)
    ours = logits(Transformer(ReferenceKernels(config, weights, 1024)), batch, pages)
    assert (ours.double() - dense_logits(config, weights, ids)).abs().max() < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["plain", "windows", "qk-norm full, post-norm only", "soft caps"])
@settings(max_examples=6, deadline=None)
@given(data=st.data())
def test_chunks_and_neighbours_never_change_a_rows_bits(name: str, dtype: torch.dtype, data: st.DataObject) -> None:
    config = SHAPES[name]
    model = Transformer(ReferenceKernels(config, random_weights(config, dtype=dtype), 1024))
    n = data.draw(st.integers(2, LONG))
    ids, blocks = tokens(n, 1), shuffled_blocks(n, 16, 1)
    whole = logits(model, flat([(ids, 0, n, blocks)], 16), pages_for(config, 100, 16, dtype))
    cuts = sorted(data.draw(st.sets(st.integers(1, n - 1), max_size=4)))
    pages, parts = pages_for(config, 100, 16, dtype), []
    for seed, (start, stop) in enumerate(zip([0, *cuts], [*cuts, n], strict=True)):
        others = data.draw(st.lists(st.integers(1, 40), max_size=3))
        neighbours = [
            (tokens(m, 9 + seed + i), 0, m, list(range(60 + 3 * i, 63 + 3 * i))) for i, m in enumerate(others)
        ]
        place = data.draw(st.integers(0, len(neighbours)))
        batch = flat([*neighbours[:place], (ids, start, stop, blocks), *neighbours[place:]], 16)
        row = int(batch.query_starts[place])
        parts.append(logits(model, batch, pages)[row : row + stop - start])
    assert torch.equal(torch.cat(parts), whole)


def test_revisited_rows_store_nothing_and_give_the_same_bits() -> None:
    config = SHAPES["plain"]
    model = Transformer(ReferenceKernels(config, random_weights(config), 1024))
    ids, blocks = tokens(48), [5, 3, 9]
    pages = pages_for(config, 12, 16)
    whole = logits(model, flat([(ids, 0, 48, blocks)], 16), pages)
    keys = pages.keys[:, 1:].clone()
    again = logits(model, flat([(ids, 47, 48, blocks)], 16, stored=48), pages)
    assert torch.equal(again[0], whole[47])
    assert torch.equal(pages.keys[:, 1:].nan_to_num(), keys.nan_to_num())


def test_open_forms_give_the_bits_of_the_fused_ones_and_their_values_fit_together() -> None:
    config = SHAPES["pre- and post-norm"]
    kernels = ReferenceKernels(config, random_weights(config), 1024)
    ids, blocks, pages = tokens(20), [4, 2], pages_for(config, 6, 16)
    plan = kernels.plan(flat([(ids, 0, 20, blocks)], 16))
    residual = kernels.embed(plan)
    q = kernels.attention_input(0, residual, plan, pages)
    opened = kernels.open_attention_input(0, residual, plan)
    assert torch.equal(q, opened.rot_q)
    assert torch.equal(pages.keys[0][blocks].transpose(1, 2).flatten(0, 1)[:20], opened.rot_k)
    z, _ = kernels.paged_attention(0, q, plan, pages)
    added = kernels.open_attention_output(0, z, residual)
    assert torch.equal(added.residual, kernels.attention_output(0, z, residual))
    assert torch.equal(added.residual, residual + added.added)
    mlp = kernels.open_mlp_input(0, added.residual)
    assert torch.equal(mlp.post, kernels.mlp_input(0, added.residual))
    assert mlp.pre_linear is not None
    torch.testing.assert_close(mlp.post, torch.nn.functional.gelu(mlp.pre, approximate="tanh") * mlp.pre_linear)
    out = kernels.open_mlp_output(0, mlp.post, added.residual)
    assert torch.equal(out.residual, kernels.mlp_output(0, mlp.post, added.residual))


@pytest.mark.parametrize("name", ["plain", "windows", "soft caps"])
def test_attention_rows_sum_to_one_and_weigh_the_values_to_z(name: str) -> None:
    config = SHAPES[name]
    kernels = ReferenceKernels(config, random_weights(config), 1024)
    parts = [(tokens(LONG), 0, LONG, shuffled_blocks(LONG, 16)), (tokens(7, 1), 0, 7, [50])]
    pages = pages_for(config, 60, 16)
    plan = kernels.plan(flat(parts, 16))
    residual = kernels.embed(plan)
    opened = kernels.open_attention_input(0, residual, plan)
    q = kernels.attention_input(0, residual, plan, pages)
    z, lse = kernels.paged_attention(0, q, plan, pages)
    for part, rows in ((slice(0, LONG), [0, 17, LONG - 1]), (slice(LONG, LONG + 7), [LONG, LONG + 6])):
        pairs = [(row, head) for row in rows for head in range(config.n_heads)]
        chosen, heads = (torch.tensor(column) for column in zip(*pairs, strict=True))
        pattern = kernels.attention_rows(0, q, lse, chosen, heads, plan, pages)
        assert (pattern.sum(-1) - 1).abs().max() < 1e-5
        values = opened.v[part][:, heads // config.group]  # [n, pairs, d_head]
        torch.testing.assert_close(torch.einsum("pk,kpd->pd", pattern, values), z[chosen, heads], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_linears_rows_do_not_depend_on_their_number_or_place(dtype: torch.dtype) -> None:
    source = torch.Generator().manual_seed(0)
    weight = torch.randn(192, 576, generator=source).to(dtype)
    x = torch.randn(3 * rows_per_tile(dtype) + 5, 576, generator=source)
    whole = linear(x, weight)
    torch.testing.assert_close(whole.float(), x.to(dtype).float() @ weight.float().T, atol=0.2, rtol=1e-2)
    for start, stop in [(0, 1), (1, 2), (3, 20), (20, 60), (rows_per_tile(dtype), len(x))]:
        assert torch.equal(linear(x[start:stop], weight), whole[start:stop])


def test_a_planted_fault_is_found_by_the_dense_model() -> None:
    weights = random_weights(PLAIN)
    ids, pages = tokens(20), pages_for(PLAIN, 6, 16)
    wrong = SHAPES["partial rotation"]
    ours = logits(Transformer(ReferenceKernels(wrong, weights, 1024)), flat([(ids, 0, 20, [4, 2])], 16), pages)
    assert (ours.double() - dense_logits(PLAIN, weights, ids)).abs().max() > 1e-2
