"""What launching a kernel needs to know: sizes that are powers of two, and whether Triton interprets."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Contracting a * b + c into one instruction is the compiler's choice, made anew for each variant of a kernel. Without
# it a fused operation and its open form agree bit for bit. Products of matrices are not concerned.
EXACT = {"enable_fp_fusion": False}


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors."""
    return bool(triton.knobs.runtime.interpret)


def multiplied_in(dtype: torch.dtype) -> tl.dtype:
    """What operands of a product are cast to. The interpreter multiplies bfloat16 by its bits, so it gets fp32."""
    if interpreting() or dtype == torch.float32:
        return tl.float32
    return tl.bfloat16 if dtype == torch.bfloat16 else tl.float16


def power_of_two(n: int) -> int:
    """The least power of two that is n or more."""
    return 1 << (n - 1).bit_length()


def warps(elements: int) -> int:
    """Warps for a program that holds this many elements of one row."""
    return 4 if elements <= 2048 else 8 if elements <= 8192 else 16


def flat(x: Tensor) -> Tensor:
    """The same values, contiguous."""
    return x if x.is_contiguous() else x.contiguous()


def _as_int(x: Any) -> int:
    return int(x.handle.data.item()) if isinstance(x, tl.tensor) else int(x)


@triton.jit
def _unchanged(x):
    return x


# A loop's bound. The interpreter of Triton makes integers of arrays with one element, which numpy 2.4 refuses.
bound = _as_int if interpreting() else _unchanged
