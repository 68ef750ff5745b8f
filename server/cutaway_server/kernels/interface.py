"""The operations a model calls: few and large, so that a device's twin can fuse each into one kernel.

The model decides the order, the kernels own the (packed) weights and compute. Residuals are fp32 [T, d_model].
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from cutaway_server.architecture import ModelConfig
from cutaway_server.cache.pages import Pages
from cutaway_server.kernels.batch import Batch
from cutaway_server.kernels.plan import Plan
from cutaway_server.kernels.reading import WeightReader
from cutaway_server.kernels.reference import Added, AttentionInput, Embedded, MlpInput, Normed


class Kernels(Protocol):
    """One way to compute the operations of DESIGN 3. A row's bits never depend on the rows beside it."""

    name: str
    config: ModelConfig

    @property
    def page_dtypes(self) -> tuple[torch.dtype, ...]:
        """What pages may hold."""

    def plan(self, batch: Batch) -> Plan:
        """What all layers of one step share."""

    def embed(self, plan: Plan) -> Tensor:
        """Token (and learned position) embeddings: the first residual [T, d_model]."""

    def layers(self, first: int, stop: int, residual: Tensor, plan: Plan, pages: Pages) -> Tensor:
        """Layers [first, stop), in which nobody looks or edits: the operations below, in order, and their bits."""

    def attention_input(self, layer: int, residual: Tensor, plan: Plan, pages: Pages) -> Tensor:
        """Norm, QKV, QK-norm, rotation; stores K and V; queries [T, heads, d_head]."""

    def paged_attention(self, layer: int, q: Tensor, plan: Plan, pages: Pages) -> tuple[Tensor, Tensor]:
        """Attention over the stored keys: z [T, heads, d_head] and the log-sum-exp of the scores [T, heads]."""

    def attention_output(self, layer: int, z: Tensor, residual: Tensor) -> Tensor:
        """W_O, post-norm, added to the residual."""

    def mlp_input(self, layer: int, residual: Tensor) -> Tensor:
        """Norm, gate and up, activation: [T, d_mlp]."""

    def mlp_output(self, layer: int, hidden: Tensor, residual: Tensor) -> Tensor:
        """Down, post-norm, added to the residual."""

    def unembed(self, residual: Tensor) -> Tensor:
        """Final norm, W_U, soft-cap: logits fp32 [rows, vocab]."""

    def attention_rows(
        self, layer: int, q: Tensor, lse: Tensor, rows: Tensor, heads: Tensor, plan: Plan, pages: Pages
    ) -> Tensor:
        """Probabilities of selected (row, head) pairs, from the pages and the log-sum-exp: [pairs, longest length]."""


class OpenKernels(Kernels, Protocol):
    """Kernels that can be looked into: the open form of an operation gives every value on the way, and the same bits.

    Open forms compute the rows they are given and store nothing.
    """

    @property
    def weight_reader(self) -> WeightReader:
        """What reads the weights back."""

    def open_embed(self, plan: Plan) -> Embedded:
        """The embeddings one by one."""

    def open_attention_input(self, layer: int, residual: Tensor, plan: Plan) -> AttentionInput:
        """Norm, QKV, QK-norm, rotation: every value."""

    def turn(self, layer: int, q: Tensor, k: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
        """QK-norm and rotation of queries and keys fp32."""

    def patterns(self, layer: int, q: Tensor, lse: Tensor | None, plan: Plan, pages: Pages, width: int) -> Tensor:
        """Probabilities (scores without `lse`) of all rows of a plan for their keys, fp32 [heads, T, width].

        `width` is more than any row's position. What a row does not see is 0 (-inf). q and lse are what paged_attention
        took and returned.
        """

    def open_attention_output(self, layer: int, z: Tensor, residual: Tensor) -> Added:
        """W_O, post-norm, residual: every value."""

    def open_mlp_input(self, layer: int, residual: Tensor) -> MlpInput:
        """Norm, gate and up, activation: every value."""

    def open_mlp_output(self, layer: int, hidden: Tensor, residual: Tensor) -> Added:
        """Down, post-norm, residual: every value."""

    def open_unembed(self, residual: Tensor) -> tuple[Normed, Tensor]:
        """The final norm's values, and the logits."""
