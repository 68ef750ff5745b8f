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
    from cutaway.results import Model


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
    yield "context", f"{limits.max_context:,} tokens"
    yield "batch", f"{limits.max_running} completions, {limits.max_batch_tokens:,} tokens a step"
    yield "KV cache", f"{limits.total_pages:,} pages of {limits.page_size} tokens"
    yield "chat template", "yes" if model.text.chat_template else "no"
    yield "default sampling", ", ".join(f"{k}={v}" for k, v in model.default_sampling.items()) or "none"
    yield "server", f"version {model.server_version}, weights {model.model_hash}"
