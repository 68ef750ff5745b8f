"""Random networks of every shape the config allows, and flat batches for them, without a scheduler."""

from __future__ import annotations

from dataclasses import replace

import torch
from cutaway_server.architecture import LayerConfig, ModelConfig, Rope
from cutaway_server.cache.pages import Pages, allocate_pages
from cutaway_server.kernels.batch import Batch
from cutaway_server.kernels.weights import LayerWeights, Norm, Weights

PLAIN = ModelConfig(
    family="test", d_model=32, n_heads=4, n_kv_heads=2, d_head=8, d_mlp=48, d_vocab=61, max_context=1024,
    layers=(LayerConfig(None, Rope(10000.0, 8)),) * 2,
)  # fmt: skip

SHAPES = {
    "plain": PLAIN,
    "one kv head": replace(PLAIN, n_kv_heads=1),
    "a kv head each": replace(PLAIN, n_kv_heads=4),
    "interleaved": replace(PLAIN, layers=(LayerConfig(None, Rope(10000.0, 8, interleaved=True)),) * 2),
    "partial rotation": replace(PLAIN, layers=(LayerConfig(None, Rope(500.0, 4)),) * 2),
    "windows": replace(PLAIN, layers=(LayerConfig(5, Rope(100.0, 8)), LayerConfig(None, Rope(10000.0, 8)))),
    "soft caps": replace(PLAIN, attention_softcap=2.0, logit_softcap=3.0, attention_scale=0.7),
    "qk-norm per head": replace(PLAIN, qk_norm="head"),
    "qk-norm full, post-norm only": replace(PLAIN, qk_norm="full", pre_norm=False, post_norm=True),
    "pre- and post-norm": replace(PLAIN, post_norm=True, activation="gelu_tanh", embed_scale=32**0.5),
    "layernorm, learned positions": replace(
        PLAIN, norm="layer", learned_positions=True, gated=False, activation="gelu", n_kv_heads=4,
        layers=(LayerConfig(),) * 2,
    ),
    "relu": replace(PLAIN, gated=False, activation="relu"),
}  # fmt: skip


def random_weights(config: ModelConfig, seed: int = 0, dtype: torch.dtype = torch.float32) -> Weights:
    """Weights of a size that keeps every value near one; biases wherever the config has room for them."""
    source = torch.Generator().manual_seed(seed)

    def matrix(out: int, width: int) -> torch.Tensor:
        return (torch.randn(out, width, generator=source) / width**0.5).to(dtype)

    def vector(width: int) -> torch.Tensor:
        return torch.randn(width, generator=source) * 0.3

    def norm(width: int, wanted: bool = True) -> Norm | None:
        if not wanted:
            return None
        return Norm(1 + vector(width), vector(width) if config.norm == "layer" else None)

    d, q, kv = config.d_model, config.n_heads * config.d_head, config.n_kv_heads * config.d_head
    mlp = config.d_mlp * (2 if config.gated else 1)
    qk = config.qk_norm != "none"
    layers = tuple(
        LayerWeights(
            matrix(q + 2 * kv, d), matrix(d, q), matrix(mlp, d), matrix(d, config.d_mlp),
            vector(q + 2 * kv), vector(d), vector(mlp), vector(d),
            norm(d, config.pre_norm), norm(d, config.post_norm), norm(d, config.pre_norm), norm(d, config.post_norm),
            norm(config.d_head if config.qk_norm == "head" else q, qk),
            norm(config.d_head if config.qk_norm == "head" else kv, qk),
        )
        for _ in config.layers
    )  # fmt: skip
    final = norm(d)
    assert final is not None
    positions = matrix(config.max_context, d) if config.learned_positions else None
    return Weights(matrix(config.d_vocab, d), layers, final, matrix(config.d_vocab, d), positions)


def pages_for(config: ModelConfig, n_pages: int, page_size: int, dtype: torch.dtype = torch.float32) -> Pages:
    """Pages full of NaN but for page 0: whoever reads what was not stored is found out."""
    pages = allocate_pages(config, n_pages, page_size, dtype, torch.device("cpu"))
    pages.keys[:, 1:], pages.values[:, 1:] = torch.nan, torch.nan
    return pages


def flat(parts: list[tuple[list[int], int, int, list[int]]], page_size: int, stored: int = 0) -> Batch:
    """A batch of (tokens, start, stop, blocks); rows below `stored` store nothing."""
    ids, positions, slots, store, starts, lengths = [], [], [], [], [0], []
    table = torch.zeros(len(parts), max(len(blocks) for *_, blocks in parts), dtype=torch.int64)
    for b, (tokens, start, stop, blocks) in enumerate(parts):
        ids += tokens[start:stop]
        positions += range(start, stop)
        kept = [p >= stored for p in range(start, stop)]
        slots += [
            blocks[p // page_size] * page_size + p % page_size if keep else 0
            for p, keep in zip(range(start, stop), kept, strict=True)
        ]
        store += kept
        starts.append(len(ids))
        lengths.append(max(stop, stored))
        table[b, : len(blocks)] = torch.tensor(blocks)
    integers = (torch.tensor(x) for x in (ids, positions, slots))
    return Batch(
        *integers, torch.tensor(store), torch.tensor(starts), torch.tensor(lengths), table,
        torch.arange(len(ids)), page_size,
    )  # fmt: skip
