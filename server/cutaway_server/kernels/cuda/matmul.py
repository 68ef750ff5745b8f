"""A product whose rows do not know each other: x W^T with tiles, order along K and splits of K fixed by W's shape.

cuBLAS picks another algorithm for every number of rows. Here the same tile multiplies one row and a thousand.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cutaway_server.kernels.cuda.launch import bound, flat, multiplied_in

M, N, K = 64, 64, 64
PROGRAMS = 256  # that one tile of rows should have, to keep a device of 132 multiprocessors reading
LEAST_DEPTH = 1024  # of one split of K


@triton.jit(do_not_specialize=["rows"])
def matmul_kernel(
    x, weight, out, rows, columns, depth, split_depth,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    column_tile = tl.program_id(0)
    row_tile = tl.program_id(1)
    split = tl.program_id(2)
    row = row_tile * M + tl.arange(0, M)
    column = column_tile * N + tl.arange(0, N)
    inner = tl.arange(0, K)
    x_line = x + row[:, None].to(tl.int64) * depth
    weight_line = weight + column[None, :].to(tl.int64) * depth
    sums = tl.zeros([M, N], tl.float32)
    stop = tl.minimum((split + 1) * split_depth, depth)
    for start in range(bound(split * split_depth), bound(stop), K):
        k = start + inner
        a = tl.load(x_line + k[None, :], mask=(row < rows)[:, None] & (k < depth)[None, :], other=0.0)
        b = tl.load(weight_line + k[:, None], mask=(column < columns)[None, :] & (k < depth)[:, None], other=0.0)
        sums = tl.dot(a.to(DOT), b.to(DOT), sums, input_precision="ieee")
    place = (split.to(tl.int64) * rows + row[:, None]) * columns + column[None, :]
    tl.store(out + place, sums.to(out.dtype.element_ty), mask=(row < rows)[:, None] & (column < columns)[None, :])


@triton.jit(do_not_specialize=["size"])
def sum_kernel(parts, out, size, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    total = tl.load(parts + place, mask=inside, other=0.0)
    for split in tl.static_range(1, SPLITS):
        total = total + tl.load(parts + split * size + place, mask=inside, other=0.0)
    tl.store(out + place, total.to(out.dtype.element_ty), mask=inside)


def n_splits(columns: int, depth: int) -> int:
    """Splits of K: a power of two that follows from the weight's shape alone."""
    splits = 1
    while splits < 8 and splits * triton.cdiv(columns, N) < PROGRAMS and depth // (2 * splits) >= LEAST_DEPTH:
        splits *= 2
    return splits


def matmul(x: Tensor, weight: Tensor) -> Tensor:
    """X [T, in] times weight [out, in] transposed: [T, out] in the weight's dtype."""
    x, weight = flat(x.to(weight.dtype)), flat(weight)
    (rows, depth), columns = x.shape, weight.shape[0]
    splits = n_splits(columns, depth)
    out = x.new_empty(rows, columns)
    if not rows:
        return out
    parts = out if splits == 1 else x.new_empty(splits, rows, columns, dtype=torch.float32)
    split_depth = triton.cdiv(triton.cdiv(depth, splits), K) * K
    matmul_kernel[(triton.cdiv(columns, N), triton.cdiv(rows, M), splits)](
        x, weight, parts, rows, columns, depth, split_depth, M=M, N=N, K=K, DOT=multiplied_in(x.dtype), num_warps=4,
        num_stages=4,
    )  # fmt: skip
    if splits > 1:
        sum_kernel[(triton.cdiv(out.numel(), 1024),)](parts, out, out.numel(), SPLITS=splits, BLOCK=1024, num_warps=4)
    return out
