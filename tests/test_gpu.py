"""On an NVIDIA GPU: compiled kernels against the reference, recorded steps against plain ones, real models.

Where pytest's plugins of this project are missing:
    python -m pytest -o addopts= -W ignore::pytest.PytestConfigWarning -m gpu tests/test_gpu.py
"""

from __future__ import annotations

import random
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cuda_cases import CASES, attend_naively, random_case
from cutaway_server.architecture import LayerConfig
from cutaway_server.cache.blocks import BlockPool
from cutaway_server.cache.pages import Pages, allocate_pages
from cutaway_server.engine.batch import BatchBuilder
from cutaway_server.engine.engine import Engine
from cutaway_server.kernels.reference import ReferenceKernels
from cutaway_server.kernels.weights import LayerWeights, Norm, Weights
from cutaway_server.model.transformer import Transformer
from cutaway_server.request import Request, Sampled, SamplingParams
from cutaway_server.sampler import SamplerState, build_batch, sample
from cutaway_server.scheduler import Scheduler
from engines import CONTEXT, ask, run
from networks import PLAIN, SHAPES, flat, random_weights

pytest.importorskip("triton")

from cutaway_server.engine.ahead import AheadEngine
from cutaway_server.engine.capture import CudaCapture
from cutaway_server.engine.draws import plain_draws
from cutaway_server.engine.graphs import DecodeGraphs
from cutaway_server.kernels.cuda.matmul import matmul
from cutaway_server.kernels.cuda.operations import CudaKernels

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

GPU = torch.device("cuda")
TOLERANCE = {torch.float32: 2e-5, torch.float16: 6e-3, torch.bfloat16: 5e-2}
WIDE = replace(
    PLAIN, d_model=256, n_heads=8, n_kv_heads=2, d_head=64, d_mlp=512,
    layers=(LayerConfig(None, PLAIN.layers[0].rope),) * 2,
)  # fmt: skip


def moved(part: object) -> object:
    """Weights on the GPU."""
    if isinstance(part, torch.Tensor):
        return part.to(GPU)
    if isinstance(part, tuple):
        return tuple(moved(item) for item in part)
    if isinstance(part, Weights | LayerWeights | Norm):
        return type(part)(*(moved(getattr(part, name)) for name in part.__slots__))
    return part


def weights_of(config, dtype: torch.dtype) -> Weights:
    weights = moved(random_weights(config, dtype=dtype))
    assert isinstance(weights, Weights)
    return weights


def empty_pages(config, dtype: torch.dtype, n_pages: int = 41, page_size: int = 16) -> Pages:
    pages = allocate_pages(config, n_pages, page_size, dtype, GPU)
    for part in (pages.keys, pages.values):
        if part.dtype.itemsize > 1:
            part[:, 1:] = torch.nan
    return pages


def tokens(n: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(61), k=n)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", SHAPES)
def test_logits_equal_the_references(name: str, dtype: torch.dtype) -> None:
    config = SHAPES[name]
    weights = weights_of(config, dtype)
    parts = [(tokens(300), 0, 300, list(range(1, 20))), (tokens(40, 1), 0, 40, [30, 21, 25])]
    found = []
    for kernels in (CudaKernels(config, weights, 1024), ReferenceKernels(config, weights, 1024)):
        model, pages = Transformer(kernels), empty_pages(config, dtype)
        model.forward(flat(parts, 16).to(GPU), pages)
        step = [([*ids, 5], len(ids), len(ids) + 1, blocks) for ids, _, _, blocks in parts]
        found.append(model.logits(model.forward(flat(step, 16).to(GPU), pages)))
    limit = TOLERANCE[dtype] * max(1.0, float(found[1].abs().max()))
    assert (found[0] - found[1]).abs().max() < limit


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("parts", [[(1, 530), (2, 257), (1, 1)], [(66, 130), (1, 20), (64, 700)]])
@pytest.mark.parametrize("name", CASES)
def test_attention_is_softmax_attention(name: str, parts: list[tuple[int, int]], dtype: torch.dtype) -> None:
    config, batch, stored = random_case(name, dtype, parts)
    kernels = CudaKernels(config, weights_of(config, dtype), 1024)
    q = torch.randn(batch.n_rows, config.n_heads, config.d_head, generator=torch.Generator().manual_seed(1)).to(dtype)
    pages = Pages(stored.keys.to(GPU), stored.values.to(GPU))
    z, lse = kernels.paged_attention(0, q.to(GPU), kernels.plan(batch), pages)
    expected, expected_lse = attend_naively(config, q, batch, stored.keys[0], stored.values[0])
    torch.testing.assert_close(z.cpu().double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    torch.testing.assert_close(lse.cpu().double(), expected_lse, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("stored", [torch.int8, torch.float8_e4m3fn])
def test_pages_in_8_bits_are_those_of_the_reference(stored: torch.dtype) -> None:
    weights = weights_of(WIDE, torch.float32)
    found = []
    for kernels in (CudaKernels(WIDE, weights, 1024), ReferenceKernels(WIDE, weights, 1024)):
        pages = empty_pages(WIDE, stored)
        plan = kernels.plan(flat([(tokens(60), 0, 60, [3, 1, 4, 2])], 16).to(GPU))
        q = kernels.attention_input(0, kernels.embed(plan), plan, pages)
        found.append((pages, kernels.paged_attention(0, q, plan, pages)))
    (ours, (z, lse)), (theirs, (expected, expected_lse)) = found
    index = torch.arange(1, 5, device=GPU)
    torch.testing.assert_close(ours.keys_of(0, index), theirs.keys_of(0, index), atol=3e-2, rtol=8e-2)
    torch.testing.assert_close(z, expected, atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(lse, expected_lse, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("invariant", [False, True])
@pytest.mark.parametrize("name", ["plain", "pre- and post-norm", "qk-norm full, post-norm only"])
def test_open_forms_and_whole_layers_give_the_bits_of_the_operations(
    name: str, invariant: bool, dtype: torch.dtype
) -> None:
    config = SHAPES[name]
    kernels = CudaKernels(config, weights_of(config, dtype), 1024, batch_invariant=invariant)
    pages = empty_pages(config, dtype)
    plan = kernels.plan(flat([(tokens(70), 0, 70, [1, 2, 3, 4, 5])], 16))
    first = residual = kernels.embed(plan)
    for layer in range(config.n_layers):
        q = kernels.attention_input(layer, residual, plan, pages)
        opened = kernels.open_attention_input(layer, residual, plan)
        assert torch.equal(q.float(), opened.rot_q)
        z, _ = kernels.paged_attention(layer, q, plan, pages)
        added = kernels.open_attention_output(layer, z, residual)
        assert torch.equal(added.residual, kernels.attention_output(layer, z, residual))
        mlp = kernels.open_mlp_input(layer, added.residual)
        assert torch.equal(mlp.post, kernels.mlp_input(layer, added.residual).float())
        out = kernels.open_mlp_output(layer, mlp.post, added.residual)
        assert torch.equal(out.residual, kernels.mlp_output(layer, mlp.post, added.residual))
        residual = out.residual
    assert torch.equal(kernels.layers(0, config.n_layers, first, plan, pages), residual)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", ["plain", "windows", "soft caps"])
def test_with_invariant_products_neither_chunks_nor_neighbours_change_a_bit(name: str, dtype: torch.dtype) -> None:
    config = SHAPES[name]
    model = Transformer(CudaKernels(config, weights_of(config, dtype), 1024, batch_invariant=True))
    ids, blocks, source = tokens(300), list(range(1, 20)), random.Random(0)

    def logits(parts, pages) -> torch.Tensor:
        return model.logits(model.forward(flat(parts, 16), pages))

    whole = logits([(ids, 0, 300, blocks)], empty_pages(config, dtype))
    pages, rows, start = empty_pages(config, dtype), [], 0
    while start < 300:
        stop = min(300, start + source.choice([1, 1, 7, 90]))
        beside = [
            (tokens(n, n), 0, n, [30 + 2 * i, 31 + 2 * i]) for i, n in enumerate(source.choices(range(1, 30), k=2))
        ]
        first = sum(stop for _, _, stop, _ in beside)
        rows.append(logits([*beside, (ids, start, stop, blocks)], pages)[first:])
        start = stop
    assert torch.equal(torch.cat(rows), whole)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_matmuls_rows_do_not_know_each_other(dtype: torch.dtype) -> None:
    source = torch.Generator(GPU).manual_seed(0)
    weight = (torch.randn(320, 4096, generator=source, device=GPU) / 64).to(dtype)
    x = torch.randn(300, 4096, generator=source, device=GPU).to(dtype)
    whole = matmul(x, weight)
    torch.testing.assert_close(whole, (x.double() @ weight.double().T).to(dtype), atol=TOLERANCE[dtype], rtol=1e-2)
    for start, stop in ((0, 1), (3, 40), (64, 67), (250, 300)):
        assert torch.equal(matmul(x[start:stop], weight), whole[start:stop])


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_recorded_steps_have_the_bits_of_plain_ones(dtype: torch.dtype) -> None:
    kernels = CudaKernels(WIDE, weights_of(WIDE, dtype), 1024, batch_invariant=True)
    pages = empty_pages(WIDE, dtype)
    pages.keys.normal_(), pages.values.normal_()
    graphs = DecodeGraphs(kernels, pages, max_rows=8, capture=CudaCapture(GPU))
    source = random.Random(0)
    states = [SamplerState(ask("r", (1,), temperature=t, logprobs=None).sampling, (1,), 61) for t in (0.0, 0.9, 2.0)]
    for _ in range(6):
        lengths = [source.randint(1, 160) for _ in range(3)]
        parts = [(tokens(n, n), n - 1, n, list(range(1 + 10 * i, 11 + 10 * i))) for i, n in enumerate(lengths)]
        batch = flat(parts, 16)
        plain = Transformer(kernels).forward(batch, pages)
        launched = graphs.launch(batch, plain_draws(states, lengths))
        assert torch.equal(launched.residual, plain)
        expected = sample(kernels.unembed(plain), build_batch(states, lengths, 61, GPU))
        assert launched.tokens()[0] == expected.tokens.tolist()
    assert len(graphs.sizes) < 6


def make_engine(kernels: CudaKernels, pages: Pages, *, ahead: bool) -> Engine:
    scheduler = Scheduler(
        BlockPool(pages.n_pages, 16, b"key"), max_batch_tokens=256, max_running=16, max_queued=100, max_context=CONTEXT
    )
    builder = BatchBuilder(
        max_rows=256, max_sequences=16, max_blocks=CONTEXT // 16, page_size=16, device=torch.device("cpu")
    )
    if not ahead:
        return Engine(Transformer(kernels), pages, scheduler, builder)
    return AheadEngine(DecodeGraphs(kernels, pages, max_rows=16, capture=CudaCapture(GPU)), pages, scheduler, builder)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_running_ahead_says_what_the_plain_engine_says(dtype: torch.dtype) -> None:
    kernels = CudaKernels(WIDE, weights_of(WIDE, dtype), CONTEXT, batch_invariant=True)
    source = random.Random(0)
    requests = [
        ask(f"r{i}", tuple(source.choices(range(61), k=source.randint(1, 90))), max_tokens=source.randint(1, 60),
            temperature=source.choice([0.0, 1.0]), logprobs=source.choice([None, None, None, 2]), seed=i)
        for i in range(24)
    ]  # fmt: skip
    said = []
    for ahead in (True, False):
        engine = make_engine(kernels, empty_pages(WIDE, dtype, n_pages=300), ahead=ahead)
        said.append({name: answer.said for name, answer in run(engine, *requests).items()})
    assert said[0] == said[1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_real_model_says_what_the_reference_says(smollm2_gguf: Path, dtype: str) -> None:
    """Token by token along the reference's answer; where two logits are near, either may be the likeliest."""
    from cutaway_server.config import Config
    from cutaway_server.engine.build import build_engine
    from cutaway_server.model.gguf_file import open_gguf

    checkpoint = open_gguf(smollm2_gguf)
    prompts = [checkpoint.text.encode(text).ids for text in ("The capital of France is", "def fibonacci(n):\n")]
    answers, models = [], []
    for kernels in ("cuda", "reference"):
        config = Config(device="cuda", kernels=kernels, dtype=dtype, max_context=512, kv_cache_memory=2**28)
        engine, facts = build_engine(config, checkpoint)
        assert facts.kernels == kernels
        models.append((engine.model, engine.pages))
        for i, prompt in enumerate(prompts):
            sampling = SamplingParams(seed=0, max_tokens=48, temperature=0.0)
            engine.add(Request(str(i), tuple(prompt), sampling, time.monotonic()))
        said: dict[str, list[int]] = {str(i): [] for i in range(len(prompts))}
        while engine.has_work:
            for name, event in engine.step():
                if isinstance(event, Sampled):
                    said[name].append(event.token)
        answers.append(said)
    near = 1e-3 if dtype == "float32" else 0.3
    for i, prompt in enumerate(prompts):
        ours, theirs = (answer[str(i)] for answer in answers)
        assert len(ours) == len(theirs) == 48
        whole = [*prompt, *theirs]
        batch = flat([(whole, 0, len(whole), list(range(1, 2 + len(whole) // 16)))], 16)
        logits = [model.logits(Transformer(model.kernels).forward(batch.to(GPU), pages)) for model, pages in models]
        assert (logits[0] - logits[1]).abs().max() < (5e-3 if dtype == "float32" else 1.5)
        different = [n for n, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b]
        if different:
            row = logits[1][len(prompt) + different[0] - 1]
            assert row[theirs[different[0]]] - row[ours[different[0]]] < near
