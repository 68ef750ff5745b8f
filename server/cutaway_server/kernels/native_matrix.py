"""Packed matrices as the native library sees them."""

from __future__ import annotations

import ctypes
from itertools import pairwise

import torch
from torch import Tensor

from cutaway_server.kernels.library import CMatrix, CShape, Library
from cutaway_server.kernels.packing import AnyPacked
from cutaway_server.kernels.packing_quantized import PackedQuantized, PackedStack


class NativeMatrix:
    """The struct of a packed matrix; what it points at lives as long as this."""

    def __init__(self, packed: AnyPacked) -> None:
        self.packed = packed
        self._following: list[NativeMatrix] = []
        if isinstance(packed, PackedStack):
            self.struct = self._stacked(packed)
            return
        self.struct = CMatrix(
            packed.data.data_ptr(), _at(packed.bias), packed.columns, packed.tiles, packed.depth, packed.padded_depth,
        )  # fmt: skip
        if isinstance(packed, PackedQuantized):
            self.struct.kind, self.struct.own = packed.kind, packed.tiles
            self.struct.scales, self.struct.parts = packed.scales.data_ptr(), _at(packed.parts)

    def _stacked(self, packed: PackedStack) -> CMatrix:
        """The first matrix, with the columns and bias of all, which leads to the others."""
        parts = [NativeMatrix(part) for part in packed.stacked]
        self._following = parts[1:]
        for part, following in pairwise(parts):
            part.struct.next = ctypes.addressof(following.struct)
        first = parts[0].struct
        first.columns, first.tiles, first.bias = packed.columns, packed.tiles, _at(packed.bias)
        return first


class NativeLinear:
    """A product with one packed matrix, alone: what benchmarks and tests ask for."""

    def __init__(
        self,
        library: Library,
        variant: str,
        packed: AnyPacked,
        *,
        dtype: torch.dtype = torch.bfloat16,
        threads: int = 1,
    ) -> None:
        self._matrix = NativeMatrix(packed)
        self._shape = CShape(bf16=dtype == torch.bfloat16, threads=threads)
        self._linear = library.operation(variant, "linear")

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """X fp32 [rows, depth] to [rows, columns], with the bias."""
        x = x.contiguous()
        out = x.new_empty(len(x), self._matrix.packed.columns) if out is None else out
        matrix = ctypes.addressof(self._matrix.struct)
        self._linear(ctypes.addressof(self._shape), matrix, len(x), x.data_ptr(), out.data_ptr())
        return out


def _at(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
