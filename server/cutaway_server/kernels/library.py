"""The native library as Python sees it: its structs, its operations, and which variants run here."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable
from ctypes import c_float, c_int64, c_void_p
from pathlib import Path
from typing import ClassVar

from cutaway_server.kernels.build_native import build, variants

log = logging.getLogger(__name__)


class CMatrix(ctypes.Structure):
    """Native `Matrix`."""

    _fields_: ClassVar = [
        ("data", c_void_p), ("bias", c_void_p), ("columns", c_int64), ("tiles", c_int64), ("depth", c_int64),
        ("padded_depth", c_int64), ("kind", c_int64), ("scales", c_void_p), ("parts", c_void_p), ("next", c_void_p),
        ("own", c_int64),
    ]  # fmt: skip


class CNorm(ctypes.Structure):
    """Native `Norm`."""

    _fields_: ClassVar = [("gain", c_void_p), ("bias", c_void_p)]


class CShape(ctypes.Structure):
    """Native `Shape`."""

    _fields_: ClassVar = [
        ("d_model", c_int64), ("n_heads", c_int64), ("n_kv_heads", c_int64), ("d_head", c_int64), ("d_mlp", c_int64),
        ("layer_norm", c_int64), ("qk_norm", c_int64), ("activation", c_int64), ("gated", c_int64), ("bf16", c_int64),
        ("threads", c_int64), ("norm_eps", c_float), ("attention_scale", c_float), ("attention_cap", c_float),
        ("logit_cap", c_float),
    ]  # fmt: skip


class CLayer(ctypes.Structure):
    """Native `Layer`."""

    _fields_: ClassVar = [
        ("qkv", CMatrix), ("attention_out", CMatrix), ("mlp_in", CMatrix), ("mlp_out", CMatrix), ("norm1", CNorm),
        ("norm1_post", CNorm), ("norm2", CNorm), ("norm2_post", CNorm), ("q_norm", CNorm), ("k_norm", CNorm),
        ("window", c_int64), ("rope_dims", c_int64), ("interleaved", c_int64),
    ]  # fmt: skip


class CPages(ctypes.Structure):
    """Native `Pages`."""

    _fields_: ClassVar = [
        ("keys", c_void_p), ("values", c_void_p), ("key_scales", c_void_p), ("value_scales", c_void_p),
        ("page_size", c_int64), ("format", c_int64),
    ]  # fmt: skip


class CStep(ctypes.Structure):
    """Native `Step`."""

    _fields_: ClassVar = [
        ("positions", c_void_p), ("slots", c_void_p), ("query_starts", c_void_p), ("block_table", c_void_p),
        ("rows", c_int64), ("sequences", c_int64), ("table_stride", c_int64),
    ]  # fmt: skip


class CRotations(ctypes.Structure):
    """Native `Rotations`."""

    _fields_: ClassVar = [("cosines", c_void_p), ("sines", c_void_p)]


class COpenNorm(ctypes.Structure):
    """Native `OpenNorm`."""

    _fields_: ClassVar = [("scale", c_void_p), ("normalized", c_void_p), ("out", c_void_p)]


P, N = c_void_p, c_int64
SIGNATURES: dict[str, tuple[type[c_void_p] | type[c_int64], ...]] = {
    "layers": (P, P, P, P, P, N, N, P, P),
    "attention_input": (P, P, P, P, P, P, P, P, P, P),
    "paged_attention": (P, P, P, P, P, P, P),
    "patterns": (P, P, P, P, P, P, P, N),
    "attention_output": (P, P, N, P, P, P, P, P),
    "mlp_input": (P, P, N, P, P, P, P, P),
    "mlp_output": (P, P, N, P, P, P, P, P),
    "unembed": (P, P, P, N, P, P, P),
    "linear": (P, P, N, P, P),
}


class Library:
    """The loaded library."""

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))  # after torch: shares its OpenMP threads
        self._library.supports.argtypes = [ctypes.c_char_p]

    def supported(self) -> list[str]:
        """The variants this machine runs, fastest first."""
        return [name for name in variants() if self._library.supports(name.encode())]

    def operation(self, variant: str, name: str) -> Callable[..., None]:
        """One operation of one variant; its arguments are those in native/operations.c, pointers as integers."""
        function = self._library[f"{variant}_{name}"]
        function.argtypes, function.restype = SIGNATURES[name], None
        return function


def load_library() -> Library | None:
    """The library, built if need be; None, with one warning, where it cannot be had."""
    path = build()
    if path is None:
        return None
    try:
        return Library(path)
    except OSError as error:
        log.warning("the native kernels cannot be loaded, the slower reference kernels serve: %s", error)
        return None
