"""The shape of every weight, as the config says it: by the paths that a `Layout` uses."""

from __future__ import annotations

from cutaway_server.architecture import ModelConfig

Shape = tuple[int, ...]
_BIAS = "_bias"


def part_shapes(config: ModelConfig, path: str) -> tuple[Shape, ...]:
    """Shapes of what lies one below the other at `path`: of Q, K and V, or gate and up; else of one tensor."""
    parts = path.split(".")
    name = ".".join(parts[2:]) if parts[0] == "layers" else path
    if name in ("embed", "unembed"):
        return ((config.d_vocab, config.d_model),)
    if name == "positions":
        return ((config.max_context, config.d_model),)
    if name.endswith(_BIAS):
        return tuple(shape[:1] for shape in _matrices(config, name.removesuffix(_BIAS)))
    if name.endswith((".gain", ".bias")):
        return (_norm(config, name.rpartition(".")[0]),)
    return _matrices(config, name)


def _matrices(config: ModelConfig, name: str) -> tuple[Shape, ...]:
    queries, keys = config.n_heads * config.d_head, config.n_kv_heads * config.d_head
    mlp = (config.d_mlp, config.d_model)
    matrices: dict[str, tuple[Shape, ...]] = {
        "qkv": ((queries, config.d_model), (keys, config.d_model), (keys, config.d_model)),
        "attention_out": ((config.d_model, queries),),
        "mlp_in": (mlp, mlp) if config.gated else (mlp,),
        "mlp_out": (mlp[::-1],),
    }
    return matrices[name]


def _norm(config: ModelConfig, name: str) -> Shape:
    heads = {"q_norm": config.n_heads, "k_norm": config.n_kv_heads}
    if name in heads:
        return (config.d_head if config.qk_norm == "head" else heads[name] * config.d_head,)
    return (config.d_model,)
