"""Hugging Face transformers on the same shape and device: static cache and compile, and continuous batching."""

from __future__ import annotations

import time
from typing import Any

import torch
from cutaway_server.architecture import ModelConfig


def llama(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> Any:
    """A random LlamaForCausalLM of the shape."""
    import transformers

    rope = config.layers[0].rope
    assert rope is not None
    made = transformers.LlamaConfig(
        vocab_size=config.d_vocab, hidden_size=config.d_model, intermediate_size=config.d_mlp,
        num_hidden_layers=config.n_layers, num_attention_heads=config.n_heads,
        num_key_value_heads=config.n_kv_heads, head_dim=config.d_head, max_position_embeddings=config.max_context,
        rope_parameters={"rope_type": "default", "rope_theta": rope.theta}, tie_word_embeddings=False,
        bos_token_id=0, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    with torch.device(device):
        model = transformers.LlamaForCausalLM._from_config(made, dtype=dtype)
    return model.eval()


def static_and_compiled(model: Any, rows: int, prompt: int, output: int) -> float:
    """Decoded tokens a second of `rows` prompts: static cache, which `generate` compiles for on a GPU by itself."""
    ids = torch.randint(1, model.config.vocab_size, (rows, prompt), device=model.device)
    options = {"do_sample": False, "cache_implementation": "static", "attention_mask": torch.ones_like(ids)}

    def seconds(tokens: int) -> float:
        _wait(model.device)
        start = time.perf_counter()
        with torch.no_grad():
            model.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, **options)
        _wait(model.device)
        return time.perf_counter() - start

    for _ in range(2):
        seconds(output)
    first, whole = seconds(1), seconds(output)
    return rows * (output - 1) / (whole - first)


def continuous(model: Any, prompts: list[list[int]], output: int) -> float:
    """Output tokens a second of `generate_batch`."""
    import transformers

    generation = transformers.GenerationConfig(max_new_tokens=output, do_sample=False, eos_token_id=-1, pad_token_id=0)
    model.generate_batch(inputs=prompts[:2], generation_config=generation)
    _wait(model.device)
    start = time.perf_counter()
    answers = model.generate_batch(inputs=prompts, generation_config=generation)
    _wait(model.device)
    return sum(len(a.generated_tokens) for a in answers.values()) / (time.perf_counter() - start)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
