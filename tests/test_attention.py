"""Paged attention over random shapes: every native variant and the reference against a dense one in fp64."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from cutaway_server.architecture import LayerConfig, ModelConfig
from cutaway_server.cache.pages import Pages, allocate_pages, page_bytes, quantize
from cutaway_server.config import Config, ConfigError, read_config
from cutaway_server.engine.build import choose_kv_dtype
from cutaway_server.errors import ModelError
from cutaway_server.kernels.batch import Batch
from cutaway_server.kernels.build_native import variants
from cutaway_server.kernels.cpu import CpuKernels
from cutaway_server.kernels.library import Library, load_library
from cutaway_server.kernels.reference import ReferenceKernels
from cutaway_server.model.transformer import Transformer
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import PLAIN, SHAPES, flat, random_weights
from serving import asking, serving, stub, tokens_of
from test_kernels import LONG, logits, shuffled_blocks, tokens
from tiny import save_tiny

STORED = [torch.float32, torch.bfloat16, torch.int8]
TOLERANCE = 2e-5  # of fp32 arithmetic over the same pages, whatever they hold


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


@dataclass(frozen=True)
class Case:
    """Sequences as (first position, rows), over pages that hold what is stored and NaN elsewhere."""

    config: ModelConfig
    page_size: int
    stored: torch.dtype
    sequences: list[tuple[int, int]]
    seed: int

    def blocks(self, i: int) -> list[int]:
        counts = [-(-(start + rows) // self.page_size) for start, rows in self.sequences]
        order = (torch.randperm(sum(counts), generator=self._source()) + 1).tolist()
        return order[sum(counts[:i]) : sum(counts[: i + 1])]

    def pages(self) -> Pages:
        n = 1 + sum(len(self.blocks(i)) for i in range(len(self.sequences)))
        pages = allocate_pages(self.config, n, self.page_size, self.stored, torch.device("cpu"))
        scales = (pages.key_scales, pages.value_scales)
        for stored, scale in zip((pages.keys, pages.values), scales, strict=True):
            if scale is None:
                stored.fill_(torch.nan)
            else:
                stored.random_(-127, 128), scale.fill_(torch.nan)
        for i, (start, rows) in enumerate(self.sequences):
            places = torch.arange(start + rows)
            slots = torch.tensor(self.blocks(i))[places // self.page_size] * self.page_size + places % self.page_size
            shape = (start + rows, self.config.n_kv_heads, self.config.d_head)
            keys, values = torch.randn(2, *shape, generator=self._source(i)).unbind()
            pages.store(0, slots, 2 * keys, values)
        return pages

    def batch(self, parts: list[tuple[int, int, int]]) -> Batch:
        """Rows [start, stop) of sequences, which are all stored already."""
        known = [(tokens(stop), start, stop, self.blocks(i)) for i, start, stop in parts]
        batch = flat(known, self.page_size, stored=max(stop for *_, stop in parts))
        return replace(batch, lengths=torch.tensor([sum(self.sequences[i]) for i, *_ in parts]))

    def queries(self) -> list[torch.Tensor]:
        shape = (self.config.n_heads, self.config.d_head)
        return [torch.randn(n, *shape, generator=self._source(50 + i)) for i, (_, n) in enumerate(self.sequences)]

    def _source(self, i: int = 0) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed + i)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    kv_heads, group = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 2, 3, 4, 7, 17]))
    layer = LayerConfig(draw(st.sampled_from([None, None, 1, 5, 100, 300])), None)
    config = replace(
        PLAIN, n_heads=kv_heads * group, n_kv_heads=kv_heads, layers=(layer,),
        d_head=draw(st.sampled_from([16, 40, 64, 64, 80, 96, 128, 256])),
        attention_softcap=draw(st.sampled_from([None, None, 5.0])),
    )  # fmt: skip
    starts = st.one_of(st.integers(0, 40), st.sampled_from([255, 256, 257]), st.integers(200, 800))
    counts = st.one_of(st.just(1), st.integers(1, 70))
    sequences = draw(st.lists(st.tuples(starts, counts), min_size=1, max_size=4))
    return Case(
        config, draw(st.sampled_from([16, 32, 256])), draw(st.sampled_from(STORED)), sequences, draw(st.integers(0, 99))
    )


def dense(case: Case, pages: Pages, q: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """z and log-sum-exp of every row, in fp64, token by token out of the pages."""
    config, z, lse = case.config, [], []
    for i, (start, rows) in enumerate(case.sequences):
        places = torch.arange(start + rows)
        page, offset = torch.tensor(case.blocks(i))[places // case.page_size], places % case.page_size
        keys, values = (
            (x[0][page, :, offset].double() * (1 if s is None else s[0][page, :, offset].double()[..., None]))
            .repeat_interleave(config.group, 1)
            for x, s in ((pages.keys, pages.key_scales), (pages.values, pages.value_scales))
        )  # fmt: skip
        scores = torch.einsum("qhd,khd->hqk", q[i].double(), keys) * config.scale
        if (cap := config.attention_softcap) is not None:
            scores = cap * torch.tanh(scores / cap)
        rows_at = torch.arange(start, start + rows)[:, None]
        hidden = places > rows_at
        if (window := config.layers[0].window) is not None:
            hidden |= places <= rows_at - window
        scores = scores.masked_fill(hidden, -torch.inf)
        z.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), values))
        lse.append(scores.logsumexp(-1).T)
    return torch.cat(z), torch.cat(lse)


def near(ours: torch.Tensor, exact: torch.Tensor) -> bool:
    return float((ours.double() - exact).abs().max()) < TOLERANCE * max(1.0, float(exact.abs().max()))


def attend(kernels: CpuKernels | ReferenceKernels, batch: Batch, q: torch.Tensor, pages: Pages) -> torch.Tensor:
    """z, and the log-sum-exp as one more column."""
    z, lse = kernels.paged_attention(0, q, kernels.plan(batch), pages)
    return torch.cat([z, lse[..., None]], -1)


@settings(max_examples=50, deadline=None)
@given(case=cases(), data=st.data())
def test_any_shape_equals_the_dense_one_and_a_row_alone_has_its_bits_among_others(
    case: Case, variant: str, library: Library, data: st.DataObject
) -> None:
    pages, q, weights = case.pages(), case.queries(), random_weights(case.config)
    kernels = [CpuKernels(case.config, weights, 1024, library, variant, threads) for threads in (1, 3)]
    everyone = [(i, start, start + rows) for i, (start, rows) in enumerate(case.sequences)]
    found = attend(kernels[1], case.batch(everyone), torch.cat(q), pages)
    z, lse = dense(case, pages, q)
    assert near(found[..., :-1], z)
    assert near(found[..., -1], lse)

    i = data.draw(st.integers(0, len(q) - 1))
    start, rows = case.sequences[i]
    first = sum(n for _, n in case.sequences[:i])
    cuts = sorted({0, rows, *data.draw(st.lists(st.integers(0, rows), max_size=3))})
    parts = [
        attend(kernels[k % 2], case.batch([(i, start + a, start + b)]), q[i][a:b], pages)
        for k, (a, b) in enumerate(itertools.pairwise(cuts))
    ]
    assert torch.equal(torch.cat(parts), found[first : first + rows])
    row = data.draw(st.integers(0, rows - 1))
    alone = attend(kernels[0], case.batch([(i, start + row, start + row + 1)]), q[i][row : row + 1], pages)
    assert torch.equal(alone[0], found[first + row])


@settings(max_examples=25, deadline=None)
@given(case=cases())
def test_the_reference_equals_the_dense_one_over_any_pages(case: Case) -> None:
    pages, q = case.pages(), case.queries()
    everyone = [(i, start, start + rows) for i, (start, rows) in enumerate(case.sequences)]
    found = attend(
        ReferenceKernels(case.config, random_weights(case.config), 1024), case.batch(everyone), torch.cat(q), pages
    )
    z, lse = dense(case, pages, q)
    assert near(found[..., :-1], z)
    assert near(found[..., -1], lse)


@pytest.mark.parametrize("stored", STORED)
def test_large_scores_lose_nothing(stored: torch.dtype, variant: str, library: Library) -> None:
    """Queries hundreds long: were they or the weights rounded to bf16, z would be wrong by a tenth."""
    config = replace(PLAIN, n_heads=3, n_kv_heads=1, d_head=64, layers=(LayerConfig(None, None),))
    case = Case(config, 16, stored, [(400, 5)], 3)
    pages, q = case.pages(), [300 * case.queries()[0]]
    found = attend(
        CpuKernels(config, random_weights(config), 1024, library, variant), case.batch([(0, 400, 405)]), q[0], pages
    )
    z, lse = dense(case, pages, q)
    assert (found[..., :-1].double() - z).abs().max() < 1e-3  # one fp32 step of a score is 6e-5 here
    assert near(found[..., -1], lse)


@pytest.mark.parametrize("name", ["plain", "qk-norm full, post-norm only", "uneven"])
def test_native_and_reference_store_the_same_int8(name: str, variant: str, library: Library) -> None:
    """The same keys and values, infinities and zeros among them, give the same bytes and scales."""
    config = replace(PLAIN, n_heads=6, n_kv_heads=2, d_head=40) if name == "uneven" else SHAPES[name]
    kernels = CpuKernels(config, random_weights(config), 1024, library, variant)
    batch = flat([(tokens(40), 0, 40, [4, 2, 7])], 16)
    pages, same = (allocate_pages(config, 9, 16, torch.int8, torch.device("cpu")) for _ in range(2))
    plan = kernels.plan(batch)
    residual = kernels.embed(plan)
    residual[3], residual[5] = 0.0, torch.inf
    kernels.attention_input(0, residual, plan, pages)
    opened = kernels.open_attention_input(0, residual, plan)
    same.store(0, batch.slots, opened.rot_k, opened.v)
    assert torch.equal(pages.keys, same.keys)
    assert torch.equal(pages.values, same.values)
    assert pages.key_scales is not None
    assert same.key_scales is not None
    assert pages.value_scales is not None
    assert same.value_scales is not None
    torch.testing.assert_close(pages.key_scales, same.key_scales, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(pages.value_scales, same.value_scales, rtol=0, atol=0, equal_nan=True)
    assert pages.value_scales[0].isnan().any()


def test_int8_is_within_half_a_step_and_says_what_is_not_finite() -> None:
    x = torch.randn(50, 3, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-30, 30, 50)[:, None, None]
    x[7] = 0.0
    rounded, scales = quantize(x, torch.int8)
    assert ((rounded * scales[..., None] - x).abs() <= 0.5001 * scales[..., None]).all()
    assert (rounded[8:].abs().amax(-1) == 127).all()
    for wrong in (torch.nan, torch.inf, -torch.inf):
        x[2, 1, 5] = wrong
        rounded, scales = quantize(x, torch.int8)
        assert scales[2, 1].isnan()
        assert scales.isnan().sum() == 1


def test_copied_pages_take_their_scales_with_them_and_bytes_count_them() -> None:
    pages = allocate_pages(PLAIN, 5, 16, torch.int8, torch.device("cpu"))
    assert pages.key_scales is not None
    assert pages.value_scales is not None
    tensors = (pages.keys, pages.values, pages.key_scales, pages.value_scales)
    for layer in range(PLAIN.n_layers):
        x = torch.randn(2, 16, PLAIN.n_kv_heads, PLAIN.d_head)
        pages.store(layer, torch.arange(32, 48), x[0], x[1])
    pages.copy(torch.tensor([2]), torch.tensor([4]))
    for tensor in tensors:
        assert torch.equal(tensor[:, 4], tensor[:, 2])
        assert tensor[:, 4].any()
    assert 5 * page_bytes(PLAIN, 16, torch.int8) == sum(t.nbytes for t in tensors)


@pytest.mark.parametrize("name", ["windows", "soft caps"])
def test_serving_over_int8_pages_is_what_the_reference_serves_over_them(
    name: str, variant: str, library: Library
) -> None:
    config, weights = SHAPES[name], random_weights(SHAPES[name])
    batch = flat([(tokens(LONG), 0, LONG, shuffled_blocks(LONG, 16))], 16)
    ours, reference, exact = (
        logits(Transformer(kernels), batch, allocate_pages(config, 41, 16, stored, torch.device("cpu")))
        for kernels, stored in (
            (CpuKernels(config, weights, 1024, library, variant), torch.int8),
            (ReferenceKernels(config, weights, 1024), torch.int8),
            (ReferenceKernels(config, weights, 1024), torch.float32),
        )
    )
    assert 1e-6 < (reference - exact).abs().max() < 0.05 * exact.abs().max()
    # A key or value on the edge of two steps may fall to either side of it.
    assert (ours - reference).abs().max() < 0.2 * (reference - exact).abs().max()


def test_attention_rows_read_int8_too(variant: str, library: Library) -> None:
    config = SHAPES["soft caps"]
    kernels = CpuKernels(config, random_weights(config), 1024, library, variant)
    pages = allocate_pages(config, 41, 16, torch.int8, torch.device("cpu"))
    plan = kernels.plan(flat([(tokens(LONG), 0, LONG, shuffled_blocks(LONG, 16))], 16))
    q = kernels.attention_input(0, kernels.embed(plan), plan, pages)
    _, lse = kernels.paged_attention(0, q, plan, pages)
    pattern = kernels.attention_rows(0, q, lse, torch.tensor([0, 17, LONG - 1]), torch.tensor([0, 3, 2]), plan, pages)
    assert (pattern.sum(-1) - 1).abs().max() < 1e-5


def test_the_cache_takes_the_models_dtype_unless_told_and_what_the_kernels_cannot_read_is_refused(
    library: Library,
) -> None:
    weights = random_weights(PLAIN, dtype=torch.bfloat16)
    native, reference = CpuKernels(PLAIN, weights, 64, library), ReferenceKernels(PLAIN, weights, 64)
    for dtype in (torch.bfloat16, torch.float32):
        assert choose_kv_dtype("auto", dtype, native) == dtype
    assert choose_kv_dtype("int8", torch.bfloat16, native) == torch.int8
    assert choose_kv_dtype("fp8", torch.bfloat16, reference) == torch.float8_e4m3fn
    for name in ("fp8", "float16"):
        with pytest.raises(ModelError, match=rf"--kv-dtype {name}: cpu-\w+ kernels read float32, bfloat16, int8 here"):
            choose_kv_dtype(name, torch.bfloat16, native)
    assert read_config(["--kv-dtype", "int8"], {}).kv_dtype == "int8"
    assert Config().kv_dtype == "auto"
    with pytest.raises(ConfigError, match="kv-dtype"):
        read_config(["--kv-dtype", "int4"], {})


@pytest.mark.parametrize("stored", [torch.float16, torch.float8_e4m3fn])
def test_the_reference_reads_what_it_stores_in_half_and_8_bit_floats(stored: torch.dtype) -> None:
    config, weights = SHAPES["windows"], random_weights(SHAPES["windows"])
    batch = flat([(tokens(LONG), 0, LONG, shuffled_blocks(LONG, 16))], 16)
    ours, exact = (
        logits(
            Transformer(ReferenceKernels(config, weights, 1024)), batch,
            allocate_pages(config, 41, 16, kind, torch.device("cpu")),
        )
        for kind in (stored, torch.float32)
    )  # fmt: skip
    assert 0 < (ours - exact).abs().max() < 0.1 * exact.abs().max()


@pytest.mark.parametrize(("kv_dtype", "kernels", "bytes_of_a_head"), [
    ("float32", "cpu", 64), ("bfloat16", "cpu", 32), ("float16", "reference", 32), ("int8", "cpu", 16 + 4),
    ("fp8", "reference", 16 + 4),
])  # fmt: skip
def test_the_pool_is_counted_in_what_it_holds_and_a_batch_says_what_each_says_alone(
    kv_dtype: str, kernels: str, bytes_of_a_head: int, tmp_path: Path, library: Library
) -> None:
    """3 layers of 2 heads of 16, keys and values: a page of 16 tokens has 192 of them."""
    save_tiny("llama", tmp_path)
    prompts = [[40 + i, *range(60, 60 + 40 * i), 50] for i in range(5)]
    options = {"kv_dtype": kv_dtype, "kernels": kernels, "max_batch_tokens": 64, "kv_cache_memory": 10**6}
    with serving(tmp_path, **options) as live, stub(live.address) as client:
        assert live.engine.scheduler.pool.capacity == 10**6 // (192 * bytes_of_a_head) - 1
        calls = [client.Generate(asking(prompt, max_tokens=20)) for prompt in prompts]
        together = [tokens_of(list(call)) for call in calls]
        alone = [list(client.Generate(asking(p, max_tokens=20, ask_prefix_caching=False))) for p in prompts]
    assert together == [tokens_of(answer) for answer in alone]
    assert all(len(answer) == 20 for answer in together)


def test_a_server_that_cannot_hold_what_is_asked_for_does_not_start(tmp_path: Path, library: Library) -> None:
    save_tiny("llama", tmp_path)
    with pytest.raises(ModelError, match="--kv-dtype fp8"), serving(tmp_path, kv_dtype="fp8", kernels="cpu"):
        pass
