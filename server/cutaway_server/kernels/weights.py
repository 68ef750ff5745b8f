"""The tensors of a model, as the operations take them: out-features first, query-key-value and gate-up joined.

Matrices are in the served dtype, or quantised as the checkpoint has them; norm gains and biases are in fp32. Nothing is
folded or centred (gains of Gemma, stored as w, are here as 1 + w, which is what they multiply by).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn import functional as F

from cutaway_server.kernels.quantized import Blocks, Quantized

Matrix = Tensor | Quantized


@dataclass(frozen=True, slots=True)
class Norm:
    """RMSNorm's gain, or LayerNorm's gain and bias, fp32 [width]."""

    gain: Tensor
    bias: Tensor | None = None


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer. H query heads, K key/value heads, D d_head, M d_model, F d_mlp."""

    qkv: Matrix  # [(H + 2K) * D, M]: W_Q, W_K, W_V one below the other
    attention_out: Matrix  # [M, H * D]
    mlp_in: Matrix  # [2F, M] (gate, then up) if gated, else [F, M]
    mlp_out: Matrix  # [M, F]
    qkv_bias: Tensor | None = None  # fp32 [(H + 2K) * D]
    attention_out_bias: Tensor | None = None  # fp32 [M]
    mlp_in_bias: Tensor | None = None
    mlp_out_bias: Tensor | None = None
    norm1: Norm | None = None  # before attention
    norm1_post: Norm | None = None  # of what attention adds
    norm2: Norm | None = None  # before the MLP
    norm2_post: Norm | None = None  # of what the MLP adds
    q_norm: Norm | None = None  # [D] per head, or [H * D]
    k_norm: Norm | None = None  # [D] per head, or [K * D]


@dataclass(frozen=True, slots=True)
class Weights:
    """The whole model."""

    embed: Matrix  # [vocab, M]
    layers: tuple[LayerWeights, ...]
    final_norm: Norm
    unembed: Matrix  # [vocab, M]; the same object as `embed` where they are tied
    positions: Tensor | None = None  # [max_context, M], learned positions

    def matrices(self) -> Iterator[Matrix]:
        """Every matrix of a product, and the embedding, once."""
        for layer in self.layers:
            yield from (layer.qkv, layer.attention_out, layer.mlp_in, layer.mlp_out)
        yield self.unembed
        if self.embed is not self.unembed:
            yield self.embed

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor once (tied ones are one), of quantised matrices their blocks."""
        return (part if isinstance(part, Tensor) else part.raw for part in self._parts())

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self.final_norm.gain.device

    @property
    def n_parameters(self) -> int:
        """Parameters, tied ones counted once."""
        return sum(p.numel() if isinstance(p, Tensor) else len(p.raw) * p.depth for p in self._parts())

    @property
    def n_bytes(self) -> int:
        """Bytes resident."""
        return sum(t.numel() * t.element_size() for t in self.tensors())

    def _parts(self) -> Iterator[Tensor | Blocks]:
        seen: set[int] = set()
        for part in _parts(self):
            if id(part) not in seen:
                seen.add(id(part))
                yield part


def embedding(ids: Tensor, embed: Matrix) -> Tensor:
    """Rows [n, M] of an embedding."""
    return embed.rows(ids) if isinstance(embed, Quantized) else F.embedding(ids, embed)


def served_dtype(weights: Weights) -> torch.dtype | None:
    """The dtype of its float matrices; None if all are quantised."""
    return next((matrix.dtype for matrix in weights.matrices() if isinstance(matrix, Tensor)), None)


def _parts(part: object) -> Iterator[Tensor | Blocks]:
    if isinstance(part, Tensor | Blocks):
        yield part
    elif isinstance(part, Quantized):
        yield from part.parts
    elif isinstance(part, tuple):
        for item in part:
            yield from _parts(item)
    elif isinstance(part, Weights | LayerWeights | Norm):
        for field in fields(part):
            yield from _parts(getattr(part, field.name))
