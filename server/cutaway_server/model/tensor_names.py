"""What the tensors of Hugging Face checkpoints are called, and where they go in `Weights`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from cutaway_server.model.json_file import Fields
from cutaway_server.model.layout import Layout, Piece

UNEMBED = "lm_head.weight"


@dataclass(frozen=True, slots=True)
class TensorNames:
    """The modules of one family. Keys of `matrices` and `norms` are those of `LayerWeights`; values, modules.

    `biases`: which matrices have one, and the flag of config.json that says so (None: they always have).
    """

    matrices: Mapping[str, tuple[str, ...]]
    norms: Mapping[str, str]
    biases: Mapping[str, str | None] = field(default_factory=dict)
    prefix: str = "model."  # of all but the unembedding; a checkpoint of the bare network leaves it out
    layers: str = "layers"
    embed: str = "embed_tokens"
    positions: str | None = None
    final_norm: str = "norm"
    transposed: bool = False  # matrices are stored [in, out]
    norm_bias: bool = False
    norm_add: float = 0.0
    ignored: str = r"\.rotary_emb\.inv_freq$"  # tensors that carry nothing

    def layout(self, fields: Fields, n_layers: int, present: frozenset[str]) -> Layout:
        """Where each weight lies, in a checkpoint that has the tensors `present`."""
        prefix = self._prefix(present)
        layout: dict[str, tuple[Piece, ...]] = {"embed": (Piece(f"{prefix}{self.embed}.weight"),)}
        if self.positions is not None:
            layout["positions"] = (Piece(f"{prefix}{self.positions}.weight"),)
        for layer in range(n_layers):
            modules = f"{prefix}{self.layers}.{layer}."
            layout.update(self._matrices(f"layers.{layer}.", modules, fields))
            for ours, theirs in self.norms.items():
                layout.update(self._norm(f"layers.{layer}.{ours}", modules + theirs))
        layout.update(self._norm("final_norm", prefix + self.final_norm))
        if UNEMBED in present or not fields.flag("tie_word_embeddings"):
            layout["unembed"] = (Piece(UNEMBED),)
        return layout

    def ignore(self, present: frozenset[str]) -> frozenset[str]:
        """Those of the tensors `present` that carry nothing."""
        return frozenset(name for name in present if re.search(self.ignored, name))

    def _prefix(self, present: frozenset[str]) -> str:
        return self.prefix if any(name.startswith(self.prefix) for name in present) else ""

    def _matrices(self, path: str, modules: str, fields: Fields) -> Layout:
        layout: dict[str, tuple[Piece, ...]] = {}
        for ours, theirs in self.matrices.items():
            weights = tuple(Piece(f"{modules}{module}.weight", transpose=self.transposed) for module in theirs)
            layout[path + ours] = weights
            if ours in self.biases and ((flag := self.biases[ours]) is None or fields.flag(flag)):
                layout[f"{path}{ours}_bias"] = tuple(Piece(f"{modules}{module}.bias") for module in theirs)
        return layout

    def _norm(self, path: str, module: str) -> Layout:
        layout = {f"{path}.gain": (Piece(f"{module}.weight", add=self.norm_add),)}
        if self.norm_bias:
            layout[f"{path}.bias"] = (Piece(f"{module}.bias"),)
        return layout


_ALL_ATTENTION: dict[str, str | None] = {"qkv": "attention_bias", "attention_out": "attention_bias"}
_QK_NORMS = {"q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"}

LLAMA = TensorNames(
    matrices={
        "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "attention_out": ("self_attn.o_proj",),
        "mlp_in": ("mlp.gate_proj", "mlp.up_proj"),
        "mlp_out": ("mlp.down_proj",),
    },
    norms={"norm1": "input_layernorm", "norm2": "post_attention_layernorm"},
    biases={**_ALL_ATTENTION, "mlp_in": "mlp_bias", "mlp_out": "mlp_bias"},
)
MISTRAL = replace(LLAMA, biases={})
QWEN2 = replace(LLAMA, biases={"qkv": None})
QWEN3 = replace(LLAMA, biases=_ALL_ATTENTION, norms={**LLAMA.norms, **_QK_NORMS})
GEMMA2 = replace(
    LLAMA,
    biases=_ALL_ATTENTION,
    norms={
        "norm1": "input_layernorm",
        "norm1_post": "post_attention_layernorm",
        "norm2": "pre_feedforward_layernorm",
        "norm2_post": "post_feedforward_layernorm",
    },
    norm_add=1.0,
)
GEMMA3 = replace(GEMMA2, norms={**GEMMA2.norms, **_QK_NORMS})
PHI3 = replace(MISTRAL, matrices={**LLAMA.matrices, "qkv": ("self_attn.qkv_proj",), "mlp_in": ("mlp.gate_up_proj",)})
OLMO2 = replace(
    LLAMA,
    biases=_ALL_ATTENTION,
    norms={"norm1_post": "post_attention_layernorm", "norm2_post": "post_feedforward_layernorm", **_QK_NORMS},
)
GPT2 = TensorNames(
    matrices={
        "qkv": ("attn.c_attn",),
        "attention_out": ("attn.c_proj",),
        "mlp_in": ("mlp.c_fc",),
        "mlp_out": ("mlp.c_proj",),
    },
    norms={"norm1": "ln_1", "norm2": "ln_2"},
    biases={"qkv": None, "attention_out": None, "mlp_in": None, "mlp_out": None},
    prefix="transformer.",
    layers="h",
    embed="wte",
    positions="wpe",
    final_norm="ln_f",
    transposed=True,
    norm_bias=True,
    ignored=r"\.attn\.(bias|masked_bias)$",  # the causal mask
)
