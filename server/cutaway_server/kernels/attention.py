"""Attention over a paged KV cache in plain torch, with grouped queries, windows and soft-capping, in fp32."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cutaway_server.architecture import ModelConfig
from cutaway_server.cache.pages import Pages
from cutaway_server.kernels.plan import SPLIT, TILE, Plan, Split

TILES_AT_ONCE = 256  # bounds the gathered keys and values


def soft_cap(x: Tensor, cap: float | None) -> Tensor:
    """Cap * tanh(x / cap); x where there is no cap."""
    return x if cap is None else cap * torch.tanh(x / cap)


def paged_attention(config: ModelConfig, layer: int, q: Tensor, plan: Plan, pages: Pages) -> tuple[Tensor, Tensor]:
    """Attention of q [T, heads, d_head] over the stored keys: z like q, and the log-sum-exp of the scores [T, heads].

    Splits of the keys are merged one after the other (Milakov and Gimelshein 2018), always in order of position.
    """
    tiled = _tile(config, q, plan)
    state = _State.empty(tiled)
    for split in plan.splits[config.layers[layer].window]:
        for part in _parts(split, tiled.shape[0]):
            keys, values = (_gather(read, layer, part) for read in (pages.keys_of, pages.values_of))
            if part.beyond is not None:
                values.masked_fill_(part.beyond, 0.0)  # 0 x garbage must be 0
            state.merge(part.tiles, _scores(config, tiled, keys, part), values)
    return state.result(config, plan)


def attention_rows(
    config: ModelConfig, layer: int, q: Tensor, lse: Tensor, rows: Tensor, heads: Tensor, plan: Plan, pages: Pages
) -> Tensor:
    """Probabilities fp32 [pairs, longest length] of (row, head) pairs; 0 where a key is hidden or not there.

    `q` and `lse` are what paged_attention took and returned; `rows` and `heads` are [pairs].
    """
    batch = plan.batch
    sequences = torch.searchsorted(batch.query_starts, rows, right=True) - 1
    table = batch.block_table[sequences]
    keys = pages.keys_of(layer, (table, heads[:, None] // config.group)).flatten(1, 2)
    scores = soft_cap((keys @ q[rows, heads].unsqueeze(-1)).squeeze(-1) * config.scale, config.attention_softcap)
    places = torch.arange(keys.shape[1], device=q.device)
    queries = batch.positions[rows, None]
    hidden = places > queries
    if (window := config.layers[layer].window) is not None:
        hidden = hidden | (places <= queries - window)
    probabilities = torch.exp(scores - lse[rows, heads, None]).masked_fill(hidden, 0.0)
    return probabilities[:, : int(batch.lengths[sequences].max())]


class _State:
    """The running softmax of every tile: highest score, sum and weighted values of the splits merged so far."""

    def __init__(self, highest: Tensor, total: Tensor, out: Tensor) -> None:
        self.highest, self.total, self.out = highest, total, out

    @classmethod
    def empty(cls, tiled: Tensor) -> _State:
        highest = torch.full(tiled.shape[:-1], -torch.inf, dtype=torch.float32, device=tiled.device)
        return cls(highest, torch.zeros_like(highest), torch.zeros_like(tiled))

    def merge(self, tiles: Tensor | slice, scores: Tensor, values: Tensor) -> None:
        """Add one split: scores [n, kv_heads, TILE * group, SPLIT], values [n, kv_heads, SPLIT, d_head]."""
        before = self.highest[tiles]
        highest = torch.maximum(before, scores.amax(-1))
        base = highest.masked_fill(highest == -torch.inf, 0.0)  # a row that sees none of these keys
        weights = torch.exp(scores - base[..., None])
        keep = torch.exp(before - base)
        self.highest[tiles] = highest
        self.total[tiles] = self.total[tiles] * keep + weights.sum(-1)
        self.out[tiles] = self.out[tiles] * keep[..., None] + _batched(weights, values)

    def result(self, config: ModelConfig, plan: Plan) -> tuple[Tensor, Tensor]:
        out = _untile(config, self.out / self.total[..., None], plan)
        lse = _untile(config, (self.highest + self.total.log())[..., None], plan)
        return out, lse.squeeze(-1)


def _tile(config: ModelConfig, q: Tensor, plan: Plan) -> Tensor:
    """[T, heads, d] to [tiles, kv_heads, TILE * group, d]."""
    tiles = torch.unflatten(q[plan.rows], 2, (config.n_kv_heads, config.group))
    return tiles.transpose(1, 2).flatten(2, 3).contiguous()


def _untile(config: ModelConfig, x: Tensor, plan: Plan) -> Tensor:
    """[tiles, kv_heads, TILE * group, d] to [T, heads, d]."""
    rows = torch.unflatten(x, 2, (TILE, config.group)).transpose(1, 2).flatten(2, 3).flatten(0, 1)
    return rows[plan.places]


class _Part:
    """Some tiles of one split."""

    def __init__(self, split: Split, start: int, stop: int) -> None:
        per_tile = split.pages.shape[0] // split.hidden.shape[0]
        self.tiles = slice(start, stop) if split.tiles is None else split.tiles[start:stop]
        self.pages = split.pages[start * per_tile : stop * per_tile].view(-1, per_tile)
        self.hidden = split.hidden[start:stop]
        self.beyond = None if split.beyond is None else split.beyond[start:stop]


def _parts(split: Split, n_tiles: int) -> list[_Part]:
    n = n_tiles if split.tiles is None else split.tiles.shape[0]
    return [_Part(split, start, min(start + TILES_AT_ONCE, n)) for start in range(0, n, TILES_AT_ONCE)]


def _gather(read: Callable[[int, Tensor], Tensor], layer: int, part: _Part) -> Tensor:
    """One layer's pages [pages, kv_heads, page_size, d] to fp32 [n, kv_heads, SPLIT, d], a copy."""
    found = read(layer, part.pages).transpose(1, 2)  # [n, kv_heads, pages of a split, page_size, d]
    return found.contiguous().reshape(*found.shape[:2], SPLIT, found.shape[-1])


def _scores(config: ModelConfig, tiled: Tensor, keys: Tensor, part: _Part) -> Tensor:
    """Scores [n, kv_heads, TILE * group, SPLIT], hidden keys at -inf."""
    scores = _batched(tiled[part.tiles], keys.transpose(2, 3)) * config.scale
    by_row = torch.unflatten(soft_cap(scores, config.attention_softcap), 2, (TILE, config.group))
    return by_row.masked_fill_(part.hidden, -torch.inf).flatten(2, 3)


def _batched(a: Tensor, b: Tensor) -> Tensor:
    """Batched matrix product over the first two axes."""
    return torch.bmm(a.flatten(0, 1), b.flatten(0, 1)).view(*a.shape[:3], b.shape[-1])
