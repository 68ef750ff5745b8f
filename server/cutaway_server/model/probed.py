"""A step that somebody looks at: the plain path but for the layers in question, and there only the rows asked for.

All rows go through the operations as always. What an operation hides is computed a second time, open, for the rows
looked at alone; their neighbours' values are never touched.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from cutaway_server.cache.pages import Pages
from cutaway_server.kernels.interface import OpenKernels
from cutaway_server.kernels.plan import Plan
from cutaway_server.kernels.reference import Added, Normed, activated
from cutaway_server.probe.editor import Editor
from cutaway_server.probe.knockout import Reader, attend_again, knocked_of
from cutaway_server.probe.recorder import Recorder

B = "blocks.{i}."
A, M = B + "attn.", B + "mlp."
NORM1, NORM2 = (B + "ln1.hook_scale", B + "ln1.hook_normalized"), (B + "ln2.hook_scale", B + "ln2.hook_normalized")
POST1 = (B + "ln1_post.hook_scale", B + "ln1_post.hook_normalized")
POST2 = (B + "ln2_post.hook_scale", B + "ln2_post.hook_normalized")
PRE = (M + "hook_pre", M + "hook_pre_linear")
QKV = (A + "hook_q", A + "hook_k", A + "hook_v", A + "hook_rot_k")


@dataclass(frozen=True, slots=True)
class Subset:
    """Some rows of a batch, ascending, as a batch of their own: each a sequence of one row."""

    rows: Tensor
    plan: Plan


@dataclass(frozen=True, slots=True)
class Probe:
    """What looks into a step, and what changes it."""

    recorder: Recorder
    editor: Editor


class ProbedStep:
    """One step of a model that a probe looks into."""

    def __init__(self, probe: Probe, plan: Plan, pages: Pages) -> None:
        self.kernels, self.plan, self.pages = probe.recorder.kernels, plan, pages
        self.recorder, self.editor = probe.recorder, probe.editor
        self._subsets: dict[tuple[int, ...], Subset] = {}

    def run(self, before_layers: Callable[[], None]) -> Tensor:
        """The last residual [T, d_model] of all rows."""
        residual = self._embed()
        before_layers()
        at = 0
        for layer in sorted({*self.recorder.layers, *self.editor.layers}):
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

    def _point(self, name: str, layer: int, values: Tensor, subset: Subset | None = None) -> Tensor:
        """Pass a point: captures see it, edits change it, captures that ask for it see it changed."""
        rows = None if subset is None else subset.rows
        self.recorder.take(name, layer, values, rows)
        values = self.editor.apply(name, layer, values, rows)
        self.recorder.take(name, layer, values, rows, after_edits=True)
        return values

    def _layer(self, layer: int, residual: Tensor) -> Tensor:
        residual = self._point(B + "hook_resid_pre", layer, residual)
        if self.recorder.inside(layer) or self.editor.inside(layer):
            residual = self._mlp(layer, self._attention(layer, residual))
        else:
            residual = self.kernels.layers(layer, layer + 1, residual, self.plan, self.pages)
        return self._point(B + "hook_resid_post", layer, residual)

    def _attention(self, layer: int, residual: Tensor) -> Tensor:
        kernels = self.kernels
        q = kernels.attention_input(layer, residual, self.plan, self.pages)
        if subset := self._subset(layer, (*NORM1, *QKV)):
            q = self._open_input(layer, residual, q, subset)
        q = self._point(A + "hook_rot_q", layer, q)
        z, lse = kernels.paged_attention(layer, q, self.plan, self.pages)
        reader = Reader(kernels.config, layer, self.plan.batch, self.pages)
        knocked = knocked_of(self.editor.knocked(layer), kernels.config.n_heads, q.device)
        if knocked:
            z, lse = attend_again(reader, q, z, lse, knocked)
        self.recorder.take(A + "hook_lse", layer, lse)
        self.recorder.attend(layer, q, lse, self.plan.batch, self.pages, knocked)
        z = self._point(A + "hook_z", layer, z)
        mid = kernels.attention_output(layer, z, residual)
        if subset := self._subset(layer, (A + "hook_result",)):
            self.recorder.take(A + "hook_result", layer, results(kernels, layer, z[subset.rows]), subset.rows)
        if subset := self._subset(layer, (*POST1, B + "hook_attn_out")):
            added = kernels.open_attention_output(layer, z[subset.rows], residual[subset.rows])
            self._take_norm(POST1, layer, added.norm, subset)
            mid = self._added(B + "hook_attn_out", layer, added, subset, residual, mid)
        return self._point(B + "hook_resid_mid", layer, mid)

    def _open_input(self, layer: int, residual: Tensor, q: Tensor, subset: Subset) -> Tensor:
        """Queries, keys and values of some rows, every value in hand; stores the keys and values that were changed."""
        values = self.kernels.open_attention_input(layer, residual[subset.rows], subset.plan)
        self._take_norm(NORM1, layer, values.norm, subset)
        edited_q, edited_k, edited_v = (
            self._point(name, layer, value, subset)
            for name, value in zip(QKV[:3], (values.q, values.k, values.v), strict=True)
        )
        rot_k = values.rot_k
        turning, turning_k = _differ((values.q, edited_q)), _differ((values.k, edited_k))
        if len(turning):
            q = q.clone()
            turned, _ = self._turned(layer, edited_q, edited_k, subset, turning)
            q[subset.rows[turning]] = turned.to(q.dtype)
        if len(turning_k):
            rot_k = rot_k.clone()
            _, rot_k[turning_k] = self._turned(layer, edited_q, edited_k, subset, turning_k)
        edited_rot_k = self._point(QKV[3], layer, rot_k, subset)
        if len(stored := _differ((values.rot_k, edited_rot_k), (values.v, edited_v))):
            slots = subset.plan.batch.slots[stored]
            self.pages.store(layer, slots, edited_rot_k[stored].float(), edited_v[stored].float())
        return q

    def _turned(self, layer: int, q: Tensor, k: Tensor, subset: Subset, places: Tensor) -> tuple[Tensor, Tensor]:
        """QK-norm and rotation of some of a subset's rows."""
        plan = self.kernels.plan(self.plan.batch.chosen(subset.rows[places]))
        return self.kernels.turn(layer, q[places], k[places], plan)

    def _mlp(self, layer: int, mid: Tensor) -> Tensor:
        kernels = self.kernels
        hidden = kernels.mlp_input(layer, mid)
        if subset := self._subset(layer, (*NORM2, *PRE)):
            values = kernels.open_mlp_input(layer, mid[subset.rows])
            self._take_norm(NORM2, layer, values.norm, subset)
            pre = self._point(PRE[0], layer, values.pre, subset)
            linear = values.pre_linear
            gates = [(values.pre, pre)]
            if linear is not None:
                linear = self._point(PRE[1], layer, linear, subset)
                gates.append((linear if values.pre_linear is None else values.pre_linear, linear))
            if len(changed := _differ(*gates)):
                post = activated(kernels.config, _row_by_row(pre[changed].float()))
                post = post if linear is None else post * linear[changed].float()
                hidden = hidden.clone()
                hidden[subset.rows[changed]] = post.to(hidden.dtype)
        hidden = self._point(M + "hook_post", layer, hidden)
        post = kernels.mlp_output(layer, hidden, mid)
        if subset := self._subset(layer, (*POST2, B + "hook_mlp_out")):
            added = kernels.open_mlp_output(layer, hidden[subset.rows], mid[subset.rows])
            self._take_norm(POST2, layer, added.norm, subset)
            post = self._added(B + "hook_mlp_out", layer, added, subset, mid, post)
        return post

    def _added(self, name: str, layer: int, added: Added, subset: Subset, before: Tensor, after: Tensor) -> Tensor:
        """The residual `after` an operation that adds to `before`, with what it adds to some rows edited."""
        edited = self._point(name, layer, added.added, subset)
        changed = _differ((added.added, edited))
        if not len(changed):
            return after
        rows = subset.rows[changed]
        after = after.clone()
        after[rows] = before[rows] + edited[changed]
        return after

    def _take_norm(self, names: tuple[str, str], layer: int, norm: Normed | None, subset: Subset) -> None:
        if norm is not None:
            self.recorder.take(names[0], layer, norm.scale, subset.rows)
            self.recorder.take(names[1], layer, norm.normalized, subset.rows)

    def _subset(self, layer: int, names: tuple[str, ...]) -> Subset | None:
        """The rows for which any of these points is wanted or changed; None: none."""
        rows = tuple(sorted({*self.recorder.rows(layer, names), *self.editor.rows(layer, names)}))
        if not rows:
            return None
        if rows not in self._subsets:
            places = torch.tensor(rows, device=self.plan.batch.positions.device)
            self._subsets[rows] = Subset(places, self.kernels.plan(self.plan.batch.chosen(places)))
        return self._subsets[rows]


def _row_by_row(x: Tensor) -> Tensor:
    """The same values [rows, n], laid out so that torch goes through each row by itself.

    It takes the last elements of a contiguous tensor one by one, by other means than those it takes by the vector, and
    which ones are the last would depend on how many rows there are.
    """
    return F.pad(x, (0, 1))[:, :-1]


def _differ(*pairs: tuple[Tensor, Tensor]) -> Tensor:
    """Rows of which any pair differs: what an edit left as it was keeps the bits that the kernels gave it."""
    differ = [(before != after).flatten(1).any(1) for before, after in pairs if before is not after]
    if not differ:
        return torch.zeros(0, dtype=torch.int64, device=pairs[0][0].device)
    return torch.stack(differ).any(0).nonzero().squeeze(1)


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
