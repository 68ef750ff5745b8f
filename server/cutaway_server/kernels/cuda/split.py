"""Attention of few rows: each program takes 256 keys of one tile, and a second kernel merges what they found.

The splits and the order in which they are merged follow from a row's position alone. So a row's bits depend neither on
the rows beside it nor on the size of the batch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cutaway_server.architecture import ModelConfig
from cutaway_server.cache.pages import Pages
from cutaway_server.kernels.batch import Batch
from cutaway_server.kernels.cuda.attend import attend, first_seen, load_queries, load_tile
from cutaway_server.kernels.cuda.launch import bound, multiplied_in, power_of_two
from cutaway_server.kernels.cuda.qkv import stored
from cutaway_server.kernels.cuda.work import SPLIT, Splits, matrix_rows

# A block's page is found, then its keys are read, then multiplied: 5 stages have two blocks on their way at a time.
KEYS_AT_ONCE = 64  # on tensor cores; in fp32, which has none, operands are in registers
KEYS_AT_ONCE_FP32 = 16
MERGED_AT_ONCE = 16


@triton.jit(do_not_specialize=["n_tiles", "n_items", "table_stride"])
def split_kernel(
    q, keys, values, key_scales, value_scales, positions, block_table, tiles, items, out, highest_out, total_out,
    n_tiles, n_items, table_stride, scale,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, D_BLOCK: tl.constexpr, M: tl.constexpr,
    N: tl.constexpr, SPLIT: tl.constexpr, PAGE: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    SCALED: tl.constexpr, DOT: tl.constexpr, EXACT_P: tl.constexpr,
):  # fmt: skip
    GROUP: tl.constexpr = HEADS // KV_HEADS
    item = tl.program_id(0)
    kv_head = tl.program_id(1)
    tile = tl.load(items + item)
    if tile >= 0:  # else it fills the size of a graph
        split = tl.load(items + n_items + item)
        first_row, n_rows = tl.load(tiles + tile), tl.load(tiles + n_tiles + tile)
        sequence = tl.load(tiles + 2 * n_tiles + tile).to(tl.int64)
        pair, real, position = load_tile(positions, first_row, n_rows, kv_head, GROUP, M, HEADS)
        stop = tl.minimum((split + 1) * SPLIT, tl.max(position, 0) + 1)
        begin = tl.maximum(split * SPLIT, first_seen(position, real, WINDOW) // N * N)
        queries = load_queries(q, pair, real, D, D_BLOCK)
        highest, total, sums = attend(
            queries, position, keys, values, key_scales, value_scales, block_table + sequence * table_stride, kv_head,
            begin, stop, scale, KV_HEADS, D, D_BLOCK, M, N, PAGE, WINDOW, SOFTCAP, SCALED, DOT, EXACT_P,
        )  # fmt: skip
        m = (item.to(tl.int64) * KV_HEADS + kv_head) * M + tl.arange(0, M)
        d = tl.arange(0, D_BLOCK)
        tl.store(highest_out + m, highest)
        tl.store(total_out + m, total)
        tl.store(out + m[:, None] * D + d[None, :], sums, mask=real[:, None] & (d < D)[None, :])


@triton.jit(do_not_specialize=["n_tiles", "n_rows"])
def merge_kernel(
    out, highest_in, total_in, positions, tiles, rows, z, lse, n_tiles, n_rows,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, D_BLOCK: tl.constexpr, M: tl.constexpr,
    SPLIT: tl.constexpr, WINDOW: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    GROUP: tl.constexpr = HEADS // KV_HEADS
    index = tl.program_id(0)
    head = tl.program_id(1)
    row = tl.load(rows + index).to(tl.int64)
    if row >= 0:
        tile = tl.load(rows + n_rows + index)
        m = tl.load(rows + 2 * n_rows + index) * GROUP + head % GROUP
        first_item = tl.load(tiles + 3 * n_tiles + tile).to(tl.int64)
        position = tl.load(positions + row).to(tl.int32)
        last = position // SPLIT
        first = tl.maximum(position - WINDOW + 1, 0) // SPLIT if WINDOW > 0 else 0
        d = tl.arange(0, D_BLOCK)
        highest = tl.max(tl.full([AT_ONCE], float("-inf"), tl.float32), 0)
        total = tl.sum(tl.zeros([AT_ONCE], tl.float32), 0)
        sums = tl.zeros([D_BLOCK], tl.float32)
        for block in range(bound(first // AT_ONCE * AT_ONCE), bound(last + 1), AT_ONCE):
            split = block + tl.arange(0, AT_ONCE)
            there = (split >= first) & (split <= last)
            place = ((first_item + split) * KV_HEADS + head // GROUP) * M + m
            found = tl.load(highest_in + place, mask=there, other=float("-inf"))
            rising = tl.maximum(highest, tl.max(found, 0))
            base = tl.where(rising == float("-inf"), 0.0, rising)
            weights = tl.exp(found - base)
            keep = tl.exp(highest - base)
            total = total * keep + tl.sum(weights * tl.load(total_in + place, mask=there, other=0.0), 0)
            part = tl.load(out + place[:, None] * D + d[None, :], mask=there[:, None] & (d < D)[None, :], other=0.0)
            sums = sums * keep + tl.sum(weights[:, None] * part, 0)
            highest = rising
        pair = row * HEADS + head
        tl.store(z + pair * D + d, (sums / total).to(z.dtype.element_ty), mask=d < D)
        tl.store(lse + pair, highest + tl.log(total))


def split_attention(
    config: ModelConfig, layer: int, q: Tensor, batch: Batch, splits: Splits, pages: Pages, z: Tensor, lse: Tensor
) -> None:
    """Attend the rows of `splits`; writes their z [T, heads, d_head] and lse [T, heads]."""
    n_items, n_tiles, n_rows = splits.items.shape[1], splits.tiles.shape[1], splits.rows.shape[1]
    m = matrix_rows(config)
    partial = (n_items, config.n_kv_heads, m)
    out = q.new_empty(*partial, config.d_head, dtype=torch.float32)
    highest, total = (q.new_empty(partial, dtype=torch.float32) for _ in range(2))
    exact = q.dtype == torch.float32
    keys, values, key_scales, value_scales = stored(pages, layer)
    shape = {
        "HEADS": config.n_heads, "KV_HEADS": config.n_kv_heads, "D": config.d_head,
        "D_BLOCK": max(16, power_of_two(config.d_head)), "M": m, "SPLIT": SPLIT,
        "WINDOW": config.layers[layer].window or 0,
    }  # fmt: skip
    split_kernel[(n_items, config.n_kv_heads)](
        q, keys, values, key_scales, value_scales, batch.positions, batch.block_table, splits.tiles, splits.items,
        out, highest, total, n_tiles, n_items, batch.block_table.stride(0), config.scale, **shape,
        N=KEYS_AT_ONCE_FP32 if exact else KEYS_AT_ONCE, PAGE=pages.page_size,
        SOFTCAP=config.attention_softcap or 0.0, SCALED=key_scales is not None,
        DOT=multiplied_in(q.dtype), EXACT_P=exact, num_warps=4, num_stages=5 if config.d_head <= 128 else 3,
    )  # fmt: skip
    merge_kernel[(n_rows, config.n_heads)](
        out, highest, total, batch.positions, splits.tiles, splits.rows, z, lse, n_tiles, n_rows, **shape,
        AT_ONCE=MERGED_AT_ONCE, num_warps=4,
    )  # fmt: skip
