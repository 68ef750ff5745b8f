"""The shape of a transformer: one frozen config describes Llama, Qwen, Gemma, GPT-2, Phi-3 and OLMo-2 alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How rotary frequencies are stretched past the trained context (names as in Hugging Face's `rope_type`).

    `factors` (one per rotated pair) divide the frequencies directly, as GGUF's `rope_freqs` tensor does.
    """

    kind: Literal["linear", "llama3", "yarn", "ntk", "factors"]
    factor: float = 1.0
    original_context: int = 0
    low_frequency_factor: float = 1.0  # llama3
    high_frequency_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float | None = None  # yarn: multiplies cos and sin; None: 0.1 ln(factor) + 1
    mscale: float | None = None  # yarn
    mscale_all_dim: float | None = None  # yarn
    truncate: bool = True  # yarn: round the correction range to whole dimensions
    factors: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary position embedding (Su et al. 2021) of the first `dims` of each head's dimensions.

    `interleaved` rotates pairs (2i, 2i+1), as GPT-J does; otherwise (i, i + dims/2), as GPT-NeoX does.
    """

    theta: float
    dims: int
    interleaved: bool = False
    scaling: RopeScaling | None = None


@dataclass(frozen=True, slots=True)
class LayerConfig:
    """What differs from layer to layer: the sliding window (None: full attention) and the rotation."""

    window: int | None = None  # a query at p sees keys in (p - window, p]
    rope: Rope | None = None


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The network. Every size is in elements; `max_context` is what the positions were trained or scaled for."""

    family: str
    d_model: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_mlp: int
    d_vocab: int
    max_context: int
    layers: tuple[LayerConfig, ...]
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-5
    pre_norm: bool = True  # norm what attention and MLP read
    post_norm: bool = False  # norm what they add to the residual
    qk_norm: Literal["none", "head", "full"] = "none"  # over each head, or over all heads together (OLMo-2)
    activation: Literal["silu", "gelu", "gelu_tanh", "relu"] = "silu"
    gated: bool = True  # act(gate) * up, rather than act(in)
    learned_positions: bool = False
    embed_scale: float = 1.0  # multiplies token embeddings (Gemma)
    attention_scale: float | None = None  # multiplies q.k; None: d_head ** -0.5
    attention_softcap: float | None = None  # c * tanh(score / c), before the mask
    logit_softcap: float | None = None
    tied_embeddings: bool = False

    @property
    def n_layers(self) -> int:
        """Number of layers."""
        return len(self.layers)

    @property
    def scale(self) -> float:
        """What multiplies q.k."""
        return self.d_head**-0.5 if self.attention_scale is None else self.attention_scale

    @property
    def group(self) -> int:
        """Query heads that share one key and value head."""
        return self.n_heads // self.n_kv_heads

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Each layer's sliding window."""
        return tuple(layer.window for layer in self.layers)
