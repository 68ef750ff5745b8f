"""GGUF's quantised blocks taken apart: integers, scales and minima, as llama.cpp's ggml-common.h lays them out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class BlockFields:
    """What some rows' blocks hold.

    `integers` uint8 [n, blocks, weights] as stored; `scales` fp16 [n, blocks], with minima [n, blocks, 2]; `parts`
    uint8 [n, blocks, groups of 32, 2], as `quantized.Integers` has them.
    """

    integers: Tensor
    scales: Tensor
    parts: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Block:
    """One type of block. Its integers are stored `stored_above` what they stand for; `scales` are the bytes of fp16."""

    n_weights: int
    n_bytes: int
    stored_above: int
    scales: slice
    split: Callable[[Tensor], BlockFields]


def _halves(raw: Tensor) -> Tensor:
    """Fp16 [..., n] of bytes [..., 2n], which start at odd places of their blocks."""
    return raw.contiguous().view(torch.float16)


def _nibbles(raw: Tensor) -> Tensor:
    """The low halves of bytes, then the high ones: [..., n] to [..., 2n]."""
    return torch.cat([raw & 15, raw >> 4], -1)


def _bits(raw: Tensor) -> Tensor:
    """Bits of bytes [..., n], lowest first: [..., 8n]."""
    return (raw[..., None] >> torch.arange(8, dtype=torch.uint8) & 1).flatten(-2)


def _q8_0(raw: Tensor) -> BlockFields:
    return BlockFields(raw[..., 2:] + 128, _halves(raw[..., :2])[..., 0])  # wraps: signed to stored + 128


def _q4_0(raw: Tensor) -> BlockFields:
    return BlockFields(_nibbles(raw[..., 2:]), _halves(raw[..., :2])[..., 0])


def _q4_1(raw: Tensor) -> BlockFields:
    return BlockFields(_nibbles(raw[..., 4:]), _halves(raw[..., :4]))


def _q5_0(raw: Tensor) -> BlockFields:
    return BlockFields(_nibbles(raw[..., 6:]) | _bits(raw[..., 2:6]) << 4, _halves(raw[..., :2])[..., 0])


def _q5_1(raw: Tensor) -> BlockFields:
    return BlockFields(_nibbles(raw[..., 8:]) | _bits(raw[..., 4:8]) << 4, _halves(raw[..., :4]))


def _six_bit_parts(raw: Tensor) -> Tensor:
    """Parts of scale and minimum [..., 8, 2] of eight groups, six bits each in twelve bytes."""
    first, second, rest = raw[..., :4], raw[..., 4:8], raw[..., 8:]
    scales = torch.cat([first & 63, (rest & 15) | (first >> 6) << 4], -1)
    minima = torch.cat([second & 63, (rest >> 4) | (second >> 6) << 4], -1)
    return torch.stack([scales, minima], -1)


def _nibbles_of_pairs(raw: Tensor) -> Tensor:
    """Bytes of 32 have one group in their low halves and the next in their high ones: [..., 128] to [..., 256]."""
    return _nibbles(torch.unflatten(raw, -1, (-1, 32))).flatten(-2)


def _q4_k(raw: Tensor) -> BlockFields:
    return BlockFields(_nibbles_of_pairs(raw[..., 16:]), _halves(raw[..., :4]), _six_bit_parts(raw[..., 4:16]))


def _q5_k(raw: Tensor) -> BlockFields:
    group = torch.arange(8, dtype=torch.uint8)[:, None]
    high = (raw[..., None, 16:48] >> group & 1).flatten(-2)
    integers = _nibbles_of_pairs(raw[..., 48:]) | high << 4
    return BlockFields(integers, _halves(raw[..., :4]), _six_bit_parts(raw[..., 4:16]))


def _q6_k(raw: Tensor) -> BlockFields:
    low = torch.unflatten(raw[..., :128], -1, (2, 64))
    low = torch.cat([low & 15, low >> 4], -1)  # [..., 2, 128]
    pairs = torch.unflatten(raw[..., 128:192], -1, (2, 1, 32))
    high = (pairs >> torch.tensor([0, 2, 4, 6], dtype=torch.uint8)[:, None] & 3).flatten(-2)
    parts = torch.unflatten(raw[..., 192:208], -1, (8, 2))
    return BlockFields((low | high << 4).flatten(-2), _halves(raw[..., 208:])[..., 0], parts)


BLOCKS = {
    "Q4_0": Block(32, 18, 8, slice(0, 2), _q4_0),
    "Q4_1": Block(32, 20, 0, slice(0, 4), _q4_1),
    "Q5_0": Block(32, 22, 16, slice(0, 2), _q5_0),
    "Q5_1": Block(32, 24, 0, slice(0, 4), _q5_1),
    "Q8_0": Block(32, 34, 128, slice(0, 2), _q8_0),
    "Q4_K": Block(256, 144, 0, slice(0, 4), _q4_k),
    "Q5_K": Block(256, 176, 0, slice(0, 4), _q5_k),
    "Q6_K": Block(256, 210, 32, slice(208, 210), _q6_k),
}
