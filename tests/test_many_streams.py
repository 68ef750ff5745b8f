"""500 streams at once from three tenants, ended at random: no page is lost, memory is bounded, metrics tell the truth.

The long form takes CUTAWAY_LOAD_SECONDS (300).
"""

from __future__ import annotations

import gc
import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import pytest
from cutaway_server.engine.requests import LiveRequest
from cutaway_server.scheduler import Sequence
from cutaway_server.service.reply import Reply
from scraping import Scrape, fetch, parsed, scrape
from secured import write_keys
from serving import LiveServer, eventually, serving
from test_service_load import greedy, prompts
from tiny import save_tiny

STREAMS, PROCESSES = 500, 4
TENANTS = {"anna": 1.0, "berta": 1.0, "carla": 3.0}
GENERATE = "/cutaway.v1.Inference/Generate"
PROGRAM = Path(__file__).with_name("stream_clients.py")
MAX_RUNNING = 64
CHECK_EVERY = 20  # steps


@dataclass
class Watch:
    """What was seen from outside while the load was on."""

    scrape_seconds: list[float] = field(default_factory=list)
    resident: list[int] = field(default_factory=list)
    open: list[float] = field(default_factory=list)


@contextmanager
def watching(live: LiveServer) -> Iterator[Watch]:
    """Scrape four times a second, as several Prometheus servers would."""
    watch, over, process = Watch(), threading.Event(), psutil.Process()

    def look() -> None:
        while not over.wait(0.25):
            began = time.perf_counter()
            text = fetch(live.server.metrics.address)
            watch.scrape_seconds.append(time.perf_counter() - began)
            watch.open.append(parsed(text)("cutaway_grpc_streams_open", method=GENERATE))
            watch.resident.append(process.memory_info().rss)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield watch
    finally:
        over.set()
        thread.join()


def check_now_and_then(live: LiveServer) -> list[int]:
    """Assert the scheduler's and the pool's invariants between steps; a list that grows with each time."""
    step, done = live.engine.step, []

    def checked() -> Any:
        events = step()
        if live.engine.steps % CHECK_EVERY == 0:
            live.engine.scheduler.check()
            done.append(live.engine.steps)
        return events

    live.engine.step = checked  # type: ignore[method-assign]
    return done


def load(live: LiveServer, keys: dict[str, str], answers: list[Any], seconds: float) -> Counter[str]:
    """Run the client programs, and add up what they saw."""
    seen: Counter[str] = Counter()
    names = list(keys)
    with ExitStack() as stack:
        processes = []
        for number in range(PROCESSES):
            command = [sys.executable, str(PROGRAM)]
            pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
            process = stack.enter_context(subprocess.Popen(command, text=True, **pipes))
            stack.callback(process.kill)
            plan = {"address": live.address, "key": keys[names[number % len(names)]], "streams": STREAMS // PROCESSES}
            process.stdin.write(json.dumps({**plan, "seconds": seconds, "seed": number, "answers": answers}) + "\n")
            process.stdin.flush()
            processes.append(process)
        for process in processes:
            assert process.stdout.readline() == "ready\n"
        for process in processes:
            process.stdin.write("go\n")
            process.stdin.flush()
        for process in processes:
            seen.update(json.loads(process.stdout.readline()))
    return seen


def alive(*kinds: type) -> int:
    """How many objects of these kinds somebody still holds."""
    gc.collect()
    return sum(type(thing) in kinds for thing in gc.get_objects())


def check_metrics(now: Scrape, seen: Counter[str]) -> None:
    """What the metrics say is what clients saw, as exactly as they can know."""
    ended = {name: count for name, count in seen.items() if ":" in name}
    finished = sum(count for name, count in ended.items() if name.endswith(":OK"))
    late = seen["deadline:DEADLINE_EXCEEDED"]  # may have been finished when nobody waited any more
    finish_reasons = now.by("cutaway_requests_finished_total", "reason")
    received = now("cutaway_requests_received_total")
    assert sum(finish_reasons.values()) == received, "every request has ended"
    early = seen["vanish:CANCELLED"]  # may have been cancelled before the server heard of it
    assert sum(ended.values()) - early - late <= received <= sum(ended.values())
    assert finished <= finish_reasons["length"] <= finished + late
    assert set(finish_reasons) <= {"length", "abort", "deadline"}
    assert now("cutaway_request_prompt_tokens_count") >= seen["started"]
    assert now("cutaway_generation_tokens_total") >= seen["tokens"]
    assert now("cutaway_request_generation_tokens_sum") <= now("cutaway_generation_tokens_total")
    cancelled = sum(now.by("cutaway_requests_cancelled_total", "phase").values())
    assert cancelled == finish_reasons["abort"]
    failed = now.by("cutaway_requests_failed_total", "code")
    assert set(failed) <= {"DEADLINE_EXCEEDED"}, failed
    assert failed["DEADLINE_EXCEEDED"] <= late
    assert now.by("cutaway_grpc_streams_open", "method") == {}
    assert now("cutaway_requests_running") == 0
    assert now.by("cutaway_requests_waiting", "reason") == {}
    assert now("cutaway_kv_cache_blocks", state="used") == 0


def withstand(tmp_path: Path, seconds: float) -> tuple[Watch, Counter[str], float]:
    """Serve the load and check what must hold for any length: what was watched and seen, and the last scrape's time."""
    model = save_tiny("llama", tmp_path / "tiny")
    answers = [(prompt, greedy(model, prompt)[:32]) for prompt in prompts()]
    shares = "".join(f'[[tenant]]\nname = "{name}"\nshare = {share}\n' for name, share in TENANTS.items())
    keys = write_keys(tmp_path / "keys.toml", {name: (["generate"], name) for name in TENANTS}, shares)
    options: dict[str, Any] = {"kv_cache_memory": 2**22, "api_keys": str(tmp_path / "keys.toml")}
    with serving(tmp_path / "tiny", max_running=MAX_RUNNING, **options) as live:
        others = alive(Sequence)  # of what the suite served before
        checks = check_now_and_then(live)
        with watching(live) as watch:
            seen = load(live, keys, answers, seconds)
        assert eventually(live.is_clean, seconds=10), "what nobody reads is not computed, and every page is back"
        assert eventually(lambda: not scrape(live.server.metrics.address).by("cutaway_grpc_streams_open", "method"))
        assert len(checks) > 5
        assert eventually(lambda: alive(Reply, LiveRequest) == 0), "nothing holds what is over"
        known = alive(Sequence) - others
        assert known <= MAX_RUNNING + 1, "but the builder of batches, which knows the rows of its last one"
        assert live.engine.observed.watched == 0
        assert (seen["wrong"], seen["short"]) == (0, 0)
        codes = {name.partition(":")[2] for name in seen if ":" in name}
        assert codes <= {"OK", "CANCELLED", "DEADLINE_EXCEEDED"}, codes
        check_metrics(scrape(live.server.metrics.address), seen)
        times = []
        for _ in range(5):
            began = time.perf_counter()
            fetch(live.server.metrics.address)
            times.append(time.perf_counter() - began)
    return watch, seen, min(times)


def test_500_streams_for_a_few_seconds(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _, seen, _ = withstand(tmp_path, 4.0)
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR], (
        "clients that leave are no error"
    )
    assert sum(count for name, count in seen.items() if ":" in name) >= STREAMS


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_500_streams_for_minutes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    watch, seen, last_scrape = withstand(tmp_path, float(os.environ.get("CUTAWAY_LOAD_SECONDS", "300")))
    fifth = len(watch.resident) // 5
    early, late = (median(part) / 2**20 for part in (watch.resident[fifth : 2 * fifth], watch.resident[-fifth:]))
    scrapes = sorted(watch.scrape_seconds)
    told = f"{dict(seen)}; open {median(watch.open):.0f}; resident {early:.0f} MiB, later {late:.0f} MiB; scrapes "
    told += f"{1e3 * median(scrapes):.1f} ms, p99 {1e3 * scrapes[int(0.99 * len(scrapes))]:.1f} ms, "
    told += f"idle {1e3 * last_scrape:.1f} ms"
    with capsys.disabled():
        print(f"\n{told}")
    assert median(watch.open) > 0.8 * STREAMS, told
    assert late < early + 32, told
    assert last_scrape < 0.02, told
    assert median(scrapes) < 1.0, told
