"""A model's weights read back, whatever its kernels have made of them: rows of each matrix, biases and norms, in fp32.

Matrices are out-features first, as `LayerWeights` has them. Weights that were rounded are read as they are served.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from cutaway_server.kernels.packing import BLOCK, AnyPacked
from cutaway_server.kernels.packing_quantized import PackedStack
from cutaway_server.kernels.quantized import Quantized
from cutaway_server.kernels.weights import LayerWeights, Norm, Weights

LayerMatrix = Literal["qkv", "attention_out", "mlp_in", "mlp_out"]
LayerNorm = Literal["norm1", "norm1_post", "norm2", "norm2_post", "q_norm", "k_norm"]
Outer = Literal["embed", "unembed"]

ROWS_AT_ONCE = 1024


class WeightReader(Protocol):
    """Reads from any thread; nothing is ever written."""

    final_norm: Norm

    def outer(self, name: Outer, rows: Tensor) -> Tensor:
        """Rows [n, d_model] of the embedding or the unembedding."""

    def positions(self, rows: Tensor) -> Tensor | None:
        """Rows [n, d_model] of learned positions; None: there are none."""

    def rows(self, name: LayerMatrix, layer: int, rows: Tensor) -> Tensor:
        """Rows [n, depth] of a layer's matrix."""

    def bias(self, name: LayerMatrix, layer: int) -> Tensor | None:
        """Its bias, as long as it has rows; None: it has none."""

    def norm(self, name: LayerNorm, layer: int) -> Norm | None:
        """A norm of a layer; None: it has none."""


class HeldWeights:
    """Reads weights that are still as they were loaded."""

    def __init__(self, weights: Weights) -> None:
        self._weights = weights
        self.final_norm = weights.final_norm

    def outer(self, name: Outer, rows: Tensor) -> Tensor:
        """Rows of the embedding or the unembedding."""
        return _taken(getattr(self._weights, name), rows)

    def positions(self, rows: Tensor) -> Tensor | None:
        """Rows of learned positions."""
        return None if self._weights.positions is None else _taken(self._weights.positions, rows)

    def rows(self, name: LayerMatrix, layer: int, rows: Tensor) -> Tensor:
        """Rows of a layer's matrix."""
        return _taken(getattr(self._weights.layers[layer], name), rows)

    def bias(self, name: LayerMatrix, layer: int) -> Tensor | None:
        """Its bias."""
        found: Tensor | None = getattr(self._weights.layers[layer], f"{name}_bias")
        return found

    def norm(self, name: LayerNorm, layer: int) -> Norm | None:
        """A norm of a layer."""
        found: Norm | None = getattr(self._weights.layers[layer], name)
        return found


@dataclass(frozen=True, slots=True)
class PackedLayer:
    """One layer's matrices as the native products read them; norms as they were loaded."""

    qkv: AnyPacked
    attention_out: AnyPacked
    mlp_in: AnyPacked  # blocks of gate and up in turn, where there is a gate
    mlp_out: AnyPacked
    norms: dict[str, Norm | None]
    mlp_rows: int | None  # of the gate; None: there is none


def packed_layer(
    matrices: tuple[AnyPacked, AnyPacked, AnyPacked, AnyPacked], weights: LayerWeights, gate: int | None
) -> PackedLayer:
    """A layer's matrices, in the order of `LayerWeights`, with the norms it was loaded with."""
    norms = {name: getattr(weights, name) for name in LayerNorm.__args__}  # type: ignore[attr-defined]
    return PackedLayer(*matrices, norms, gate)


class PackedWeights:
    """Reads weights that were packed for the native library."""

    def __init__(
        self, layers: Sequence[PackedLayer], embed: AnyPacked | Tensor | Quantized, unembed: AnyPacked,
        positions: Tensor | None, final_norm: Norm,
    ) -> None:  # fmt: skip
        self._layers, self._embed, self._unembed, self._positions = layers, embed, unembed, positions
        self.final_norm = final_norm

    def outer(self, name: Outer, rows: Tensor) -> Tensor:
        """Rows of the embedding or the unembedding."""
        return _taken(self._embed if name == "embed" else self._unembed, rows)

    def positions(self, rows: Tensor) -> Tensor | None:
        """Rows of learned positions."""
        return None if self._positions is None else _taken(self._positions, rows)

    def rows(self, name: LayerMatrix, layer: int, rows: Tensor) -> Tensor:
        """Rows of a layer's matrix."""
        return _taken(getattr(self._layers[layer], name), self._place(name, layer, rows))

    def bias(self, name: LayerMatrix, layer: int) -> Tensor | None:
        """Its bias, without padding."""
        here = self._layers[layer]
        packed: AnyPacked = getattr(here, name)
        if packed.bias is None:
            return None
        n_rows = 2 * here.mlp_rows if name == "mlp_in" and here.mlp_rows is not None else packed.columns
        return packed.bias[self._place(name, layer, torch.arange(n_rows))]

    def norm(self, name: LayerNorm, layer: int) -> Norm | None:
        """A norm of a layer."""
        return self._layers[layer].norms[name]

    def _place(self, name: LayerMatrix, layer: int, rows: Tensor) -> Tensor:
        """Where rows are after packing: gate and up lie in turn, by blocks."""
        gate = self._layers[layer].mlp_rows
        if name != "mlp_in" or gate is None:
            return rows
        up = (rows >= gate).long()
        within = rows - up * gate
        return (2 * (within // BLOCK) + up) * BLOCK + within % BLOCK


def _taken(matrix: AnyPacked | Tensor | Quantized, rows: Tensor) -> Tensor:
    if isinstance(matrix, Tensor):
        return matrix[rows.to(matrix.device)].float()
    if isinstance(matrix, PackedStack):
        return _from_stack(matrix, rows)
    return matrix.rows(rows).float()


def _from_stack(stack: PackedStack, rows: Tensor) -> Tensor:
    out = torch.empty(len(rows), stack.stacked[0].depth)
    offset = 0
    for part in stack.stacked:
        mine = (rows >= offset) & (rows < offset + part.columns)
        out[mine] = part.rows(rows[mine] - offset)
        offset += part.columns
    return out


def times(reader: WeightReader, name: LayerMatrix, layer: int, vector: Tensor) -> Tensor:
    """A vector [rows of the matrix] times a layer's matrix: [depth], a few rows at a time."""
    total = None
    for start in range(0, len(vector), ROWS_AT_ONCE):
        some = vector[start : start + ROWS_AT_ONCE]
        part = some @ reader.rows(name, layer, torch.arange(start, start + len(some)))
        total = part if total is None else total + part
    assert total is not None
    return total
