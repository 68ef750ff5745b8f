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
