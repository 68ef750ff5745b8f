"""What is served, as GetModel tells it."""

from __future__ import annotations

from importlib.metadata import version

from cutaway.v1 import inference_pb2 as v1

from cutaway_server.architecture import ModelConfig
from cutaway_server.engine.build import EngineFacts
from cutaway_server.request import MAX_LOGPROBS, MAX_N
from cutaway_server.service.tokens import wire_sampling
from cutaway_server.text.tokenizer import TextModel


def describe(name: str, facts: EngineFacts, text: TextModel) -> v1.GetModelResponse:
    """The answer to GetModel."""
    return v1.GetModelResponse(
        name=name,
        model_hash=facts.model_hash,
        server_version=version("cutaway"),
        kernels=facts.kernels,
        dtype=facts.dtype,
        device=facts.device,
        architecture=_architecture(facts.config, facts.n_parameters),
        limits=_limits(facts),
        text=v1.TextInfo(
            bos_token_id=text.bos_token_id,
            eos_token_ids=sorted(facts.eos_token_ids),
            chat_template=text.chat_template,
        ),
        default_sampling=wire_sampling(facts.defaults),
    )


def _architecture(config: ModelConfig, n_parameters: int) -> v1.Architecture:
    return v1.Architecture(
        family=config.family,
        n_layers=config.n_layers,
        d_model=config.d_model,
        n_heads=config.n_heads,
        n_kv_heads=config.n_kv_heads,
        d_head=config.d_head,
        d_mlp=config.d_mlp,
        d_vocab=config.d_vocab,
        n_parameters=n_parameters,
        windows=[window or 0 for window in config.windows],
    )


def _limits(facts: EngineFacts) -> v1.Limits:
    return v1.Limits(
        max_context=facts.max_context,
        max_running=facts.max_running,
        max_queued=facts.max_queued,
        max_batch_tokens=facts.max_batch_tokens,
        page_size=facts.page_size,
        total_pages=facts.total_pages,
        max_n=min(MAX_N, facts.max_running),
        max_logprobs=MAX_LOGPROBS,
    )
