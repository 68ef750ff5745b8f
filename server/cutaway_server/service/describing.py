"""What is served, as GetModel tells it."""

from __future__ import annotations

from importlib.metadata import version

from cutaway.v1 import inference_pb2 as v1

from cutaway_server import request
from cutaway_server.architecture import ModelConfig
from cutaway_server.config import Config
from cutaway_server.engine.build import EngineFacts
from cutaway_server.service import texts
from cutaway_server.service.caller import Caller
from cutaway_server.service.capturing import MAX_CAPTURES
from cutaway_server.service.editing import MAX_EDITS
from cutaway_server.service.tokens import wire_sampling
from cutaway_server.text.tokenizer import TextModel


def describe(config: Config, facts: EngineFacts, text: TextModel, caller: Caller) -> v1.GetModelResponse:
    """The answer to GetModel, for `caller`."""
    return v1.GetModelResponse(
        name=config.name,
        model_hash=facts.model_hash,
        server_version=version("cutaway"),
        kernels=facts.kernels,
        dtype=facts.dtype,
        quantization=facts.quantization,
        kv_dtype=facts.kv_dtype,
        device=facts.device,
        architecture=_architecture(facts.config, facts.n_parameters),
        limits=_limits(config, facts, caller),
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


def started(facts: EngineFacts) -> v1.Started:
    """What the first message of every stream tells of the server."""
    return v1.Started(
        model_hash=facts.model_hash,
        kernels=facts.kernels,
        dtype=facts.dtype,
        quantization=facts.quantization,
        kv_dtype=facts.kv_dtype,
    )


def _limits(config: Config, facts: EngineFacts, caller: Caller) -> v1.Limits:
    return v1.Limits(
        max_context=facts.max_context,
        max_running=facts.max_running,
        max_queued=facts.max_queued,
        max_batch_tokens=facts.max_batch_tokens,
        page_size=facts.page_size,
        total_pages=facts.total_pages,
        max_n=min(request.MAX_N, facts.max_running),
        max_logprobs=request.MAX_LOGPROBS,
        max_prompt_bytes=config.max_prompt_bytes,
        max_message_bytes=config.max_message_bytes,
        max_chat_messages=texts.MAX_MESSAGES,
        max_stops=request.MAX_STOPS,
        max_stop_bytes=request.MAX_STOP_BYTES,
        max_stop_token_ids=request.MAX_STOP_TOKENS,
        max_bad_words=request.MAX_BAD_WORDS,
        max_bad_word_bytes=request.MAX_BAD_WORD_BYTES,
        max_bad_word_tokens=request.MAX_BAD_WORD_TOKENS,
        max_logit_biases=request.MAX_BIASES,
        max_detokenized=texts.MAX_DETOKENIZED,
        max_answer_bytes=texts.MAX_ANSWER_BYTES,
        max_backlog_bytes=config.max_backlog,
        max_streams=config.max_streams,
        max_calls=caller.max_calls,
        max_captures=MAX_CAPTURES,
        max_capture_bytes=config.max_capture_bytes,
        max_edits=MAX_EDITS,
    )
