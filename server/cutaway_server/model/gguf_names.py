"""What llama.cpp calls each weight: one table for all families, and what is there decides."""

from __future__ import annotations

from collections.abc import Mapping

from cutaway_server.architecture import ModelConfig
from cutaway_server.errors import ModelError
from cutaway_server.model.gguf_families import ROPE_FACTORS
from cutaway_server.model.layout import Layout, Piece

IGNORED = frozenset({ROPE_FACTORS})  # read into the config

SEPARATE = {
    "qkv": ("attn_q", "attn_k", "attn_v"),
    "attention_out": ("attn_output",),
    "mlp_in": ("ffn_gate", "ffn_up"),
    "mlp_out": ("ffn_down",),
}
JOINED = {"qkv": ("attn_qkv",), "mlp_in": ("ffn_up",)}  # Phi-3 and GPT-2
PRE_NORMS = {"norm1": "attn_norm", "norm2": "ffn_norm"}
POST_NORMS = {"norm1_post": "post_attention_norm", "norm2_post": "post_ffw_norm"}
QK_NORMS = {"q_norm": "attn_q_norm", "k_norm": "attn_k_norm"}
PERMUTED = frozenset({"llama"})  # families whose Q and K llama.cpp stores for interleaved rotation


def read_layout(config: ModelConfig, present: frozenset[str]) -> Layout:
    """Where each weight of `config` lies in a GGUF file with the tensors `present`."""
    layout: dict[str, tuple[Piece, ...]] = {"embed": (Piece("token_embd.weight"),)}
    if not config.tied_embeddings:
        layout["unembed"] = (Piece("output.weight"),)
    if config.learned_positions:
        layout["positions"] = (Piece("position_embd.weight"),)
    layout |= _norms(config, "final_norm", "output_norm")
    for number in range(config.n_layers):
        layout |= _layer(config, number, present)
    return layout


def _layer(config: ModelConfig, number: int, present: frozenset[str]) -> dict[str, tuple[Piece, ...]]:
    ours, theirs = f"layers.{number}.", f"blk.{number}."
    layer: dict[str, tuple[Piece, ...]] = {}
    for path, names in SEPARATE.items():
        if path in JOINED and f"{theirs}{names[0]}.weight" not in present:
            names = JOINED[path]
        layer[ours + path] = tuple(_piece(config, f"{theirs}{name}", "weight") for name in names)
        biased = [f"{theirs}{name}.bias" in present for name in names]
        if any(biased) and not all(biased):
            raise ModelError(f"layer {number}: of {', '.join(names)} some have a bias and some do not")
        if all(biased):
            layer[f"{ours}{path}_bias"] = tuple(_piece(config, f"{theirs}{name}", "bias") for name in names)
    for path, name in _layer_norms(config).items():
        layer |= _norms(config, ours + path, theirs + name)
    return layer


def _piece(config: ModelConfig, name: str, kind: str) -> Piece:
    permuted = config.family in PERMUTED and name.endswith((".attn_q", ".attn_k"))
    return Piece(f"{name}.{kind}", head_width=config.d_head if permuted else None)


def _layer_norms(config: ModelConfig) -> Mapping[str, str]:
    norms = dict(PRE_NORMS) if config.pre_norm else {}
    if config.post_norm:
        norms |= POST_NORMS
    return norms if config.qk_norm == "none" else norms | QK_NORMS


def _norms(config: ModelConfig, path: str, name: str) -> dict[str, tuple[Piece, ...]]:
    norm: dict[str, tuple[Piece, ...]] = {f"{path}.gain": (Piece(f"{name}.weight"),)}
    if config.norm == "layer":
        norm[f"{path}.bias"] = (Piece(f"{name}.bias"),)
    return norm
