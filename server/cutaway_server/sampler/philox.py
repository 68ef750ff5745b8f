"""Random numbers that are a function of (seed, index, position), on any device.

Philox4x32-10 of Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3" (SC11).
"""

from __future__ import annotations

import torch
from torch import Tensor

WORD = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10


def uniforms(seeds: Tensor, indices: Tensor, positions: Tensor) -> Tensor:
    """Numbers in [0, 1) with 53 random bits, fp64 [R], of int64 seeds, completion indices and positions [R].

    The seed is the key, low word first; the counter is position (low, high), index, 0.
    """
    counter = torch.stack([positions & WORD, (positions >> 32) & WORD, indices & WORD, torch.zeros_like(indices)])
    words = philox(counter, torch.stack([seeds & WORD, (seeds >> 32) & WORD]))
    return ((words[0] >> 5) * 2**26 + (words[1] >> 6)).double() * 2.0**-53


def philox(counter: Tensor, key: Tensor) -> Tensor:
    """Encrypt counters [4, R] under keys [2, R]; words are int64 in [0, 2^32)."""
    multipliers = torch.cat([key.new_full((1, 1), m) for m in MULTIPLIERS])  # made on the device: nothing waits
    rounds = torch.arange(ROUNDS, device=key.device)[:, None]
    keys = torch.stack([word + rounds * weyl for word, weyl in zip(key, WEYL, strict=True)], 1) & WORD  # [ROUNDS, 2, R]
    even, odd = counter[0::2], counter[1::2]
    for round_key in keys.unbind():
        product = even * multipliers  # its 64 bits are right though the sign wraps
        even = (((product >> 32) & WORD).flip(0) ^ odd) ^ round_key
        odd = (product & WORD).flip(0)
    return torch.stack([even[0], odd[0], even[1], odd[1]])
