"""Attention of many rows of one sequence: a program takes a tile of queries through all keys they see.

Faster than splits where there are enough tiles to fill the device; adds in another order, so with `--batch-invariant`
prompts take the splits too, and in fp32, where tensor cores have no part in it, they always do.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from cutaway_server.architecture import ModelConfig
from cutaway_server.cache.pages import Pages
from cutaway_server.kernels.batch import Batch
from cutaway_server.kernels.cuda.attend import attend, first_seen, load_queries, load_tile
from cutaway_server.kernels.cuda.launch import multiplied_in, power_of_two
from cutaway_server.kernels.cuda.qkv import stored
from cutaway_server.kernels.cuda.work import PROMPT_ROWS

KEYS_AT_ONCE = 64


@triton.jit(do_not_specialize=["n_tiles", "table_stride"])
def prefill_kernel(
    q, keys, values, key_scales, value_scales, positions, block_table, tiles, z, lse, n_tiles, table_stride, scale,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, D_BLOCK: tl.constexpr, M: tl.constexpr,
    N: tl.constexpr, PAGE: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, SCALED: tl.constexpr,
    DOT: tl.constexpr, EXACT_P: tl.constexpr,
):  # fmt: skip
    GROUP: tl.constexpr = HEADS // KV_HEADS
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    first_row, n_rows = tl.load(tiles + tile), tl.load(tiles + n_tiles + tile)
    sequence = tl.load(tiles + 2 * n_tiles + tile).to(tl.int64)
    pair, real, position = load_tile(positions, first_row, n_rows, kv_head, GROUP, M, HEADS)
    queries = load_queries(q, pair, real, D, D_BLOCK)
    highest, total, sums = attend(
        queries, position, keys, values, key_scales, value_scales, block_table + sequence * table_stride, kv_head,
        first_seen(position, real, WINDOW) // N * N, tl.max(position, 0) + 1, scale, KV_HEADS, D, D_BLOCK, M, N, PAGE,
        WINDOW, SOFTCAP, SCALED, DOT, EXACT_P,
    )  # fmt: skip
    d = tl.arange(0, D_BLOCK)
    total = tl.where(real, total, 1.0)
    tl.store(lse + pair, highest + tl.log(total), mask=real)
    out = (sums / total[:, None]).to(z.dtype.element_ty)
    tl.store(z + pair[:, None] * D + d[None, :], out, mask=real[:, None] & (d < D)[None, :])


def prefill_attention(
    config: ModelConfig, layer: int, q: Tensor, batch: Batch, tiles: Tensor, pages: Pages, z: Tensor, lse: Tensor
) -> None:
    """Attend the rows of `tiles` int32 [3, n] (first row, rows, sequence); writes their z and lse."""
    n_tiles = tiles.shape[1]
    keys, values, key_scales, value_scales = stored(pages, layer)
    prefill_kernel[(n_tiles, config.n_kv_heads)](
        q, keys, values, key_scales, value_scales, batch.positions, batch.block_table, tiles, z, lse, n_tiles,
        batch.block_table.stride(0), config.scale, HEADS=config.n_heads, KV_HEADS=config.n_kv_heads, D=config.d_head,
        D_BLOCK=max(16, power_of_two(config.d_head)), M=max(PROMPT_ROWS, power_of_two(config.group)), N=KEYS_AT_ONCE,
        PAGE=pages.page_size, WINDOW=config.layers[layer].window or 0, SOFTCAP=config.attention_softcap or 0.0,
        SCALED=key_scales is not None, DOT=multiplied_in(q.dtype), EXACT_P=False,
        num_warps=4 if config.d_head <= 128 else 8, num_stages=3 if config.d_head <= 128 else 2,
    )  # fmt: skip
