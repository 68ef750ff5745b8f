"""A step that somebody looks at: the plain path but for the layers in question, and there only the rows asked for.

All rows go through the operations as always. What an operation hides is computed a second time, open, for the rows
looked at alone; their neighbours' values are never touched.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cutaway_server.cache.pages import Pages
from cutaway_server.kernels.batch import Batch
from cutaway_server.kernels.interface import OpenKernels
from cutaway_server.kernels.plan import Plan
from cutaway_server.kernels.reference import Normed
from cutaway_server.probe.recorder import Recorder

B = "blocks.{i}."
A, M = B + "attn.", B + "mlp."
NORM1, NORM2 = (B + "ln1.hook_scale", B + "ln1.hook_normalized"), (B + "ln2.hook_scale", B + "ln2.hook_normalized")
POST1 = (B + "ln1_post.hook_scale", B + "ln1_post.hook_normalized")
POST2 = (B + "ln2_post.hook_scale", B + "ln2_post.hook_normalized")
QKV = (A + "hook_q", A + "hook_k", A + "hook_v", A + "hook_rot_k")


@dataclass(frozen=True, slots=True)
class Subset:
    """Some rows of a batch, ascending, as a batch of their own: each a sequence of one row."""

    rows: Tensor
    plan: Plan


@dataclass(frozen=True, slots=True)
class Probe:
    """What looks into a step."""

    recorder: Recorder


class ProbedStep:
    """One step of a model that a probe looks into."""

    def __init__(self, probe: Probe, plan: Plan, pages: Pages) -> None:
        self.kernels, self.recorder, self.plan, self.pages = probe.recorder.kernels, probe.recorder, plan, pages
        self._subsets: dict[tuple[int, ...], Subset] = {}

    def run(self, before_layers: Callable[[], None]) -> Tensor:
        """The last residual [T, d_model] of all rows."""
        residual = self._embed()
        before_layers()
        at = 0
        for layer in self.recorder.layers:
            residual = self.kernels.layers(at, layer, residual, self.plan, self.pages)
            residual = self._layer(layer, residual)
            at = layer + 1
        residual = self.kernels.layers(at, self.kernels.config.n_layers, residual, self.plan, self.pages)
        self.recorder.finish(residual)
        return residual

    def _embed(self) -> Tensor:
        if not self.recorder.rows(-1, ("hook_embed", "hook_pos_embed")):
            return self.kernels.embed(self.plan)
        embedded = self.kernels.open_embed(self.plan)
        self.recorder.take("hook_embed", -1, embedded.tokens)
        if embedded.positions is not None:
            self.recorder.take("hook_pos_embed", -1, embedded.positions)
        return embedded.residual

    def _layer(self, layer: int, residual: Tensor) -> Tensor:
        take = self.recorder.take
        take(B + "hook_resid_pre", layer, residual)
        if self.recorder.inside(layer):
            residual = self._mlp(layer, self._attention(layer, residual))
        else:
            residual = self.kernels.layers(layer, layer + 1, residual, self.plan, self.pages)
        take(B + "hook_resid_post", layer, residual)
        return residual

    def _attention(self, layer: int, residual: Tensor) -> Tensor:
        kernels, take = self.kernels, self.recorder.take
        q = kernels.attention_input(layer, residual, self.plan, self.pages)
        if subset := self._subset(layer, (*NORM1, *QKV)):
            values = kernels.open_attention_input(layer, residual[subset.rows], subset.plan)
            self._take_norm(NORM1, layer, values.norm, subset)
            for name, value in zip(QKV, (values.q, values.k, values.v, values.rot_k), strict=True):
                take(name, layer, value, subset.rows)
        take(A + "hook_rot_q", layer, q)
        z, lse = kernels.paged_attention(layer, q, self.plan, self.pages)
        take(A + "hook_lse", layer, lse)
        self.recorder.attend(layer, q, lse, self.plan.batch, self.pages)
        take(A + "hook_z", layer, z)
        mid = kernels.attention_output(layer, z, residual)
        if subset := self._subset(layer, (*POST1, B + "hook_attn_out")):
            added = kernels.open_attention_output(layer, z[subset.rows], residual[subset.rows])
            self._take_norm(POST1, layer, added.norm, subset)
            take(B + "hook_attn_out", layer, added.added, subset.rows)
        if subset := self._subset(layer, (A + "hook_result",)):
            take(A + "hook_result", layer, results(kernels, layer, z[subset.rows]), subset.rows)
        take(B + "hook_resid_mid", layer, mid)
        return mid

    def _mlp(self, layer: int, mid: Tensor) -> Tensor:
        kernels, take = self.kernels, self.recorder.take
        hidden = kernels.mlp_input(layer, mid)
        if subset := self._subset(layer, (*NORM2, M + "hook_pre", M + "hook_pre_linear")):
            values = kernels.open_mlp_input(layer, mid[subset.rows])
            self._take_norm(NORM2, layer, values.norm, subset)
            take(M + "hook_pre", layer, values.pre, subset.rows)
            if values.pre_linear is not None:
                take(M + "hook_pre_linear", layer, values.pre_linear, subset.rows)
        take(M + "hook_post", layer, hidden)
        post = kernels.mlp_output(layer, hidden, mid)
        if subset := self._subset(layer, (*POST2, B + "hook_mlp_out")):
            added = kernels.open_mlp_output(layer, hidden[subset.rows], mid[subset.rows])
            self._take_norm(POST2, layer, added.norm, subset)
            take(B + "hook_mlp_out", layer, added.added, subset.rows)
        return post

    def _take_norm(self, names: tuple[str, str], layer: int, norm: Normed | None, subset: Subset) -> None:
        if norm is not None:
            self.recorder.take(names[0], layer, norm.scale, subset.rows)
            self.recorder.take(names[1], layer, norm.normalized, subset.rows)

    def _subset(self, layer: int, names: tuple[str, ...]) -> Subset | None:
        """The rows for which any of these points is wanted; None: none."""
        rows = tuple(self.recorder.rows(layer, names))
        if not rows:
            return None
        if rows not in self._subsets:
            places = torch.tensor(rows, device=self.plan.batch.positions.device)
            self._subsets[rows] = Subset(places, self.kernels.plan(chosen(self.plan.batch, places)))
        return self._subsets[rows]


def chosen(batch: Batch, rows: Tensor) -> Batch:
    """Rows of a batch, each as a sequence of one row."""
    sequences = torch.searchsorted(batch.query_starts, rows, right=True) - 1
    return Batch(
        batch.token_ids[rows], batch.positions[rows], batch.slots[rows], batch.store[rows],
        torch.arange(len(rows) + 1, device=rows.device), batch.lengths[sequences], batch.block_table[sequences],
        rows[:0], batch.page_size,
    )  # fmt: skip


def results(kernels: OpenKernels, layer: int, z: Tensor) -> Tensor:
    """What each head adds before bias and post-norm: z [rows, heads, d_head] through W_O, [rows, heads, d_model].

    Each head goes through the operation alone, among zeros; the bias is what zeros give.
    """
    rows, heads, _ = z.shape
    alone = z.float()[:, None] * torch.eye(heads, device=z.device)[None, :, :, None]
    alone = torch.cat([alone.flatten(0, 1), torch.zeros_like(alone[0, :1])])
    opened = kernels.open_attention_output(layer, alone, alone.new_zeros(len(alone), kernels.config.d_model))
    products = opened.added if opened.norm is None else opened.norm.normalized * opened.norm.scale
    return torch.unflatten(products[:-1] - products[-1], 0, (rows, heads))
