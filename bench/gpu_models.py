"""Models of published shapes with random weights, and engines around them, for `gpu.py`: no files, no options."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from cutaway_server.architecture import LayerConfig, ModelConfig, Rope, RopeScaling
from cutaway_server.cache.blocks import BlockPool
from cutaway_server.cache.pages import allocate_pages, page_bytes
from cutaway_server.engine.ahead import AheadEngine
from cutaway_server.engine.batch import BatchBuilder
from cutaway_server.engine.capture import CudaCapture, EagerCapture
from cutaway_server.engine.engine import Engine
from cutaway_server.engine.graphs import DecodeGraphs
from cutaway_server.kernels.cuda.operations import CudaKernels
from cutaway_server.kernels.weights import LayerWeights, Norm, Weights
from cutaway_server.model.transformer import Transformer
from cutaway_server.scheduler import Scheduler

LLAMA_8B = ModelConfig(
    family="llama", d_model=4096, n_heads=32, n_kv_heads=8, d_head=128, d_mlp=14336, d_vocab=128_256,
    max_context=131_072,
    layers=(LayerConfig(None, Rope(5e5, 128, scaling=RopeScaling("llama3", 8.0, 8192, 1.0, 4.0))),) * 32,
)  # fmt: skip
QWEN3_06B = ModelConfig(
    family="qwen3", d_model=1024, n_heads=16, n_kv_heads=8, d_head=128, d_mlp=3072, d_vocab=151_936,
    max_context=40_960, layers=(LayerConfig(None, Rope(1e6, 128)),) * 28, norm_eps=1e-6, qk_norm="head",
    tied_embeddings=True,
)  # fmt: skip
PAGE = 16


def shrunk(config: ModelConfig) -> ModelConfig:
    """The same kind of network, small enough for Triton's interpreter."""
    rope = config.layers[0].rope
    assert rope is not None
    return replace(
        config, d_model=32, n_heads=2, n_kv_heads=1, d_head=16, d_mlp=48, d_vocab=97, max_context=256,
        layers=(replace(config.layers[0], rope=replace(rope, dims=16)),),
    )  # fmt: skip


def random_weights(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> Weights:
    """Weights that keep values near one, made on the device."""
    source = torch.Generator(device).manual_seed(0)

    def matrix(out: int, width: int) -> torch.Tensor:
        return torch.empty(out, width, dtype=dtype, device=device).normal_(0, width**-0.5, generator=source)

    def norm(width: int) -> Norm:
        return Norm(torch.ones(width, device=device))

    d, q, kv = config.d_model, config.n_heads * config.d_head, config.n_kv_heads * config.d_head
    head = norm(config.d_head) if config.qk_norm == "head" else None
    layers = tuple(
        LayerWeights(
            matrix(q + 2 * kv, d), matrix(d, q), matrix(2 * config.d_mlp, d), matrix(d, config.d_mlp), norm1=norm(d),
            norm2=norm(d), q_norm=head, k_norm=head,
        )
        for _ in config.layers
    )  # fmt: skip
    embed = matrix(config.d_vocab, d)
    return Weights(embed, layers, norm(d), embed if config.tied_embeddings else matrix(config.d_vocab, d))


@dataclass(frozen=True, slots=True)
class Bench:
    """A model on a device."""

    config: ModelConfig
    weights: Weights
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def make(cls, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> Bench:
        """Random weights."""
        return cls(config, random_weights(config, dtype, device), dtype, device)

    @property
    def step_bytes(self) -> int:
        """Bytes of weights that a step reads whatever its rows: all but an embedding that is only looked up in."""
        embed = 0 if self.config.tied_embeddings else self.weights.embed.nbytes
        return self.weights.n_bytes - embed

    @property
    def token_bytes(self) -> int:
        """Bytes of keys and values of one token."""
        return page_bytes(self.config, PAGE, self.dtype) // PAGE

    @property
    def row_flops(self) -> int:
        """Operations of the products of one row, without the last."""
        parts = (
            w for layer in self.weights.layers for w in (layer.qkv, layer.attention_out, layer.mlp_in, layer.mlp_out)
        )
        return 2 * sum(w.numel() for w in parts)

    def engine(
        self, *, running: int, context: int, step_rows: int, invariant: bool = False, ahead: bool = True
    ) -> Engine:
        """An engine with pages for `running` sequences of `context` tokens."""
        kernels = CudaKernels(self.config, self.weights, context, batch_invariant=invariant)
        n_pages = running * -(-context // PAGE) + 2 * running + 2
        pages = allocate_pages(self.config, n_pages, PAGE, self.dtype, self.device)
        scheduler = Scheduler(
            BlockPool(n_pages, PAGE, b"bench"), max_batch_tokens=step_rows, max_running=running, max_queued=4096,
            max_context=context, prefix_caching=False,
        )  # fmt: skip
        builder = BatchBuilder(
            max_rows=step_rows, max_sequences=running, max_blocks=-(-context // PAGE), page_size=PAGE,
            device=torch.device("cpu"),
        )  # fmt: skip
        if not ahead:
            return Engine(Transformer(kernels), pages, scheduler, builder)
        capture = CudaCapture(self.device) if self.device.type == "cuda" else EagerCapture()
        return AheadEngine(DecodeGraphs(kernels, pages, max_rows=running, capture=capture), pages, scheduler, builder)
