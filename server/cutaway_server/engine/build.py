"""An engine from a checkpoint: weights loaded, the pool sized from what memory is left, warmed up."""

from __future__ import annotations

import logging
import os
import secrets
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import cast

import torch

from cutaway_server.architecture import ModelConfig
from cutaway_server.cache.blocks import BlockPool
from cutaway_server.cache.pages import Pages, allocate_pages, page_bytes
from cutaway_server.config import Config
from cutaway_server.engine.batch import BatchBuilder
from cutaway_server.engine.engine import Engine
from cutaway_server.engine.memory import available_bytes, count_pages
from cutaway_server.engine.observed import Observed
from cutaway_server.engine.quantize import AS_IS, check_quantize, quantization, rounding_of
from cutaway_server.engine.retained import Retained
from cutaway_server.errors import ModelError
from cutaway_server.kernels.cpu import DTYPES as CPU_DTYPES
from cutaway_server.kernels.cpu import CpuKernels
from cutaway_server.kernels.dequantise import dequantised
from cutaway_server.kernels.interface import OpenKernels
from cutaway_server.kernels.library import load_library
from cutaway_server.kernels.reading import WeightReader
from cutaway_server.kernels.reference import ReferenceKernels
from cutaway_server.kernels.rounding import NO_ROUNDING, Rounding
from cutaway_server.kernels.weights import Weights, served_dtype
from cutaway_server.model.checkpoint import Checkpoint, load_weights
from cutaway_server.model.transformer import Transformer
from cutaway_server.request import Request, RequestFailed, SamplingOptions, SamplingParams
from cutaway_server.scheduler import Scheduler

log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
KV_DTYPES = {**DTYPES, "int8": torch.int8, "fp8": torch.float8_e4m3fn}
WIRE_DTYPES = {
    torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int8: "I8", torch.float8_e4m3fn: "F8_E4M3"
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """What an engine serves, and within which limits."""

    config: ModelConfig
    model_hash: str
    n_parameters: int
    kernels: str
    dtype: str  # as safetensors names it
    quantization: str  # "none", "int8", "int4", "as-is: Q4_1, Q8_0"
    kv_dtype: str  # of keys and values in the cache, likewise
    device: str
    max_context: int
    max_running: int
    max_queued: int
    max_batch_tokens: int
    page_size: int
    total_pages: int  # without page 0
    eos_token_ids: frozenset[int]
    defaults: SamplingOptions
    weights: WeightReader


def build_engine(
    config: Config, checkpoint: Checkpoint, progress: Callable[[int, int], None] | None = None
) -> tuple[Engine, EngineFacts]:
    """Load the weights and make everything that computes.

    Raises:
        ModelError: the model does not fit, or the options do not fit the model.
    """
    _check_step(config)
    device, dtype = choose_device(config.device), choose_dtype(config.dtype, choose_device(config.device))
    torch.set_num_threads(config.threads or len(os.sched_getaffinity(0)))
    context = _context(config, checkpoint.config)
    check_quantize(config.quantize, checkpoint, device, dtype)
    with ThreadPoolExecutor(1) as hashing:  # reads the same bytes as the loader, beside it
        digest = hashing.submit(checkpoint.reader.digest)
        weights = load_weights(checkpoint, dtype, device, progress, as_is=config.quantize == AS_IS)
        model_hash = digest.result()
    n_parameters, quantized = weights.n_parameters, quantization(config.quantize, checkpoint, weights)
    kernels = choose_kernels(
        config.kernels, checkpoint.config, weights, context, dtype, rounding_of(config.quantize),
        batch_invariant=config.batch_invariant,
    )  # fmt: skip
    del weights  # the kernels have them now, packed or as they were
    kv_dtype = choose_kv_dtype(config.kv_dtype, dtype, kernels)
    pages = _pages(config, checkpoint.config, context, kv_dtype, device)
    engine = _engine(config, kernels, pages, context)
    warm_up(engine)
    engine.retained = Retained(engine.scheduler.pool, pages.page_bytes, config.retain_bytes, config.retain_seconds)
    facts = EngineFacts(
        checkpoint.config, model_hash, n_parameters, kernels.name, WIRE_DTYPES[dtype], quantized,
        WIRE_DTYPES[kv_dtype], device.type, context, config.max_running, config.max_queued, config.max_batch_tokens,
        config.page_size, pages.n_pages - 1, checkpoint.eos_token_ids, checkpoint.defaults, kernels.weight_reader,
    )  # fmt: skip
    log.info(
        "%s: %d parameters in %s (quantised: %s) on %s, %s kernels, %d pages of %d tokens in %s",
        checkpoint.config.family, facts.n_parameters, facts.dtype, facts.quantization, facts.device,
        facts.kernels, facts.total_pages, facts.page_size, facts.kv_dtype,
    )  # fmt: skip
    return engine, facts


def choose_device(name: str) -> torch.device:
    """The device asked for; auto takes a GPU if there is one.

    Raises:
        ModelError: CUDA is asked for and not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise ModelError("--device cuda: torch finds no CUDA device here")
    return torch.device(name)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype asked for; auto takes bfloat16 where the hardware multiplies it, else float32."""
    if name != "auto":
        return DTYPES[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()  # not emulated
    return torch.bfloat16 if fast else torch.float32


def choose_kernels(
    name: str, model: ModelConfig, weights: Weights, context: int, dtype: torch.dtype | None = None,
    rounding: Rounding = NO_ROUNDING, *, batch_invariant: bool = False,
) -> OpenKernels:  # fmt: skip
    """The operations asked for; auto takes the fastest that run. They take the weights over.

    `dtype` is what weights that are all quantised are computed beside; `rounding` is what becomes of float ones.

    Raises:
        ModelError: the operations asked for cannot serve this.
    """
    device, dtype = weights.device, dtype or served_dtype(weights)
    assert dtype is not None
    if name == "cuda" and device.type != "cuda":
        raise ModelError(f"--kernels cuda: needs a CUDA device, not {device.type}")
    if device.type == "cuda" and name in ("auto", "cuda"):
        found = _cuda_kernels(name, model, weights, context, batch_invariant=batch_invariant)
        if found is not None:
            return found
    fits = device.type == "cpu" and dtype in CPU_DTYPES
    if name == "cpu" and not fits:
        raise ModelError(f"--kernels cpu: needs a CPU and bfloat16 or float32, not {device.type} and {dtype}")
    library = load_library() if fits and name != "reference" else None
    if library is not None:
        return CpuKernels(model, weights, context, library, consume=True, dtype=dtype, rounding=rounding)
    if name == "cpu":
        raise ModelError("--kernels cpu: the native library cannot be had here; the log says why")
    return ReferenceKernels(model, dequantised(weights, dtype, rounding), context)


def choose_kv_dtype(name: str, dtype: torch.dtype, kernels: OpenKernels) -> torch.dtype:
    """What pages hold, as asked for; auto is `dtype`, which the model is computed in.

    Raises:
        ModelError: the kernels cannot read that.
    """
    chosen = KV_DTYPES.get(name, dtype)
    if chosen not in kernels.page_dtypes:
        known = ", ".join(known for known, kind in KV_DTYPES.items() if kind in kernels.page_dtypes)
        raise ModelError(f"--kv-dtype {name}: {kernels.name} kernels read {known} here")
    return chosen


def _cuda_kernels(
    name: str, model: ModelConfig, weights: Weights, context: int, *, batch_invariant: bool
) -> OpenKernels | None:
    """The Triton kernels; None, after a warning, if there is no Triton and nobody insists on it."""
    try:
        from cutaway_server.kernels.cuda.operations import CudaKernels
    except ImportError as error:
        reason = (
            f"Triton cannot be imported ({error}); it comes with torch's CUDA build, or pip install 'cutaway[cuda]'"
        )
        if name == "cuda":
            raise ModelError(f"--kernels cuda: {reason}") from None
        log.warning("%s: the slower reference kernels serve", reason)
        return None
    return CudaKernels(model, weights, context, batch_invariant=batch_invariant)


def _engine(config: Config, kernels: OpenKernels, pages: Pages, context: int) -> Engine:
    """The engine for these kernels: one that runs ahead of the host where steps can be recorded."""
    device, scheduler = pages.keys.device, _scheduler(config, pages, context)
    if device.type != "cuda" or isinstance(kernels, ReferenceKernels):
        return Engine(Transformer(kernels), pages, scheduler, _builder(config, context, device))
    from cutaway_server.engine.ahead import AheadEngine
    from cutaway_server.engine.capture import CudaCapture
    from cutaway_server.engine.graphs import DecodeGraphs, RecordableKernels

    graphs = DecodeGraphs(
        cast(RecordableKernels, kernels), pages, max_rows=config.max_running, capture=CudaCapture(device)
    )
    return AheadEngine(graphs, pages, scheduler, _builder(config, context, torch.device("cpu")))


def _check_step(config: Config) -> None:
    if config.max_batch_tokens < config.max_running:
        raise ModelError(
            f"--max-batch-tokens: {config.max_batch_tokens} is less than --max-running {config.max_running}, and a "
            "step computes a token of each completion that runs"
        )


def _context(config: Config, model: ModelConfig) -> int:
    if config.max_context is None:
        return model.max_context
    if config.max_context > longest_context(model):
        raise ModelError(
            f"--max-context: {config.max_context} is more than the {longest_context(model)} positions that the model "
            "was made for"
        )
    return config.max_context


def longest_context(model: ModelConfig) -> int:
    """Positions that the model was made for; some configs with linear scaling tell those before it."""
    scalings = [layer.rope.scaling for layer in model.layers if layer.rope is not None]
    linear = [s.factor for s in scalings if s is not None and s.kind == "linear"]
    return int(model.max_context * max(linear, default=1.0))


def _pages(config: Config, model: ModelConfig, context: int, dtype: torch.dtype, device: torch.device) -> Pages:
    one = page_bytes(model, config.page_size, dtype)
    n_pages = count_pages(
        available=available_bytes(device), utilization=config.memory_utilization,
        kv_cache_memory=config.kv_cache_memory, page_bytes=one, page_size=config.page_size, max_context=context,
        max_running=config.max_running,
    )  # fmt: skip
    return allocate_pages(model, n_pages, config.page_size, dtype, device)


def _scheduler(config: Config, pages: Pages, context: int) -> Scheduler:
    pool = BlockPool(pages.n_pages, pages.page_size, key=secrets.token_bytes(32))
    return Scheduler(
        pool, max_batch_tokens=config.max_batch_tokens, max_running=config.max_running, max_queued=config.max_queued,
        max_context=context, prefix_caching=config.prefix_caching, max_stretch=config.max_stretch,
    )  # fmt: skip


def _builder(config: Config, context: int, device: torch.device) -> BatchBuilder:
    return BatchBuilder(
        max_rows=config.max_batch_tokens, max_sequences=config.max_running, page_size=config.page_size,
        max_blocks=-(-context // config.page_size), device=device,
    )  # fmt: skip


def warm_up(engine: Engine) -> None:
    """Run one request, so that the first user does not wait for lazy initialisation.

    Raises:
        ModelError: the model computes nothing usable.
    """
    sampling = SamplingParams(seed=0, max_tokens=2, temperature=1.0)
    engine.add(Request("warm-up", (0, 0), sampling, time.monotonic(), prefix_caching=False))
    while engine.has_work:
        for _, event in engine.step():
            if isinstance(event, RequestFailed):
                raise ModelError(f"the model computes no usable logits: {event.error}")
    engine.steps = 0
    engine.observed = Observed(engine.scheduler.max_context)
