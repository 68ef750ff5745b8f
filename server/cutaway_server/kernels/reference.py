"""Every operation in plain torch: the oracle of all faster twins, and what runs where they do not.

The *open* form of an operation returns every value on the way; the fused form is its last value.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cutaway_server.architecture import ModelConfig
from cutaway_server.cache.pages import FORMATS, Pages
from cutaway_server.kernels import attention
from cutaway_server.kernels.batch import Batch
from cutaway_server.kernels.linear import linear
from cutaway_server.kernels.patterns import patterns
from cutaway_server.kernels.plan import Plan, all_frequencies, make_plan
from cutaway_server.kernels.reading import HeldWeights, WeightReader
from cutaway_server.kernels.rope import rotate
from cutaway_server.kernels.weights import Norm, Weights, embedding


@dataclass(frozen=True, slots=True)
class Normed:
    """A norm's values, fp32: `scale` [T, 1] divides; `normalized` is before the gain (RMSNorm) or after (LayerNorm)."""

    scale: Tensor
    normalized: Tensor
    out: Tensor


@dataclass(frozen=True, slots=True)
class AttentionInput:
    """Values of attention_input. q, rot_q [T, heads, d_head]; k, rot_k, v [T, kv_heads, d_head], fp32."""

    norm: Normed | None
    q: Tensor
    k: Tensor
    v: Tensor
    rot_q: Tensor
    rot_k: Tensor


@dataclass(frozen=True, slots=True)
class MlpInput:
    """Values of mlp_input, [T, d_mlp] fp32. `pre_linear` is None without a gate."""

    norm: Normed | None
    pre: Tensor
    pre_linear: Tensor | None
    post: Tensor


@dataclass(frozen=True, slots=True)
class Added:
    """Values of attention_output and mlp_output: what is added, and the residual after it, fp32 [T, d_model]."""

    norm: Normed | None
    added: Tensor
    residual: Tensor


@dataclass(frozen=True, slots=True)
class Embedded:
    """Values of embed, fp32 [T, d_model]: of tokens, and of positions where those are learned."""

    tokens: Tensor
    positions: Tensor | None

    @property
    def residual(self) -> Tensor:
        """The first residual."""
        return self.tokens if self.positions is None else self.tokens + self.positions


class ReferenceKernels:
    """Plain torch on any device. See `interface.Kernels` for what each operation does."""

    name = "reference"
    page_dtypes = FORMATS

    def __init__(self, config: ModelConfig, weights: Weights, context: int) -> None:
        """`context` is the longest position served (NTK scaling depends on it). No matrix may be quantised."""
        self.config = config
        self.weights = weights
        self.frequencies = all_frequencies(config, context, weights.device)

    @property
    def weight_reader(self) -> WeightReader:
        """What reads the weights back."""
        return HeldWeights(self.weights)

    def plan(self, batch: Batch) -> Plan:
        """What all layers of one step share."""
        return make_plan(self.config, self.frequencies, batch)

    def embed(self, plan: Plan) -> Tensor:
        """Token (and learned position) embeddings: the first residual [T, d_model]."""
        return self.open_embed(plan).residual

    def open_embed(self, plan: Plan) -> Embedded:
        """The embeddings one by one."""
        tokens = embedding(plan.batch.token_ids, self.weights.embed).float() * self.config.embed_scale
        if self.weights.positions is None:
            return Embedded(tokens, None)
        return Embedded(tokens, F.embedding(plan.batch.positions, self.weights.positions).float())

    def layers(self, first: int, stop: int, residual: Tensor, plan: Plan, pages: Pages) -> Tensor:
        """Layers [first, stop), in which nobody looks or edits: the operations below, in order."""
        for layer in range(first, stop):
            q = self.attention_input(layer, residual, plan, pages)
            z, _ = self.paged_attention(layer, q, plan, pages)
            residual = self.attention_output(layer, z, residual)
            hidden = self.mlp_input(layer, residual)
            residual = self.mlp_output(layer, hidden, residual)
        return residual

    def open_attention_input(self, layer: int, residual: Tensor, plan: Plan) -> AttentionInput:
        """Norm, QKV, QK-norm, rotation: every value."""
        config, w = self.config, self.weights.layers[layer]
        normed = None if w.norm1 is None else self.norm(residual, w.norm1)
        joined = linear(residual if normed is None else normed.out, w.qkv, w.qkv_bias).float()
        heads = torch.unflatten(joined, -1, (-1, config.d_head))
        q, k, v = torch.split(heads, [config.n_heads, config.n_kv_heads, config.n_kv_heads], dim=1)
        rot_q, rot_k = self.turn(layer, q, k, plan)
        return AttentionInput(normed, q, k, v, rot_q, rot_k)

    def turn(self, layer: int, q: Tensor, k: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
        """QK-norm and rotation of queries and keys fp32."""
        w = self.weights.layers[layer]
        return turned(self.config, layer, q, w.q_norm, plan), turned(self.config, layer, k, w.k_norm, plan)

    def attention_input(self, layer: int, residual: Tensor, plan: Plan, pages: Pages) -> Tensor:
        """Norm, QKV, QK-norm, rotation; stores K and V; queries [T, heads, d_head]."""
        values = self.open_attention_input(layer, residual, plan)
        self.store(layer, values, plan, pages)
        return values.rot_q

    def store(self, layer: int, values: AttentionInput, plan: Plan, pages: Pages) -> None:
        """Write K and V where the batch says; rows that are revisited write to page 0, which nobody reads."""
        pages.store(layer, plan.batch.slots, values.rot_k, values.v)

    def paged_attention(self, layer: int, q: Tensor, plan: Plan, pages: Pages) -> tuple[Tensor, Tensor]:
        """Attention over the stored keys: z [T, heads, d_head] and the log-sum-exp of the scores [T, heads]."""
        return attention.paged_attention(self.config, layer, q, plan, pages)

    def attention_rows(
        self, layer: int, q: Tensor, lse: Tensor, rows: Tensor, heads: Tensor, plan: Plan, pages: Pages
    ) -> Tensor:
        """Probabilities of selected (row, head) pairs, from the pages and the log-sum-exp: [pairs, longest length]."""
        return attention.attention_rows(self.config, layer, q, lse, rows, heads, plan, pages)

    def patterns(self, layer: int, q: Tensor, lse: Tensor | None, plan: Plan, pages: Pages, width: int) -> Tensor:
        """Probabilities (scores without `lse`) of all rows of a plan for their keys: [heads, T, width]."""
        return patterns(self.config, layer, q, lse, plan.batch, pages, width)

    def open_attention_output(self, layer: int, z: Tensor, residual: Tensor) -> Added:
        """W_O, post-norm, residual: every value."""
        w = self.weights.layers[layer]
        return self._add(linear(z.flatten(1), w.attention_out, w.attention_out_bias), w.norm1_post, residual)

    def attention_output(self, layer: int, z: Tensor, residual: Tensor) -> Tensor:
        """W_O, post-norm, added to the residual."""
        return self.open_attention_output(layer, z, residual).residual

    def open_mlp_input(self, layer: int, residual: Tensor) -> MlpInput:
        """Norm, gate and up, activation: every value."""
        w = self.weights.layers[layer]
        normed = None if w.norm2 is None else self.norm(residual, w.norm2)
        joined = linear(residual if normed is None else normed.out, w.mlp_in, w.mlp_in_bias).float()
        if not self.config.gated:
            return MlpInput(normed, joined, None, activated(self.config, joined))
        gate, up = joined.chunk(2, dim=-1)
        return MlpInput(normed, gate, up, activated(self.config, gate) * up)

    def mlp_input(self, layer: int, residual: Tensor) -> Tensor:
        """Norm, gate and up, activation: [T, d_mlp]."""
        return self.open_mlp_input(layer, residual).post

    def open_mlp_output(self, layer: int, hidden: Tensor, residual: Tensor) -> Added:
        """Down, post-norm, residual: every value."""
        w = self.weights.layers[layer]
        return self._add(linear(hidden, w.mlp_out, w.mlp_out_bias), w.norm2_post, residual)

    def mlp_output(self, layer: int, hidden: Tensor, residual: Tensor) -> Tensor:
        """Down, post-norm, added to the residual."""
        return self.open_mlp_output(layer, hidden, residual).residual

    def unembed(self, residual: Tensor) -> Tensor:
        """Final norm, W_U, soft-cap: logits fp32 [rows, vocab]."""
        return self.open_unembed(residual)[1]

    def open_unembed(self, residual: Tensor) -> tuple[Normed, Tensor]:
        """The final norm's values, and the logits."""
        normed = self.norm(residual, self.weights.final_norm)
        return normed, attention.soft_cap(linear(normed.out, self.weights.unembed).float(), self.config.logit_softcap)

    def norm(self, x: Tensor, weights: Norm) -> Normed:
        """RMSNorm or LayerNorm over the last axis of x, fp32."""
        return norm(self.config, x, weights)

    def _add(self, out: Tensor, post: Norm | None, residual: Tensor) -> Added:
        added = out.float()
        normed = None if post is None else self.norm(added, post)
        added = added if normed is None else normed.out
        return Added(normed, added, residual + added)


def norm(config: ModelConfig, x: Tensor, weights: Norm) -> Normed:
    """RMSNorm or LayerNorm over the last axis of x, fp32."""
    if config.norm == "layer":
        x = x - x.mean(-1, keepdim=True)
    scale = (x.square().mean(-1, keepdim=True) + config.norm_eps).sqrt()
    normalized = x / scale
    out = normalized * weights.gain
    if weights.bias is not None:
        out = out + weights.bias
    return Normed(scale, out if config.norm == "layer" else normalized, out)


def turned(config: ModelConfig, layer: int, x: Tensor, weights: Norm | None, plan: Plan) -> Tensor:
    """QK-norm and rotation of queries or keys x fp32 [T, heads, d_head]."""
    if weights is not None:
        x = norm(config, x if config.qk_norm == "head" else x.flatten(1), weights).out.view_as(x)
    if (rope := config.layers[layer].rope) is not None:
        cos, sin = plan.rotations[rope]
        x = rotate(x, cos, sin, interleaved=rope.interleaved)
    return x


def activated(config: ModelConfig, x: Tensor) -> Tensor:
    """The MLP's activation function of x."""
    if config.activation == "silu":
        return F.silu(x)
    if config.activation == "relu":
        return F.relu(x)
    return F.gelu(x, approximate="tanh" if config.activation == "gelu_tanh" else "none")
