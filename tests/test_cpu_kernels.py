"""Every native variant against the naive dense model and the reference, and rows that do not know each other."""

from __future__ import annotations

import ctypes
import functools
import logging
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cutaway_server.architecture import LayerConfig, ModelConfig, Rope
from cutaway_server.engine.build import choose_kernels
from cutaway_server.errors import ModelError
from cutaway_server.kernels.build_native import build, variants
from cutaway_server.kernels.cpu import CpuKernels
from cutaway_server.kernels.library import Library, load_library
from cutaway_server.kernels.packing import pack, pack_gated
from cutaway_server.kernels.reference import ReferenceKernels
from cutaway_server.kernels.weights import Norm, Weights
from cutaway_server.model.transformer import Transformer
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import PLAIN, SHAPES, flat, pages_for, random_weights
from oracle import dense_logits
from test_kernels import LONG, logits, shuffled_blocks, tokens

DTYPES = [torch.float32, torch.bfloat16]
# Sizes that fill no block and no tile of the library, over more rows of q than one of its tiles has.
UNEVEN = replace(
    PLAIN, d_model=88, n_heads=6, n_kv_heads=2, d_head=40, d_mlp=104, d_vocab=61, attention_softcap=20.0,
    layers=(LayerConfig(100, Rope(10000.0, 40)), LayerConfig(None, Rope(10000.0, 24))),
)  # fmt: skip
WIDE = replace(PLAIN, d_model=160, n_heads=2, n_kv_heads=2, d_head=128, d_mlp=96, layers=(LayerConfig(None, None),) * 2)
UNEVEN_LAYERNORM = replace(SHAPES["layernorm, learned positions"], d_model=85, d_mlp=50, attention_softcap=2.0)
ALL_SHAPES = {**SHAPES, "uneven sizes": UNEVEN, "wide heads": WIDE, "uneven layernorm": UNEVEN_LAYERNORM}


@pytest.fixture(scope="module")
def library() -> Library:
    found = load_library()
    if found is None:
        pytest.skip("no C compiler here")
    return found


@pytest.fixture(scope="module", params=variants())
def variant(request: pytest.FixtureRequest, library: Library) -> str:
    if request.param not in library.supported():
        pytest.skip(f"untested: this machine does not run {request.param}")
    return str(request.param)


def tolerance(dtype: torch.dtype) -> float:
    return 2e-5 if dtype == torch.float32 else 3e-2


def near(ours: torch.Tensor, other: torch.Tensor, dtype: torch.dtype) -> bool:
    return float((ours.double() - other).abs().max()) < tolerance(dtype) * max(1.0, float(other.abs().max()))


@functools.cache
def dense(name: str, dtype: torch.dtype, n: int) -> torch.Tensor:
    return dense_logits(ALL_SHAPES[name], random_weights(ALL_SHAPES[name], dtype=dtype), tokens(n))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ALL_SHAPES)
def test_logits_equal_the_dense_model(name: str, dtype: torch.dtype, variant: str, library: Library) -> None:
    config, n = ALL_SHAPES[name], LONG if name in ("windows", "uneven sizes") else 40
    model = Transformer(CpuKernels(config, random_weights(config, dtype=dtype), 1024, library, variant))
    batch = flat([(tokens(n), 0, n, shuffled_blocks(n, 16))], 16)
    assert near(logits(model, batch, pages_for(config, 41, 16, dtype)), dense(name, dtype, n), dtype)


@pytest.mark.parametrize("page_size", [16, 32, 64, 256])
def test_pages_of_any_size_give_the_same_bits(page_size: int, variant: str, library: Library) -> None:
    weights, ids = random_weights(SHAPES["windows"]), tokens(LONG)
    model = Transformer(CpuKernels(SHAPES["windows"], weights, 1024, library, variant))
    found = []
    for size in (16, page_size):
        batch = flat([(ids, 0, LONG, shuffled_blocks(LONG, size))], size)
        found.append(logits(model, batch, pages_for(SHAPES["windows"], 41, size)))
    assert torch.equal(*found)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["plain", "windows", "qk-norm full, post-norm only", "soft caps", "uneven sizes"])
@settings(max_examples=6, deadline=None)
@given(data=st.data())
def test_chunks_and_neighbours_never_change_a_rows_bits(
    name: str, dtype: torch.dtype, variant: str, library: Library, data: st.DataObject
) -> None:
    config = ALL_SHAPES[name]
    weights = random_weights(config, dtype=dtype)
    model = Transformer(CpuKernels(config, weights, 1024, library, variant))
    n = data.draw(st.integers(2, LONG + 60))
    ids, blocks = tokens(n, 1), list(range(1, 40))
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
        threads = data.draw(st.integers(1, 3))
        other = Transformer(CpuKernels(config, weights, 1024, library, variant, threads))
        parts.append(logits(other, batch, pages)[row : row + stop - start])
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 400])
def test_splits_on_several_threads_give_the_bits_of_one_thread(
    window: int | None, dtype: torch.dtype, variant: str, library: Library
) -> None:
    """A row or two over a long context: the library shares out their splits, and merges them."""
    config = replace(WIDE, layers=(LayerConfig(window, None),))
    pages = pages_for(config, 70, 16, dtype)
    source = torch.Generator().manual_seed(0)
    for tensor in (pages.keys, pages.values):
        tensor[:, 1:66] = torch.randn(tensor[:, 1:66].shape, generator=source).to(dtype)
    weights, q = random_weights(config, dtype=dtype), torch.randn(40, 2, 128, generator=source)
    kernels = [CpuKernels(config, weights, 2048, library, variant, threads) for threads in (1, 3)]
    whole = flat([(tokens(1040), 1000, 1040, list(range(1, 66)))], 16)
    z, lse = kernels[0].paged_attention(0, q, kernels[0].plan(whole), pages)
    for start, stop in [(1000, 1001), (1023, 1025), (1039, 1040)]:
        part, at = flat([(tokens(1040), start, stop, list(range(1, 66)))], 16), slice(start - 1000, stop - 1000)
        found, found_lse = kernels[1].paged_attention(0, q[at], kernels[1].plan(part), pages)
        assert torch.equal(found, z[at])
        assert torch.equal(found_lse, lse[at])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_alone_has_the_bits_it_has_among_many(dtype: torch.dtype, variant: str, library: Library) -> None:
    """Products over more rows than a task has, and as deep and wide as no tile."""
    config = replace(PLAIN, d_model=200, d_mlp=328)
    kernels = CpuKernels(config, random_weights(config, dtype=dtype), 1024, library, variant)
    residual = torch.randn(300, 200, generator=torch.Generator().manual_seed(0))
    hidden = kernels.mlp_input(0, residual)
    out = kernels.mlp_output(0, hidden, residual)
    for start, stop in [
        (0, 1),
        (299, 300),
        (3, 20),
        (20, 60),
        (127, 129),
        (100, 300),
        *((7, 7 + n) for n in range(1, 36)),
    ]:
        assert torch.equal(kernels.mlp_input(0, residual[start:stop]), hidden[start:stop])
        assert torch.equal(kernels.mlp_output(0, hidden[start:stop], residual[start:stop]), out[start:stop])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_product_is_the_sum_over_its_depth(dtype: torch.dtype, variant: str, library: Library) -> None:
    """With whole numbers every sum is exact, so nothing may differ, not a padded column nor a last row."""
    source = torch.Generator().manual_seed(0)
    config = replace(PLAIN, d_vocab=1000, norm="layer")
    matrix = torch.randint(-4, 5, (1000, 32), generator=source).to(dtype)
    row = torch.randint(-4, 5, (32,), generator=source).float()
    weights = replace(random_weights(config, dtype=dtype), unembed=matrix, final_norm=Norm(torch.zeros(32), row))
    kernels = CpuKernels(config, weights, 1024, library, variant)
    assert torch.equal(kernels.unembed(torch.randn(3, 32)), (row @ matrix.float().T).expand(3, -1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ALL_SHAPES)
def test_each_operation_gives_what_the_reference_gives_and_its_open_form_the_same_bits(
    name: str, dtype: torch.dtype, variant: str, library: Library
) -> None:
    config = ALL_SHAPES[name]
    weights = random_weights(config, dtype=dtype)
    ours, reference = CpuKernels(config, weights, 1024, library, variant), ReferenceKernels(config, weights, 1024)
    parts = [(tokens(40), 0, 40, [4, 2, 7]), (tokens(300, 2), 290, 300, list(range(20, 40)))]
    batch = flat(parts, 16)
    pages, same = (pages_for(config, 41, 16, dtype) for _ in range(2))
    for filled in (pages, same):
        source = torch.Generator().manual_seed(1)
        for tensor in (filled.keys, filled.values):
            tensor[:, 20:] = torch.randn(tensor[:, 20:].shape, generator=source).to(dtype)
    plan, other = ours.plan(batch), reference.plan(batch)
    residual = reference.embed(other)
    assert torch.equal(ours.embed(plan), residual)

    q, expected = ours.attention_input(0, residual, plan, pages), reference.attention_input(0, residual, other, same)
    opened, reference_opened = (
        ours.open_attention_input(0, residual, plan),
        reference.open_attention_input(0, residual, other),
    )
    assert near(q, expected, dtype)
    assert torch.equal(q, opened.rot_q)
    _check_parts(opened, reference_opened, dtype)
    assert torch.equal(pages.keys.isnan(), same.keys.isnan())
    assert near(pages.keys.float().nan_to_num(), same.keys.float().nan_to_num(), dtype)
    assert near(pages.values.float().nan_to_num(), same.values.float().nan_to_num(), dtype)
    assert torch.equal(pages.keys[0][[4, 2, 7]].transpose(1, 2).flatten(0, 1)[:40], opened.rot_k[:40].to(dtype))

    (z, lse), (expected_z, expected_lse) = (
        ours.paged_attention(0, q, plan, pages),
        reference.paged_attention(0, q, other, pages),
    )
    assert near(z, expected_z, torch.float32)  # over the same pages
    assert near(lse, expected_lse, torch.float32)

    mid = ours.attention_output(0, z, residual)
    added = ours.open_attention_output(0, z, residual)
    assert near(mid, reference.attention_output(0, z, residual), dtype)
    assert torch.equal(mid, added.residual)
    assert torch.equal(mid, residual + added.added)
    _check_parts(added, reference.open_attention_output(0, z, residual), dtype)

    hidden, mlp = ours.mlp_input(0, mid), ours.open_mlp_input(0, mid)
    assert near(hidden, reference.mlp_input(0, mid), dtype)
    assert torch.equal(hidden, mlp.post)
    _check_parts(mlp, reference.open_mlp_input(0, mid), dtype)

    out, added = ours.mlp_output(0, hidden, mid), ours.open_mlp_output(0, hidden, mid)
    assert near(out, reference.mlp_output(0, hidden, mid), dtype)
    assert torch.equal(out, added.residual)
    _check_parts(added, reference.open_mlp_output(0, hidden, mid), dtype)
    assert near(ours.unembed(out), reference.unembed(out), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ALL_SHAPES)
def test_layers_in_one_call_give_the_bits_of_their_operations(
    name: str, dtype: torch.dtype, variant: str, library: Library
) -> None:
    config = ALL_SHAPES[name]
    weights = random_weights(config, dtype=dtype)
    alone, together = (CpuKernels(config, weights, 1024, library, variant, threads) for threads in (1, 3))
    for n in (1, 5, 290):
        batch = flat([(tokens(n), 0, n, shuffled_blocks(n, 16)), (tokens(2, 3), 0, 2, [40])], 16)
        pages, same = (pages_for(config, 41, 16, dtype) for _ in range(2))
        plan = alone.plan(batch)
        residual = first = alone.embed(plan)
        for layer in range(config.n_layers):
            z, _ = alone.paged_attention(layer, alone.attention_input(layer, residual, plan, pages), plan, pages)
            middle = alone.attention_output(layer, z, residual)
            residual = alone.mlp_output(layer, alone.mlp_input(layer, middle), middle)
        untouched = first.clone()
        assert torch.equal(together.layers(0, config.n_layers, first, plan, same), residual)
        assert torch.equal(first, untouched)
        assert torch.equal(pages.keys.nan_to_num(), same.keys.nan_to_num())
        assert torch.equal(pages.values.nan_to_num(), same.values.nan_to_num())
        part = together.layers(0, 1, first, plan, same)
        assert torch.equal(together.layers(1, config.n_layers, part, plan, same), residual)
        assert together.layers(1, 1, part, plan, same) is part


def _check_parts(ours: object, reference: object, dtype: torch.dtype) -> None:
    """Every tensor of an open form, those of its norm too."""
    for field in type(reference).__slots__:  # type: ignore[attr-defined]
        a, b = getattr(ours, field), getattr(reference, field)
        assert (a is None) == (b is None), field
        if isinstance(b, torch.Tensor):
            assert a.shape == b.shape, field
            assert near(a, b, dtype), field
        elif b is not None:
            _check_parts(a, b, dtype)


def test_attention_rows_sum_to_one(variant: str, library: Library) -> None:
    config = SHAPES["soft caps"]
    kernels = CpuKernels(config, random_weights(config), 1024, library, variant)
    pages = pages_for(config, 41, 16)
    plan = kernels.plan(flat([(tokens(LONG), 0, LONG, shuffled_blocks(LONG, 16))], 16))
    q = kernels.attention_input(0, kernels.embed(plan), plan, pages)
    _, lse = kernels.paged_attention(0, q, plan, pages)
    rows, heads = torch.tensor([0, 17, LONG - 1]), torch.tensor([0, 3, 2])
    pattern = kernels.attention_rows(0, q, lse, rows, heads, plan, pages)
    assert (pattern.sum(-1) - 1).abs().max() < 1e-5


def test_revisited_rows_store_nothing_and_give_the_same_bits(variant: str, library: Library) -> None:
    model = Transformer(CpuKernels(PLAIN, random_weights(PLAIN), 1024, library, variant))
    ids, blocks, pages = tokens(48), [5, 3, 9], pages_for(PLAIN, 12, 16)
    whole = logits(model, flat([(ids, 0, 48, blocks)], 16), pages)
    keys = pages.keys[:, 1:].clone()
    again = logits(model, flat([(ids, 47, 48, blocks)], 16, stored=48), pages)
    assert torch.equal(again[0], whole[47])
    assert torch.equal(pages.keys[:, 1:].nan_to_num(), keys.nan_to_num())


def test_nothing_in_a_row_reaches_its_neighbours_not_even_nan(variant: str, library: Library) -> None:
    kernels = CpuKernels(PLAIN, random_weights(PLAIN, dtype=torch.bfloat16), 1024, library, variant)
    residual = torch.randn(40, 32)
    whole = kernels.mlp_output(0, kernels.mlp_input(0, residual), residual)
    residual[20] = torch.nan
    spoilt = kernels.mlp_output(0, kernels.mlp_input(0, residual), residual)
    assert spoilt[20].isnan().all()
    others = torch.arange(40) != 20
    assert torch.equal(spoilt[others], whole[others])


@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_matrices_give_their_rows_back(dtype: torch.dtype) -> None:
    matrix = torch.randn(61, 45).to(dtype)
    packed = pack(matrix)
    assert (packed.tiles, packed.padded_depth) == (2, 64 if dtype == torch.bfloat16 else 45)
    numbers = torch.tensor([0, 60, 17, 17, 16])
    assert torch.equal(packed.rows(numbers), matrix[numbers])
    gate_up = torch.randn(2 * 24, 45).to(dtype)
    assert torch.equal(pack_gated(gate_up).rows(torch.tensor([3, 19, 35])), gate_up[[3, 24 + 3, 16 + 3]])


def test_tied_embeddings_come_from_the_packed_matrix(library: Library) -> None:
    config = replace(PLAIN, tied_embeddings=True)
    weights = random_weights(config, dtype=torch.bfloat16)
    tied = Weights(weights.embed, weights.layers, weights.final_norm, weights.embed)
    kernels, reference = CpuKernels(config, tied, 1024, library), ReferenceKernels(config, tied, 1024)
    batch = flat([(tokens(40), 0, 40, [4, 2, 7])], 16)
    assert torch.equal(kernels.embed(kernels.plan(batch)), reference.embed(reference.plan(batch)))


def test_the_library_shares_torchs_threads(library: Library) -> None:
    """Seen from a new thread, where nobody's settings linger."""
    native, seen = ctypes.CDLL(str(build())), []

    def ask() -> None:
        torch.set_num_threads(3)
        seen.append(native.omp_get_max_threads())

    before = torch.get_num_threads()
    asking = threading.Thread(target=ask)
    asking.start()
    asking.join()
    torch.set_num_threads(before)
    assert seen == [3]


def test_without_a_compiler_there_is_one_warning_and_no_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    with caplog.at_level(logging.WARNING):
        assert build(tmp_path / "cache") is None
    assert [r.getMessage() for r in caplog.records] == [
        "no C compiler (cc, gcc or clang) found: the slower reference kernels serve"
    ]


def test_a_compiler_that_fails_gives_one_warning_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\necho no such flag >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    with caplog.at_level(logging.WARNING):
        assert build(tmp_path / "cache") is None
    assert len(caplog.records) == 1
    assert "no such flag" in caplog.text
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_dtype_the_library_has_not_is_refused(library: Library) -> None:
    config: ModelConfig = PLAIN
    with pytest.raises(AssertionError):
        CpuKernels(config, random_weights(config, dtype=torch.float16), 1024, library)


def test_auto_takes_the_native_kernels_where_they_run(library: Library) -> None:
    def chosen(name: str, dtype: torch.dtype) -> str:
        return choose_kernels(name, PLAIN, random_weights(PLAIN, dtype=dtype), 1024).name

    native = f"cpu-{library.supported()[0]}"
    assert chosen("auto", torch.bfloat16) == chosen("cpu", torch.float32) == native
    assert chosen("auto", torch.float16) == chosen("reference", torch.float32) == "reference"
    with pytest.raises(ModelError, match="--kernels cpu: needs"):
        chosen("cpu", torch.float16)


def test_without_the_library_auto_is_the_reference_and_cpu_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    weights = random_weights(PLAIN)
    assert choose_kernels("auto", PLAIN, weights, 1024).name == "reference"
    with pytest.raises(ModelError, match="cannot be had here"):
        choose_kernels("cpu", PLAIN, weights, 1024)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_that_consume_the_weights_compute_the_same_and_free_them(dtype: torch.dtype, library: Library) -> None:
    config = replace(SHAPES["plain"], d_vocab=70_000)  # more than one chunk
    kept = CpuKernels(config, random_weights(config, dtype=dtype), 64, library)
    weights = random_weights(config, dtype=dtype)
    consumed = CpuKernels(config, weights, 64, library, consume=True)
    layer = weights.layers[0]
    assert all(w.untyped_storage().nbytes() == 0 for w in (weights.unembed, layer.qkv, layer.mlp_in, layer.mlp_out))
    residual = torch.randn(3, config.d_model)
    assert torch.equal(consumed.unembed(residual), kept.unembed(residual))
    assert torch.equal(consumed.mlp_input(1, residual), kept.mlp_input(1, residual))
