"""Where a checkpoint has each weight, and how its tensors are read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


class TensorReader(Protocol):
    """Named tensors in memory-mapped files."""

    def names(self) -> frozenset[str]:
        """Every tensor's name."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Its shape, out-features first as torch has it."""

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of its first axis, dequantised to fp32 or as stored (F32, F16, BF16)."""

    def format(self, name: str) -> str:
        """Its type, as GGUF names it: F32, BF16, Q4_K, ..."""

    def blocks(self, name: str) -> Tensor:
        """A quantised matrix's blocks as the file has them: uint8 [rows, bytes of a row]."""

    def digest(self) -> str:
        """Hex blake2b-128 of everything that decides the weights' values (slow: reads every byte)."""


@dataclass(frozen=True, slots=True)
class Piece:
    """One tensor of the checkpoint that fills some rows of one of ours.

    `transpose`: stored [in, out] (GPT-2). `add`: added in fp32 (Gemma's norms store w for 1 + w). `head_width`: rows
    of each head of that many are stored with the two halves interleaved, as llama.cpp permutes Q and K.
    """

    name: str
    transpose: bool = False
    add: float = 0.0
    head_width: int | None = None


# Where each weight lies: "embed", "unembed" (absent: tied), "positions", "final_norm.gain", "final_norm.bias",
# "layers.3.qkv", "layers.3.norm1.gain", ...: paths into `Weights`, each filled by pieces one below the other.
Layout = Mapping[str, tuple[Piece, ...]]


def halves_apart(rows: Tensor, head_width: int) -> Tensor:
    """Undo llama.cpp's permutation: in each head, row 2i goes to i and row 2i + 1 to i + head_width / 2."""
    heads = rows.reshape(-1, head_width // 2, 2, *rows.shape[1:])
    return heads.transpose(1, 2).reshape(rows.shape)
