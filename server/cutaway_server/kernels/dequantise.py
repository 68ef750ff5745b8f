"""Quantised weights as floats: what the reference kernels multiply with."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from cutaway_server.kernels.quantized import Kind, Quantized
from cutaway_server.kernels.rounding import Rounded, Rounding
from cutaway_server.kernels.weights import LayerWeights, Matrix, Weights


def dequantised(weights: Weights, dtype: torch.dtype, rounding: Rounding) -> Weights:
    """The same weights with every matrix in `dtype`, holding what quantised or rounded ones stand for."""

    def plain(matrix: Matrix, kind: Kind | None) -> Tensor:
        if isinstance(matrix, Quantized):
            return matrix.values(dtype)
        return matrix if kind is None else Rounded(matrix, kind).values(dtype)

    def layer(w: LayerWeights) -> LayerWeights:
        return replace(
            w, qkv=plain(w.qkv, rounding.layers), attention_out=plain(w.attention_out, rounding.layers),
            mlp_in=plain(w.mlp_in, rounding.layers), mlp_out=plain(w.mlp_out, rounding.layers),
        )  # fmt: skip

    unembed = plain(weights.unembed, rounding.unembed)
    embed = unembed if weights.embed is weights.unembed else plain(weights.embed, None)
    return replace(weights, embed=embed, unembed=unembed, layers=tuple(map(layer, weights.layers)))
