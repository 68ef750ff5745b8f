"""`cutaway model`: what is served."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from cutaway.cli.connection import connect, connection_options
from cutaway.cli.generate import print_json
from cutaway.cli.options import timeout_option
from cutaway.cli.screen import harmless

if TYPE_CHECKING:
    from cutaway.results import Limits, Model


@click.command()
@timeout_option
@connection_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def model(timeout: float | None, as_json: bool) -> None:
    """Show what is served: the network, the limits, the defaults."""
    with connect(timeout) as client:
        served = client.model()
    if as_json:
        print_json(asdict(served))
        return
    for name, value in facts(served):
        click.echo(click.style(name.ljust(18), fg="cyan") + harmless(value))


def facts(model: Model) -> Iterator[tuple[str, str]]:
    """Names and values, in the order in which one wants to know them."""
    shape, limits = model.architecture, model.limits
    yield "name", model.name
    yield "family", shape.family
    yield "parameters", f"{shape.n_parameters:,}"
    yield "layers", str(shape.n_layers)
    yield "width", f"{shape.d_model}, feed-forward {shape.d_mlp}"
    yield "heads", f"{shape.n_heads} of {shape.d_head}, {shape.n_kv_heads} for keys and values"
    yield "vocabulary", f"{shape.d_vocab:,}"
    if any(shape.windows):
        yield "windows", f"{sum(map(bool, shape.windows))} layers of {sorted(set(shape.windows) - {0})} tokens"
    yield "computes", f"{model.kernels}, {model.dtype} on {model.device}"
    if model.quantization:  # an older server does not tell, nor some of its limits
        yield "weights", "not rounded" if model.quantization == "none" else model.quantization
    yield "context", f"{limits.max_context:,} tokens"
    yield "batch", f"{limits.max_running} completions, {limits.max_batch_tokens:,} tokens a step"
    yield (
        "KV cache",
        f"{limits.total_pages:,} pages of {limits.page_size} tokens{f' in {model.kv_dtype}' if model.kv_dtype else ''}",
    )
    if limits.max_prompt_bytes:
        yield from _most(limits)
    yield "chat template", "yes" if model.text.chat_template else "no"
    yield "default sampling", ", ".join(f"{k}={v}" for k, v in model.default_sampling.items()) or "none"
    yield "server", f"version {model.server_version}, weights {model.model_hash}"


def _most(limits: Limits) -> Iterator[tuple[str, str]]:
    """What a request may have at most."""
    yield "prompt", f"{limits.max_prompt_bytes:,} bytes of text, {limits.max_chat_messages:,} turns"
    yield "request", f"{limits.max_message_bytes:,} bytes, n up to {limits.max_n}, logprobs up to {limits.max_logprobs}"
    yield "stop", f"{limits.max_stops} texts of {limits.max_stop_bytes:,} bytes, {limits.max_stop_token_ids:,} tokens"
    yield (
        "bad words",
        f"{limits.max_bad_words} of {limits.max_bad_word_bytes} bytes, {limits.max_bad_word_tokens} tokens",
    )
    yours = "" if limits.max_calls is None else f", {limits.max_calls:,} in all for you"
    yield "calls", f"{limits.max_streams:,} on a connection{yours}; {limits.max_queued:,} requests may wait"
