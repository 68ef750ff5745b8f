"""What a checkpoint is, whatever its format: a config, where each weight lies, and a reader of rows.

`huggingface.py` and `gguf_file.py` each open a path as a `Checkpoint`; `load_weights` turns one into `Weights`, row by
row from the memory map straight into the target dtype and device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Protocol

import torch
from torch import Tensor

from cutaway_server.architecture import ModelConfig
from cutaway_server.errors import ModelError
from cutaway_server.kernels.weights import LayerWeights, Matrix, Norm, Weights
from cutaway_server.model.quantized import read_quantized
from cutaway_server.model.shapes import Shape, part_shapes
from cutaway_server.request import SamplingOptions
from cutaway_server.text.tokenizer import TextModel

CHUNK_BYTES = 16 << 20  # fp32 values read at a time

Progress = Callable[[int, int], None]  # values loaded so far, values in all


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


def load_weights(
    checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, progress: Progress | None = None, *,
    as_is: bool = False,
) -> Weights:  # fmt: skip
    """Every weight: matrices in `dtype`, norms and biases in fp32.

    `as_is` keeps matrices quantised that the checkpoint has so, in a type that is served.

    Raises:
        ModelError: names tensors that are missing, unexpected, of another shape, or too large for `dtype`.
    """
    _check_names(checkpoint)
    shapes = {path: _shape(checkpoint, path) for path in checkpoint.layout}
    total, done = sum(prod(shape) for shape in shapes.values()), 0

    def advance(values: int) -> None:
        nonlocal done
        done += values
        if progress is not None:
            progress(done, total)

    tensors: dict[str, Matrix] = {}
    for path, shape in shapes.items():
        if as_is and (kept_quantized := read_quantized(path, checkpoint.layout[path], checkpoint.reader)) is not None:
            tensors[path] = kept_quantized
            advance(prod(shape))
            continue
        kept = dtype if len(shape) > 1 else torch.float32
        plain = torch.empty(shape, dtype=kept, device=device)
        _fill(plain, checkpoint.layout[path], checkpoint.reader, advance)
        tensors[path] = plain
    return _assemble(checkpoint.config, tensors)


def _check_names(checkpoint: Checkpoint) -> None:
    present = checkpoint.reader.names()
    wanted = {piece.name for pieces in checkpoint.layout.values() for piece in pieces}
    if missing := sorted(wanted - present):
        raise ModelError(f"the checkpoint lacks {_listed(missing)}")
    if unexpected := sorted(present - wanted - checkpoint.ignored):
        raise ModelError(f"the checkpoint has tensors that no part of this model takes: {_listed(unexpected)}")


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"


def _shape(checkpoint: Checkpoint, path: str) -> Shape:
    """The shape at `path`, once its pieces are found to have theirs."""
    pieces, parts = checkpoint.layout[path], part_shapes(checkpoint.config, path)
    whole = (sum(part[0] for part in parts), *parts[0][1:])
    assert len(pieces) in (1, len(parts)), path
    for piece, part in zip(pieces, parts if len(pieces) > 1 else (whole,), strict=True):
        expected = part[::-1] if piece.transpose else part
        found = tuple(checkpoint.reader.shape(piece.name))
        if found != expected:
            raise ModelError(f"tensor {piece.name} has shape {list(found)}; the config asks for {list(expected)}")
    return whole


def _fill(target: Tensor, pieces: tuple[Piece, ...], reader: TensorReader, advance: Callable[[int], None]) -> None:
    """Copy pieces one below the other into `target`."""
    offset = 0
    for piece in pieces:
        shape = reader.shape(piece.name)
        height = shape[1] if piece.transpose else shape[0]
        _copy(target[offset : offset + height], piece, reader, advance)
        offset += height


def _copy(target: Tensor, piece: Piece, reader: TensorReader, advance: Callable[[int], None]) -> None:
    """Copy one piece in chunks of whole heads, converting on the way."""
    shape = reader.shape(piece.name)
    unit = piece.head_width or 1
    step = unit * max(1, CHUNK_BYTES // (4 * prod(shape[1:]) * unit))
    for start in range(0, shape[0], step):
        rows = reader.rows(piece.name, start, min(start + step, shape[0]))
        into = target[:, start : start + step] if piece.transpose else target[start : start + step]
        if piece.head_width is not None:
            rows = _halves_apart(rows, piece.head_width)
        if piece.add:
            rows = rows.float() + piece.add
        into.copy_(rows.t() if piece.transpose else rows)
        if target.dtype == torch.float16 and not into.isfinite().all():
            raise ModelError(f"tensor {piece.name} has values that float16 cannot hold; serve it in another dtype")
        advance(rows.numel())


def _halves_apart(rows: Tensor, head_width: int) -> Tensor:
    """Undo llama.cpp's permutation: in each head, row 2i goes to i and row 2i + 1 to i + head_width / 2."""
    heads = rows.reshape(-1, head_width // 2, 2, *rows.shape[1:])
    return heads.transpose(1, 2).reshape(rows.shape)


def _assemble(config: ModelConfig, tensors: Mapping[str, Tensor]) -> Weights:
    embed = _required(tensors, "embed")
    final_norm = _norm(tensors, "final_norm")
    assert final_norm is not None, "the layout has no final norm"
    return Weights(
        embed=embed,
        layers=tuple(_layer(tensors, f"layers.{layer}") for layer in range(config.n_layers)),
        final_norm=final_norm,
        unembed=tensors.get("unembed", embed),
        positions=_required(tensors, "positions") if config.learned_positions else None,
    )


def _layer(tensors: Mapping[str, Tensor], path: str) -> LayerWeights:
    return LayerWeights(
        qkv=_required(tensors, f"{path}.qkv"),
        attention_out=_required(tensors, f"{path}.attention_out"),
        mlp_in=_required(tensors, f"{path}.mlp_in"),
        mlp_out=_required(tensors, f"{path}.mlp_out"),
        qkv_bias=tensors.get(f"{path}.qkv_bias"),
        attention_out_bias=tensors.get(f"{path}.attention_out_bias"),
        mlp_in_bias=tensors.get(f"{path}.mlp_in_bias"),
        mlp_out_bias=tensors.get(f"{path}.mlp_out_bias"),
        norm1=_norm(tensors, f"{path}.norm1"),
        norm1_post=_norm(tensors, f"{path}.norm1_post"),
        norm2=_norm(tensors, f"{path}.norm2"),
        norm2_post=_norm(tensors, f"{path}.norm2_post"),
        q_norm=_norm(tensors, f"{path}.q_norm"),
        k_norm=_norm(tensors, f"{path}.k_norm"),
    )


def _norm(tensors: Mapping[str, Tensor], path: str) -> Norm | None:
    gain = tensors.get(f"{path}.gain")
    return None if gain is None else Norm(gain, tensors.get(f"{path}.bias"))


def _required(tensors: Mapping[str, Tensor], path: str) -> Tensor:
    assert path in tensors, f"the layout has nothing for {path}"
    return tensors[path]
