"""What the model itself believes: log-probabilities of the logits as they are."""

from __future__ import annotations

from torch import Tensor

from cutaway_server.sampler.draw import blocks
from cutaway_server.sampler.order import least


def log_probabilities(logits: Tensor, tokens: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Natural log-probabilities under logits [R, V]: of tokens [R], and of the k likeliest, likeliest first.

    Returns:
        fp32 [R], int64 [R, min(k, V)] and fp32 [R, min(k, V)].
    """
    logits = logits.float()
    normaliser = _log_sum_exp(logits)
    chosen = logits.gather(1, tokens[:, None]) - normaliser
    if k == 0:
        return chosen.float().squeeze(1), tokens.new_zeros(len(tokens), 0), logits.new_zeros(len(tokens), 0)
    negated, top = least(-logits, k)
    return chosen.float().squeeze(1), top, (-negated - normaliser).float()


def _log_sum_exp(logits: Tensor) -> Tensor:
    """fp64 [R, 1], in an order of summing that the other rows have no part in."""
    highest = logits.amax(1, keepdim=True)
    likelihood = (logits - highest).exp_()
    return highest.double() + blocks(likelihood).sum(2).double().sum(1, keepdim=True).log_()
