"""Which tokens end an answer, as a GGUF file says and as llama.cpp knows them by their text."""

from __future__ import annotations

from collections.abc import Mapping

from cutaway_server.model.json_file import Fields

END_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")
END_TEXTS = frozenset(
    (
        *("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<end_of_turn>", "<end_of_utterance>"),
        *("<|endoftext|>", "<|end_of_text|>", "<EOT>", "_<EOT>", "<eos>"),
    )
)  # not "</s>": where that ends an answer it is the eos_token_id, and in Gemma it is HTML for the end of struck text
CONTROL, USER_DEFINED = 3, 4


def end_tokens(metadata: Mapping[str, object], d_vocab: int, file: str) -> frozenset[int]:
    """Ids of the tokens that end an answer."""
    fields = Fields(metadata, file)
    ends = {token for key in END_KEYS for token in fields.token_ids(f"tokenizer.ggml.{key}")}
    for token in ends:
        if token >= d_vocab:
            raise fields.wrong("tokenizer.ggml.eos_token_id", f"(or eot, eom) must be below the vocabulary's {d_vocab}")
    tokens, kinds = (metadata.get(f"tokenizer.ggml.{key}") for key in ("tokens", "token_type"))
    if isinstance(tokens, list) and isinstance(kinds, list):
        ends |= {
            token
            for token, (text, kind) in enumerate(zip(tokens[:d_vocab], kinds, strict=False))
            if kind in (CONTROL, USER_DEFINED) and text in END_TEXTS
        }
    return frozenset(ends)
