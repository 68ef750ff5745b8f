"""Rotary position embedding: frequencies, with the ways of stretching them, and the rotation.

Sources: RoFormer (Su et al. 2021); linear: Chen et al. 2023; NTK: bloc97 2023; YaRN: Peng et al. 2023; llama3: the
Llama 3.1 release. The numbers equal those of Hugging Face transformers.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cutaway_server.architecture import Rope, RopeScaling


def inverse_frequencies(rope: Rope, context: int) -> Tensor:
    """Radians per position of each rotated pair, fp32 [dims / 2].

    `context` is the longest position served; only NTK scaling depends on it: past the trained context the base grows
    once, for that length, and not with every token, because keys already in the cache cannot be turned again.
    """
    scaling = rope.scaling
    theta = rope.theta
    if scaling is not None and scaling.kind == "ntk" and context > scaling.original_context:
        stretch = scaling.factor * context / scaling.original_context - (scaling.factor - 1)
        theta *= stretch ** (rope.dims / (rope.dims - 2))
    exponents = torch.arange(0, rope.dims, 2, dtype=torch.int64).float() / rope.dims
    inverse = 1.0 / theta**exponents
    if scaling is None or scaling.kind == "ntk":
        return inverse
    if scaling.kind == "linear":
        return inverse / scaling.factor
    if scaling.kind == "llama3":
        return _llama3(inverse, scaling)
    if scaling.kind == "yarn":
        return _yarn(inverse, rope, scaling)
    return inverse / torch.tensor(scaling.factors, dtype=torch.float32)


def amplitude(rope: Rope) -> float:
    """What cos and sin are multiplied by: 1, but for YaRN."""
    scaling = rope.scaling
    if scaling is None or scaling.kind != "yarn":
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return _mscale(scaling.factor, scaling.mscale) / _mscale(scaling.factor, scaling.mscale_all_dim)
    return _mscale(scaling.factor, 1.0)


def _mscale(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _llama3(inverse: Tensor, scaling: RopeScaling) -> Tensor:
    wavelength = 2 * math.pi / inverse
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    smooth = (scaling.original_context / wavelength - low) / (high - low)
    between = (1 - smooth) * inverse / scaling.factor + smooth * inverse
    scaled = torch.where(wavelength > scaling.original_context / low, inverse / scaling.factor, between)
    return torch.where(wavelength < scaling.original_context / high, inverse, scaled)


def _yarn(inverse: Tensor, rope: Rope, scaling: RopeScaling) -> Tensor:
    def dimension(rotations: float) -> float:
        turns = scaling.original_context / (rotations * 2 * math.pi)
        return rope.dims * math.log(turns) / (2 * math.log(rope.theta))

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dims - 1)
    high = high + 0.001 if low == high else high
    ramp = ((torch.arange(rope.dims // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return inverse / scaling.factor * ramp + inverse * (1 - ramp)


def rotation(inverse: Tensor, amplitude: float, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines fp32 [T, 1, dims / 2] for positions [T]."""
    angles = positions.float()[:, None, None] * inverse
    return angles.cos() * amplitude, angles.sin() * amplitude


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool) -> Tensor:
    """Turn the first `dims` of x [T, heads, d_head]; the rest stays as it is."""
    half = cos.shape[-1]
    turned, rest = x[..., : 2 * half], x[..., 2 * half :]
    if interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        return torch.cat([torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2), rest], -1)
    a, b = turned[..., :half], turned[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)
