"""How paged attention splits one step's work, decided on the host once a step and used by every layer.

Queries go in tiles of TILE rows of one sequence, keys in splits of SPLIT tokens counted from position 0. A product has
the same shape whatever else is in the batch, and splits are merged in order, so a row's bits depend neither on its
neighbours nor on how its prompt was chunked.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cutaway_server.architecture import ModelConfig, Rope
from cutaway_server.kernels.batch import Batch
from cutaway_server.kernels.rope import amplitude, inverse_frequencies, rotation

TILE = 4
SPLIT = 256

Integers = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Split:
    """The same SPLIT keys for `n` tiles."""

    tiles: Tensor | None  # [n] indices of the tiles; None: all of them, in order
    pages: Tensor  # [n * SPLIT / page_size]
    hidden: Tensor  # bool [n, 1, TILE, 1, SPLIT]: this row must not see this key
    beyond: Tensor | None  # bool [n, 1, SPLIT, 1]: nothing is stored there (may be garbage); None: nowhere


@dataclass(frozen=True, slots=True)
class Plan:
    """A batch, tiled; what depends on a layer's window or rotation is made once for all layers that share it."""

    batch: Batch
    rows: Tensor  # [tiles, TILE]: rows of each tile; a tile that is not full repeats its last row
    places: Tensor  # [T]: each row's place in the flattened tiles
    splits: dict[int | None, tuple[Split, ...]] = field(default_factory=dict)  # by window
    rotations: dict[Rope, tuple[Tensor, Tensor]] = field(default_factory=dict)


def make_plan(config: ModelConfig, frequencies: dict[Rope, Tensor], batch: Batch) -> Plan:
    """Tile the batch. `frequencies` are the `inverse_frequencies` of every rotation in `config`."""
    starts = batch.query_starts.cpu().numpy()
    counts = np.diff(starts)
    tiles_of = -(-counts // TILE)
    first_tile = np.concatenate([[0], np.cumsum(tiles_of)])
    sequence = np.repeat(np.arange(len(counts)), tiles_of)
    first_row = starts[sequence] + TILE * (np.arange(first_tile[-1]) - first_tile[sequence])
    rows = np.minimum(first_row[:, None] + np.arange(TILE), starts[sequence + 1][:, None] - 1)
    row_sequence = np.repeat(np.arange(len(counts)), counts)
    places = TILE * first_tile[row_sequence] + np.arange(batch.n_rows) - starts[row_sequence]
    device = batch.token_ids.device
    positions = batch.positions.cpu().numpy()[rows]
    lengths = batch.lengths.cpu().numpy()[sequence]
    return Plan(
        batch,
        torch.from_numpy(rows).to(device),
        torch.from_numpy(places).to(device),
        {w: _splits(batch, sequence, positions, lengths, w) for w in set(config.windows)},
        rotations(config, frequencies, batch.positions),
    )


def rotations(
    config: ModelConfig, frequencies: dict[Rope, Tensor], positions: Tensor
) -> dict[Rope, tuple[Tensor, Tensor]]:
    """Cosines and sines fp32 [T, 1, dims / 2] of every rotation in `config`."""
    ropes = {layer.rope for layer in config.layers}
    return {rope: rotation(frequencies[rope], amplitude(rope), positions) for rope in ropes if rope is not None}


def all_frequencies(config: ModelConfig, context: int, device: torch.device) -> dict[Rope, Tensor]:
    """The inverse frequencies of every rotation in `config`."""
    ropes = {layer.rope for layer in config.layers}
    return {rope: inverse_frequencies(rope, context).to(device) for rope in ropes if rope is not None}


def _splits(
    batch: Batch, sequence: Integers, positions: Integers, lengths: Integers, window: int | None
) -> tuple[Split, ...]:
    """Which tiles each split of the keys concerns, seen through `window`."""
    oldest = np.zeros_like(sequence) if window is None else np.maximum(positions[:, 0] - window + 1, 0)
    first, last = oldest // SPLIT, positions[:, -1] // SPLIT
    table = batch.block_table.cpu().numpy()
    made = []
    for split in range(int(first.min()), int(last.max()) + 1):
        active = np.flatnonzero((first <= split) & (split <= last))
        if len(active):
            made.append(_split(batch, table, active, split, sequence, positions, lengths, window))
    return tuple(made)


def _split(
    batch: Batch, table: Integers, active: Integers, split: int, sequence: Integers, positions: Integers,
    lengths: Integers, window: int | None,
) -> Split:  # fmt: skip
    per_split = SPLIT // batch.page_size
    pages = np.zeros((len(active), per_split), dtype=np.int64)
    known = table[sequence[active], split * per_split : (split + 1) * per_split]
    pages[:, : known.shape[1]] = known
    keys = split * SPLIT + np.arange(SPLIT)
    queries = positions[active][:, :, None]
    hidden = keys > queries
    if window is not None:
        hidden |= keys <= queries - window
    beyond = keys >= lengths[active][:, None]
    device = batch.token_ids.device
    return Split(
        None if len(active) == len(sequence) else torch.from_numpy(active).to(device),
        torch.from_numpy(pages.reshape(-1)).to(device),
        torch.from_numpy(hidden[:, None, :, None, :]).to(device),
        torch.from_numpy(beyond[:, None, :, None]).to(device) if beyond.any() else None,
    )
