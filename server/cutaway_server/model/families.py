"""What each served family of Hugging Face models is: how its config.json reads, and what its tensors are called.

A new family is one more `Family` in the table at the end: defaults, a function from fields to config, and names.
Defaults are those of transformers for keys that a config.json leaves out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from cutaway_server.architecture import LayerConfig, ModelConfig, Rope
from cutaway_server.errors import ModelError
from cutaway_server.model import tensor_names
from cutaway_server.model.json_file import Fields
from cutaway_server.model.layout import Layout
from cutaway_server.model.rope_fields import FULL, SLIDING, read_rope, rope_parameters, rope_type, served_context
from cutaway_server.model.tensor_names import TensorNames

_PLACE = "config.json"
Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]


@dataclass(frozen=True, slots=True)
class Family:
    """How to read one architecture."""

    read: Callable[[Fields], ModelConfig]
    names: TensorNames
    defaults: Mapping[str, object]


def read_config(config: Mapping[str, object]) -> ModelConfig:
    """The network that a config.json describes.

    Raises:
        ModelError: names the architecture, key or value that is not served.
    """
    family, fields = _family(config)
    return family.read(fields)


def layout(config: Mapping[str, object], present: frozenset[str]) -> Layout:
    """Where each weight lies, in a checkpoint of this config.json with the tensors `present`."""
    family, fields = _family(config)
    return family.names.layout(fields, family.read(fields).n_layers, present)


def ignored(config: Mapping[str, object], present: frozenset[str]) -> frozenset[str]:
    """Those of the tensors `present` that carry nothing."""
    family, _ = _family(config)
    return family.names.ignore(present)


def _family(config: Mapping[str, object]) -> tuple[Family, Fields]:
    fields = Fields(config, _PLACE)
    architectures = fields.texts("architectures")
    known = next((name for name in architectures if name in FAMILIES), None)
    if known is None:
        served = ", ".join(FAMILIES)
        raise ModelError(f"{_PLACE}: architecture {', '.join(architectures)} is not served; these are: {served}")
    if fields.has("quantization_config"):
        method = fields.inner("quantization_config").values.get("quant_method")
        raise ModelError(f"{_PLACE}: quantization_config ({method}) is not served; use unquantised weights or GGUF")
    for key in ("num_experts", "num_local_experts", "n_routed_experts"):
        if fields.has(key):
            raise fields.wrong(key, "is not served: no mixture of experts is")
    return FAMILIES[known], fields.over(FAMILIES[known].defaults)


def _decoder(
    fields: Fields,
    family: str,
    kinds: tuple[str, ...],
    activation: str = "hidden_act",
    rope: Callable[[Fields, int, str], Rope] = read_rope,
) -> ModelConfig:
    """What the rotary families have in common; `kinds` says which layers slide."""
    heads, d_model = fields.count("num_attention_heads"), fields.count("hidden_size")
    d_head = fields.count("head_dim") if fields.has("head_dim") else d_model // heads
    kv_heads = fields.count("num_key_value_heads") if fields.has("num_key_value_heads") else heads
    if heads % kv_heads:
        raise fields.wrong("num_key_value_heads", f"must divide the {heads} attention heads")
    ropes = {kind: rope(fields, d_head, kind) for kind in set(kinds)}
    window = fields.count("sliding_window") if SLIDING in kinds else None
    return ModelConfig(
        family=family,
        d_model=d_model,
        n_heads=heads,
        n_kv_heads=kv_heads,
        d_head=d_head,
        d_mlp=fields.count("intermediate_size"),
        d_vocab=fields.count("vocab_size"),
        max_context=served_context(fields),
        layers=tuple(LayerConfig(window if kind == SLIDING else None, ropes[kind]) for kind in kinds),
        norm_eps=fields.positive("rms_norm_eps"),
        activation=_activation(fields, activation),
        tied_embeddings=fields.flag("tie_word_embeddings"),
    )


def _activation(fields: Fields, key: str) -> Activation:
    name = fields.text(key)
    if name not in _ACTIVATIONS:
        raise fields.wrong(key, f"is not served; these are: {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}


def _unserved(fields: Fields, served: Mapping[str, object]) -> None:
    """Refuse values other than those of `served`, which are the only ones served."""
    for key, value in served.items():
        if fields.has(key) and fields.values[key] != value:
            raise fields.wrong(key, f"is not served; {value!r} is")


def _kinds(fields: Fields, slides: Callable[[int], bool]) -> tuple[str, ...]:
    """Each layer's kind: as `layer_types` says, or as `slides` does for the layer of that number."""
    n_layers = fields.count("num_hidden_layers")
    if not fields.has("layer_types"):
        return tuple(SLIDING if slides(layer) else FULL for layer in range(n_layers))
    kinds = fields.texts("layer_types")
    if len(kinds) != n_layers:
        raise ModelError(f"{_PLACE}: layer_types has {len(kinds)} entries for {n_layers} layers")
    for kind in kinds:
        if kind not in (FULL, SLIDING):
            raise ModelError(f"{_PLACE}: layer_types: {kind!r} is not served; {FULL} and {SLIDING} are")
    return kinds


def _alike(fields: Fields) -> tuple[str, ...]:
    """Layers that all slide where there is a window, as in families that know no other kind."""
    slides = fields.has("sliding_window")
    kinds = (SLIDING if slides else FULL,) * fields.count("num_hidden_layers")
    if fields.has("layer_types") and fields.texts("layer_types") != kinds:
        raise fields.wrong("layer_types", f"must be all {kinds[0]} for this architecture")
    return kinds


def _whole_heads(fields: Fields) -> None:
    """Refuse partial rotation, which transformers does not compute for these families."""
    for place in (fields, rope_parameters(fields)):
        _unserved(place, {"partial_rotary_factor": 1.0})


def _llama(fields: Fields) -> ModelConfig:
    _whole_heads(fields)
    return _decoder(fields, "llama", (FULL,) * fields.count("num_hidden_layers"))


def _mistral(fields: Fields) -> ModelConfig:
    _whole_heads(fields)
    return _decoder(fields, "mistral", _alike(fields))


def _qwen2(fields: Fields) -> ModelConfig:
    _whole_heads(fields)
    window = fields.flag("use_sliding_window") and fields.has("sliding_window")
    kinds = _kinds(fields, lambda layer: window and layer >= fields.count("max_window_layers"))
    if SLIDING in kinds and not window:  # transformers sees no window then
        raise fields.wrong("layer_types", "has sliding layers, but use_sliding_window or sliding_window is unset")
    return _decoder(fields, "qwen2", kinds)


def _qwen3(fields: Fields) -> ModelConfig:
    return replace(_qwen2(fields), family="qwen3", qk_norm="head")


def _phi3(fields: Fields) -> ModelConfig:
    parameters = rope_parameters(fields)
    if rope_type(parameters) != "default":
        raise ModelError(f"{parameters.place}: rope_type {rope_type(parameters)!r} is not served for Phi-3")
    return _decoder(fields, "phi3", _alike(fields))


def _olmo2(fields: Fields) -> ModelConfig:
    _whole_heads(fields)
    config = _decoder(fields, "olmo2", (FULL,) * fields.count("num_hidden_layers"))
    return replace(config, pre_norm=False, post_norm=True, qk_norm="full")


def _gemma2(fields: Fields) -> ModelConfig:
    return _gemma(fields, "gemma2", _kinds(fields, lambda layer: layer % 2 == 0))


def _gemma3(fields: Fields) -> ModelConfig:
    period = fields.count("sliding_window_pattern")
    kinds = _kinds(fields, lambda layer: (layer + 1) % period != 0)
    return replace(_gemma(fields, "gemma3", kinds, _gemma3_rope), qk_norm="head")


def _gemma3_rope(fields: Fields, d_head: int, kind: str) -> Rope:
    """Sliding layers have a base of their own. Before transformers 5, `rope_scaling` is of the others only."""
    if kind == FULL:
        return read_rope(fields, d_head, kind)
    unscaled = Fields({key: value for key, value in fields.values.items() if key != "rope_scaling"}, fields.place)
    return read_rope(unscaled, d_head, kind, "rope_local_base_freq")


def _gemma(
    fields: Fields,
    family: str,
    kinds: tuple[str, ...],
    rope: Callable[[Fields, int, str], Rope] = read_rope,
) -> ModelConfig:
    _whole_heads(fields)
    _unserved(fields, {"use_bidirectional_attention": False})
    config = _decoder(fields, family, kinds, "hidden_activation", rope)

    def cap(key: str) -> float | None:
        return fields.positive(key) if fields.has(key) else None

    return replace(
        config,
        post_norm=True,
        embed_scale=config.d_model**0.5,
        attention_scale=fields.positive("query_pre_attn_scalar") ** -0.5,
        attention_softcap=cap("attn_logit_softcapping"),
        logit_softcap=cap("final_logit_softcapping"),
    )


def _gpt2(fields: Fields) -> ModelConfig:
    _unserved(fields, {"scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False})
    heads, d_model = fields.count("n_head"), fields.count("n_embd")
    if d_model % heads:
        raise fields.wrong("n_head", f"must divide n_embd ({d_model})")
    return ModelConfig(
        family="gpt2",
        d_model=d_model,
        n_heads=heads,
        n_kv_heads=heads,
        d_head=d_model // heads,
        d_mlp=fields.count("n_inner") if fields.has("n_inner") else 4 * d_model,
        d_vocab=fields.count("vocab_size"),
        max_context=fields.count("n_positions"),
        layers=(LayerConfig(),) * fields.count("n_layer"),
        norm="layer",
        norm_eps=fields.positive("layer_norm_epsilon"),
        activation=_activation(fields, "activation_function"),
        gated=False,
        learned_positions=True,
        attention_scale=None if fields.flag("scale_attn_weights") else 1.0,
        tied_embeddings=fields.flag("tie_word_embeddings"),
    )


_DECODER = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
}
_QWEN = {**_DECODER, "use_sliding_window": False, "max_window_layers": 28, "sliding_window": 4096}
_GEMMA = {
    **_DECODER,
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "head_dim": 256,
    "num_key_value_heads": 4,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}
_GEMMA2 = {
    **_GEMMA,
    "max_position_embeddings": 8192,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
}
_GEMMA3 = {
    **_GEMMA,
    "max_position_embeddings": 131_072,
    "rope_theta": 1e6,
    "rope_local_base_freq": 1e4,
    "sliding_window_pattern": 6,
}
_GPT2 = {
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "tie_word_embeddings": True,
    "n_positions": 1024,
}

FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family(_llama, tensor_names.LLAMA, {**_DECODER, "max_position_embeddings": 2048}),
    "MistralForCausalLM": Family(
        _mistral,
        tensor_names.MISTRAL,
        {**_DECODER, "num_key_value_heads": 8, "sliding_window": 4096, "max_position_embeddings": 131_072},
    ),
    "Qwen2ForCausalLM": Family(_qwen2, tensor_names.QWEN2, {**_QWEN, "max_position_embeddings": 32_768}),
    "Qwen3ForCausalLM": Family(
        _qwen3, tensor_names.QWEN3, {**_QWEN, "head_dim": 128, "max_position_embeddings": 32_768}
    ),
    "Gemma2ForCausalLM": Family(_gemma2, tensor_names.GEMMA2, _GEMMA2),
    "Gemma3ForCausalLM": Family(_gemma3, tensor_names.GEMMA3, _GEMMA3),
    "GPT2LMHeadModel": Family(_gpt2, tensor_names.GPT2, _GPT2),
    "Phi3ForCausalLM": Family(
        _phi3, tensor_names.PHI3, {**_DECODER, "rms_norm_eps": 1e-5, "max_position_embeddings": 4096}
    ),
    "Olmo2ForCausalLM": Family(
        _olmo2, tensor_names.OLMO2, {**_DECODER, "rms_norm_eps": 1e-5, "max_position_embeddings": 2048}
    ),
}
