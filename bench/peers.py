"""Our engine and server beside llama.cpp and vLLM: the table of goals, measured in turns (A B, B A, A B, ...).

Each row compares ours with one peer on the same machine in one run, with the same prompts, threads and lengths, and
prefix caching off. Whoever is not measured is paused. docs/performance.md says how to install the peers. With --out,
each pair is added to a file as it is done, and pairs that this commit has there already are not run again.
"""

from __future__ import annotations

import argparse
import json
import random
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from contestants import Contestant, Setting, started
from cost import BYTES, Cost
from cutaway_server.model.open import open_model
from launch import LaunchError, unwind_on_sigterm
from measure import Machine, Spread, Turn, commit, figure, print_json, say, table, turns
from reading import fastest_read
from replay import RequestError
from rows import RATE, Goal, Row, Sizes, rows
from workload import WORKLOAD, read_workload

Pair = dict[str, dict[str, float]]  # "ours" and "peer" to their figures


def main() -> None:
    """Run the rows that are asked for, and print what they reached."""
    options = read_options()
    unwind_on_sigterm()
    chosen = [row for row in rows() if not options.only or row.name in options.only]
    setting = Setting(
        options.models, options.llama, options.vllm, tuple(options.preload), options.threads, tuple(options.our_options)
    )
    sizes = Sizes(tuple(read_workload(options.workload, options.limit)), options.output)
    same = (options.threads, options.output, options.limit, str(options.workload), *options.our_options)
    book = Book(options.out, " ".join(str(part) for part in same))
    with Turn(options.lock, options.hold) as turn:
        failures = run(chosen, setting, sizes, options.pairs, book, turn)
        measured_rows = [row for row in chosen if book.of(row.name)]
        bandwidth = 0.0
        if any(row.streams for row in measured_rows):
            with turn.held():
                bandwidth = fastest_read(options.threads)
    reports = [report(row, book.of(row.name), setting, bandwidth) for row in measured_rows]
    if options.json:
        print_json(read_bytes_per_second=bandwidth, threads=options.threads, rows=reports, failures=failures)
    else:
        show(reports, bandwidth, options)
    for name, failure in failures.items():
        say(f"{name} was not measured: {failure}")
    if failures:
        raise SystemExit(1)


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--peers", type=Path, default=Path("peers"), help="folder of the peers, from which the next four follow")
    add("--models", type=Path, help="folder with bf16/, bf16.gguf, q8_0.gguf, q4_0.gguf, q4_1.gguf [PEERS/models]")
    add("--llama", type=Path, help="folder with llama-batched-bench [PEERS/llama/bin]")
    add("--vllm", type=Path, help="Python that vLLM is installed in [PEERS/vllm/bin/python]")
    add("--preload", type=Path, action="append", help="library for vLLM [PEERS/vllm/lib/libiomp5.so]; repeatable")
    add("--only", nargs="+", choices=[row.name for row in rows()], metavar="ROW",
        help="of: " + ", ".join(row.name for row in rows()))  # fmt: skip
    add("--pairs", type=int, default=5, help="of one measurement each, in changing order [%(default)s]")
    add("--threads", type=int, default=2, help="for everyone [%(default)s]")
    add("--output", type=int, default=128, help="tokens of a decoding stream [%(default)s]")
    add("--workload", type=Path, default=WORKLOAD, help="[bench/workload.json]")
    add("--limit", type=int, help="only the first so many requests of the workload")
    add("--out", type=Path, help="file to which pairs are added, and from which a run goes on")
    add("--lock", type=Path, help="file to lock (flock) while measuring, where jobs of a machine take turns")
    add("--hold", type=float, default=45, help="seconds after which the lock is given back between pairs [%(default)s]")
    add("--json", action="store_true")
    add("our_options", nargs="*", help="after --: further options for cutaway-server")
    options = parser.parse_args()
    options.models = options.models or options.peers / "models"
    options.llama = options.llama or options.peers / "llama" / "bin"
    options.vllm = options.vllm or options.peers / "vllm" / "bin" / "python"
    options.preload = options.preload or [options.vllm.parents[1] / "lib" / "libiomp5.so"]
    return options


class Book:
    """Pairs of each row: what this commit has in the file under the same options, and what is added to it."""

    def __init__(self, out: Path | None, options: str = "") -> None:
        self._key = {"commit": commit(), "options": options}
        self.rows: dict[str, list[Pair]] = {}
        self._out = out
        for line in out.read_text().splitlines() if out and out.exists() else ():
            record = json.loads(line)
            if self._key.items() <= record.items():
                self.of(record["row"]).append(record["pair"])

    def of(self, row: str) -> list[Pair]:
        """A row's pairs."""
        return self.rows.setdefault(row, [])

    def add(self, row: str, pair: Pair) -> None:
        """Note a pair."""
        self.of(row).append(pair)
        say(f"{row}, pair {len(self.of(row))}: " + "; ".join(f"{who} {told(of)}" for who, of in pair.items()))
        if self._out:
            with self._out.open("a") as file:
                file.write(json.dumps({"row": row, **self._key, "pair": pair}) + "\n")


def run(chosen: list[Row], setting: Setting, sizes: Sizes, pairs: int, book: Book, turn: Turn) -> dict[str, str]:
    """Measure what the book lacks; rows that failed, and why. A contestant stays for the rows that follow."""
    failures: dict[str, str] = {}
    here: dict[str, tuple[Contestant, ExitStack]] = {}
    try:
        for row in chosen:
            wanted = [who for who in (row.ours, row.peer) if who is not None]
            for who in [who for who in here if who not in wanted]:
                here.pop(who)[1].close()
            if len(book.of(row.name)) >= pairs:
                continue
            try:
                for who in wanted:
                    if who not in here:
                        with turn.held():
                            here[who] = enter(who, setting)
                measure_row(row, [here[who][0] for who in wanted], sizes, pairs, book, turn)
            except (LaunchError, RequestError) as error:
                failures[row.name] = str(error)
    finally:
        for _, stack in here.values():
            stack.close()
        turn.end()
    return failures


def enter(who: str, setting: Setting) -> tuple[Contestant, ExitStack]:
    """A contestant, paused, and what ends it."""
    say(f"starting {who}")
    stack = ExitStack()
    contestant = stack.enter_context(started(who, setting))
    contestant.pause()
    return contestant, stack


def measure_row(row: Row, contestants: list[Contestant], sizes: Sizes, pairs: int, book: Book, turn: Turn) -> None:
    """Add pairs to the book until there are enough."""
    for number, order in list(enumerate(turns(pairs)))[len(book.of(row.name)) :]:
        with turn.held():
            # Both of a pair are asked the same, and no two pairs are.
            pair = {
                ("ours", "peer")[i]: measured(row, contestants[i], sizes, random.Random(f"{row.name} {number}"))
                for i in order
                if i < len(contestants)
            }
        book.add(row.name, pair)


def measured(row: Row, contestant: Contestant, sizes: Sizes, source: random.Random) -> dict[str, float]:
    """One measurement, by someone who is paused before and after."""
    contestant.resume()
    try:
        return row.measure(contestant, sizes, source)
    finally:
        contestant.pause()


def told(figures: dict[str, float]) -> str:
    """Figures in a line."""
    return ", ".join(f"{name} {figure(value)}" for name, value in figures.items())


def report(row: Row, pairs: list[Pair], setting: Setting, bandwidth: float) -> dict[str, object]:
    """A row's medians and spreads, and how it stands to its goals."""
    sides = {
        side: {name: Spread.of(pair[side][name] for pair in pairs) for name in pairs[0][side]} for side in pairs[0]
    }
    goals = []
    for goal in row.goals:
        reached = Spread.of(value(row, goal, pair) for pair in pairs)
        goals.append({**asdict(goal), "reached": reached, "met": goal.met(reached.median)})
    share = share_of_limit(row, sides["ours"][RATE].median, setting, bandwidth) if row.streams else None
    return {"row": row.name, "pairs": len(pairs), "contestants": [row.ours, row.peer], **sides, "goals": goals,
            "share_of_reading_weights": share}  # fmt: skip


def value(row: Row, goal: Goal, pair: Pair) -> float:
    """What the goal bounds, in one pair."""
    ours = pair["ours"][goal.figure]
    return ours / pair["peer"][goal.figure] if row.ratio else ours


def share_of_limit(row: Row, rate: float, setting: Setting, bandwidth: float) -> float:
    """The bytes of the matrices that our steps read a second, over what the machine reads."""
    weights = row.ours.split()[1]
    cost = Cost.of(open_model(str(setting.model("bf16"))).config)
    element = BYTES[{"bf16": "bfloat16", "int8": "int8"}.get(weights, weights.upper())]
    unembed = BYTES["Q8_0"] if weights.startswith("q4") else None  # as llama-quantize leaves the embedding
    return rate / row.streams * cost.decode_bytes(row.streams, 0, element, 2, unembed) / bandwidth


def show(reports: list[dict[str, Any]], bandwidth: float, options: argparse.Namespace) -> None:
    """The table."""
    print(Machine.here())
    print(f"{options.threads} threads; medians (least to greatest) of the pairs\n")
    lines = []
    for row in reports:
        for goal in row["goals"]:
            wanted = Goal(goal["figure"], goal["bound"], goal["at_least"])
            sides = [row[side][goal["figure"]] if side in row else "" for side in ("ours", "peer")]
            verdict = "met" if goal["met"] else "missed"
            lines.append([row["row"], goal["figure"], *sides, goal["reached"], wanted, verdict, row["pairs"]])
    print(table(["row", "figure", "ours", "peer", "reached", "goal", "", "pairs"], lines))
    for row in reports:
        share = row["share_of_reading_weights"]
        if share is not None:
            print(f"{row['row']}: reads its weights at {100 * share:.0f} % of {bandwidth / 1e9:.1f} GB/s")


if __name__ == "__main__":
    main()
