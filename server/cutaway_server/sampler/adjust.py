"""What a request changes about the logits before a token is chosen: biases, penalties, bans and masks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cutaway_server.sampler.batch import Biases, Parameters, SamplingBatch, Seen
from cutaway_server.sampler.note import Note, unnoted

LARGEST = torch.finfo(torch.float32).max


def adjust(logits: Tensor, batch: SamplingBatch, note: Note = unnoted) -> Tensor:
    """The logits fp32 [R, V] as the rows want them: a copy, or the same tensor where nobody wants a change.

    Notes them "biased" and "penalised" where they are.
    """
    if batch.biases is None and batch.seen is None and batch.banned is None and batch.mask is None:
        return logits
    logits = logits.clone()
    if batch.biases is not None:
        _add(logits, batch.biases)
        note("biased", logits)
    if batch.seen is not None:
        _penalise(logits, batch.seen, batch.parameters)
        note("penalised", logits)
    if batch.banned is not None:
        logits[batch.banned.rows, batch.banned.tokens] = -torch.inf
    if batch.mask is not None:
        logits.masked_fill_(~allowed(batch.mask, logits.shape[1]), -torch.inf)
    return logits


def allowed(mask: Tensor, vocab_size: int) -> Tensor:
    """A bit mask int32 [R, words] as bool [R, vocab_size], lowest bit first."""
    bits = mask[:, :, None] >> torch.arange(32, dtype=torch.int32, device=mask.device)
    return (bits & 1).bool().flatten(1)[:, :vocab_size]


def _add(logits: Tensor, biases: Biases) -> None:
    where = (biases.rows, biases.tokens)
    logits[where] = logits[where] + biases.values.float()


def _penalise(logits: Tensor, seen: Seen, parameters: Parameters) -> None:
    """Repetition over prompt and output, as transformers has it; frequency and presence over output, as OpenAI."""
    repetition = parameters.repetition[seen.rows]
    before = logits[seen.rows, seen.tokens].double()
    values = torch.where(before < 0, before * repetition, before / repetition)
    values -= parameters.frequency[seen.rows] * seen.counts
    values -= parameters.presence[seen.rows] * (seen.counts > 0)
    logits[seen.rows, seen.tokens] = values.clamp_(max=LARGEST).float()


def masks(forced: Sequence[int | None], vocab_size: int) -> Tensor:
    """A bit mask int32 [R, words] that allows one token in each row, or all where there is None."""
    mask = torch.full((len(forced), -(-vocab_size // 32)), -1, dtype=torch.int32)
    for row, token in enumerate(forced):
        if token is not None:
            mask[row] = 0
            mask[row, token // 32] = (1 << token % 32) - (1 << 32 if token % 32 == 31 else 0)
    return mask
