"""Log-probabilities of prompt tokens, each given those before it."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cutaway_server.errors import EngineFailed
from cutaway_server.model.transformer import Transformer
from cutaway_server.request import Logprobs, PromptScored
from cutaway_server.sampler import log_probabilities
from cutaway_server.scheduler import Sequence

ROWS_AT_ONCE = 64  # bounds the logits in memory: 64 rows of a vocabulary of 262,144 are 64 MiB


def score(
    model: Transformer, sequence: Sequence, positions: NDArray[np.int64], residual: Tensor
) -> Iterator[PromptScored]:
    """Score the tokens that follow `positions` [R] of the prompt, from their last residuals [R, d_model].

    Raises:
        EngineFailed: the model's logits are not finite.
    """
    inside = positions < sequence.prompt_length - 1
    positions, residual = positions[inside], residual[torch.from_numpy(inside).to(residual.device)]
    top = sequence.request.sampling.prompt_logprobs or 0
    for start in range(0, len(positions), ROWS_AT_ONCE):
        part = positions[start : start + ROWS_AT_ONCE] + 1
        tokens = [sequence.tokens[position] for position in part]
        logits = model.logits(residual[start : start + ROWS_AT_ONCE])
        chosen, top_ids, top_values = log_probabilities(logits, torch.tensor(tokens, device=logits.device), top)
        logprobs = tuple(
            Logprobs(value, tuple(zip(ids, values, strict=True)))
            for value, ids, values in zip(chosen.tolist(), top_ids.tolist(), top_values.tolist(), strict=True)
        )
        if not all(map(math.isfinite, chosen.tolist())):
            raise EngineFailed("the prompt can't be scored: the model's logits are not finite")
        yield PromptScored(int(part[0]), tuple(tokens), logprobs)
