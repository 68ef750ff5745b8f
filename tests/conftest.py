"""Real models, once a session: the files, and transformers on the weights it dequantises itself as the reference."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read when torch is loaded; see docs/decisions.md

os.environ.setdefault("CUTAWAY_METRICS_LISTEN", "none")  # the default port may be taken; who wants one asks for it

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is loaded, which transformers does too

from cutaway_server.model.sources import resolve

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a suite in the background; what it starts would inherit this
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _few_threads() -> None:
    torch.set_num_threads(2)


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct, fetched once into the user's cache."""
    return resolve("smollm2")


@pytest.fixture(scope="session")
def gemma3_gguf() -> Path:
    """Gemma 3 270M, fetched once into the user's cache."""
    return resolve("gemma3-270m")


@pytest.fixture(scope="session")
def smollm2_hf(smollm2_gguf: Path) -> Any:
    """transformers' LlamaForCausalLM in fp32: the published config, the weights its own GGUF loader dequantises."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        attn_implementation="eager",
    )
    return _with_gguf_weights(LlamaForCausalLM(config), smollm2_gguf)


@pytest.fixture(scope="session")
def gemma3_hf(gemma3_gguf: Path) -> Any:
    """transformers' Gemma3ForCausalLM in fp32: the published config, the weights its own GGUF loader dequantises."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    config = Gemma3TextConfig(
        hidden_size=640,
        intermediate_size=2048,
        num_hidden_layers=18,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=256,
        vocab_size=262_144,
        max_position_embeddings=32_768,
        rms_norm_eps=1e-6,
        query_pre_attn_scalar=256,
        sliding_window=512,
        layer_types=["full_attention" if n % 6 == 5 else "sliding_attention" for n in range(18)],
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
            "full_attention": {"rope_type": "default", "rope_theta": 1_000_000.0},
        },
        tie_word_embeddings=True,
        attn_implementation="eager",
    )
    return _with_gguf_weights(Gemma3ForCausalLM(config), gemma3_gguf)


def _with_gguf_weights(model: Any, path: Path) -> Any:
    # from_pretrained(gguf_file=...) would want accelerate, and read the metadata (slow) twice.
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    tensors = load_gguf_checkpoint(path, return_tensors=True, model_to_load=model)["tensors"]
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert set(missing) <= {"lm_head.weight"}
    assert not unexpected
    return model.eval()
