"""One number in [0, 1) to one token, by inverse CDF. A token of likelihood zero is never drawn.

Sums over a vocabulary go in two steps, blocks and then inside one block: a block is summed in fp32, in a shape that
does not depend on the rows; what is summed over blocks, or inside one, is integers.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import pad

BLOCK = 256
ONE = 2.0**42  # 2^20 weights fit int64


def distances(logits: Tensor, highest: Tensor, temperature: Tensor) -> Tensor:
    """How far each logit is below its row's highest, in units of the temperature: fp32 [R, V], 0 to +inf.

    Subtracting first keeps huge logits and small temperatures finite.
    """
    below = highest[:, None] - logits
    return below.div_(temperature.float()[:, None]).abs_()  # abs: no minus zero


def likelihoods(logits: Tensor, highest: Tensor, temperature: Tensor) -> Tensor:
    """exp(-distances), in fewer passes: fp32 [R, V], 0 to 1."""
    return (logits - highest[:, None]).div_(temperature.float()[:, None]).exp_()


def blocks(likelihood: Tensor) -> Tensor:
    """fp32 [R, V] as [R, ceil(V / BLOCK), BLOCK], with zeros at the end."""
    missing = -likelihood.shape[1] % BLOCK
    return (pad(likelihood, (0, missing)) if missing else likelihood).view(len(likelihood), -1, BLOCK)


def draw(likelihood: Tensor, uniform: Tensor) -> Tensor:
    """Draw places from likelihoods fp32 [R, V], in order of places, by numbers fp64 [R]."""
    parts = blocks(likelihood)
    block, rest = invert(parts.sum(2), uniform)
    inside = parts.gather(1, block[:, None, None].expand(-1, 1, BLOCK)).squeeze(1)
    place, _ = invert(inside, rest)
    return (block * BLOCK + place).clamp_(max=likelihood.shape[1] - 1)


def invert(weights: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Find where the running sum of weights [R, N] passes `uniform` of the total: place, and how far into it."""
    scaled = (weights.double() / weights.amax(1, keepdim=True)).mul_(ONE).ceil_().long()  # ceil: none is lost
    running = scaled.cumsum(1)
    total = running[:, -1]
    target = uniform * total
    # Rounding may reach the total, and rows that are not valid hold anything: both stay inside.
    aim = target.long().minimum(total - 1)
    place = (running <= aim[:, None]).sum(1, keepdim=True).clamp_(max=weights.shape[1] - 1)
    width = scaled.gather(1, place)
    into = (target[:, None] - running.gather(1, place) + width) / width
    return place.squeeze(1), into.squeeze(1).clamp_(0.0, 1.0)
