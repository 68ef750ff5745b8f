"""Attention over random pages, and what it has to be: softmax in fp64, a row and a head at a time."""

from __future__ import annotations

from dataclasses import replace

import torch
from cutaway_server.architecture import LayerConfig, ModelConfig
from cutaway_server.cache.pages import Pages
from cutaway_server.kernels.batch import Batch
from networks import PLAIN, flat, pages_for


def attend_naively(
    config: ModelConfig, q: torch.Tensor, batch: Batch, keys: torch.Tensor, values: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention in fp64, a row and a head at a time, over dequantised pages of one layer."""
    z, lse = torch.zeros(q.shape, dtype=torch.float64), torch.zeros(q.shape[:2], dtype=torch.float64)
    window = config.layers[0].window
    for b, (start, stop) in enumerate(zip(batch.query_starts[:-1], batch.query_starts[1:], strict=True)):
        dense_k, dense_v = (x[batch.block_table[b]].transpose(1, 2).flatten(0, 1).double() for x in (keys, values))
        for row in range(int(start), int(stop)):
            position = int(batch.positions[row])
            first = 0 if window is None else max(0, position - window + 1)
            for head in range(config.n_heads):
                seen = dense_k[first : position + 1, head // config.group]
                scores = seen @ q[row, head].double() * config.scale
                if config.attention_softcap is not None:
                    scores = config.attention_softcap * torch.tanh(scores / config.attention_softcap)
                lse[row, head] = torch.logsumexp(scores, 0)
                z[row, head] = torch.softmax(scores, 0) @ dense_v[first : position + 1, head // config.group]
    return z, lse


CASES = {  # heads, KV heads, d_head, page size, window, soft-cap
    "grouped": (4, 2, 64, 16, None, None),
    "a group of three": (3, 1, 24, 64, None, None),
    "a group of seven": (7, 1, 80, 16, 40, None),
    "wide heads, a window over splits": (1, 1, 256, 256, 300, 5.0),
    "a window of one": (2, 1, 16, 16, 1, None),
    "more heads than a tile has rows": (20, 1, 16, 32, None, None),
}


def random_case(name: str, dtype: torch.dtype, parts: list[tuple[int, int]]) -> tuple[ModelConfig, Batch, Pages]:
    """Random pages, NaN where nothing is stored, for parts of (rows, length); on the CPU."""
    heads, kv_heads, d_head, page_size, window, cap = CASES[name]
    config = replace(
        PLAIN, n_heads=heads, n_kv_heads=kv_heads, d_head=d_head, attention_softcap=cap, layers=(LayerConfig(window),)
    )
    source = torch.Generator().manual_seed(0)
    widths = [-(-length // page_size) for _, length in parts]
    blocks = (1 + torch.randperm(sum(widths), generator=source)).split(widths)
    batch = flat(
        [
            ([0] * length, length - rows, length, own.tolist())
            for (rows, length), own in zip(parts, blocks, strict=True)
        ],
        page_size,
    )
    pages = pages_for(config, sum(widths) + 1, page_size, dtype)
    for (_, length), own in zip(parts, blocks, strict=True):
        for position in range(length):
            page, offset = own[position // page_size], position % page_size
            for stored in (pages.keys, pages.values):
                stored[0, page, :, offset] = torch.randn(kv_heads, d_head, generator=source).to(dtype)
    return config, batch, pages
