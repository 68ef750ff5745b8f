"""The Triton kernels on the CPU, through Triton's interpreter: against the reference, and against a naive softmax.

On a machine with a GPU they are compiled, and run there: `tests/test_gpu.py`.
"""

from __future__ import annotations

import logging
import random
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from cuda_cases import CASES, attend_naively, random_case
from cutaway_server.architecture import LayerConfig, ModelConfig
from cutaway_server.cache.pages import Pages, allocate_pages, quantize
from cutaway_server.engine.build import _cuda_kernels as cuda_kernels
from cutaway_server.engine.build import choose_kernels
from cutaway_server.errors import ModelError
from cutaway_server.kernels.reference import ReferenceKernels
from cutaway_server.model.transformer import Transformer
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import PLAIN, SHAPES, flat, pages_for, random_weights

pytest.importorskip("triton")

from cutaway_server.kernels.cuda.launch import interpreting
from cutaway_server.kernels.cuda.matmul import matmul, n_splits
from cutaway_server.kernels.cuda.operations import CudaKernels
from cutaway_server.kernels.cuda.work import ITEMS_AT_ONCE, SPLIT, Layout, Splits, tile_work

pytestmark = pytest.mark.skipif(not interpreting(), reason="tests/test_gpu.py asks the compiled kernels")

ONE = {name: replace(config, layers=config.layers[:1]) for name, config in SHAPES.items()} | {
    "windows": SHAPES["windows"]
}
Part = tuple[list[int], int, int, list[int]]


def tokens(n: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(61), k=n)


# The end of a prompt, a decode, and a prompt's start; what comes before is in the pages already.
PARTS: list[Part] = [(tokens(19), 17, 19, [3, 1]), (tokens(40, 1), 39, 40, [5, 2, 7]), (tokens(2, 2), 0, 2, [6])]


def filled(config: ModelConfig, weights: object, parts: list[Part], dtype: torch.dtype, page_size: int = 16) -> Pages:
    """Pages with what comes before the parts, as the reference computes it."""
    pages = pages_for(config, 9, page_size, dtype)
    before = [(ids, 0, start, blocks) for ids, start, _, blocks in parts if start]
    Transformer(ReferenceKernels(config, weights, 1024)).forward(flat(before, page_size), pages)  # type: ignore[arg-type]
    return pages


def copy_of(pages: Pages) -> Pages:
    return Pages(pages.keys.clone(), pages.values.clone())


def logits(model: Transformer, parts: list[Part], pages: Pages) -> torch.Tensor:
    return model.logits(model.forward(flat(parts, pages.page_size), pages))


@pytest.mark.parametrize("name", SHAPES)
def test_logits_and_pages_equal_the_references(name: str) -> None:
    config = ONE[name]
    weights = random_weights(config)
    theirs = filled(config, weights, PARTS, torch.float32)
    ours = copy_of(theirs)
    expected = logits(Transformer(ReferenceKernels(config, weights, 1024)), PARTS, theirs)
    torch.testing.assert_close(
        logits(Transformer(CudaKernels(config, weights, 1024)), PARTS, ours), expected, atol=1e-5, rtol=1e-5
    )
    for a, b in ((ours.keys, theirs.keys), (ours.values, theirs.values)):
        torch.testing.assert_close(a[:, 1:], b[:, 1:], atol=1e-5, rtol=1e-5, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_within_its_rounding_of_the_reference(dtype: torch.dtype) -> None:
    config = ONE["qk-norm per head"]
    weights = random_weights(config, dtype=dtype)
    pages = filled(config, weights, PARTS, dtype)
    expected = logits(Transformer(ReferenceKernels(config, weights, 1024)), PARTS, copy_of(pages))
    ours = logits(Transformer(CudaKernels(config, weights, 1024)), PARTS, pages)
    # The interpreter cuts off where a device rounds to bfloat16: errors of up to 2^-7.
    assert (ours - expected).abs().max() < (0.1 if dtype == torch.bfloat16 else 5e-3)


@pytest.mark.parametrize("name", CASES)
def test_split_attention_is_softmax_attention(name: str) -> None:
    config, batch, pages = random_case(name, torch.float32, [(1, 530), (2, 257), (1, 1)])
    kernels = CudaKernels(config, random_weights(config), 1024)
    q = torch.randn(batch.n_rows, config.n_heads, config.d_head, generator=torch.Generator().manual_seed(1)) * 2
    z, lse = kernels.paged_attention(0, q, kernels.plan(batch), pages)
    expected, expected_lse = attend_naively(config, q, batch, pages.keys[0], pages.values[0])
    torch.testing.assert_close(z.double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_prompts_in_large_tiles_are_softmax_attention(name: str) -> None:
    config, batch, pages = random_case(name, torch.float16, [(66, 130), (1, 20), (64, 64)])
    kernels = CudaKernels(config, random_weights(config, dtype=torch.float16), 1024)
    plan = kernels.plan(batch)
    assert plan.prompts is not None
    assert plan.work, "the decode row takes the splits"
    q = torch.randn(batch.n_rows, config.n_heads, config.d_head, generator=torch.Generator().manual_seed(1)).half()
    z, lse = kernels.paged_attention(0, q, plan, pages)
    expected, expected_lse = attend_naively(config, q, batch, pages.keys[0], pages.values[0])
    torch.testing.assert_close(z.double(), expected, atol=3e-3, rtol=3e-3)
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_keys_and_values_in_8_bits_are_stored_and_read_with_their_scales(dtype: torch.dtype) -> None:
    config = replace(ONE["plain"], d_head=16, layers=(LayerConfig(),))
    kernels = CudaKernels(config, random_weights(config), 1024)
    assert {dtype, torch.float32} < {*kernels.page_dtypes}, "what --kv-dtype asks them"
    pages = allocate_pages(config, 9, 16, dtype, torch.device("cpu"))
    assert pages.key_scales is not None
    pages.key_scales[:], pages.value_scales[:] = torch.nan, torch.nan  # type: ignore[index]
    batch = flat([(tokens(18), 12, 18, [3, 1])], 16)
    plan = kernels.plan(batch)
    residual = kernels.embed(plan)
    pages.store(0, torch.arange(48, 60), torch.randn(12, 2, 16), torch.randn(12, 2, 16))
    q = kernels.attention_input(0, residual, plan, pages)
    opened = kernels.open_attention_input(0, residual, plan)
    for stored, scales, true in (
        (pages.keys, pages.key_scales, opened.rot_k),
        (pages.values, pages.value_scales, opened.v),
    ):
        assert scales is not None
        page, offset = batch.slots // 16, batch.slots % 16
        codes, expected_scales = quantize(true, dtype)
        torch.testing.assert_close(scales[0, page, :, offset], expected_scales)
        wrong = stored[0, page, :, offset].float() - codes.float()
        assert (wrong != 0).sum() <= 1, "a value on the edge between two codes may go either way"
    z, lse = kernels.paged_attention(0, q, plan, pages)
    dense = [read(0, torch.arange(9)).nan_to_num() for read in (pages.keys_of, pages.values_of)]
    expected, expected_lse = attend_naively(config, q, batch, *dense)
    torch.testing.assert_close(z.double(), expected, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(lse.double(), expected_lse, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("name", ["interleaved", "qk-norm full, post-norm only"])
def test_with_invariant_products_neither_chunks_nor_neighbours_change_a_bit(name: str) -> None:
    config = ONE[name]
    model = Transformer(CudaKernels(config, random_weights(config), 1024, batch_invariant=True))
    ids, blocks = tokens(6), [4, 2]
    pages = pages_for(config, 9, 16)
    whole = logits(model, [(ids, 0, 6, blocks)], pages)
    pages, rows = pages_for(config, 9, 16), []
    others: list[list[Part]] = [[], [(tokens(2, 1), 0, 2, [7])], [(tokens(1, 2), 0, 1, [8])]]
    for (start, stop), neighbours in zip(((0, 4), (4, 5), (5, 6)), others, strict=True):
        first = sum(stop - start for _, start, stop, _ in neighbours)
        rows.append(logits(model, [*neighbours, (ids, start, stop, blocks)], pages)[first:])
    assert torch.equal(torch.cat(rows), whole)


def test_a_tile_of_queries_gives_each_the_bits_it_has_alone() -> None:
    config, batch, pages = random_case("a group of three", torch.float32, [(5, 300)])
    kernels = CudaKernels(config, random_weights(config), 1024)
    q = torch.randn(batch.n_rows, config.n_heads, config.d_head, generator=torch.Generator().manual_seed(1))
    whole = kernels.paged_attention(0, q, kernels.plan(batch), pages)
    for row in (0, 2, 4):
        blocks = batch.block_table[0].tolist()
        alone = kernels.plan(flat([([0] * 300, 295 + row, 296 + row, blocks)], pages.page_size))
        z, lse = kernels.paged_attention(0, q[row : row + 1], alone, pages)
        assert torch.equal(z[0], whole[0][row])
        assert torch.equal(lse[0], whole[1][row])


def test_matmul_is_a_product_and_its_rows_do_not_know_each_other() -> None:
    source = torch.Generator().manual_seed(0)
    weight = torch.randn(70, 4100, generator=source) / 64
    x = torch.randn(67, 4100, generator=source)
    assert n_splits(70, 4100) == 4
    whole = matmul(x, weight)
    torch.testing.assert_close(whole, x @ weight.T, atol=1e-4, rtol=1e-4)
    for start, stop in ((0, 1), (3, 40), (64, 67)):
        assert torch.equal(matmul(x[start:stop], weight), whole[start:stop])


@pytest.mark.parametrize("name", ["plain", "pre- and post-norm", "layernorm, learned positions"])
def test_open_forms_and_whole_layers_give_the_bits_of_the_operations(name: str) -> None:
    config = SHAPES[name]
    weights = random_weights(config, dtype=torch.float16)
    kernels, reference = CudaKernels(config, weights, 1024), ReferenceKernels(config, weights, 1024)
    pages, theirs = pages_for(config, 6, 16, torch.float16), pages_for(config, 6, 16, torch.float16)
    batch = flat([(tokens(3), 0, 3, [4])], 16)
    plan = kernels.plan(batch)
    first = residual = kernels.embed(plan)
    for layer in range(config.n_layers):
        opened, oracle = (
            kernels.open_attention_input(layer, residual, plan),
            reference.open_attention_input(layer, residual, reference.plan(batch)),
        )
        for field in ("q", "k", "v", "rot_q", "rot_k"):
            close(getattr(opened, field), getattr(oracle, field))
        close(opened.norm.normalized, oracle.norm.normalized)
        close(opened.norm.scale, oracle.norm.scale)
        q = kernels.attention_input(layer, residual, plan, pages)
        assert torch.equal(q.float(), opened.rot_q)
        assert torch.equal(pages.keys[layer, 4, :, :3].transpose(0, 1), opened.rot_k.half())
        assert torch.equal(pages.values[layer, 4, :, :3].transpose(0, 1), opened.v.half())
        z, _ = kernels.paged_attention(layer, q, plan, pages)
        added = kernels.open_attention_output(layer, z, residual)
        assert torch.equal(added.residual, kernels.attention_output(layer, z, residual))
        assert torch.equal(added.residual, residual + added.added)
        mlp = kernels.open_mlp_input(layer, added.residual)
        assert torch.equal(mlp.post, kernels.mlp_input(layer, added.residual).float())
        theirs_mlp = reference.open_mlp_input(layer, added.residual)
        close(mlp.pre, theirs_mlp.pre)
        close(mlp.post, theirs_mlp.post)
        assert (mlp.pre_linear is None) == (not config.gated)
        out = kernels.open_mlp_output(layer, mlp.post, added.residual)
        assert torch.equal(out.residual, kernels.mlp_output(layer, mlp.post, added.residual))
        assert torch.equal(out.residual, added.residual + out.added)
        residual = out.residual
    assert torch.equal(kernels.layers(0, config.n_layers, first, plan, theirs), residual)
    assert torch.equal(theirs.keys[:, 4, :, :3], pages.keys[:, 4, :, :3])
    assert torch.equal(kernels.layers(1, 1, first, plan, theirs), first)


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a.float(), b.float(), atol=4e-3, rtol=4e-3)


def test_attention_rows_sum_to_one_and_weigh_the_values_to_z() -> None:
    config, batch, pages = random_case("grouped", torch.float16, [(2, 270)])
    kernels = CudaKernels(config, random_weights(config, dtype=torch.float16), 1024)
    plan = kernels.plan(batch)
    q = torch.randn(2, config.n_heads, config.d_head, generator=torch.Generator().manual_seed(1)).half()
    z, lse = kernels.paged_attention(0, q, plan, pages)
    rows, heads = torch.tensor([0, 1, 1]), torch.tensor([0, 1, 3])
    pattern = kernels.attention_rows(0, q, lse, rows, heads, plan, pages)
    assert (pattern.sum(-1) - 1).abs().max() < 1e-4
    values = pages.values[0][batch.block_table[0]].transpose(1, 2).flatten(0, 1)[:270].float()
    weighed = torch.einsum("pk,kpd->pd", pattern, values[:, heads // config.group])
    torch.testing.assert_close(weighed, z[rows, heads].float(), atol=2e-3, rtol=2e-3)


def test_revisited_rows_store_nothing_and_give_the_same_bits() -> None:
    config = ONE["plain"]
    kernels = CudaKernels(config, random_weights(config), 1024, batch_invariant=True)
    model, pages = Transformer(kernels), pages_for(config, 9, 16)
    ids = tokens(6)
    whole = logits(model, [(ids, 0, 6, [5])], pages)
    kept = pages.keys[:, 1:].clone()
    again = model.logits(model.forward(flat([(ids, 5, 6, [5])], 16, stored=6), pages))
    assert torch.equal(again[0], whole[5])
    assert torch.equal(pages.keys[:, 1:].nan_to_num(), kept.nan_to_num())


@settings(max_examples=60, deadline=None)
@given(
    parts=st.lists(st.tuples(st.integers(1, 90), st.integers(0, 3000)), min_size=1, max_size=9),
    group=st.sampled_from([1, 3, 4, 7, 20]),
    large=st.booleans(),
)
def test_work_lists_hold_every_row_and_every_split_once(parts: list[tuple[int, int]], group: int, large: bool) -> None:
    config = replace(PLAIN, n_heads=group, n_kv_heads=1)
    counts, before = (np.array(column) for column in zip(*parts, strict=True))
    layout = Layout(np.concatenate([[0], np.cumsum(counts)]), before + counts - 1)
    work, prompts = tile_work(config, layout, torch.device("cpu"), large_tiles=large)
    seen: list[int] = []
    for splits in work:
        seen += rows_of(splits, layout)
        assert splits.items.shape[1] <= ITEMS_AT_ONCE or splits.tiles.shape[1] == 1
    assert large or prompts is None
    for first, n_rows, sequence in [] if prompts is None else prompts.T.tolist():
        assert layout.starts[sequence] <= first
        assert first + n_rows <= layout.starts[sequence + 1]
        seen += range(first, first + n_rows)
    assert sorted(seen) == list(range(counts.sum()))


def rows_of(splits: Splits, layout: Layout) -> list[int]:
    """The rows of a launch, after checking that each tile's splits are there, in order, as far as its rows see."""
    items, total = splits.items.T.tolist(), 0
    for tile, (first, n_rows, sequence, first_item) in enumerate(splits.tiles.T.tolist()):
        assert layout.starts[sequence] <= first
        assert first + n_rows <= layout.starts[sequence + 1]
        last = layout.last[sequence] - (layout.starts[sequence + 1] - first - n_rows)
        needed = [[tile, split] for split in range(last // SPLIT + 1)]
        assert items[first_item : first_item + len(needed)] == needed
        total += len(needed)
    assert len(items) == total
    for row, tile, place in splits.rows.T.tolist():
        assert splits.tiles[0, tile] + place == row
        assert place < splits.tiles[1, tile]
    return splits.rows[0].tolist()


def test_cuda_kernels_are_refused_where_there_is_no_gpu() -> None:
    with pytest.raises(ModelError, match="--kernels cuda: needs a CUDA device, not cpu"):
        choose_kernels("cuda", PLAIN, random_weights(PLAIN), 1024)


def test_without_triton_auto_is_the_reference_after_one_warning_and_cuda_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "cutaway_server.kernels.cuda.operations", None)
    arguments = (PLAIN, random_weights(PLAIN), 64)
    with caplog.at_level(logging.WARNING):
        assert cuda_kernels("auto", *arguments, batch_invariant=False) is None
    assert len(caplog.records) == 1
    assert "the slower reference kernels serve" in caplog.text
    with pytest.raises(ModelError, match=r"--kernels cuda: Triton cannot be imported .* pip install 'cutaway\[cuda\]'"):
        cuda_kernels("cuda", *arguments, batch_invariant=False)
