"""Scores and probabilities of whole rows, in plain torch: what attention itself never writes down."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from cutaway_server.architecture import ModelConfig
from cutaway_server.cache.pages import Pages
from cutaway_server.kernels.attention import soft_cap
from cutaway_server.kernels.batch import Batch


def patterns(
    config: ModelConfig, layer: int, q: Tensor, lse: Tensor | None, batch: Batch, pages: Pages, width: int
) -> Tensor:
    """Probabilities (scores without `lse`) of q [T, heads, d_head] for all keys: [heads, T, width].

    What a row does not see is 0, or -inf in scores.
    """
    if batch.n_rows == len(batch.lengths):
        products = _of_one_row_each(config, layer, q, batch, pages, width)
    else:
        starts = batch.query_starts.tolist()
        products = torch.cat(
            [
                _of_one_sequence(config, layer, q[start:stop], batch.block_table[i], pages, width)
                for i, (start, stop) in enumerate(pairwise(starts))
            ],
            1,
        )
    scores = soft_cap(products * config.scale, config.attention_softcap)
    scores = scores.masked_fill_(hidden(config, layer, batch.positions, 0, width), -torch.inf)
    return scores if lse is None else torch.exp(scores - lse.T[..., None])


def hidden(config: ModelConfig, layer: int, positions: Tensor, start: int, n: int) -> Tensor:
    """Whether queries at `positions` must not see keys [start, start + n): bool [rows, n]."""
    places = torch.arange(start, start + n, device=positions.device)
    found = places > positions[:, None]
    if (window := config.layers[layer].window) is not None:
        found |= places <= positions[:, None] - window
    return found


def stored(pages: Pages, layer: int, table: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Keys and values fp32 [kv_heads, n, d_head] of one sequence, from position 0 on."""
    table = table[: -(-n // pages.page_size)]
    keys, values = pages.keys_of(layer, table), pages.values_of(layer, table)
    return keys.transpose(0, 1).flatten(1, 2)[:, :n], values.transpose(0, 1).flatten(1, 2)[:, :n]


def _of_one_sequence(config: ModelConfig, layer: int, q: Tensor, table: Tensor, pages: Pages, width: int) -> Tensor:
    keys, _ = stored(pages, layer, table, width)
    grouped = torch.unflatten(q.transpose(0, 1), 0, (config.n_kv_heads, config.group)).flatten(1, 2)
    return torch.unflatten(grouped @ keys.transpose(1, 2), 1, (config.group, len(q))).flatten(0, 1)


def _of_one_row_each(config: ModelConfig, layer: int, q: Tensor, batch: Batch, pages: Pages, width: int) -> Tensor:
    table = batch.block_table[:, : -(-width // pages.page_size)]
    keys = pages.keys_of(layer, table).transpose(1, 2).flatten(2, 3)[:, :, :width]
    grouped = torch.unflatten(q, 1, (config.n_kv_heads, config.group))  # each key is read once for all that share it
    return (grouped @ keys.transpose(2, 3)).flatten(1, 2).transpose(0, 1)
