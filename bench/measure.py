"""What the benchmarks share: medians and spread, turns of A B B A, a machine's description, tables and JSON."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8")


@dataclass(frozen=True, slots=True)
class Spread:
    """The median of repeated measurements, the least and the greatest, and how many there were."""

    median: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """The spread of at least one value."""
        ordered = sorted(values)
        return cls(statistics.median(ordered), ordered[0], ordered[-1], len(ordered))

    def __str__(self) -> str:
        return f"{figure(self.median)} ({figure(self.low)} to {figure(self.high)})"


def figure(value: float) -> str:
    """A number in about four digits."""
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear between the two nearest of at least one value."""
    ordered = sorted(values)
    at = (len(ordered) - 1) * percent / 100
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


def turns(pairs: int) -> Iterator[tuple[int, int]]:
    """Which of the two goes first in each pair, so that a drift of the machine hits both: A B, B A, A B, ..."""
    for pair in range(pairs):
        yield (0, 1) if pair % 2 == 0 else (1, 0)


def seconds_each(call: Callable[[], object], repeats: int, at_least: float) -> list[float]:
    """Seconds of one call, `repeats` times, each from a loop of at least `at_least` seconds, after one call."""
    call()
    start = time.perf_counter()
    call()
    loops = max(1, round(at_least / max(time.perf_counter() - start, 1e-9)))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(loops):
            call()
        times.append((time.perf_counter() - start) / loops)
    return times


def rate(amount: float, call: Callable[[], object], repeats: int) -> Spread:
    """How much a second, when a call does `amount`."""
    return Spread.of(amount / t for t in seconds_each(call, repeats, 0.2))


class Turn:
    """A machine that is shared by turns: an exclusive flock on a file that the others lock, too.

    It is given back about every `seconds`, between two measurements, so that nobody waits for long. Without a file
    every turn is ours.
    """

    def __init__(self, path: Path | None, seconds: float) -> None:
        self._file = None if path is None else path.open("a")
        self._seconds = seconds
        self._since: float | None = None

    @contextmanager
    def held(self) -> Iterator[None]:
        """Wait for our turn, unless it still is; end it if it has been long."""
        if self._file is None:
            yield
            return
        if self._since is None:
            fcntl.flock(self._file, fcntl.LOCK_EX)
            self._since = time.monotonic()
        try:
            yield
        finally:
            if time.monotonic() - self._since > self._seconds:
                self.end()

    def end(self) -> None:
        """Give the machine back."""
        if self._file is not None:
            fcntl.flock(self._file, fcntl.LOCK_UN)
        self._since = None

    def __enter__(self) -> Turn:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()


@dataclass(frozen=True, slots=True)
class Machine:
    """Where and on what a figure was measured."""

    processor: str
    cores: int
    memory_gib: float
    instructions: tuple[str, ...]
    python: str
    commit: str

    @classmethod
    def here(cls) -> Machine:
        """This machine and this checkout."""
        facts = _cpuinfo()
        flags = set(facts.get("flags", facts.get("Features", "")).split())
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
        return cls(
            facts.get("model name", platform.machine()), len(os.sched_getaffinity(0)), round(memory, 1),
            tuple(name for name in INSTRUCTIONS if name in flags), platform.python_version(), commit(),
        )  # fmt: skip

    def __str__(self) -> str:
        known = ", ".join(self.instructions) or platform.machine()
        return f"{self.processor}, {self.cores} cores ({known}), {self.memory_gib} GiB; commit {self.commit}"


def _cpuinfo() -> dict[str, str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return {}
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}


def commit() -> str:
    """The checkout's commit, with "+" if tracked files differ from it."""
    try:
        command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Columns as wide as they must be; the first to the left, the others to the right."""
    cells = [tuple(head), *(tuple(str(cell) for cell in row) for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    lines = []
    for row in cells:
        first, *others = (
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  ".join([first, *others]).rstrip())
    return "\n".join(lines)


def plain(value: object) -> object:
    """Dataclasses as what JSON knows."""
    if hasattr(value, "__dataclass_fields__"):
        return asdict(value)  # type: ignore[call-overload]
    raise TypeError(f"{type(value).__name__} is no JSON")


def print_json(**fields: object) -> None:
    """One JSON object with the machine in it."""
    print(json.dumps({"machine": Machine.here(), **fields}, default=plain))


def say(text: str) -> None:
    """Progress, on stderr, so that --json stays JSON."""
    print(text, file=sys.stderr, flush=True)
