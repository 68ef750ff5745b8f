"""Which matrices of a checkpoint are served quantised as they are, and how they are read."""

from __future__ import annotations

from collections import Counter
from math import prod

from cutaway_server.errors import ModelError
from cutaway_server.kernels.quantized import KINDS, Blocks, Quantized
from cutaway_server.kernels.weights import Weights
from cutaway_server.model.layout import Piece, TensorReader, halves_apart

ALTERNATING = ".mlp_in"  # gate and up lie in turn, so both must be of one kind
TILE = 32  # columns of the native products: another kind starts at a whole tile
FLOATS = frozenset({"F32", "F16", "BF16", "F64"})
MATRICES = (".qkv", ".attention_out", ".mlp_in", ".mlp_out")


def read_quantized(path: str, pieces: tuple[Piece, ...], reader: TensorReader) -> Quantized | None:
    """The matrix at a layout's path in the types it is stored in; None if it must be served as floats."""
    if not (path in ("embed", "unembed") or path.endswith(MATRICES)) or not _together(path, pieces, reader):
        return None
    return Quantized(tuple(_blocks(piece, reader) for piece in pieces))


def _together(path: str, pieces: tuple[Piece, ...], reader: TensorReader) -> bool:
    """Whether the pieces of one matrix can be multiplied as they are."""
    formats = [reader.format(piece.name) for piece in pieces]
    if not all(name in KINDS for name in formats) or any(piece.transpose or piece.add for piece in pieces):
        return False
    if len({KINDS[name] for name in formats}) == 1:
        return True
    whole = all(reader.shape(piece.name)[0] % TILE == 0 for piece in pieces[:-1])
    return whole and not path.endswith(ALTERNATING)


def _blocks(piece: Piece, reader: TensorReader) -> Blocks:
    raw = reader.blocks(piece.name)
    if piece.head_width is not None:
        raw = halves_apart(raw, piece.head_width)
    blocks = Blocks(raw.contiguous(), reader.format(piece.name))
    if not blocks.scales().isfinite().all():
        raise ModelError(f"tensor {piece.name} has scales that are not finite")
    return blocks


def formats_of(weights: Weights) -> Counter[str]:
    """Weights in each quantised type."""
    counts: Counter[str] = Counter()
    for matrix in weights.matrices():
        if isinstance(matrix, Quantized):
            for part in matrix.parts:
                counts[part.format] += len(part.raw) * part.depth
    return counts


def blown_up(reader: TensorReader, weights: Weights) -> frozenset[str]:
    """Quantised types in the checkpoint of which some or all tensors are served as floats."""
    stored = Counter[str]()
    for name in reader.names():
        if (kind := reader.format(name)) not in FLOATS:
            stored[kind] += prod(reader.shape(name))
    served = formats_of(weights)
    return frozenset(kind for kind, size in stored.items() if served[kind] < size)
