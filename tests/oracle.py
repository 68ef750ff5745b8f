"""A naive dense transformer: one sequence, one head at a time, float64, no cache. Shares no code with the kernels."""

from __future__ import annotations

import math

import torch
from cutaway_server.architecture import ModelConfig, Rope
from cutaway_server.kernels.weights import LayerWeights, Norm, Weights
from torch import Tensor


def dense_logits(config: ModelConfig, weights: Weights, token_ids: list[int]) -> Tensor:
    """Logits float64 [n, vocab] of one sequence."""
    x = weights.embed[token_ids].double() * config.embed_scale
    if weights.positions is not None:
        x = x + weights.positions[: len(token_ids)].double()
    for i, layer in enumerate(weights.layers):
        x = x + _post(config, _attention(config, i, layer, _pre(config, x, layer.norm1)), layer.norm1_post)
        x = x + _post(config, _mlp(config, layer, _pre(config, x, layer.norm2)), layer.norm2_post)
    return _cap(_norm(config, x, weights.final_norm) @ weights.unembed.double().T, config.logit_softcap)


def _attention(config: ModelConfig, i: int, layer: LayerWeights, x: Tensor) -> Tensor:
    n, width = len(x), config.d_head
    joined = x @ layer.qkv.double().T + (0 if layer.qkv_bias is None else layer.qkv_bias.double())
    q_width, kv_width = config.n_heads * width, config.n_kv_heads * width
    q, k, v = joined[:, :q_width], joined[:, q_width : q_width + kv_width], joined[:, q_width + kv_width :]
    if config.qk_norm == "full":
        q, k = _norm(config, q, layer.q_norm), _norm(config, k, layer.k_norm)
    heads = []
    for head in range(config.n_heads):
        kv = head // (config.n_heads // config.n_kv_heads)
        qh = q[:, head * width : (head + 1) * width]
        kh, vh = k[:, kv * width : (kv + 1) * width], v[:, kv * width : (kv + 1) * width]
        if config.qk_norm == "head":
            qh, kh = _norm(config, qh, layer.q_norm), _norm(config, kh, layer.k_norm)
        rope = config.layers[i].rope
        if rope is not None:
            qh, kh = _rotated(rope, qh), _rotated(rope, kh)
        scale = width**-0.5 if config.attention_scale is None else config.attention_scale
        scores = _cap(qh @ kh.T * scale, config.attention_softcap)
        for query in range(n):
            for key in range(n):
                window = config.layers[i].window
                if key > query or (window is not None and key <= query - window):
                    scores[query, key] = -math.inf
        heads.append(torch.softmax(scores, -1) @ vh)
    out = torch.cat(heads, -1) @ layer.attention_out.double().T
    return out + (0 if layer.attention_out_bias is None else layer.attention_out_bias.double())


def _rotated(rope: Rope, x: Tensor) -> Tensor:
    """Turn pairs as complex numbers; unscaled rotations only."""
    assert rope.scaling is None
    out = x.clone()
    for pair in range(rope.dims // 2):
        a, b = (2 * pair, 2 * pair + 1) if rope.interleaved else (pair, pair + rope.dims // 2)
        angles = torch.arange(len(x)).double() * rope.theta ** (-2 * pair / rope.dims)
        turned = torch.complex(x[:, a], x[:, b]) * torch.polar(torch.ones_like(angles), angles)
        out[:, a], out[:, b] = turned.real, turned.imag
    return out


def _mlp(config: ModelConfig, layer: LayerWeights, x: Tensor) -> Tensor:
    h = x @ layer.mlp_in.double().T + (0 if layer.mlp_in_bias is None else layer.mlp_in_bias.double())
    if config.gated:
        gate, up = h[:, : config.d_mlp], h[:, config.d_mlp :]
        h = _activation(config, gate) * up
    else:
        h = _activation(config, h)
    return h @ layer.mlp_out.double().T + (0 if layer.mlp_out_bias is None else layer.mlp_out_bias.double())


def _activation(config: ModelConfig, x: Tensor) -> Tensor:
    if config.activation == "silu":
        return x / (1 + torch.exp(-x))
    if config.activation == "relu":
        return x.clamp(min=0)
    if config.activation == "gelu":
        return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _norm(config: ModelConfig, x: Tensor, norm: Norm | None) -> Tensor:
    assert norm is not None
    if config.norm == "layer":
        x = x - x.mean(-1, keepdim=True)
    out = x / torch.sqrt((x * x).mean(-1, keepdim=True) + config.norm_eps) * norm.gain.double()
    return out if norm.bias is None else out + norm.bias.double()


def _pre(config: ModelConfig, x: Tensor, norm: Norm | None) -> Tensor:
    return _norm(config, x, norm) if norm is not None else x


def _post(config: ModelConfig, x: Tensor, norm: Norm | None) -> Tensor:
    return _norm(config, x, norm) if norm is not None else x


def _cap(x: Tensor, cap: float | None) -> Tensor:
    return x if cap is None else cap * torch.tanh(x / cap)
