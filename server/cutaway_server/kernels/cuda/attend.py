"""The queries of one tile over a range of keys: one loop, used by both kinds of attention.

A tile is up to TILE successive rows of one sequence with the query heads that share a key and value head: the matrix
row m is query m // GROUP and head m % GROUP, so keys are read once for all of them. Blocks that a row does not see
leave its sums as they are, to the bit, whatever else the tile holds.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cutaway_server.kernels.cuda.activation import tanh
from cutaway_server.kernels.cuda.launch import bound


@triton.jit
def load_tile(
    positions, first_row, n_rows, kv_head,
    GROUP: tl.constexpr, M: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Of each matrix row: its (row, head) pair as one index, whether there is one, and its position."""
    m = tl.arange(0, M)
    query = m // GROUP
    real = query < n_rows
    row = first_row + query
    position = tl.load(positions + row, mask=real, other=-1).to(tl.int32)
    return row.to(tl.int64) * HEADS + kv_head * GROUP + m % GROUP, real, position


@triton.jit
def load_queries(q, pair, real, D: tl.constexpr, D_BLOCK: tl.constexpr):
    """Queries [M, D_BLOCK], zero where there is none."""
    d = tl.arange(0, D_BLOCK)
    return tl.load(q + pair[:, None] * D + d[None, :], mask=real[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def attend(
    queries, position, keys, values, key_scales, value_scales, table, kv_head, begin, stop, scale,
    KV_HEADS: tl.constexpr, D: tl.constexpr, D_BLOCK: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    PAGE: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, SCALED: tl.constexpr, DOT: tl.constexpr,
    EXACT_P: tl.constexpr,
):  # fmt: skip
    """Softmax over the keys [begin, stop) of one sequence, not yet divided: highest score, sum, weighted values.

    `table` points at the sequence's pages. Keys a row must not see weigh nothing; what is not stored is never read.
    """
    d = tl.arange(0, D_BLOCK)
    highest = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    out = tl.zeros([M, D_BLOCK], tl.float32)
    for block in range(bound(begin), bound(stop), N):
        key = block + tl.arange(0, N)
        there = key < stop
        page = tl.load(table + key // PAGE, mask=there, other=0).to(tl.int64)
        line = (page * KV_HEADS + kv_head) * PAGE + key % PAGE
        k = tl.load(keys + line[None, :] * D + d[:, None], mask=there[None, :] & (d < D)[:, None], other=0.0)
        scores = tl.dot(queries.to(DOT), k.to(DOT), input_precision="ieee") * scale
        if SCALED:
            scores = scores * tl.load(key_scales + line, mask=there, other=0.0)[None, :]
        if SOFTCAP > 0.0:
            scores = SOFTCAP * tanh(scores / SOFTCAP)
        seen = there[None, :] & (key[None, :] <= position[:, None])
        if WINDOW > 0:
            seen = seen & (key[None, :] > position[:, None] - WINDOW)
        scores = tl.where(seen, scores, float("-inf"))
        rising = tl.maximum(highest, tl.max(scores, 1))
        base = tl.where(rising == float("-inf"), 0.0, rising)  # a row that sees none of these keys
        weights = tl.exp(scores - base[:, None])
        keep = tl.exp(highest - base)
        total = total * keep + tl.sum(weights, 1)
        v = tl.load(values + line[:, None] * D + d[None, :], mask=there[:, None] & (d < D)[None, :], other=0.0)
        if SCALED:
            weights = weights * tl.load(value_scales + line, mask=there, other=0.0)[None, :]
        if not EXACT_P:
            weights = weights.to(queries.dtype)
        out = tl.dot(weights.to(DOT), v.to(DOT), out * keep[:, None], input_precision="ieee")
        highest = rising
    return highest, total, out


@triton.jit
def first_seen(position, real, WINDOW: tl.constexpr):
    """The first key that any row of a tile sees."""
    if WINDOW > 0:
        oldest = tl.min(tl.where(real, position, 2147483647), 0)
        first = tl.maximum(oldest - WINDOW + 1, 0)
    else:
        first = 0
    return first
