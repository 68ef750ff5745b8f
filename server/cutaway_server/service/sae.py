"""Sparse autoencoders as SAELens saves them: a cfg.json beside sae_weights.safetensors, of version 6 or before."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from cutaway_server.captures import Sae
from cutaway_server.edits import Floats
from cutaway_server.errors import ModelError
from cutaway_server.model.json_file import Fields, parse_object

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
ARCHITECTURES = ("standard", "gated", "topk", "jumprelu")
# SAELens normalises with expected_average_only_in only while training: what it saves takes activations as they are.
NORMALIZED = {
    "none": "none", "expected_average_only_in": "none", "layer_norm": "layer_norm",
    "constant_norm_rescale": "constant_norm_rescale",
}  # fmt: skip
MAX_CONFIG = 2**16  # bytes


def sae_of(text: bytes, tensors: Mapping[str, Floats], path: Path) -> Sae:
    """The autoencoder of a config and its tensors; `path` is what it is called in messages.

    Raises:
        ModelError: it is of an unknown kind, or config and tensors do not fit together.
    """
    if len(text) > MAX_CONFIG:
        raise ModelError(f"{path}: {CONFIG} has {len(text)} bytes, and may have {MAX_CONFIG}")
    config = parse_object(text, f"{path}, {CONFIG}")
    architecture = _architecture(config)
    weights = _Weights(tensors, config.count("d_in"), config.count("d_sae"), path)
    gated = architecture == "gated"
    w_dec = weights.matrix("W_dec", turned=True)
    rescaled = architecture == "topk" and config.has("rescale_acts_by_decoder_norm")
    rescaled = rescaled and config.flag("rescale_acts_by_decoder_norm")
    b_dec = weights.of_input("b_dec")
    applied = not config.has("apply_b_dec_to_input") or config.flag("apply_b_dec_to_input")
    return Sae(
        architecture,
        _hook_name(config),
        _normalize(config),
        weights.matrix("W_enc"),
        weights.of_features("b_gate" if gated else "b_enc"),
        b_dec if applied else None,
        weights.of_features("threshold") if architecture == "jumprelu" else None,
        _k(config) if architecture == "topk" else 0,
        np.linalg.norm(w_dec, axis=-1) if rescaled else None,
        weights.of_features("r_mag") if gated else None,
        weights.of_features("b_mag") if gated else None,
    )


def _architecture(config: Fields) -> str:
    name = config.text("architecture") if config.has("architecture") else "standard"
    activation = next((config.text(key) for key in ("activation_fn", "activation_fn_str") if config.has(key)), "relu")
    if activation not in ("relu", "topk"):
        raise config.wrong("activation_fn", "must be relu or topk")
    if activation == "topk" and name == "standard":
        name = "topk"  # so it was said before version 6
    if name not in ARCHITECTURES:
        raise config.wrong("architecture", f"must be one of {', '.join(ARCHITECTURES)}")
    return name


def _normalize(config: Fields) -> str:
    value = config.values.get("normalize_activations")
    if value is None or isinstance(value, bool):
        return "none"
    if value not in NORMALIZED:
        raise config.wrong("normalize_activations", f"must be one of {', '.join(NORMALIZED)}")
    return NORMALIZED[str(value)]


def _k(config: Fields) -> int:
    given = config.inner("activation_fn_kwargs")
    return given.count("k") if given.has("k") else config.count("k")


def _hook_name(config: Fields) -> str:
    for fields in (config.inner("metadata"), config):
        for key in ("hook_name", "hook_point"):
            if fields.has(key):
                return fields.text(key)
    return ""


class _Weights:
    """Tensors whose shapes are checked."""

    def __init__(self, tensors: Mapping[str, Floats], d_in: int, d_sae: int, path: Path) -> None:
        self._tensors, self._d_in, self._d_sae, self._path = tensors, d_in, d_sae, path

    def matrix(self, name: str, *, turned: bool = False) -> Floats:
        """[d_in, d_sae], or the other way round."""
        return self._shaped(name, (self._d_sae, self._d_in) if turned else (self._d_in, self._d_sae))

    def of_input(self, name: str) -> Floats:
        """[d_in]."""
        return self._shaped(name, (self._d_in,))

    def of_features(self, name: str) -> Floats:
        """[d_sae]."""
        return self._shaped(name, (self._d_sae,))

    def _shaped(self, name: str, shape: tuple[int, ...]) -> Floats:
        if name not in self._tensors:
            raise ModelError(f"{self._path}: tensor {name} is missing")
        found = self._tensors[name]
        if found.shape != shape:
            raise ModelError(f"{self._path}: tensor {name} is {list(found.shape)}, and must be {list(shape)}")
        return found
