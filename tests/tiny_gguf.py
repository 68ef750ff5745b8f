"""Writes transformers' models as GGUF files, as llama.cpp's converter does, with the gguf package's names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from numpy.typing import NDArray
from tiny import CHAT_TEMPLATE, save_tokenizer

F32 = GGMLQuantizationType.F32
TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # GPT-2's Conv1D


def write_model(model: Any, path: Path, tokenizer: Path, kind: GGMLQuantizationType = F32, **extra: object) -> None:
    """Write `model` with matrices as `kind`; `extra` are more keys of its architecture, with _ for the first dot."""
    config = model.config
    architecture = config.model_type.removesuffix("_text")
    writer = GGUFWriter(path, architecture)
    _write_config(writer, config)
    for key, value in extra.items():
        name = f"{architecture}.{key.replace('__', '.')}"
        adders = {str: writer.add_string, float: writer.add_float32, int: writer.add_uint32, list: writer.add_array}
        adders[type(value)](name, value)
    _write_tokenizer(writer, tokenizer)
    _write_tensors(writer, model, kind)
    finish(writer)


def finish(writer: GGUFWriter) -> None:
    """Write what was added."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_config(writer: GGUFWriter, config: Any) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    if config.model_type == "gpt2":
        writer.add_feed_forward_length(4 * config.n_embd)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(_parameters(config)["rope_theta"])
    if config.model_type != "llama":
        writer.add_key_length(_d_head(config))
        writer.add_value_length(_d_head(config))
    if config.model_type in ("gemma2", "gemma3_text", "phi3"):
        writer.add_sliding_window(config.sliding_window or 0)
    if config.model_type == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if config.model_type == "phi3":
        writer.add_rope_dimension_count(int(_d_head(config) * _parameters(config).get("partial_rotary_factor", 1.0)))


def _parameters(config: Any) -> dict[str, Any]:
    parameters: dict[str, Any] = config.rope_parameters
    return parameters.get("full_attention", parameters)


def _d_head(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _write_tokenizer(writer: GGUFWriter, directory: Path) -> None:
    save_tokenizer(directory)
    content = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
    ids = content["model"]["vocab"]
    tokens = sorted(ids, key=ids.__getitem__)
    special = {token["content"] for token in content["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in special else 1 for token in tokens])
    writer.add_token_merges(
        [merge if isinstance(merge, str) else " ".join(merge) for merge in content["model"]["merges"]]
    )
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_chat_template(CHAT_TEMPLATE)


def _write_tensors(writer: GGUFWriter, model: Any, kind: GGMLQuantizationType) -> None:
    names = gguf.get_tensor_name_map(_architecture(model), model.config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        base, _, suffix = name.rpartition(".")
        values = _converted(model, name, tensor).contiguous().numpy()
        add(writer, f"{names.get_name(base)}.{suffix}", values, kind if values.ndim > 1 else F32)
    if (factors := rope_factors(model)) is not None:
        add(writer, "rope_freqs.weight", factors.numpy(), F32)


def _architecture(model: Any) -> gguf.MODEL_ARCH:
    name = model.config.model_type.removesuffix("_text")
    return next(arch for arch, known in gguf.MODEL_ARCH_NAMES.items() if known == name)


def add(writer: GGUFWriter, name: str, values: NDArray[np.float32], kind: GGMLQuantizationType) -> None:
    """Add a tensor, quantised as `kind`."""
    data = gguf.quants.quantize(values, kind)
    writer.add_tensor(name, data, raw_dtype=kind)


def _converted(model: Any, name: str, tensor: torch.Tensor) -> torch.Tensor:
    config = model.config
    if config.model_type == "llama" and ".q_proj." in name:
        return _permuted(tensor, config.num_attention_heads)
    if config.model_type == "llama" and ".k_proj." in name:
        return _permuted(tensor, config.num_key_value_heads)
    if config.model_type == "gpt2" and name.endswith(TRANSPOSED):
        return tensor.t()
    if config.model_type.startswith("gemma") and name.endswith("norm.weight"):
        return tensor + 1
    return tensor


def _permuted(weights: torch.Tensor, heads: int) -> torch.Tensor:
    """Each head's rows 0, 1, ... h, h+1, ... in the order 0, h, 1, h+1, ..., for a rotation of neighbours."""
    halves = weights.unflatten(0, (heads, 2, -1))
    return torch.stack([halves[:, 0], halves[:, 1]], 2).reshape(weights.shape)


def rope_factors(model: Any) -> torch.Tensor | None:
    """What llama3 scaling divides each frequency by, or None for other models."""
    if model.config.model_type != "llama" or _parameters(model.config)["rope_type"] != "llama3":
        return None
    dims = _d_head(model.config)
    plain = 1.0 / _parameters(model.config)["rope_theta"] ** (torch.arange(0, dims, 2).float() / dims)
    factors: torch.Tensor = plain / model.model.rotary_emb.inv_freq
    return factors
