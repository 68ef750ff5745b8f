"""Tiny random models of every family, made by transformers, with a small real tokenizer.

Gains are not all one and biases not all zero, so that a weight that is left out or laid wrong changes the numbers.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

VOCAB = 512
SPECIAL = ("<|bos|>", "<|eos|>", "<|im_start|>", "<|im_end|>")  # ids 0 to 3
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_LLAMA_LIKE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
    "initializer_range": 0.12,
    "attn_implementation": "eager",
}
_GEMMA = {**_LLAMA_LIKE, "head_dim": 24, "query_pre_attn_scalar": 20, "sliding_window": 20}

# Family to the class of its config and what is set in it.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _LLAMA_LIKE),
    "mistral": ("MistralConfig", {**_LLAMA_LIKE, "sliding_window": 24}),
    "qwen2": (
        "Qwen2Config",
        {**_LLAMA_LIKE, "use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3Config", {**_LLAMA_LIKE, "head_dim": 24, "tie_word_embeddings": True}),
    "gemma2": ("Gemma2Config", _GEMMA),
    "gemma3": ("Gemma3TextConfig", {**_GEMMA, "sliding_window_pattern": 2}),
    "gpt2": (
        "GPT2Config",
        {
            "vocab_size": VOCAB,
            "n_embd": 64,
            "n_layer": 3,
            "n_head": 4,
            "n_positions": 512,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "initializer_range": 0.12,
            "attn_implementation": "eager",
        },
    ),
    "phi3": ("Phi3Config", _LLAMA_LIKE),
    "olmo2": ("Olmo2Config", _LLAMA_LIKE),
}


def tiny_model(family: str, seed: int = 0, **overrides: Any) -> transformers.PreTrainedModel:
    """A random fp32 model of 3 layers, 64 wide, with 4 heads and 512 tokens of context; `overrides` of its config."""
    name, settings = FAMILIES[family]
    config = getattr(transformers, name)(**{**settings, **overrides})
    return random_model(config, seed)


def random_model(config: transformers.PreTrainedConfig, seed: int = 0) -> transformers.PreTrainedModel:
    """A model of `config` with random weights, norms and biases included, in fp32 and ready to infer."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.data += 0.2 * torch.randn_like(parameter)
    model.eval()
    model.generation_config = transformers.GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id
    )
    return model


def save_tiny(
    family: str,
    path: Path,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "1GB",
    **overrides: Any,
) -> transformers.PreTrainedModel:
    """Write a tiny model and its tokenizer as a Hugging Face directory, and return the model."""
    return save_model(tiny_model(family, seed, **overrides), path, dtype, max_shard_size)


def save_model(
    model: transformers.PreTrainedModel,
    path: Path,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "1GB",
) -> transformers.PreTrainedModel:
    """Write `model`, turned into `dtype`, and the tokenizer as a Hugging Face directory, and return it."""
    model = model.to(dtype)
    model.save_pretrained(path, max_shard_size=max_shard_size)
    save_tokenizer(path)
    return model


def save_tokenizer(path: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json: byte-level BPE, a first BOS, ChatML."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "tokenizer.json").write_text(_tokenizer_json(), encoding="utf-8")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|bos|>",
        "eos_token": "<|eos|>",
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 512,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")


@cache
def _tokenizer_json() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT.splitlines(keepends=True), trainer)
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", 0)]),
        ]
    )
    assert tokenizer.get_vocab_size() == VOCAB, tokenizer.get_vocab_size()
    return str(tokenizer.to_str())


TEXT = """\
A cutaway drawing shows a machine at work with its casing removed. The gears turn, the belts run, and whoever looks
can follow the power from the boiler to the wheels without stopping the engine. The people who build the machine need
such a drawing, and so do those who repair it, who teach it, or who only want to know how it works.
The harbour lay quiet in the morning. Two fishing boats had come back before the sun was over the hills, and the men
on the pier were sorting the catch into boxes: herring, mackerel, and a few large cod. "There was more of everything
when I was young," said the old man, "and there was less of the wind." Nobody answered him, because he said so every
day, and because it was true.
What is the capital of France? The capital of France is Paris. What is the largest planet? The largest planet is
Jupiter. How many days are there in a week? There are seven days in a week. Please write a short story about a dragon.
for i in range(10):
    if i % 2 == 0:
        print("even", i)
    else:
        print("odd", i)
def add(first, second):
    return first + second
In 1969 the first people walked on the moon; in 1989 the wall came down; in 2024 there were more than 8,000,000,000 of
us. The train leaves at 7:45 from platform 12 and arrives at 10:30. Water boils at 100 degrees and freezes at 0.
Der Zug nach Köln fährt um halb acht ab, und das Frühstück gibt es im Speisewagen. Où est la bibliothèque, s'il vous
plaît? El niño comió una manzana. 東京は日本の首都です。Привет, мир! 🙂 👋
"""
