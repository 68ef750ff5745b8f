"""`cutaway inspect cache`: the KV cache, its blocks, and what they hold."""

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
    from cutaway.machine import Block, Blocks, CacheStats

MARKS = {"used": ("█", "green"), "retained": ("▓", "yellow"), "cached": ("▒", "blue")}
FREE = ("·", "bright_black")
MAP_WIDTH = 64
UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


@click.command()
@click.argument("request_id", required=False, default="")
@click.option("--blocks", "list_blocks", is_flag=True, help="List each block of your tenant, or of REQUEST_ID.")
@click.option("--save", metavar="FILE", help="Write keys and values of REQUEST_ID to a safetensors file.")
@click.option("--index", type=int, default=0, metavar="N", help="Which of its completions to save.  [default: 0]")
@timeout_option
@connection_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def cache(
    request_id: str, list_blocks: bool, save: str | None, index: int, timeout: float | None, as_json: bool
) -> None:
    """Show the KV cache, and the blocks of your tenant or of one request.

    --save asks for the scope introspect, all else for observe.
    """
    if save is not None and not request_id:
        raise click.UsageError("--save: needs REQUEST_ID")
    with connect(timeout) as client:
        if save is not None:
            from cutaway.arrays import save_arrays

            contents = client.read_cache(request_id, index=index)
            try:
                save_arrays({array.name: array for array in (contents.keys, contents.values)}, save)
            except OSError as error:
                raise click.ClickException(f"{save!r} cannot be written: {error.strerror}") from None
            click.echo(f"{save}: keys and values of {contents.stored} positions", err=True)
            return
        told = client.blocks(request_id)
    if as_json:
        print_json({"stats": asdict(told.stats), "blocks": [_json(block) for block in told]})
        return
    for name, value in facts(told.stats):
        click.echo(click.style(name.ljust(18), fg="cyan") + value)
    click.echo()
    for line in block_lines(told) if list_blocks or request_id else block_map(told):
        click.echo(line)


def _json(block: Block) -> dict[str, object]:
    return {**asdict(block), "hash": block.hash.hex()}


def facts(stats: CacheStats) -> Iterator[tuple[str, str]]:
    """Names and values, in the order in which one wants to know them."""
    yield (
        "cache",
        f"{stats.blocks_total:,} blocks of {stats.page_size} tokens, {size(stats.bytes_total)} ({stats.dtype})",
    )
    for name, count in (("used", stats.blocks_used), ("cached", stats.blocks_cached), ("free", stats.blocks_free)):
        yield name, f"{bar(count / max(1, stats.blocks_total))} {count:,}"
    yield "retained", f"{stats.blocks_retained:,} of the cached, for {stats.requests_retained} finished requests"
    yield "yours", f"{stats.own_blocks_used:,} used, {stats.own_blocks_cached:,} cached"
    yield "fragmentation", f"{stats.fragmentation:.1%} of the used positions are empty"
    found = f"{stats.prefix_hit_tokens:,} of {stats.prefix_queried_tokens:,} prompt tokens found ({stats.hit_rate:.1%})"
    yield "prefix cache", found if stats.prefix_caching else "off"
    yield "evictions", f"{stats.evictions:,}, and {stats.preemptions:,} preemptions"


def block_map(told: Blocks) -> Iterator[str]:
    """One mark for each block of the pool: what is not yours is a dot."""
    marks = {block.block: MARKS.get(block.use, FREE) for block in told}
    last = max(marks, default=0)
    for start in range(1, last + 1, MAP_WIDTH):
        places = range(start, min(start + MAP_WIDTH, last + 1))
        line = "".join(click.style(mark, fg=colour) for mark, colour in (marks.get(n, FREE) for n in places))
        yield f"{start:>8}  {line}"
    legend = "  ".join(click.style(mark, fg=colour) + f" {use}" for use, (mark, colour) in MARKS.items())
    yield f"{'':>8}  {legend}  {click.style(FREE[0], fg=FREE[1])} free, or not yours"


def block_lines(told: Blocks) -> Iterator[str]:
    """A line for each block."""
    header = f"{'block':>7} {'use':<9}{'refs':>4} {'filled':>6} {'positions':>11} {'idle':>8}  {'hash':<12}holders"
    yield click.style(header, dim=True)
    for block in told:
        at = sorted({holder.position for holder in block.holders})
        positions = f"{at[0]}-{at[0] + block.filled - 1}" if len(at) == 1 and block.filled else "-"
        holders = ", ".join(f"{holder.request_id}/{holder.index}" for holder in block.holders) or f"({block.made_by})"
        mark, colour = MARKS.get(block.use, FREE)
        yield (
            f"{block.block:>7} {click.style(mark, fg=colour)} {block.use:<8}{block.references:>3} {block.filled:>6} "
            f"{positions:>11} {block.idle_seconds:>7.1f}s  {block.hash.hex()[:10] or '-':<12}{harmless(holders)}"
        )
        if block.text:
            yield " " * 10 + click.style(repr(harmless(block.text))[:100], dim=True)


def bar(share: float, width: int = 30) -> str:
    """A share of one as a bar."""
    full = round(share * width)
    return "█" * full + "░" * (width - full) + f" {share:6.1%}"


def size(n_bytes: float) -> str:
    """Bytes as people read them."""
    power = min(max(0, int(n_bytes).bit_length() - 1) // 10, len(UNITS) - 1)
    return f"{n_bytes / 1024**power:.4g} {UNITS[power]}"
