"""Replays a workload over gRPC: output tokens a second, time to the first token, time between tokens.

A server is started for it, unless --address names one that runs. Each concurrency is warmed up once and measured
--repeats times. The client's own cost is told as its share of one core; on a machine as small as this one's engine
needs, it is part of what a user would see. Requests that fail are counted, never dropped.
"""

from __future__ import annotations

import argparse
import random
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from doors import GrpcDoor
from launch import LaunchError, our_server, unwind_on_sigterm
from measure import Machine, Spread, print_json, say, table
from replay import Summary, replay
from workload import WORKLOAD, Ask, drawn, read_workload


def main() -> None:
    """Measure and print."""
    options = read_options()
    unwind_on_sigterm()
    asks = read_workload(options.workload, options.limit)
    server = nullcontext((options.address, None)) if options.address else our_server(server_options(options))
    records = []
    try:
        with server as (address, _):
            door = GrpcDoor(address, options.prefix_caching)
            for concurrency in options.concurrency:
                replay(door, warm_up(asks, concurrency), concurrency)
                runs = []
                for i in range(options.repeats):
                    runs.append(Summary.of(replay(door, asks, concurrency)))
                    say(f"{concurrency} at once, {i + 1}: {runs[-1].output_tokens_per_second:.1f} tokens/s")
                records.append({"concurrency": concurrency, **merged(runs), "runs": runs})
    except LaunchError as error:
        raise SystemExit(f"the server did not start: {error}") from None
    if options.json:
        print_json(workload=str(options.workload), requests=len(asks), records=records)
    else:
        show(options, asks, records)


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="as for cutaway-server [%(default)s]")
    parser.add_argument("--threads", type=int, default=2, help="of the server that is started [%(default)s]")
    parser.add_argument("--address", help="a server that runs already, HOST:PORT")
    parser.add_argument("--workload", type=Path, default=WORKLOAD, help="file of requests [bench/workload.json]")
    parser.add_argument("--limit", type=int, help="only the first so many requests")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 16, 64], help="requests at once")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--prefix-caching", action="store_true", help="let requests share prefixes")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("server_options", nargs="*", help="after --: options for cutaway-server")
    return parser.parse_args()


def server_options(options: argparse.Namespace) -> list[str]:
    """The command line of the server."""
    return ["--model", options.model, "--threads", str(options.threads), *options.server_options]


def warm_up(asks: list[Ask], concurrency: int) -> list[Ask]:
    """Short requests, so that every thread, buffer and connection has been used."""
    return drawn(asks, concurrency, min(32, min(len(ask.prompt) for ask in asks)), 8, random.Random(0))


def merged(runs: list[Summary]) -> dict[str, object]:
    """Medians over the runs; errors of all of them."""
    errors: dict[str, int] = {}
    for run in runs:
        for name, count in run.errors.items():
            errors[name] = errors.get(name, 0) + count
    return {
        "output_tokens_per_second": Spread.of(run.output_tokens_per_second for run in runs),
        "first_token_ms": {p: Spread.of(run.first_token_ms[i] for run in runs) for i, p in enumerate(PERCENTILES)},
        "between_tokens_ms": {
            p: Spread.of(run.between_tokens_ms[i] for run in runs) for i, p in enumerate(PERCENTILES)
        },
        "errors": errors,
        "client_share": Spread.of(run.client_share for run in runs),
    }


PERCENTILES = ("p50", "p95", "p99")


def show(options: argparse.Namespace, asks: list[Ask], records: list[dict[str, Any]]) -> None:
    """The table."""
    print(f"{len(asks)} requests of {options.workload.name} over gRPC, medians of {options.repeats} runs")
    print(Machine.here())
    head = [
        "at once",
        "output tok/s",
        "first token ms p50/p95/p99",
        "between tokens ms p50/p95/p99",
        "client",
        "errors",
    ]
    rows = []
    for record in records:
        latencies = ("/".join(f"{record[k][p].median:.0f}" for p in PERCENTILES) for k in ("first_token_ms",))
        gaps = "/".join(f"{record['between_tokens_ms'][p].median:.1f}" for p in PERCENTILES)
        share = f"{100 * record['client_share'].median:.0f} %"
        errors = sum(record["errors"].values())
        rows.append([record["concurrency"], record["output_tokens_per_second"], *latencies, gaps, share, errors])
    print(table(head, rows))
    for record in records:
        for name, count in record["errors"].items():
            print(f"{record['concurrency']} at once: {count} x {name}")


if __name__ == "__main__":
    main()
