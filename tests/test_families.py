"""Every family computes what transformers computes, in fp32, unpadded, with eager attention.

The configs in published/ are those of checkpoints on the hub, spelled as there; only sizes are shrunk here.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from cutaway_server.architecture import ModelConfig
from cutaway_server.errors import ModelError
from cutaway_server.kernels.plan import Plan
from cutaway_server.kernels.reference import ReferenceKernels
from cutaway_server.kernels.weights import Weights
from cutaway_server.model.checkpoint import Checkpoint, load_weights
from cutaway_server.model.families import FAMILIES, ignored, layout, read_config
from cutaway_server.model.safetensors_files import open_safetensors
from cutaway_server.model.transformer import Transformer
from cutaway_server.text.tokenizer import TextModel
from networks import flat, pages_for
from safetensors.torch import load_file, save_file
from torch import Tensor

PUBLISHED = Path(__file__).parent / "published"
LENGTH = 80  # tokens; windows are shrunk below it, so that they hide something
PAGE = 16

SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
SHRUNK: dict[str, dict[str, Any]] = {
    "llama-3.2-1b": {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 16},
    "smollm2-135m": {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 72},
    "tinyllama-1.1b": {"num_attention_heads": 8, "num_key_value_heads": 1},
    "mistral-7b-v0.1": {"num_attention_heads": 4, "num_key_value_heads": 1, "sliding_window": 24},
    "qwen2.5-0.5b": {"num_attention_heads": 7, "num_key_value_heads": 1, "hidden_size": 112, "max_window_layers": 3},
    "qwen3-0.6b": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32},
    "gemma-2-2b": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "sliding_window": 24},
    "gemma-3-1b": {"num_hidden_layers": 7, "num_attention_heads": 4, "head_dim": 32, "sliding_window": 24},
    "gemma-3-270m": {
        "num_hidden_layers": 7,
        "num_attention_heads": 4,
        "head_dim": 32,
        "sliding_window": 24,
        "layer_types": ["full_attention" if layer == 5 else "sliding_attention" for layer in range(7)],
    },
    "gpt2": {"n_embd": 64, "n_head": 4, "n_layer": 3, "n_positions": 256, "n_ctx": 256},
    "phi-3-mini-4k": {"num_attention_heads": 4, "num_key_value_heads": 4, "sliding_window": 24},
    "olmo-2-1b": {"num_attention_heads": 4, "num_key_value_heads": 4},
}


@dataclass
class Computed:
    """Logits and residuals (before each layer, and last) of one prompt."""

    logits: Tensor
    residuals: list[Tensor]
    final: Tensor


class Recording(ReferenceKernels):
    """The reference kernels, keeping every residual that goes by."""

    def __init__(self, config: ModelConfig, weights: Weights, context: int) -> None:
        super().__init__(config, weights, context)
        self.residuals: list[Tensor] = []

    def embed(self, plan: Plan) -> Tensor:
        self.residuals.append(super().embed(plan))
        return self.residuals[-1]

    def mlp_output(self, layer: int, hidden: Tensor, residual: Tensor) -> Tensor:
        self.residuals.append(super().mlp_output(layer, hidden, residual))
        return self.residuals[-1]


def checkpoint(path: Path) -> Checkpoint:
    """The directory as a checkpoint, but for its tokenizer."""
    raw = json.loads((path / "config.json").read_text())
    reader = open_safetensors(path)
    names = reader.names()
    text = TextModel.__new__(TextModel)  # nothing here has to do with text
    return Checkpoint(read_config(raw), layout(raw, names), reader, text, frozenset(), ignored=ignored(raw, names))


def ours(path: Path, token_ids: list[int], context: int = LENGTH) -> Computed:
    opened = checkpoint(path)
    kernels = Recording(opened.config, load_weights(opened, torch.float32, torch.device("cpu")), context)
    model = Transformer(kernels)
    blocks = list(range(1, 2 + len(token_ids) // PAGE))
    pages = pages_for(opened.config, len(blocks) + 1, PAGE)
    last = model.forward(flat([(token_ids, 0, len(token_ids), blocks)], PAGE), pages)
    with torch.inference_mode():
        final = kernels.norm(last, kernels.weights.final_norm).out
    return Computed(model.logits(last), kernels.residuals, final)


def theirs(model: transformers.PreTrainedModel, token_ids: list[int]) -> Computed:
    assert model.config._attn_implementation == "eager"
    with torch.inference_mode():
        out = model(torch.tensor([token_ids]), output_hidden_states=True)
    *residuals, final = (hidden[0] for hidden in out.hidden_states)
    return Computed(out.logits[0], residuals, final)


def prompt() -> list[int]:
    return torch.randint(0, 512, (LENGTH,), generator=torch.Generator().manual_seed(7)).tolist()


def assert_same(path: Path, model: transformers.PreTrainedModel, context: int = LENGTH) -> None:
    """Logits within 1e-4; residuals within 1e-4 of the largest value of their row."""
    token_ids = prompt()
    a, b = ours(path, token_ids, context), theirs(model, token_ids)
    assert b.logits.std() > 0.3, "a comparison of nothing much"
    assert (a.logits - b.logits).abs().max() <= 1e-4
    assert len(a.residuals) == len(b.residuals) + 1
    for mine, reference in zip([*a.residuals[:-1], a.final], [*b.residuals, b.final], strict=True):
        scale = reference.abs().amax(-1, keepdim=True).clamp(min=1)
        assert ((mine - reference).abs() <= 1e-4 * scale).all()


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_tiny_random_model_computes_what_transformers_computes(family: str, tmp_path: Path) -> None:
    assert_same(tmp_path, tiny.save_tiny(family, tmp_path))


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gemma3", "olmo2"])
def test_attention_biases_are_used_where_the_config_has_them(family: str, tmp_path: Path) -> None:
    assert_same(tmp_path, tiny.save_tiny(family, tmp_path, attention_bias=True))


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("llama", {"mlp_bias": True, "head_dim": 24, "tie_word_embeddings": True}),
        ("llama", {"hidden_act": "gelu"}),
        ("mistral", {"sliding_window": None, "head_dim": 24}),
        ("qwen2", {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 2}),
        ("gemma2", {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
        ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
        ("gemma3", {"layer_types": ["full_attention", "sliding_attention", "sliding_attention"]}),
        ("gemma3", {"tie_word_embeddings": False}),
        ("gpt2", {"activation_function": "relu", "n_inner": 80, "scale_attn_weights": False}),
        ("gpt2", {"tie_word_embeddings": False, "activation_function": "gelu"}),
        ("phi3", {"sliding_window": 24, "tie_word_embeddings": True}),
        ("phi3", {"partial_rotary_factor": 0.5}),
    ],
)
def test_a_variant_computes_what_transformers_computes(family: str, overrides: dict[str, Any], tmp_path: Path) -> None:
    assert_same(tmp_path, tiny.save_tiny(family, tmp_path, **overrides))


@pytest.mark.parametrize("name", SHRUNK)
def test_a_published_config_shrunk_computes_what_transformers_computes(name: str, tmp_path: Path) -> None:
    published = json.loads((PUBLISHED / f"{name}.json").read_text())
    sizes = {**(SIZES if name != "gpt2" else {"vocab_size": 512, "bos_token_id": 0, "eos_token_id": 1}), **SHRUNK[name]}
    raw = {**published, **sizes}
    # transformers changes what it is given, and wide initial weights make the comparison sensitive.
    settings = {**json.loads(json.dumps(raw)), "initializer_range": 0.12}
    model = tiny.random_model(transformers.AutoConfig.for_model(settings.pop("model_type"), **settings))
    tiny.save_model(model, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert_same(tmp_path, model)


def test_every_family_has_a_tiny_model_and_a_published_config() -> None:
    tested = {json.loads((PUBLISHED / f"{name}.json").read_text())["architectures"][0] for name in SHRUNK}
    assert tested == set(FAMILIES)
    assert {path.stem for path in PUBLISHED.glob("*.json")} == set(SHRUNK)
    assert {type(tiny.tiny_model(family)).__name__ for family in tiny.FAMILIES} == set(FAMILIES)


@pytest.mark.parametrize("architecture", FAMILIES)
def test_keys_left_out_mean_what_they_mean_to_transformers(architecture: str) -> None:
    kind = getattr(transformers, architecture).config_class
    defaults = {key: value for key, value in FAMILIES[architecture].defaults.items() if hasattr(kind, key)}
    assert len(defaults) >= 4
    assert defaults == {key: getattr(kind, key) for key in defaults}


SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 3.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    "yarn, attention factor": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "attention_factor": 0.8,
        "beta_fast": 2.0,
        "beta_slow": 0.3,
    },
    "yarn, mscale, not truncated": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "mscale": 1.2,
        "mscale_all_dim": 0.7,
        "truncate": False,
    },
}


@pytest.mark.parametrize("spelling", ["rope_parameters", "rope_scaling", "type"])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_every_rope_scaling_in_every_spelling_computes_what_transformers_computes(
    scaling: str, spelling: str, tmp_path: Path
) -> None:
    parameters = SCALINGS[scaling]
    model = tiny.save_tiny(
        "llama", tmp_path, max_position_embeddings=64, rope_parameters={**parameters, "rope_theta": 500.0}
    )
    raw = json.loads((tmp_path / "config.json").read_text())
    if spelling != "rope_parameters":
        del raw["rope_parameters"]
        kind = "rope_type" if spelling == "rope_scaling" else "type"
        raw["rope_scaling"] = {**parameters, kind: parameters["rope_type"]}
        raw["rope_theta"] = 500.0
        if kind == "type":
            del raw["rope_scaling"]["rope_type"]
        (tmp_path / "config.json").write_text(json.dumps(raw))
    # transformers' NTK stretches for the length it is given, ours for the longest that is served.
    assert_same(tmp_path, model, context=LENGTH)


@pytest.mark.parametrize("spelling", ["rope_parameters", "rope_scaling"])
def test_gemma3_scales_full_layers_only(spelling: str, tmp_path: Path) -> None:
    parameters = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e5},
        "sliding_attention": {"rope_type": "default", "rope_theta": 3e3},
    }
    model = tiny.save_tiny("gemma3", tmp_path, rope_parameters=parameters)
    if spelling == "rope_scaling":
        raw = json.loads((tmp_path / "config.json").read_text())
        del raw["rope_parameters"]
        raw.update(rope_theta=5e5, rope_local_base_freq=3e3, rope_scaling={"rope_type": "linear", "factor": 8.0})
        (tmp_path / "config.json").write_text(json.dumps(raw))
    assert_same(tmp_path, model)


def test_gpt2_as_on_the_hub_without_prefix_and_with_causal_masks(tmp_path: Path) -> None:
    model = tiny.save_tiny("gpt2", tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    renamed = {name.removeprefix("transformer."): tensor for name, tensor in stored.items() if name != "lm_head.weight"}
    for layer in range(3):
        renamed[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 512, 512).tril()
        renamed[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(renamed, tmp_path / "model.safetensors")
    assert_same(tmp_path, model)


def test_old_rotary_tables_are_ignored(tmp_path: Path) -> None:
    model = tiny.save_tiny("llama", tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    stored["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(stored, tmp_path / "model.safetensors")
    assert_same(tmp_path, model)


def config_of(name: str, **changes: Any) -> dict[str, Any]:
    return {**json.loads((PUBLISHED / f"{name}.json").read_text()), **changes}


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("llama-3.2-1b", {"architectures": ["MixtralForCausalLM"]}, ["MixtralForCausalLM", "LlamaForCausalLM"]),
        ("llama-3.2-1b", {"architectures": None}, ["architectures", "missing"]),
        ("llama-3.2-1b", {"quantization_config": {"quant_method": "gptq"}}, ["quantization_config", "gptq"]),
        ("llama-3.2-1b", {"num_local_experts": 8}, ["num_local_experts", "8"]),
        ("llama-3.2-1b", {"hidden_act": "mish"}, ["hidden_act", "'mish'"]),
        ("llama-3.2-1b", {"hidden_size": None}, ["hidden_size", "missing"]),
        ("llama-3.2-1b", {"hidden_size": "64"}, ["hidden_size", "'64'"]),
        ("llama-3.2-1b", {"num_hidden_layers": True}, ["num_hidden_layers", "True"]),
        ("llama-3.2-1b", {"num_hidden_layers": 0}, ["num_hidden_layers", "0"]),
        ("llama-3.2-1b", {"num_key_value_heads": 5}, ["num_key_value_heads", "5", "32"]),
        ("llama-3.2-1b", {"head_dim": 63}, ["63"]),
        ("llama-3.2-1b", {"partial_rotary_factor": 0.5}, ["partial_rotary_factor", "0.5"]),
        ("llama-3.2-1b", {"rms_norm_eps": float("nan")}, ["rms_norm_eps", "nan"]),
        ("llama-3.2-1b", {"rope_scaling": {"rope_type": "longrope"}}, ["rope_scaling", "'longrope'"]),
        ("llama-3.2-1b", {"rope_scaling": {"type": "magic", "factor": 2.0}}, ["rope_scaling", "'magic'"]),
        ("llama-3.2-1b", {"rope_scaling": {"type": "linear"}}, ["rope_scaling", "factor", "missing"]),
        ("llama-3.2-1b", {"rope_scaling": 3}, ["rope_scaling", "3"]),
        ("llama-3.2-1b", {"rope_parameters": {"rope_type": "default"}}, ["rope_scaling", "rope_parameters"]),
        ("llama-3.2-1b", {"tie_word_embeddings": "yes"}, ["tie_word_embeddings", "'yes'"]),
        ("mistral-7b-v0.1", {"layer_types": ["full_attention"] * 32}, ["layer_types", "sliding_attention"]),
        ("qwen3-0.6b", {"layer_types": ["full_attention"] * 3}, ["layer_types", "3", "28"]),
        ("qwen3-0.6b", {"layer_types": ["linear_attention"] * 28}, ["layer_types", "'linear_attention'"]),
        ("qwen3-0.6b", {"layer_types": ["sliding_attention"] * 28}, ["layer_types", "use_sliding_window"]),
        ("gemma-3-1b", {"use_bidirectional_attention": True}, ["use_bidirectional_attention"]),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, ["scale_attn_by_inverse_layer_idx", "True"]),
        ("gpt2", {"add_cross_attention": True}, ["add_cross_attention", "True"]),
        ("gpt2", {"n_head": 7}, ["n_head", "7"]),
        ("phi-3-mini-4k", {"rope_scaling": {"type": "longrope", "factor": 2.0}}, ["'longrope'", "Phi-3"]),
        ("phi-3-mini-4k", {"rope_scaling": {"type": "yarn", "factor": 2.0}}, ["'yarn'", "Phi-3"]),
    ],
)
def test_what_is_not_served_is_refused_by_name(name: str, changes: dict[str, Any], words: list[str]) -> None:
    read_config(config_of(name))
    with pytest.raises(ModelError) as refusal:
        read_config(config_of(name, **changes))
    assert all(word in str(refusal.value) for word in words), str(refusal.value)


def test_the_context_is_what_positions_are_stretched_for() -> None:
    def context(**changes: Any) -> int:
        return read_config(config_of("tinyllama-1.1b", **changes)).max_context

    assert context() == 2048
    assert context(rope_scaling={"type": "dynamic", "factor": 2.0}) == 4096
    assert context(rope_scaling={"type": "linear", "factor": 2.0}) == 2048
    assert context(rope_scaling={"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}) == 8192
    assert read_config(config_of("llama-3.2-1b")).max_context == 131_072
