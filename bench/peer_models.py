"""Writes the models that bench/peers.py compares: smollm2's own weights in every form, so that all compute the same.

The GGUF file that `smollm2` stands for is Q4_1. From it come bf16/ (Hugging Face's format, by transformers' own GGUF
loader), bf16.gguf, q8_0.gguf and q4_0.gguf (by llama.cpp's llama-quantize), and a copy, q4_1.gguf.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
from pathlib import Path

from cutaway_server.model.sources import resolve


def main() -> None:
    """Write what is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quantize", type=Path, required=True, help="llama.cpp's llama-quantize")
    parser.add_argument("--models", type=Path, required=True, help="folder to write to")
    options = parser.parse_args()
    options.models.mkdir(parents=True, exist_ok=True)
    source = resolve("smollm2")
    copy = options.models / "q4_1.gguf"
    if not copy.exists():
        shutil.copyfile(source, copy)
    if not (options.models / "bf16").exists():
        write_directory(copy, options.models / "bf16")
    for name, kind in (("bf16", "BF16"), ("q8_0", "Q8_0"), ("q4_0", "Q4_0")):
        made = options.models / f"{name}.gguf"
        if not made.exists():
            origin = copy if name == "bf16" else options.models / "bf16.gguf"
            subprocess.run([options.quantize, "--allow-requantize", origin, made, kind], check=True)


def write_directory(gguf: Path, target: Path) -> None:
    """The weights in bf16, with config and tokenizer, as transformers reads the GGUF file."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    config = LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
        vocab_size=49152, max_position_embeddings=8192, rms_norm_eps=1e-5, tie_word_embeddings=True, bos_token_id=1,
        eos_token_id=2, pad_token_id=2, rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
        architectures=["LlamaForCausalLM"], dtype=torch.bfloat16,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    tensors = load_gguf_checkpoint(gguf, return_tensors=True, model_to_load=model)["tensors"]
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert set(missing) <= {"lm_head.weight"}
    assert not unexpected
    model.tie_weights()
    model.to(torch.bfloat16).save_pretrained(target)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(target)


if __name__ == "__main__":
    main()
