"""Attention of queries that are kept from some keys: computed again for those queries, over all the keys that are left.

Taking p_j v_j from the output would fail where a key has much of the mass: what remains is the difference of two nearly
equal numbers. Here the softmax is made anew over the remaining keys.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from cutaway_server.architecture import ModelConfig
from cutaway_server.cache.pages import Pages
from cutaway_server.edits import KnockOut
from cutaway_server.kernels.attention import soft_cap
from cutaway_server.kernels.batch import Batch
from cutaway_server.kernels.patterns import hidden, stored
from cutaway_server.kernels.plan import SPLIT, TILE
from cutaway_server.probe.editor import Marked

ROWS_AT_ONCE = 256  # bounds the keys and values that are laid out beside each tile


@dataclass(frozen=True, slots=True)
class Reader:
    """Where one layer's keys and values are, in one step."""

    config: ModelConfig
    layer: int
    batch: Batch
    pages: Pages


@dataclass(frozen=True, slots=True, eq=False)
class Knocked:
    """What is added to the scores of some queries of one sequence: [heads, rows, keys]."""

    sequence: int
    rows: Tensor  # of the batch, ascending
    positions: Tensor
    bias: Tensor
    heads: tuple[int, ...]  # the query heads concerned, ascending


def knocked_of(marked: Sequence[Marked], n_heads: int, device: torch.device) -> list[Knocked]:
    """One for each sequence that has knock-outs in a layer; those of one query add up."""
    by_sequence: defaultdict[int, list[Marked]] = defaultdict(list)
    for each in marked:
        by_sequence[each.sequence].append(each)
    return [_knocked(sequence, several, n_heads, device) for sequence, several in by_sequence.items()]


def _knocked(sequence: int, marked: list[Marked], n_heads: int, device: torch.device) -> Knocked:
    positions = {row: position for each in marked for row, position in zip(each.rows, each.positions, strict=True)}
    rows = sorted(positions)
    place = {row: i for i, row in enumerate(rows)}
    bias = torch.zeros(n_heads, len(rows), max(positions.values()) + 1)
    concerned: set[int] = set()
    for each in marked:
        edit = each.edit
        assert isinstance(edit, KnockOut)
        heads = edit.heads or tuple(range(n_heads))
        concerned |= set(heads)
        weight = math.log(edit.factor) if edit.factor else -math.inf
        at = torch.tensor([place[row] for row in each.rows])
        for start, stop in edit.keys:
            keys = torch.arange(start, max(start, min(stop, bias.shape[-1])))
            bias[torch.tensor(heads)[:, None, None], at[None, :, None], keys] += weight
    return Knocked(
        sequence, torch.tensor(rows, device=device), torch.tensor([positions[row] for row in rows], device=device),
        bias.to(device), tuple(sorted(concerned)),
    )  # fmt: skip


def attend_again(
    reader: Reader, q: Tensor, z: Tensor, lse: Tensor, knocked: Sequence[Knocked]
) -> tuple[Tensor, Tensor]:
    """What attention left, z [T, heads, d_head] and log-sum-exps [T, heads], with what is knocked out computed anew."""
    z, lse = z.clone(), lse.clone()
    for each in knocked:
        heads = torch.tensor(each.heads, device=q.device)
        for start in range(0, len(each.rows), ROWS_AT_ONCE):
            part = slice(start, start + ROWS_AT_ONCE)
            rows = each.rows[part]
            out, total = _attend(reader, q[rows].float(), each.sequence, each.positions[part], each.bias[:, part])
            z[rows[:, None], heads] = out[:, heads].to(z.dtype)
            lse[rows[:, None], heads] = total[:, heads]
    return z, lse


def _attend(reader: Reader, q: Tensor, sequence: int, positions: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Attention of queries [rows, heads, d_head] of one sequence: out like q, and log-sum-exps [rows, heads].

    Tiles of TILE rows and splits of SPLIT keys make every product the same shape, whatever else is in the step, and
    splits are merged in order: a row's bits do not depend on its neighbours.
    """
    config, n = reader.config, int(positions.max()) + 1
    tiled = torch.arange(-(-len(q) // TILE) * TILE, device=q.device).clamp(max=len(q) - 1)
    queries = torch.unflatten(q[tiled], 0, (-1, TILE)).transpose(1, 2)  # [tiles, heads, TILE, d_head]
    queries = torch.unflatten(queries, 1, (config.n_kv_heads, config.group)).flatten(2, 3)
    keys, values = stored(reader.pages, reader.layer, reader.batch.block_table[sequence], n)
    highest = torch.full(queries.shape[:-1], -torch.inf, device=q.device)
    total, out = torch.zeros_like(highest), torch.zeros_like(queries)
    for start in range(0, n, SPLIT):
        k, v = (F.pad(x[:, start : start + SPLIT], (0, 0, 0, max(0, start + SPLIT - n))) for x in (keys, values))
        unseen = hidden(config, reader.layer, positions[tiled], start, SPLIT)  # [rows, SPLIT]
        added = F.pad(bias[:, tiled, start : start + SPLIT], (0, SPLIT - bias[:, :, start : start + SPLIT].shape[-1]))
        added = torch.unflatten(added.masked_fill(unseen, -torch.inf), 1, (-1, TILE)).transpose(0, 1)
        added = torch.unflatten(added, 1, (config.n_kv_heads, config.group)).flatten(2, 3)
        scores = soft_cap(_products(queries, k.transpose(1, 2)) * config.scale, config.attention_softcap) + added
        before, highest = highest, torch.maximum(highest, scores.amax(-1))
        base = highest.masked_fill(highest == -torch.inf, 0.0)  # a row that sees none of these keys
        weights, keep = torch.exp(scores - base[..., None]), torch.exp(before - base)
        total = total * keep + weights.sum(-1)
        out = out * keep[..., None] + _products(weights, v)
    found = torch.cat([out / total[..., None], (highest + total.log())[..., None]], -1)
    found = torch.unflatten(found, 2, (config.group, TILE)).flatten(1, 2).transpose(1, 2).flatten(0, 1)[: len(q)]
    return found[..., :-1], found[..., -1]


def _products(a: Tensor, b: Tensor) -> Tensor:
    """Products of a [tiles, kv_heads, x, y] with b [kv_heads, y, z], each computed by itself."""
    wide = b.expand(len(a), *b.shape)
    return torch.bmm(a.flatten(0, 1), wide.flatten(0, 1)).view(*a.shape[:3], b.shape[-1])
