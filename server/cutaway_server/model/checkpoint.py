"""What a checkpoint is, whatever its format: a config, where each weight lies, and a reader of rows.

`huggingface.py` and `gguf_file.py` each open a path as a `Checkpoint`; `load_weights` turns one into `Weights`, row by
row from the memory map straight into the target dtype and device.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from cutaway_server.model.config import ModelConfig
from cutaway_server.request import SamplingOptions
from cutaway_server.text.tokenizer import TextModel


class TensorReader(Protocol):
    """Named tensors in memory-mapped files."""

    def names(self) -> frozenset[str]:
        """Every tensor's name."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Its shape, out-features first as torch has it."""

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of its first axis, dequantised to fp32 or as stored (F32, F16, BF16)."""

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


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An opened checkpoint."""

    config: ModelConfig
    layout: Layout
    reader: TensorReader
    text: TextModel
    eos_token_ids: frozenset[int]
    defaults: SamplingOptions = field(default_factory=SamplingOptions)  # from generation_config
    ignored: frozenset[str] = frozenset()  # tensors known to carry nothing (rotary tables and the like)
