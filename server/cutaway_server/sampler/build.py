"""The completions of a step as one `SamplingBatch`, in a single transfer to the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from cutaway_server.sampler.batch import Banned, Biases, Parameters, Paths, SamplingBatch, Seen
from cutaway_server.sampler.state import FLOATS, Integers, Path, SamplerState


class BatchMaker:
    """Lays out one step after another. While the completions stay the same, nothing but their positions is laid out.

    Where nobody draws, positions are of no use and stay as they were.
    """

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self._states: list[SamplerState] = []
        self._batch: SamplingBatch | None = None

    def make(self, states: list[SamplerState], positions: Sequence[int]) -> SamplingBatch:
        """One row per state; see `build_batch`."""
        if self._batch is None or states != self._states:
            batch = build_batch(states, positions, self._vocab_size, self._device)
            lasting = not any(state.past_matters for state in states)
            self._states, self._batch = states, batch if lasting else None
            return batch
        if not self._batch.paths.drawing:
            return self._batch
        moved = torch.tensor(positions).to(self._device, non_blocking=True)
        return replace(self._batch, parameters=replace(self._batch.parameters, positions=moved))


def build_batch(
    states: Sequence[SamplerState],
    positions: Sequence[int],
    vocab_size: int,
    device: torch.device,
    masks: Tensor | None = None,
) -> SamplingBatch:
    """Lay out one row per state.

    Args:
        states: the completions, in the order of the logits' rows.
        positions: of the token each is about to get, counted from the prompt's start.
        vocab_size: ids are in [0, vocab_size).
        device: where the logits are.
        masks: int32 [R, ceil(vocab_size / 32)], bit t % 32 of word t / 32 allows token t.
    """
    numbers = np.stack([*np.stack([state.numbers for state in states]).T, np.array(positions, np.int64)])
    paths = np.array([state.path.value for state in states])
    by_path = [np.flatnonzero(paths == path.value) for path in Path]
    scored = np.flatnonzero([state.sampling.logprobs is not None for state in states])
    arrays = [numbers.ravel(), *by_path, scored, *_seen(states), *_biases(states), *_banned(states)]
    parts = _transfer(arrays, device)
    seen, biases, banned = parts[6:9], parts[9:12], parts[12:14]
    return SamplingBatch(
        _parameters(parts[0].view(numbers.shape)),
        _paths(parts[1:5], states, vocab_size),
        Seen(*seen) if len(seen[0]) else None,
        Biases(biases[0], biases[1], biases[2].view(torch.float64)) if len(biases[0]) else None,
        Banned(*banned) if len(banned[0]) else None,
        None if masks is None else masks.to(device),
        parts[5] if len(scored) else None,
        max((k for state in states if (k := state.sampling.logprobs) is not None), default=None),
    )


def _transfer(arrays: Sequence[Integers], device: torch.device) -> list[Tensor]:
    """All arrays as one, moved, and as they were."""
    moved = torch.from_numpy(np.concatenate(arrays)).to(device, non_blocking=True)
    ends = np.cumsum([len(array) for array in arrays]).tolist()
    return [moved[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def _parameters(numbers: Tensor) -> Parameters:
    """`SamplerState.numbers`, one column per row of the batch, and the positions."""
    return Parameters(*numbers[:FLOATS].view(torch.float64), *numbers[FLOATS:])


def _paths(rows: Sequence[Tensor], states: Sequence[SamplerState], vocab_size: int) -> Paths:
    greedy, plain, short, long = (part if len(part) else None for part in rows)
    filtered = [state.sampling for state in states if state.path in (Path.SHORT, Path.LONG)]
    return Paths(
        greedy,
        plain,
        short,
        long,
        longest_short=max((state.sampling.top_k for state in states if state.path is Path.SHORT), default=0),
        any_long_k=any(0 < state.sampling.top_k < vocab_size for state in states if state.path is Path.LONG),
        any_top_p=any(sampling.top_p < 1.0 for sampling in filtered),
        any_min_p=any(sampling.min_p > 0.0 for sampling in filtered),
        any_typical_p=any(sampling.typical_p < 1.0 for sampling in filtered),
    )


def _seen(states: Sequence[SamplerState]) -> list[Integers]:
    """Rows, tokens and counts."""
    parts = [(row, s.seen.tokens, s.seen.counts) for row, s in enumerate(states) if s.seen is not None]
    return [_rows(parts), _join([p[1] for p in parts]), _join([p[2] for p in parts])]


def _biases(states: Sequence[SamplerState]) -> list[Integers]:
    """Rows, tokens and values by their bits."""
    parts = [(row, *s.biases) for row, s in enumerate(states) if s.biases is not None]
    return [_rows(parts), _join([p[1] for p in parts]), _join([p[2] for p in parts])]


def _banned(states: Sequence[SamplerState]) -> list[Integers]:
    """Rows and tokens."""
    parts = [(row, tokens) for row, state in enumerate(states) if len(tokens := state.banned())]
    return [_rows(parts), _join([p[1] for p in parts])]


def _rows(parts: Sequence[tuple[int, Integers, *tuple[Integers, ...]]]) -> Integers:
    return np.repeat(np.array([p[0] for p in parts], np.int64), [len(p[1]) for p in parts])


def _join(arrays: list[Integers]) -> Integers:
    return np.concatenate(arrays) if arrays else np.zeros(0, np.int64)
