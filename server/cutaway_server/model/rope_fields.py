"""Rotary positions as config.json spells them, before transformers 5 (`rope_theta`, `rope_scaling`) and since.

Since then `rope_parameters` has all of it, for all layers or for each kind of layer.
"""

from __future__ import annotations

from cutaway_server.architecture import Rope, RopeScaling
from cutaway_server.errors import ModelError
from cutaway_server.model.json_file import Fields

FULL, SLIDING = "full_attention", "sliding_attention"
DEFAULT_THETA = 10_000.0


def read_rope(fields: Fields, d_head: int, kind: str = FULL, theta_key: str = "rope_theta") -> Rope:
    """The rotation of layers of this kind; the base is at `theta_key` if not among the parameters."""
    parameters = rope_parameters(fields, kind)
    source = parameters if parameters.has("rope_theta") else fields
    key = "rope_theta" if parameters.has("rope_theta") else theta_key
    theta = source.positive(key) if source.has(key) else DEFAULT_THETA
    source = parameters if parameters.has("partial_rotary_factor") else fields
    partial = source.positive("partial_rotary_factor") if source.has("partial_rotary_factor") else 1.0
    dims = int(d_head * partial)
    if dims % 2 or not 2 <= dims <= d_head:
        raise ModelError(f"{fields.place}: {dims} of a head's {d_head} dimensions cannot be rotated in pairs")
    return Rope(theta=theta, dims=dims, scaling=_scaling(fields, parameters))


def rope_parameters(fields: Fields, kind: str = FULL) -> Fields:
    """What is said of the rotation of layers of this kind, empty if nothing is."""
    old, new = fields.inner("rope_scaling"), fields.inner("rope_parameters")
    if old.values and new.values and old.values != new.values:
        raise ModelError(f"{fields.place}: rope_scaling and rope_parameters are both given, and differ")
    parameters = old if old.values else new
    return parameters.inner(kind) if parameters.has(FULL) or parameters.has(SLIDING) else parameters


def rope_type(parameters: Fields) -> str:
    """The kind of scaling, "default" for none."""
    for key in ("rope_type", "type"):
        if parameters.has(key):
            return parameters.text(key)
    return "default"


def served_context(fields: Fields) -> int:
    """Tokens that the positions were trained, or are stretched, for.

    Configs state the stretched length for llama3 and linear scaling; for YaRN and NTK most state the trained one.
    """
    stated = fields.count("max_position_embeddings")
    parameters = rope_parameters(fields)
    kind = rope_type(parameters)
    if kind == "dynamic":
        return int(stated * parameters.positive("factor"))
    if kind == "yarn" and parameters.has("factor"):
        return max(stated, int(_original(fields, parameters) * parameters.positive("factor")))
    return stated


def _scaling(fields: Fields, parameters: Fields) -> RopeScaling | None:
    kind = rope_type(parameters)
    if kind == "default":
        return None
    if kind == "linear":
        return RopeScaling("linear", factor=parameters.positive("factor"))
    if kind == "dynamic":
        context = fields.count("max_position_embeddings")
        return RopeScaling("ntk", factor=parameters.positive("factor"), original_context=context)
    if kind == "llama3":
        return RopeScaling(
            "llama3",
            factor=parameters.positive("factor"),
            original_context=_original(fields, parameters),
            low_frequency_factor=parameters.positive("low_freq_factor"),
            high_frequency_factor=parameters.positive("high_freq_factor"),
        )
    if kind == "yarn":
        return _yarn(fields, parameters)
    raise ModelError(f"{parameters.place}: rope_type {kind!r} is not supported (linear, dynamic, llama3 and yarn are)")


def _yarn(fields: Fields, parameters: Fields) -> RopeScaling:
    original = _original(fields, parameters)
    stretch = fields.count("max_position_embeddings") / original

    def optional(key: str) -> float | None:
        return parameters.positive(key) if parameters.has(key) else None

    return RopeScaling(
        "yarn",
        factor=optional("factor") or stretch,
        original_context=original,
        beta_fast=optional("beta_fast") or 32.0,
        beta_slow=optional("beta_slow") or 1.0,
        attention_factor=optional("attention_factor"),
        mscale=optional("mscale"),
        mscale_all_dim=optional("mscale_all_dim"),
        truncate=not parameters.has("truncate") or parameters.flag("truncate"),
    )


def _original(fields: Fields, parameters: Fields) -> int:
    """The trained context. A statement at the top level counts more, as in transformers."""
    key = "original_max_position_embeddings"
    for place in (fields, parameters):
        if place.has(key):
            return place.count(key)
    return fields.count("max_position_embeddings")
