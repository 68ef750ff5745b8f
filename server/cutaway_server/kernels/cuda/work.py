"""Which tile of queries reads which keys: lists made on the host once a step, for every layer.

Rows are tiled within their sequence. Prompts of at least PROMPT_ROWS matrix rows may go to `prefill.py` in large tiles;
all others go to `split.py` in small ones, with an item for every 256 keys of each tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cutaway_server.architecture import ModelConfig
from cutaway_server.kernels.batch import Batch
from cutaway_server.kernels.cuda.launch import power_of_two
from cutaway_server.kernels.plan import Plan

SPLIT = 256
PROMPT_ROWS = 64  # matrix rows of a large tile
ITEMS_AT_ONCE = 2048  # bounds what the splits of one launch leave to be merged

Integers = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Splits:
    """Work of `split.py`, int32 on the device. -1 in the first line of items or rows: nothing to do."""

    tiles: Tensor  # [4, n]: first row, rows, sequence, item of the tile's split 0
    items: Tensor  # [2, n]: tile, split
    rows: Tensor  # [3, n]: row, its tile, its place in the tile


@dataclass(frozen=True, slots=True)
class CudaPlan(Plan):
    """A plan as the Triton kernels take it: its tiles are in `splits` (few rows) and `prompts` (many rows)."""

    work: tuple[Splits, ...] = ()
    prompts: Tensor | None = None  # int32 [3, n]: first row, rows, sequence


@dataclass(frozen=True, slots=True)
class Layout:
    """A batch's integers on the host."""

    starts: Integers  # [B + 1]
    last: Integers  # [B]: position of each sequence's last row

    @classmethod
    def of(cls, batch: Batch) -> Layout:
        """Read from the batch; waits for the device if it is there."""
        starts = batch.query_starts.cpu().numpy()
        return cls(starts, batch.positions.cpu().numpy()[starts[1:] - 1])


def matrix_rows(config: ModelConfig) -> int:
    """Rows of a small tile's matrix: at least 16, which is what tensor cores take."""
    return max(16, power_of_two(config.group))


def tile_work(
    config: ModelConfig, layout: Layout, device: torch.device, *, large_tiles: bool
) -> tuple[tuple[Splits, ...], Tensor | None]:
    """The step's work: small tiles in launches of bounded size, and large tiles where prompts may have them."""
    counts = np.diff(layout.starts)
    prompt = (counts * config.group >= PROMPT_ROWS) & large_tiles
    tiles = _tiles(layout, np.flatnonzero(~prompt), matrix_rows(config) // config.group)
    large = _tiles(layout, np.flatnonzero(prompt), max(PROMPT_ROWS, power_of_two(config.group)) // config.group)
    prompts = torch.from_numpy(large[:3].astype(np.int32)).to(device) if large.shape[1] else None
    return tuple(_splits(part, device) for part in _launches(tiles)), prompts


def _tiles(layout: Layout, sequences: Integers, tile: int) -> Integers:
    """Tiles of `tile` rows of these sequences, [4, n]: first row, rows, sequence, splits."""
    counts = np.diff(layout.starts)[sequences]
    n_tiles = -(-counts // tile)
    sequence = np.repeat(sequences, n_tiles)
    within = np.arange(n_tiles.sum()) - np.repeat(np.cumsum(n_tiles) - n_tiles, n_tiles)
    first = layout.starts[sequence] + within * tile
    rows = np.minimum(tile, layout.starts[sequence + 1] - first)
    last = layout.last[sequence] - (layout.starts[sequence + 1] - first - rows)
    return np.stack([first, rows, sequence, last // SPLIT + 1])


def _launches(tiles: Integers) -> Iterator[Integers]:
    """The tiles in parts of at most ITEMS_AT_ONCE splits (or one tile)."""
    start, n = 0, tiles.shape[1]
    while start < n:
        items = np.cumsum(tiles[3, start:])
        stop = start + max(1, int(np.searchsorted(items, ITEMS_AT_ONCE, side="right")))
        yield tiles[:, start:stop]
        start = stop


def _splits(tiles: Integers, device: torch.device) -> Splits:
    arrays = split_arrays(tiles)
    return Splits(*(torch.from_numpy(array).to(device) for array in arrays))


def split_arrays(tiles: Integers) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]:
    """`Splits` on the host, of tiles [4, n]."""
    first, rows, _, splits = tiles
    tile = np.repeat(np.arange(tiles.shape[1]), splits)
    first_item = np.cumsum(splits) - splits
    row_tile = np.repeat(np.arange(tiles.shape[1]), rows)
    place = np.arange(rows.sum()) - np.repeat(np.cumsum(rows) - rows, rows)
    lists = (
        [*tiles[:3], first_item],
        [tile, np.arange(len(tile)) - first_item[tile]],
        [first[row_tile] + place, row_tile, place],
    )
    made = [np.stack(list_).astype(np.int32) for list_ in lists]
    return made[0], made[1], made[2]
