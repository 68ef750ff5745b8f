"""The tensors of a model, as the operations take them: out-features first, query-key-value and gate-up joined.

Matrices are in the served dtype, norm gains and biases in fp32. Nothing is folded or centred (gains of Gemma, stored
as w, are here as 1 + w, which is what they multiply by).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Norm:
    """RMSNorm's gain, or LayerNorm's gain and bias, fp32 [width]."""

    gain: Tensor
    bias: Tensor | None = None


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer. H query heads, K key/value heads, D d_head, M d_model, F d_mlp."""

    qkv: Tensor  # [(H + 2K) * D, M]: W_Q, W_K, W_V one below the other
    attention_out: Tensor  # [M, H * D]
    mlp_in: Tensor  # [2F, M] (gate, then up) if gated, else [F, M]
    mlp_out: Tensor  # [M, F]
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

    embed: Tensor  # [vocab, M]
    layers: tuple[LayerWeights, ...]
    final_norm: Norm
    unembed: Tensor  # [vocab, M]; the same tensor as `embed` where they are tied
    positions: Tensor | None = None  # [max_context, M], learned positions

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor once (tied ones are one)."""
        seen: set[int] = set()
        for tensor in _tensors(self):
            if id(tensor) not in seen:
                seen.add(id(tensor))
                yield tensor

    @property
    def n_parameters(self) -> int:
        """Parameters, tied ones counted once."""
        return sum(t.numel() for t in self.tensors())

    @property
    def n_bytes(self) -> int:
        """Bytes resident."""
        return sum(t.numel() * t.element_size() for t in self.tensors())


def _tensors(part: object) -> Iterator[Tensor]:
    if isinstance(part, Tensor):
        yield part
    elif isinstance(part, tuple):
        for item in part:
            yield from _tensors(item)
    elif isinstance(part, Weights | LayerWeights | Norm):
        for field in fields(part):
            yield from _tensors(getattr(part, field.name))
