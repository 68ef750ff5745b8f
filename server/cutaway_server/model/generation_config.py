"""generation_config.json: what it sets that this server follows, and what it sets that nobody here does.

Followed as defaults: the numbers in `_NUMBERS`, top_k, stop_strings, and do_sample=false as temperature 0; the end
tokens are read beside config.json's. Not followed, though a counterpart seems near, and warned about:
- max_new_tokens, min_new_tokens: as defaults they would refuse long prompts and small max_tokens.
- bad_words_ids, suppress_tokens: they are ids, and bad words here are texts.
"""

from __future__ import annotations

import logging

from cutaway_server.errors import InvalidField, ModelError
from cutaway_server.model.json_file import Fields
from cutaway_server.request import SamplingOptions, resolve_sampling

log = logging.getLogger(__name__)

_NUMBERS = ("temperature", "top_p", "min_p", "typical_p", "repetition_penalty")
_FOLLOWED = frozenset({*_NUMBERS, "do_sample", "top_k", "stop_strings", "eos_token_id"})
# They say how transformers computes, or nothing unless another key (such as num_beams) is set: not which tokens come.
_WITHOUT_EFFECT = frozenset({
    "_from_model_config", "transformers_version", "bos_token_id", "pad_token_id", "decoder_start_token_id",
    "renormalize_logits", "remove_invalid_values", "length_penalty", "early_stopping", "num_beam_groups",
    "use_cache", "cache_implementation", "cache_config", "max_cache_len", "prefill_chunk_size", "low_memory",
    "compile_config", "disable_compile", "continuous_batching_config", "return_dict_in_generate",
    "output_attentions", "output_hidden_states", "output_scores", "output_logits",
    "use_mtp", "speculation_type", "is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule",
    "assistant_confidence_threshold", "assistant_early_exit", "assistant_lookbehind", "assistant_ensemble_weight",
    "target_lookbehind", "prompt_lookup_num_tokens", "max_matching_ngram_size",
})  # fmt: skip
_ONE_IS_NEUTRAL = frozenset({"num_beams", "encoder_repetition_penalty", "guidance_scale", "num_return_sequences"})
_IDS = frozenset({"forced_bos_token_id", "forced_eos_token_id"})  # 0 is a token


def sampling_defaults(generation: Fields) -> SamplingOptions:
    """The values that generation_config.json sets.

    Raises:
        ModelError: one of them breaks a request's rules.
    """
    numbers = {key: generation.number(key) for key in _NUMBERS if generation.has(key)}
    if generation.values.get("do_sample") is False:
        numbers["temperature"] = 0.0  # whatever it says of the temperature it would not use
    defaults = SamplingOptions(
        **numbers,  # type: ignore[arg-type]
        top_k=_top_k(generation),
        stop=_stop_strings(generation),
    )
    try:
        resolve_sampling(
            defaults, prompt_length=1, max_context=2, vocab_size=2**31,
            eos_token_ids=frozenset(), bad_words=(), seed=0,
        )  # fmt: skip
    except InvalidField as error:
        raise ModelError(f"{generation.place}: {error}") from error
    return defaults


def warn_of_the_rest(generation: Fields, max_context: int) -> None:
    """Log, in one line, what generation_config.json asks for and nobody here does."""
    ignored = [key for key, value in generation.values.items() if not _is_neutral(key, value, max_context)]
    if ignored:
        told = ", ".join(f"{key}={_shown(generation.values[key])}" for key in sorted(ignored))
        log.warning("%s: not followed: %s", generation.place, told)


def _is_neutral(key: str, value: object, max_context: int) -> bool:
    if key in _FOLLOWED or key in _WITHOUT_EFFECT or value is None:
        return True
    if key == "max_length":
        return isinstance(value, int) and value >= max_context
    return value == 1 if key in _ONE_IS_NEUTRAL else not value and key not in _IDS


def _shown(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 40 else shown[:37] + "..."


def _top_k(generation: Fields) -> int | None:
    if not generation.has("top_k"):
        return None
    value = generation.values["top_k"]
    if isinstance(value, bool) or not isinstance(value, int):
        raise generation.wrong("top_k", "must be an integer")
    return value


def _stop_strings(generation: Fields) -> tuple[str, ...]:
    if not generation.has("stop_strings"):
        return ()
    if isinstance(generation.values["stop_strings"], str):
        return (generation.text("stop_strings"),)
    return generation.texts("stop_strings")
