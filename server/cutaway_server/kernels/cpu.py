"""The operations on a CPU: a few native calls a layer over weights packed once. See `interface.Kernels`.

An operation's open form is the same native call, told to write the values on the way too, so both agree bit for bit.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cutaway_server.architecture import ModelConfig, Rope
from cutaway_server.cache.pages import Pages
from cutaway_server.kernels import attention
from cutaway_server.kernels.batch import Batch
from cutaway_server.kernels.library import CLayer, CMatrix, CNorm, COpenNorm, CPages, CRotations, CShape, CStep, Library
from cutaway_server.kernels.native_matrix import NativeMatrix
from cutaway_server.kernels.packing import AnyPacked, pack, pack_gated
from cutaway_server.kernels.packing_quantized import PackedStack
from cutaway_server.kernels.plan import Plan, all_frequencies, rotations
from cutaway_server.kernels.reading import PackedLayer, PackedWeights, WeightReader, packed_layer
from cutaway_server.kernels.reference import Added, AttentionInput, Embedded, MlpInput, Normed, turned
from cutaway_server.kernels.rounding import NO_ROUNDING, Rounding
from cutaway_server.kernels.weight_memory import WeightMemory
from cutaway_server.kernels.weights import LayerWeights, Norm, Weights, embedding, served_dtype

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")
QK_NORMS = ("none", "head", "full")
DTYPES = (torch.bfloat16, torch.float32)
PAGE_FORMATS = (torch.float32, torch.bfloat16, torch.int8)  # as native/interface.h numbers them


@dataclass(frozen=True, slots=True, kw_only=True)
class CpuPlan(Plan):
    """A plan whose tiles the library makes itself."""

    step: CStep
    at: int  # where `step` is
    turns: ctypes.Array[CRotations]  # of each layer
    turns_at: tuple[int, ...]
    held: tuple[Tensor, ...]  # what `step` points at


class CpuKernels:
    """The native library's operations for one model in bf16 or fp32."""

    page_dtypes = PAGE_FORMATS

    def __init__(
        self, config: ModelConfig, weights: Weights, context: int, library: Library, variant: str | None = None,
        threads: int | None = None, *, consume: bool = False, dtype: torch.dtype | None = None,
        rounding: Rounding = NO_ROUNDING,
    ) -> None:  # fmt: skip
        """`context` is the longest position served. By default: the fastest variant, as many threads as torch has.

        `dtype` is that of float matrices and of pages, for weights that have no such matrix.
        To `consume` the weights frees each matrix once it is packed; they are of no use to anyone else afterwards.
        """
        self.config = config
        variant = variant or library.supported()[0]
        self.name = f"cpu-{variant}"
        self.frequencies = all_frequencies(config, context, torch.device("cpu"))
        self._pages = _PagesOfLayers()
        self._held: list[Tensor] = []  # what the native structs point at
        self._matrices: list[NativeMatrix] = []
        self._dtype = served_dtype(weights) or dtype
        assert self._dtype in DTYPES
        self._consume, self._rounding, self._memory = consume, rounding, WeightMemory()
        unembed = pack(weights.unembed, rounded=rounding.unembed, consume=consume, memory=self._memory)
        assert not isinstance(unembed, PackedStack), "an embedding has one type"
        self._unembed = unembed
        self._tied = weights.unembed is weights.embed
        self._embed = None if self._tied else weights.embed
        self._positions = weights.positions
        self._shape = _shape(config, self._dtype, threads or torch.get_num_threads())
        self._qk_norms = [(layer.q_norm, layer.k_norm) for layer in weights.layers]
        self._packed: list[PackedLayer] = []
        self._final_norm = weights.final_norm
        layers = [self._layer(i, layer) for i, layer in enumerate(weights.layers)]
        self._all_layers = (CLayer * len(layers))(*layers)
        self._layer_at = _addresses(self._all_layers)
        self._shape_at = ctypes.addressof(self._shape)
        self._final = (self._matrix(self._unembed), self._norm(weights.final_norm))
        self._layers = library.operation(variant, "layers")
        self._attention_input = library.operation(variant, "attention_input")
        self._paged_attention = library.operation(variant, "paged_attention")
        self._patterns = library.operation(variant, "patterns")
        self._attention_output = library.operation(variant, "attention_output")
        self._mlp_input = library.operation(variant, "mlp_input")
        self._mlp_output = library.operation(variant, "mlp_output")
        self._unembed_native = library.operation(variant, "unembed")

    @property
    def weight_reader(self) -> WeightReader:
        """What reads the weights back."""
        embed = self._unembed if self._embed is None else self._embed
        return PackedWeights(self._packed, embed, self._unembed, self._positions, self._final_norm)

    def plan(self, batch: Batch) -> CpuPlan:
        """What all layers of one step share."""
        table = batch.block_table if batch.block_table.stride(1) == 1 else batch.block_table.contiguous()
        held = (batch.positions.contiguous(), batch.slots.contiguous(), batch.query_starts.contiguous(), table)
        step = CStep(*(t.data_ptr() for t in held), batch.n_rows, len(batch.query_starts) - 1, table.stride(0))
        none = batch.positions[:0]
        turned = rotations(self.config, self.frequencies, batch.positions)
        turns = (CRotations * self.config.n_layers)(*(_rotations(turned, here.rope) for here in self.config.layers))
        return CpuPlan(
            batch, none, none, {}, turned, step=step, at=ctypes.addressof(step), turns=turns,
            turns_at=_addresses(turns), held=held,
        )  # fmt: skip

    def embed(self, plan: Plan) -> Tensor:
        """Token (and learned position) embeddings: the first residual [T, d_model]."""
        return self.open_embed(plan).residual

    def open_embed(self, plan: Plan) -> Embedded:
        """The embeddings one by one."""
        ids = plan.batch.token_ids
        rows = self._unembed.rows(ids) if self._embed is None else embedding(ids, self._embed)
        tokens = rows.float() * self.config.embed_scale
        if self._positions is None:
            return Embedded(tokens, None)
        return Embedded(tokens, F.embedding(plan.batch.positions, self._positions).float())

    def layers(self, first: int, stop: int, residual: Tensor, plan: Plan, pages: Pages) -> Tensor:
        """Layers [first, stop), in which nobody looks or edits: the operations below, in order, and their bits."""
        assert isinstance(plan, CpuPlan)
        residual = _plain(residual)
        if first == stop:
            return residual
        out = torch.empty_like(residual)
        self._layers(
            self._shape_at, self._layer_at[0], self._pages.at(pages, 0), plan.at, plan.turns_at[0], first, stop,
            residual.data_ptr(), out.data_ptr(),
        )  # fmt: skip
        return out

    def attention_input(self, layer: int, residual: Tensor, plan: Plan, pages: Pages) -> Tensor:
        """Norm, QKV, QK-norm, rotation; stores K and V; queries [T, heads, d_head]."""
        return self._attend_input(layer, residual, plan, self._pages.at(pages, layer), None, None, None)

    def open_attention_input(self, layer: int, residual: Tensor, plan: Plan) -> AttentionInput:
        """Norm, QKV, QK-norm, rotation: every value. Stores nothing."""
        config = self.config
        joined = residual.new_empty(len(residual), config.n_heads + 2 * config.n_kv_heads, config.d_head)
        rot_k = residual.new_empty(len(residual), config.n_kv_heads, config.d_head)
        norm = _OpenNorm.like(residual) if config.pre_norm else None
        rot_q = self._attend_input(layer, residual, plan, None, joined, rot_k, norm)
        q, k, v = torch.split(joined, [config.n_heads, config.n_kv_heads, config.n_kv_heads], dim=1)
        return AttentionInput(_values(norm), q, k, v, rot_q, rot_k)

    def turn(self, layer: int, q: Tensor, k: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
        """QK-norm and rotation of queries and keys fp32, in plain torch: only for rows whose q or k was changed."""
        q_norm, k_norm = self._qk_norms[layer]
        return turned(self.config, layer, q, q_norm, plan), turned(self.config, layer, k, k_norm, plan)

    def _attend_input(
        self, layer: int, residual: Tensor, plan: Plan, pages: int | None, joined: Tensor | None, rot_k: Tensor | None,
        norm: _OpenNorm | None,
    ) -> Tensor:  # fmt: skip
        assert isinstance(plan, CpuPlan)
        residual = _plain(residual)
        q = residual.new_empty(len(residual), self.config.n_heads, self.config.d_head)
        self._attention_input(
            self._shape_at, self._layer_at[layer], pages, plan.at, residual.data_ptr(),
            plan.turns_at[layer], q.data_ptr(), _at(joined), _at(rot_k), _places(norm),
        )  # fmt: skip
        return q

    def paged_attention(self, layer: int, q: Tensor, plan: Plan, pages: Pages) -> tuple[Tensor, Tensor]:
        """Attention over the stored keys: z [T, heads, d_head] and the log-sum-exp of the scores [T, heads]."""
        assert isinstance(plan, CpuPlan)
        q = _plain(q)
        z, lse = torch.empty_like(q), q.new_empty(q.shape[:2])
        self._paged_attention(
            self._shape_at, self._layer_at[layer], self._pages.at(pages, layer), plan.at, q.data_ptr(), z.data_ptr(),
            lse.data_ptr(),
        )  # fmt: skip
        return z, lse

    def attention_rows(
        self, layer: int, q: Tensor, lse: Tensor, rows: Tensor, heads: Tensor, plan: Plan, pages: Pages
    ) -> Tensor:
        """Probabilities of selected (row, head) pairs, from the pages and the log-sum-exp: [pairs, longest length]."""
        return attention.attention_rows(self.config, layer, q, lse, rows, heads, plan, pages)

    def patterns(self, layer: int, q: Tensor, lse: Tensor | None, plan: Plan, pages: Pages, width: int) -> Tensor:
        """Probabilities (scores without `lse`) of all rows of a plan for their keys: [heads, T, width]."""
        assert isinstance(plan, CpuPlan)
        q, lse = _plain(q), None if lse is None else _plain(lse)
        out = q.new_empty(self.config.n_heads, len(q), width)
        self._patterns(
            self._shape_at, self._layer_at[layer], self._pages.at(pages, layer), plan.at, q.data_ptr(), _at(lse),
            out.data_ptr(), width,
        )  # fmt: skip
        return out

    def attention_output(self, layer: int, z: Tensor, residual: Tensor) -> Tensor:
        """W_O, post-norm, added to the residual."""
        z, residual = _plain(z), _plain(residual)
        out = torch.empty_like(residual)
        self._attention_output(
            self._shape_at, self._layer_at[layer], len(z), z.data_ptr(), residual.data_ptr(), out.data_ptr(), None, None
        )
        return out

    def open_attention_output(self, layer: int, z: Tensor, residual: Tensor) -> Added:
        """W_O, post-norm, residual: every value."""
        z, residual = _plain(z), _plain(residual)
        out, added = torch.empty_like(residual), torch.empty_like(residual)
        norm = _OpenNorm.like(residual) if self.config.post_norm else None
        self._attention_output(
            self._shape_at, self._layer_at[layer], len(z), z.data_ptr(), residual.data_ptr(), out.data_ptr(),
            added.data_ptr(), _places(norm),
        )  # fmt: skip
        return Added(_values(norm), added, out)

    def mlp_input(self, layer: int, residual: Tensor) -> Tensor:
        """Norm, gate and up, activation: [T, d_mlp]."""
        residual = _plain(residual)
        post = residual.new_empty(len(residual), self.config.d_mlp)
        self._mlp_input(
            self._shape_at, self._layer_at[layer], len(residual), residual.data_ptr(), post.data_ptr(), None, None, None
        )
        return post

    def open_mlp_input(self, layer: int, residual: Tensor) -> MlpInput:
        """Norm, gate and up, activation: every value."""
        residual = _plain(residual)
        post = residual.new_empty(len(residual), self.config.d_mlp)
        pre, linear = torch.empty_like(post), torch.empty_like(post) if self.config.gated else None
        norm = _OpenNorm.like(residual) if self.config.pre_norm else None
        self._mlp_input(
            self._shape_at, self._layer_at[layer], len(residual), residual.data_ptr(), post.data_ptr(), pre.data_ptr(),
            _at(linear), _places(norm),
        )  # fmt: skip
        return MlpInput(_values(norm), pre, linear, post)

    def mlp_output(self, layer: int, hidden: Tensor, residual: Tensor) -> Tensor:
        """Down, post-norm, added to the residual."""
        hidden, residual = _plain(hidden), _plain(residual)
        out = torch.empty_like(residual)
        self._mlp_output(
            self._shape_at, self._layer_at[layer], len(hidden), hidden.data_ptr(), residual.data_ptr(), out.data_ptr(),
            None, None,
        )  # fmt: skip
        return out

    def open_mlp_output(self, layer: int, hidden: Tensor, residual: Tensor) -> Added:
        """Down, post-norm, residual: every value."""
        hidden, residual = _plain(hidden), _plain(residual)
        out, added = torch.empty_like(residual), torch.empty_like(residual)
        norm = _OpenNorm.like(residual) if self.config.post_norm else None
        self._mlp_output(
            self._shape_at, self._layer_at[layer], len(hidden), hidden.data_ptr(), residual.data_ptr(), out.data_ptr(),
            added.data_ptr(), _places(norm),
        )  # fmt: skip
        return Added(_values(norm), added, out)

    def unembed(self, residual: Tensor) -> Tensor:
        """Final norm, W_U, soft-cap: logits fp32 [rows, vocab]."""
        residual = _plain(residual)
        logits = residual.new_empty(len(residual), self.config.d_vocab)
        matrix, norm = (ctypes.addressof(part) for part in self._final)
        self._unembed_native(self._shape_at, matrix, norm, len(residual), residual.data_ptr(), logits.data_ptr(), None)
        return logits

    def open_unembed(self, residual: Tensor) -> tuple[Normed, Tensor]:
        """The final norm's values, and the logits."""
        residual = _plain(residual)
        logits, opened = residual.new_empty(len(residual), self.config.d_vocab), _OpenNorm.like(residual)
        matrix, norm = (ctypes.addressof(part) for part in self._final)
        self._unembed_native(
            self._shape_at, matrix, norm, len(residual), residual.data_ptr(), logits.data_ptr(), opened.at
        )
        return opened.values, logits

    def _layer(self, i: int, w: LayerWeights) -> CLayer:
        here = self.config.layers[i]
        packed, gated = (
            partial(form, rounded=self._rounding.layers, consume=self._consume, memory=self._memory)
            for form in (pack, pack_gated if self.config.gated else pack)
        )
        matrices = (
            packed(w.qkv, w.qkv_bias), packed(w.attention_out, w.attention_out_bias), gated(w.mlp_in, w.mlp_in_bias),
            packed(w.mlp_out, w.mlp_out_bias),
        )  # fmt: skip
        self._packed.append(packed_layer(matrices, w, self.config.d_mlp if self.config.gated else None))
        norms = (w.norm1, w.norm1_post, w.norm2, w.norm2_post, w.q_norm, w.k_norm)
        return CLayer(
            *(self._matrix(m) for m in matrices), *(self._norm(n) for n in norms), here.window or 0,
            0 if here.rope is None else here.rope.dims, here.rope is not None and here.rope.interleaved,
        )  # fmt: skip

    def _matrix(self, packed: AnyPacked) -> CMatrix:
        self._matrices.append(NativeMatrix(packed))
        return self._matrices[-1].struct

    def _norm(self, norm: Norm | None) -> CNorm:
        return CNorm() if norm is None else CNorm(self._hold(norm.gain), self._hold(norm.bias))

    def _hold(self, tensor: Tensor | None) -> int | None:
        if tensor is None:
            return None
        self._held.append(tensor.contiguous())
        return self._held[-1].data_ptr()


class _OpenNorm:
    """A norm's values, and where the library finds their places."""

    def __init__(self, values: Normed) -> None:
        self.values = values
        self._places = COpenNorm(values.scale.data_ptr(), values.normalized.data_ptr(), values.out.data_ptr())
        self.at = ctypes.addressof(self._places)

    @classmethod
    def like(cls, x: Tensor) -> _OpenNorm:
        return cls(Normed(x.new_empty(len(x), 1), torch.empty_like(x), torch.empty_like(x)))


def _values(norm: _OpenNorm | None) -> Normed | None:
    return None if norm is None else norm.values


def _places(norm: _OpenNorm | None) -> int | None:
    return None if norm is None else norm.at


def _shape(config: ModelConfig, dtype: torch.dtype, threads: int) -> CShape:
    return CShape(
        config.d_model, config.n_heads, config.n_kv_heads, config.d_head, config.d_mlp, config.norm == "layer",
        QK_NORMS.index(config.qk_norm), ACTIVATIONS.index(config.activation), config.gated, dtype == torch.bfloat16,
        threads, config.norm_eps, config.scale, config.attention_softcap or 0.0,
        config.logit_softcap or 0.0,
    )  # fmt: skip


class _PagesOfLayers:
    """Where the library finds the pages of each layer; made again only when other pages are asked about."""

    def __init__(self) -> None:
        self._pages: Pages | None = None
        self._structs: ctypes.Array[CPages] | None = None
        self._at: tuple[int, ...] = ()

    def at(self, pages: Pages, layer: int) -> int:
        """The address of one layer's struct."""
        if pages is not self._pages:
            structs = [_struct(pages, layer) for layer in range(len(pages.keys))]
            self._pages, self._structs = pages, (CPages * len(structs))(*structs)
            self._at = _addresses(self._structs)
        return self._at[layer]


def _struct(pages: Pages, layer: int) -> CPages:
    parts = [pages.keys, pages.values, pages.key_scales, pages.value_scales]
    assert all(part is None or part.is_contiguous() for part in parts)
    at = (None if part is None else part[layer].data_ptr() for part in parts)
    return CPages(*at, pages.page_size, PAGE_FORMATS.index(pages.keys.dtype))


def _rotations(turned: dict[Rope, tuple[Tensor, Tensor]], rope: Rope | None) -> CRotations:
    if rope is None:
        return CRotations()
    assert all(t.is_contiguous() for t in turned[rope])
    return CRotations(*(t.data_ptr() for t in turned[rope]))


def _addresses(structs: ctypes.Array[Any]) -> tuple[int, ...]:
    """Where each struct of an array is."""
    start, each = ctypes.addressof(structs), ctypes.sizeof(structs._type_)
    return tuple(start + each * i for i in range(len(structs)))


def _plain(x: Tensor) -> Tensor:
    assert x.dtype == torch.float32
    return x.contiguous()


def _at(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
