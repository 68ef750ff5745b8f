"""The benchmarks start, measure something true, and end, on a tiny model; their arithmetic against figures by hand."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from tiny import save_tiny

BENCH = Path(__file__).parents[1] / "bench"
sys.path[:0] = [str(BENCH), str(BENCH / "workers")]

from cost import BYTES, Cost  # noqa: E402
from cutaway_server.model.open import open_model  # noqa: E402
from doors import OpenAiDoor  # noqa: E402
from launch import LaunchError, worker  # noqa: E402
from measure import Spread, Turn, percentile, table, turns  # noqa: E402
from peers import Book, measure_row, report  # noqa: E402
from replay import Summary, replay  # noqa: E402
from rows import RATE, Goal, Row, Sizes, rows  # noqa: E402
from timeline import rates  # noqa: E402
from workload import Ask, drawn, read_workload  # noqa: E402


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bench") / "tiny"
    save_tiny("llama", path)
    return path


@pytest.fixture(scope="module")
def workload(tiny: Path) -> Path:
    asks = [{"prompt_token_ids": list(range(5 + i, 25 + i)), "output_len": 4 + i} for i in range(6)]
    path = tiny.parent / "workload.json"
    path.write_text(json.dumps({"requests": asks}))
    return path


def run(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCH / script), *(str(a) for a in arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_serve_replays_every_request_and_counts_every_token(tiny: Path, workload: Path) -> None:
    server = ["--", "--dtype", "float32", "--kv-cache-memory", "8MB"]
    result = run("serve.py", "--model", tiny, "--threads", 1, "--workload", workload, "--concurrency", 1, 3,
                 "--repeats", 2, "--json", *server)  # fmt: skip
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert [record["concurrency"] for record in found["records"]] == [1, 3]
    assert found["machine"]["cores"] == len(os.sched_getaffinity(0))
    for record in found["records"]:
        assert record["errors"] == {}
        assert [run["requests"] for run in record["runs"]] == [6, 6]
        assert record["first_token_ms"]["p50"]["median"] <= record["first_token_ms"]["p99"]["median"]
        assert 0 < record["output_tokens_per_second"]["low"] <= record["output_tokens_per_second"]["high"]


def test_serve_counts_what_the_server_refuses_and_says_why(tiny: Path, workload: Path) -> None:
    server = ["--", "--dtype", "float32", "--kv-cache-memory", "8MB", "--max-context", "28"]
    result = run("serve.py", "--model", tiny, "--threads", 1, "--workload", workload, "--concurrency", 2,
                 "--repeats", 1, *server)  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "INVALID_ARGUMENT" in result.stdout  # 20 tokens of prompt and up to 9 more


def test_limits_measures_memory_and_products(tiny: Path) -> None:
    result = run("limits.py", "--model", tiny, "--mib", 8, "--size", 128, "--repeats", 1, "--threads", 1, "--json")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["read_bytes_per_second"]["torch, sum"]["median"] > 1e8
    assert found["operations_per_second"]["torch bfloat16"]["median"] > 1e6
    assert found["bounds"]["decode 8, int8"] > found["bounds"]["decode 8, bfloat16"]


def test_peers_without_the_peers_names_what_is_missing(tiny: Path, workload: Path) -> None:
    result = run("peers.py", "--peers", tiny.parent / "none", "--workload", workload, "--only", "decode-1-bf16")
    assert result.returncode == 1
    assert "decode-1-bf16 was not measured" in result.stderr
    assert "is not there; docs/performance.md" in result.stderr


def test_peers_explains_itself_and_lists_its_rows() -> None:
    shown = "".join(run("peers.py", "--help").stdout.split())  # however it is wrapped
    assert all(row.name in shown for row in rows())


def test_a_workload_for_another_tokenizer_can_be_made_and_read(tiny: Path, tmp_path: Path) -> None:
    sizes = ["--requests", 5, "--prompt", 8, 16, "--output", 2, 4]
    (tmp_path / "made.json").write_text(run("workload.py", "--model", tiny, *sizes).stdout)
    asks = read_workload(tmp_path / "made.json")
    assert len(asks) == 5
    assert all(8 <= len(ask.prompt) <= 16 and 2 <= ask.output <= 4 and max(ask.prompt) < 512 for ask in asks)


def test_our_worker_and_the_rows_agree_on_what_is_measured(tiny: Path, workload: Path, tmp_path: Path) -> None:
    """A pair of two of ours: what one row measures of both, in turns, noted in the book and not measured again."""
    from contestants import ByWorker

    options = ["--model", str(tiny), "--threads", "1", "--dtype", "float32", "--kv-cache-memory", "8MB"]
    command = [sys.executable, str(BENCH / "workers" / "run_ours.py"), *options]
    sizes = Sizes(tuple(read_workload(workload)), output=64)
    row = next(row for row in rows() if row.name == "decode-8-bf16")
    out = tmp_path / "pairs.jsonl"
    with worker(command) as (one, process):
        who = ByWorker(one, process)
        who.pause()
        for pairs in (2, 3):
            with Turn(tmp_path / "lock", 0) as turn:
                measure_row(row, [who, who], sizes, pairs, Book(out), turn)
        who.resume()
        with pytest.raises(LaunchError, match="KeyError"):
            one.ask(prompts=[[1]])
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(lines) == 3
    assert all(line["pair"][side][RATE] > 0 for line in lines for side in ("ours", "peer"))


def test_a_goal_is_judged_by_the_median_of_the_pairs_ratios() -> None:
    row = Row("x", rows()[0].measure, "ours bf16", "vllm bf16", (Goal(RATE, 1.5),))
    pairs = [{"ours": {RATE: ours}, "peer": {RATE: peer}} for ours, peer in ((10.0, 5.0), (16.0, 10.0), (2.0, 20.0))]
    goal: Any = report(row, pairs, None, 1.0)["goals"]  # type: ignore[arg-type]
    assert (goal[0]["reached"].median, goal[0]["met"]) == (1.6, True)


def test_rates_count_only_while_all_streams_run() -> None:
    # Stream 0 gets tokens at 1, 2, 3, 4; stream 1 at 2, 3, 4, 5: both run from 2 to 4.
    comes = [(at + stream, stream, 1) for stream in (0, 1) for at in (1.0, 2.0, 3.0, 4.0)]
    assert rates(0.0, comes, [6, 4], 4) == {"prompt_tokens_per_second": 5.0, "tokens_per_second": 2.0}
    assert rates(0.0, [(1.0, 0, 1)], [7], 1) == {"prompt_tokens_per_second": 7.0}
    with pytest.raises(ValueError, match="tokens came"):
        rates(0.0, comes[:-1], [6, 4], 4)


def test_a_step_reads_every_matrix_once_and_every_streams_keys(tiny: Path) -> None:
    checkpoint = open_model(str(tiny))
    cost = Cost.of(checkpoint.config)
    # By hand: 3 layers of 64 wide, 4 heads and 2 KV heads of 16, an MLP of 112, 512 tokens.
    assert cost.layer_weights == 3 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 112)
    assert cost.kv_elements == 3 * 2 * 32
    assert cost.decode_bytes(2, 10, BYTES["bfloat16"], 2) == 2 * (cost.layer_weights + 512 * 64) + 2 * 10 * 192 * 2


def test_percentiles_spreads_and_turns() -> None:
    assert percentile([4, 1, 3, 2], 50) == 2.5
    assert percentile([1, 2, 3], 100) == 3
    assert str(Spread.of([3, 1, 2])) == "2 (1 to 3)"
    assert list(turns(3)) == [(0, 1), (1, 0), (0, 1)]
    assert table(["a", "b"], [("x", 10)]) == "a   b\nx  10"


def test_prompts_are_cut_from_the_workload_and_differ() -> None:
    asks = [Ask(tuple(range(100)), 1), Ask(tuple(range(100, 200)), 1)]
    cut = drawn(asks, 5, 50, 8, random.Random(0))
    assert len({ask.prompt for ask in cut}) == 5
    assert all(ask.prompt == tuple(range(ask.prompt[0], ask.prompt[0] + 50)) and ask.output == 8 for ask in cut)


def test_the_http_door_reads_events_across_chunks_and_counts_errors() -> None:
    """Against a small server: an event in two chunks, the usage at the end; what is refused is an error by its name."""
    import http.server

    events = [{"choices": [{"text": "a"}]}, {"choices": [{"text": "b"}]}, {"usage": {"completion_tokens": 2}}]
    body = b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in events)

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if asked["prompt"] == [9]:
                return self.send_error(400)
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            for chunk in (body[:10], body[10:], b""):
                self.wfile.write(f"{len(chunk):x}\r\n".encode() + chunk + b"\r\n")
            return None

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        door = OpenAiDoor("127.0.0.1", server.server_address[1])
        summary = Summary.of(replay(door, [Ask((1, 2), 2), Ask((9,), 2), Ask((1, 2), 3)], 2))
        server.shutdown()
    assert summary.requests == 3
    assert summary.output_tokens_per_second > 0
    short, refused = sorted(summary.errors)
    assert short == "2 tokens, not 3"
    assert refused.startswith("ValueError: HTTP/1.1 400 Bad Request")
