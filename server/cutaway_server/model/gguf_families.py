"""What each served family of GGUF files is: how its metadata reads, and what its tensors are called.

Names and meanings are llama.cpp's (src/llama-model.cpp, convert_hf_to_gguf.py). Its converter already adds the one to
Gemma's norm gains and turns GPT-2's matrices, so nothing of that is left to do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from cutaway_server.architecture import LayerConfig, ModelConfig, Rope, RopeScaling
from cutaway_server.errors import ModelError
from cutaway_server.model.json_file import Fields
from cutaway_server.model.layout import TensorReader

ROPE_FACTORS = "rope_freqs.weight"

# Not in the files of these families: what llama.cpp takes for granted.
GEMMA2_WINDOW, GEMMA2_ATTENTION_CAP, GEMMA2_LOGIT_CAP = 4096, 50.0, 30.0
GEMMA3_LOCAL_THETA = 10_000.0
GEMMA2_27B_LAYERS, GEMMA3_27B_LAYERS = 46, 62  # these two scale by d_model / n_heads, not by d_head


def read_config(metadata: Mapping[str, object], tensors: TensorReader, file: str) -> ModelConfig:
    """The network that the metadata describes.

    Raises:
        ModelError: names the architecture, key or value that is missing or not served.
    """
    architecture = Fields(metadata, file).text("general.architecture")
    if architecture not in FAMILIES:
        raise ModelError(f"{file}: architecture {architecture!r} is not served; these are: {', '.join(FAMILIES)}")
    prefix = architecture + "."
    ours = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
    fields = Fields(ours, f"{file}, {architecture}")
    if fields.values.get("expert_count"):
        raise fields.wrong("expert_count", "is not served: no mixture of experts is")
    return FAMILIES[architecture](fields, _decoder(fields, architecture, tensors))


def _decoder(fields: Fields, family: str, tensors: TensorReader) -> ModelConfig:
    """What the families have in common."""
    d_model, heads = fields.count("embedding_length"), fields.count("attention.head_count")
    kv_heads = _count(fields, "attention.head_count_kv", heads)
    if heads % kv_heads:
        raise fields.wrong("attention.head_count_kv", f"must divide the {heads} attention heads")
    d_head = _count(fields, "attention.key_length", d_model // heads)
    if _count(fields, "attention.value_length", d_head) != d_head:
        raise fields.wrong("attention.value_length", f"is not served unless it equals key_length ({d_head})")
    layers = fields.count("block_count")
    if layers > len(tensors.names()):
        raise fields.wrong("block_count", "is more than there are tensors")
    norm = "attention.layer_norm_epsilon" if family == "gpt2" else "attention.layer_norm_rms_epsilon"
    rope = None if family == "gpt2" else _rope(fields, d_head, tensors)
    return ModelConfig(
        family=family,
        d_model=d_model,
        n_heads=heads,
        n_kv_heads=kv_heads,
        d_head=d_head,
        d_mlp=fields.count("feed_forward_length"),
        d_vocab=tensors.shape("token_embd.weight")[0],
        max_context=_context(fields),
        layers=(LayerConfig(rope=rope),) * layers,
        norm_eps=fields.positive(norm),
        tied_embeddings="output.weight" not in tensors.names(),
    )


def _count(fields: Fields, key: str, default: int) -> int:
    return fields.count(key) if fields.has(key) else default


def _positive(fields: Fields, key: str, default: float) -> float:
    return fields.positive(key) if fields.has(key) else default


def _context(fields: Fields) -> int:
    """Tokens the positions were trained, or are stretched, for; with YaRN most files state the trained ones."""
    stated = fields.count("context_length")
    scaling = _scaling(fields)
    if scaling is None or scaling.kind != "yarn":
        return stated
    return max(stated, int(scaling.original_context * scaling.factor))


def _rope(fields: Fields, d_head: int, tensors: TensorReader) -> Rope:
    dims = _count(fields, "rope.dimension_count", d_head)
    if dims % 2 or dims > d_head:
        raise fields.wrong("rope.dimension_count", f"must be even and at most the {d_head} of a head")
    scaling = _scaling(fields)
    if ROPE_FACTORS in tensors.names():
        if scaling is not None or tensors.shape(ROPE_FACTORS) != (dims // 2,):
            raise ModelError(f"{fields.place}: {ROPE_FACTORS} must have {dims // 2} factors, and rope.scaling be unset")
        factors = tensors.rows(ROPE_FACTORS, 0, dims // 2).float()
        scaling = RopeScaling("factors", factors=tuple(factors.tolist()))
    return Rope(_positive(fields, "rope.freq_base", 10_000.0), dims, scaling=scaling)


def _scaling(fields: Fields) -> RopeScaling | None:
    kind = fields.text("rope.scaling.type") if fields.has("rope.scaling.type") else "none"
    if fields.has("rope.scale_linear"):  # files of 2023
        kind, fields = "linear", fields.over({"rope.scaling.factor": fields.positive("rope.scale_linear")})
    if kind == "none":
        return None
    if kind not in ("linear", "yarn"):
        raise fields.wrong("rope.scaling.type", "is not served; none, linear and yarn are")
    factor = fields.positive("rope.scaling.factor")
    return RopeScaling("linear", factor) if kind == "linear" else _yarn(fields, factor)


def _yarn(fields: Fields, factor: float) -> RopeScaling:
    for key in ("attn_factor", "yarn_attn_factor", "yarn_ext_factor", "yarn_log_multiplier"):
        if fields.values.get(f"rope.scaling.{key}") not in (None, 1.0):
            raise fields.wrong(f"rope.scaling.{key}", "is not served; 1 is")
    return RopeScaling(
        "yarn",
        factor=factor,
        original_context=fields.count("rope.scaling.original_context_length"),
        beta_fast=_positive(fields, "rope.scaling.yarn_beta_fast", 32.0),
        beta_slow=_positive(fields, "rope.scaling.yarn_beta_slow", 1.0),
    )


def _whole_heads(fields: Fields, config: ModelConfig) -> ModelConfig:
    rope = config.layers[0].rope
    if rope is not None and rope.dims != config.d_head:
        raise fields.wrong("rope.dimension_count", f"is not served unless it is the {config.d_head} of a head")
    return config


def _qwen3(fields: Fields, config: ModelConfig) -> ModelConfig:
    return replace(_whole_heads(fields, config), qk_norm="head")


def _olmo2(fields: Fields, config: ModelConfig) -> ModelConfig:
    if fields.has("attention.sliding_window"):
        raise fields.wrong("attention.sliding_window", "is not served here: OLMo-3 is not, OLMo-2 is")
    return replace(_whole_heads(fields, config), pre_norm=False, post_norm=True, qk_norm="full")


def _phi3(fields: Fields, config: ModelConfig) -> ModelConfig:
    if not fields.values.get("attention.sliding_window"):  # the converter writes 0 for none
        return config
    window = fields.count("attention.sliding_window")
    return replace(config, layers=tuple(replace(layer, window=window) for layer in config.layers))


def _gpt2(_: Fields, config: ModelConfig) -> ModelConfig:
    return replace(config, norm="layer", activation="gelu_tanh", gated=False, learned_positions=True)


def _gemma2(fields: Fields, config: ModelConfig) -> ModelConfig:
    window = _count(fields, "attention.sliding_window", GEMMA2_WINDOW)
    layers = tuple(
        replace(layer, window=window if slides else None)
        for layer, slides in zip(config.layers, _slides(fields, config.n_layers, 2), strict=True)
    )
    config = replace(
        config,
        layers=layers,
        attention_softcap=_positive(fields, "attn_logit_softcapping", GEMMA2_ATTENTION_CAP),
        logit_softcap=_positive(fields, "final_logit_softcapping", GEMMA2_LOGIT_CAP),
    )
    return _gemma(fields, config, GEMMA2_27B_LAYERS)


def _gemma3(fields: Fields, config: ModelConfig) -> ModelConfig:
    window = fields.count("attention.sliding_window")
    local = Rope(_positive(fields, "rope.freq_base_swa", GEMMA3_LOCAL_THETA), config.d_head)  # never scaled
    layers = tuple(
        LayerConfig(window, local) if slides else layer
        for layer, slides in zip(config.layers, _slides(fields, config.n_layers, 6), strict=True)
    )
    cap = fields.positive("final_logit_softcapping") if fields.values.get("final_logit_softcapping") else None
    config = replace(config, layers=layers, logit_softcap=cap, qk_norm="head")
    return _gemma(fields, config, GEMMA3_27B_LAYERS)


def _gemma(fields: Fields, config: ModelConfig, layers_of_27b: int) -> ModelConfig:
    by_head = config.n_layers != layers_of_27b
    return replace(
        _whole_heads(fields, config),
        post_norm=True,
        activation="gelu_tanh",
        embed_scale=config.d_model**0.5,
        attention_scale=(config.d_head if by_head else config.d_model / config.n_heads) ** -0.5,
    )


def _slides(fields: Fields, layers: int, period: int) -> tuple[bool, ...]:
    """Whether each layer has a window: all but the last of each `period`, or as newer files say in either form."""
    key = "attention.sliding_window_pattern"
    told = fields.values.get(key)
    if isinstance(told, list):
        if len(told) != layers or not all(isinstance(slides, bool) for slides in told):
            raise fields.wrong(key, f"must be {layers} flags")
        return tuple(told)
    period = _count(fields, key, period)
    return tuple((layer + 1) % period != 0 for layer in range(layers))


# Architecture, as llama.cpp names it, to what sets it apart.
FAMILIES: Mapping[str, Callable[[Fields, ModelConfig], ModelConfig]] = {
    "llama": _whole_heads,
    "qwen2": _whole_heads,
    "qwen3": _qwen3,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "gpt2": _gpt2,
    "phi3": _phi3,
    "olmo2": _olmo2,
}
