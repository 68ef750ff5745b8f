"""The operations on an NVIDIA GPU. See `interface.Kernels`.

What travels between operations is fp32 for the residual and the served dtype for everything else; open forms tell the
same values in fp32. An operation's open form is the same kernels, told to write the values on the way too.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from cutaway_server.architecture import ModelConfig
from cutaway_server.cache.pages import LARGEST, Pages
from cutaway_server.kernels import attention
from cutaway_server.kernels.batch import Batch
from cutaway_server.kernels.cuda.activation import activation
from cutaway_server.kernels.cuda.launch import flat
from cutaway_server.kernels.cuda.matmul import matmul
from cutaway_server.kernels.cuda.norm import AddNorm, Delta, add_norm
from cutaway_server.kernels.cuda.prefill import prefill_attention
from cutaway_server.kernels.cuda.qkv import finish_qkv
from cutaway_server.kernels.cuda.split import split_attention
from cutaway_server.kernels.cuda.work import CudaPlan, Layout, Splits, tile_work
from cutaway_server.kernels.patterns import patterns
from cutaway_server.kernels.plan import Plan, all_frequencies, rotations
from cutaway_server.kernels.quantized import Quantized
from cutaway_server.kernels.reading import HeldWeights, WeightReader
from cutaway_server.kernels.reference import Added, AttentionInput, Embedded, MlpInput, Normed, turned
from cutaway_server.kernels.weights import Matrix, Norm, Weights, embedding, served_dtype

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class CudaKernels:
    """Triton kernels and products of one model, on the device its weights are on."""

    def __init__(self, config: ModelConfig, weights: Weights, context: int, *, batch_invariant: bool = False) -> None:
        """`context` is the longest position served. `batch_invariant`: a row's bits never depend on other rows."""
        self.config = config
        self.weights = weights
        self.batch_invariant = batch_invariant
        self.name = "cuda-invariant" if batch_invariant else "cuda"
        self.dtype = _dtype(weights)
        self.frequencies = all_frequencies(config, context, weights.device)
        self._product: Callable[[Tensor, Tensor], Tensor] = matmul if batch_invariant else F.linear

    @property
    def page_dtypes(self) -> tuple[torch.dtype, ...]:
        """What pages may hold."""
        scaled = LARGEST if _converts_fp8(self.weights.device) else (torch.int8,)
        return (self.dtype, *scaled)

    @property
    def weight_reader(self) -> WeightReader:
        """What reads the weights back."""
        return HeldWeights(self.weights)

    def plan(self, batch: Batch) -> CudaPlan:
        """What all layers of one step share. A batch that is still on the host costs one copy and no waiting."""
        device = self.weights.device
        large_tiles = not self.batch_invariant and self.dtype != torch.float32
        work, prompts = tile_work(self.config, Layout.of(batch), device, large_tiles=large_tiles)
        return self.plan_of(batch.to(device), work, prompts)

    def plan_of(self, batch: Batch, work: tuple[Splits, ...], prompts: Tensor | None = None) -> CudaPlan:
        """A plan whose work is laid out already: computed on the device alone, so that a graph can hold it."""
        none = batch.positions[:0]
        turned = rotations(self.config, self.frequencies, batch.positions)
        return CudaPlan(batch, none, none, {}, turned, work=work, prompts=prompts)

    def embed(self, plan: Plan) -> Tensor:
        """Token (and learned position) embeddings: the first residual fp32 [T, d_model]."""
        return self.open_embed(plan).residual

    def open_embed(self, plan: Plan) -> Embedded:
        """The embeddings one by one."""
        tokens = embedding(plan.batch.token_ids, self.weights.embed).float() * self.config.embed_scale
        if self.weights.positions is None:
            return Embedded(tokens, None)
        return Embedded(tokens, F.embedding(plan.batch.positions, self.weights.positions).float())

    def layers(self, first: int, stop: int, residual: Tensor, plan: Plan, pages: Pages) -> Tensor:
        """Layers [first, stop) in which nobody looks: what one adds and what the next norms is one kernel."""
        if first == stop:
            return residual
        layers = self.weights.layers
        step = self._row_wise(residual, None, layers[first].norm1)
        for layer in range(first, stop):
            w = layers[layer]
            q = self._attend_input(layer, step, plan, pages)
            z, _ = self.paged_attention(layer, q, plan, pages)
            out = Delta(self._linear(z.flatten(1), w.attention_out), w.attention_out_bias, w.norm1_post)
            step = self._row_wise(step.residual, out, w.norm2)
            hidden, _, _ = self._hidden(layer, step, opened=False)
            down = Delta(self._linear(hidden, w.mlp_out), w.mlp_out_bias, w.norm2_post)
            if layer + 1 == stop:
                return self._row_wise(step.residual, down, None, emit=False).residual
            step = self._row_wise(step.residual, down, layers[layer + 1].norm1)
        raise AssertionError("the last layer returns")

    def attention_input(self, layer: int, residual: Tensor, plan: Plan, pages: Pages) -> Tensor:
        """Norm, QKV, QK-norm, rotation; stores K and V; queries [T, heads, d_head]."""
        return self._attend_input(layer, self._row_wise(residual, None, self.weights.layers[layer].norm1), plan, pages)

    def open_attention_input(self, layer: int, residual: Tensor, plan: Plan) -> AttentionInput:
        """Norm, QKV, QK-norm, rotation: every value. Stores nothing."""
        config, w = self.config, self.weights.layers[layer]
        step = self._row_wise(residual, None, w.norm1, opened=True)
        joined = self._linear(_emitted(step), w.qkv)
        rope = config.layers[layer].rope
        turned = finish_qkv(
            config, w, joined, rope, None if rope is None else plan.rotations[rope], plan.batch.slots, layer, None,
            opened=True,
        )  # fmt: skip
        assert turned.rot_k is not None
        heads = torch.unflatten(_with_bias(joined, w.qkv_bias), -1, (-1, config.d_head))
        q, k, v = torch.split(heads, [config.n_heads, config.n_kv_heads, config.n_kv_heads], dim=1)
        return AttentionInput(step.norm, q, k, v, turned.q.float(), turned.rot_k)

    def turn(self, layer: int, q: Tensor, k: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
        """QK-norm and rotation of queries and keys fp32, in plain torch: only for rows whose q or k was changed."""
        w = self.weights.layers[layer]
        return turned(self.config, layer, q, w.q_norm, plan), turned(self.config, layer, k, w.k_norm, plan)

    def paged_attention(self, layer: int, q: Tensor, plan: Plan, pages: Pages) -> tuple[Tensor, Tensor]:
        """Attention over the stored keys: z [T, heads, d_head] and the log-sum-exp of the scores fp32 [T, heads]."""
        assert isinstance(plan, CudaPlan)
        q = flat(q.to(self.dtype))
        z, lse = torch.empty_like(q), q.new_empty(q.shape[:2], dtype=torch.float32)
        for splits in plan.work:
            split_attention(self.config, layer, q, plan.batch, splits, pages, z, lse)
        if plan.prompts is not None:
            prefill_attention(self.config, layer, q, plan.batch, plan.prompts, pages, z, lse)
        return z, lse

    def attention_rows(
        self, layer: int, q: Tensor, lse: Tensor, rows: Tensor, heads: Tensor, plan: Plan, pages: Pages
    ) -> Tensor:
        """Probabilities of selected (row, head) pairs, from the pages and the log-sum-exp: [pairs, longest length]."""
        queries = q.to(self.dtype).float()  # as the attention read them
        return attention.attention_rows(self.config, layer, queries, lse, rows, heads, plan, pages)

    def patterns(self, layer: int, q: Tensor, lse: Tensor | None, plan: Plan, pages: Pages, width: int) -> Tensor:
        """Probabilities (scores without `lse`) of all rows of a plan for their keys: [heads, T, width]."""
        queries = q.to(self.dtype).float()  # as the attention read them
        return patterns(self.config, layer, queries, lse, plan.batch, pages, width)

    def attention_output(self, layer: int, z: Tensor, residual: Tensor) -> Tensor:
        """W_O, post-norm, added to the residual."""
        return self._row_wise(residual, self._attention_delta(layer, z), None, emit=False).residual

    def open_attention_output(self, layer: int, z: Tensor, residual: Tensor) -> Added:
        """W_O, post-norm, residual: every value."""
        return _added(self._row_wise(residual, self._attention_delta(layer, z), None, emit=False, opened=True))

    def mlp_input(self, layer: int, residual: Tensor) -> Tensor:
        """Norm, gate and up, activation: [T, d_mlp]."""
        step = self._row_wise(residual, None, self.weights.layers[layer].norm2)
        hidden, _, _ = self._hidden(layer, step, opened=False)
        return hidden

    def open_mlp_input(self, layer: int, residual: Tensor) -> MlpInput:
        """Norm, gate and up, activation: every value."""
        step = self._row_wise(residual, None, self.weights.layers[layer].norm2, opened=True)
        hidden, pre, linear = self._hidden(layer, step, opened=True)
        assert pre is not None
        return MlpInput(step.norm, pre, linear, hidden.float())

    def mlp_output(self, layer: int, hidden: Tensor, residual: Tensor) -> Tensor:
        """Down, post-norm, added to the residual."""
        return self._row_wise(residual, self._mlp_delta(layer, hidden), None, emit=False).residual

    def open_mlp_output(self, layer: int, hidden: Tensor, residual: Tensor) -> Added:
        """Down, post-norm, residual: every value."""
        return _added(self._row_wise(residual, self._mlp_delta(layer, hidden), None, emit=False, opened=True))

    def unembed(self, residual: Tensor) -> Tensor:
        """Final norm, W_U, soft-cap: logits fp32 [rows, vocab]."""
        x = _emitted(self._row_wise(residual, None, self.weights.final_norm))
        return attention.soft_cap(self._linear(x, self.weights.unembed).float(), self.config.logit_softcap)

    def open_unembed(self, residual: Tensor) -> tuple[Normed, Tensor]:
        """The final norm's values, and the logits."""
        step = self._row_wise(residual, None, self.weights.final_norm, opened=True)
        assert step.norm is not None
        logits = self._linear(_emitted(step), self.weights.unembed).float()
        return step.norm, attention.soft_cap(logits, self.config.logit_softcap)

    def _row_wise(
        self, residual: Tensor, delta: Delta | None, norm: Norm | None, *, emit: bool = True, opened: bool = False
    ) -> AddNorm:
        return add_norm(
            residual, delta, norm, eps=self.config.norm_eps, layer_norm=self.config.norm == "layer",
            emit=self.dtype if emit else None, opened=opened,
        )  # fmt: skip

    def _linear(self, x: Tensor, weight: Matrix) -> Tensor:
        assert isinstance(weight, Tensor)
        return self._product(x, weight)

    def _attend_input(self, layer: int, step: AddNorm, plan: Plan, pages: Pages) -> Tensor:
        w, rope = self.weights.layers[layer], self.config.layers[layer].rope
        turned = None if rope is None else plan.rotations[rope]
        joined = self._linear(_emitted(step), w.qkv)
        return finish_qkv(self.config, w, joined, rope, turned, plan.batch.slots, layer, pages).q

    def _attention_delta(self, layer: int, z: Tensor) -> Delta:
        w = self.weights.layers[layer]
        product = self._linear(z.flatten(1).to(self.dtype), w.attention_out)
        return Delta(product, w.attention_out_bias, w.norm1_post)

    def _mlp_delta(self, layer: int, hidden: Tensor) -> Delta:
        w = self.weights.layers[layer]
        return Delta(self._linear(hidden.to(self.dtype), w.mlp_out), w.mlp_out_bias, w.norm2_post)

    def _hidden(self, layer: int, step: AddNorm, *, opened: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
        w, config = self.weights.layers[layer], self.config
        joined = self._linear(_emitted(step), w.mlp_in)
        return activation(joined, w.mlp_in_bias, kind=config.activation, gated=config.gated, opened=opened)


def _dtype(weights: Weights) -> torch.dtype:
    if any(isinstance(matrix, Quantized) for matrix in weights.matrices()):
        raise ValueError("weights: the CUDA kernels multiply floats, not quantised matrices")
    dtype = served_dtype(weights)
    assert dtype in DTYPES
    return dtype


def _converts_fp8(device: torch.device) -> bool:
    """Whether Triton compiles conversions of e4m3 for it: from Ada and Hopper on, and in the interpreter."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 9)


def _emitted(step: AddNorm) -> Tensor:
    assert step.x is not None
    return step.x


def _with_bias(joined: Tensor, bias: Tensor | None) -> Tensor:
    return joined.float() if bias is None else joined.float() + bias


def _added(step: AddNorm) -> Added:
    assert step.added is not None
    return Added(step.post, step.added, step.residual)
