"""What a step of a model must read and multiply, and so how fast a machine could be at most."""

from __future__ import annotations

from dataclasses import dataclass

from cutaway_server.architecture import ModelConfig

# Bytes for each weight. GGUF's blocks of 32: Q8_0 has a 2-byte scale, Q4_0 too, Q4_1 also a minimum.
BYTES = {"float32": 4.0, "bfloat16": 2.0, "int8": 1.0, "Q8_0": 34 / 32, "Q4_0": 18 / 32, "Q4_1": 20 / 32}


@dataclass(frozen=True, slots=True)
class Cost:
    """Counts of one model: elements of its matrices, and of keys and values of one token."""

    layer_weights: int  # all layers together
    unembed_weights: int
    kv_elements: int  # keys and values of one token, all layers together
    attention_flops: int  # of one query for each key it sees, all layers together

    @classmethod
    def of(cls, config: ModelConfig) -> Cost:
        """The counts of a model with this shape; sliding windows are not thought of."""
        layers, queries = len(config.layers), config.n_heads * config.d_head
        keys = config.n_kv_heads * config.d_head
        mlp = (3 if config.gated else 2) * config.d_mlp * config.d_model
        attention = config.d_model * (2 * queries + 2 * keys)
        return cls(layers * (attention + mlp), config.d_vocab * config.d_model, 2 * keys * layers, 4 * queries * layers)

    def decode_bytes(
        self, streams: int, context: float, weight: float, kv: float, unembed: float | None = None
    ) -> float:
        """Bytes that one decode step reads: all matrices once, and the keys and values of every stream.

        `weight`, `unembed` (if it differs) and `kv` are bytes of one element.
        """
        matrices = self.layer_weights * weight + self.unembed_weights * (weight if unembed is None else unembed)
        return matrices + streams * context * self.kv_elements * kv

    def prefill_flops(self, tokens: int) -> float:
        """Multiplications and additions of a prompt, whose last token alone is unembedded."""
        seen = tokens * (tokens + 1) / 2
        return 2.0 * (self.layer_weights * tokens + self.unembed_weights) + self.attention_flops * seen
