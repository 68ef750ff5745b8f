"""How long one step of sampling takes, by what the rows ask for.

python bench/sampler.py --rows 1,16,64 --vocab 49152
python bench/sampler.py --json > sampler.json
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from statistics import median

import click
import torch
from cutaway_server.request import SamplingParams
from cutaway_server.sampler import SamplerState, build_batch, sample
from rich.console import Console
from rich.table import Table

BASE = SamplingParams(seed=1, max_tokens=1, temperature=0.8)
CASES = {
    "greedy": replace(BASE, temperature=0.0),
    "temperature": BASE,
    "top_k 40": replace(BASE, top_k=40),
    "top_k 40, top_p 0.9": replace(BASE, top_k=40, top_p=0.9),
    "top_k 1000": replace(BASE, top_k=1000),
    "top_p 0.9": replace(BASE, top_p=0.9),
    "min_p 0.05": replace(BASE, min_p=0.05),
    "typical_p 0.9": replace(BASE, typical_p=0.9),
    "penalties": replace(BASE, repetition_penalty=1.1, frequency_penalty=0.2),
    "logprobs 5": replace(BASE, logprobs=5),
}


@dataclass(frozen=True, slots=True)
class Result:
    """Median milliseconds of one step."""

    case: str
    rows: int
    vocab: int
    device: str
    build_ms: float  # on the host: lay the batch out and move it
    sample_ms: float


def measure(case: str, rows: int, vocab: int, device: torch.device, repeats: int) -> Result:
    """Time building and sampling of `rows` rows that all ask for the same, each after a prompt of 2,000 tokens."""
    prompt = tuple(token % vocab for token in range(0, 34_000, 17))
    states = [SamplerState(CASES[case], prompt, vocab, index) for index in range(rows)]
    positions = range(2000, 2000 + rows)
    logits = torch.randn(rows, vocab, device=device) * 3
    batch = build_batch(states, positions, vocab, device)
    build_ms = _median_ms(lambda: build_batch(states, positions, vocab, device), device, repeats)
    sample_ms = _median_ms(lambda: sample(logits, batch), device, repeats)
    return Result(case, rows, vocab, str(device), build_ms, sample_ms)


def _median_ms(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    times = []
    for _ in range(repeats + 1):  # the first warms up
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return round(1000 * median(times[1:]), 3)


def _table(results: list[Result], threads: int) -> Table:
    table = Table(title=f"One step of sampling, median ms ({results[0].device}, {threads} threads)")
    for name in ("case", "rows", "vocab", "build", "sample", "sample per row"):
        table.add_column(name, justify="left" if name == "case" else "right")
    for r in results:
        per_row = f"{r.sample_ms / r.rows:.3f}"
        table.add_row(r.case, str(r.rows), str(r.vocab), f"{r.build_ms:.2f}", f"{r.sample_ms:.2f}", per_row)
    return table


def _integers(_context: click.Context, _option: click.Parameter, text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise click.BadParameter("give integers with commas between them") from None


@click.command(help=__doc__)
@click.option("--rows", default="1,16,64", callback=_integers, show_default=True, help="Rows in a step.")
@click.option("--vocab", default="49152", callback=_integers, show_default=True, help="Sizes of the vocabulary.")
@click.option("--case", "cases", type=click.Choice(list(CASES)), multiple=True, help="Only these; all by default.")
@click.option("--device", default="cpu", show_default=True, help="Where the logits are.")
@click.option("--threads", default=0, help="torch's threads on the CPU; 0 leaves torch's own choice.")
@click.option("--repeats", default=9, show_default=True, help="Steps timed.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, not a table.")
def main(
    rows: list[int], vocab: list[int], cases: tuple[str, ...], device: str, threads: int, repeats: int, as_json: bool
) -> None:
    """Measure every combination."""
    if threads:
        torch.set_num_threads(threads)
    wanted = cases or tuple(CASES)
    results = [measure(case, r, v, torch.device(device), repeats) for v in vocab for r in rows for case in wanted]
    if as_json:
        click.echo(json.dumps([asdict(result) for result in results], indent=2))
    else:
        Console().print(_table(results, torch.get_num_threads()))


if __name__ == "__main__":
    main()
