"""x W^T in tiles of a fixed number of rows.

BLAS libraries pick another kernel, with another order of additions, for every number of rows, so a row's bits would
depend on its neighbours. A product of always the same shape has no such choice to make. The last tile is filled with
zeros. Sizes measured on an AVX-512 + AMX machine (bench/linear.py): for bf16, 32 rows cost what one row costs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cutaway_server.kernels.weights import Matrix


def rows_per_tile(dtype: torch.dtype) -> int:
    """Rows of one product."""
    return 32 if dtype == torch.bfloat16 else 16


def linear(x: Tensor, weight: Matrix, bias: Tensor | None = None) -> Tensor:
    """X [T, in] times weight [out, in] transposed, plus bias: [T, out], in the weight's dtype (fp32 with a bias)."""
    assert isinstance(weight, Tensor), "the reference multiplies floats"
    tile = rows_per_tile(weight.dtype)
    n_rows = x.shape[0]
    padded = -(-n_rows // tile) * tile
    narrow = x.new_zeros((padded, x.shape[1]), dtype=weight.dtype)
    narrow[:n_rows] = x
    out = torch.empty((padded, weight.shape[0]), dtype=weight.dtype, device=x.device)
    for start in range(0, padded, tile):
        torch.mm(narrow[start : start + tile], weight.t(), out=out[start : start + tile])
    return out[:n_rows] if bias is None else out[:n_rows].float() + bias
