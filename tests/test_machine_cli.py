"""`cutaway inspect cache` and `cutaway top` against a real server."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from cutaway import Client
from cutaway.cli import main
from cutaway.cli.cache import bar, size
from cutaway.cli.top import sparks
from safetensors.numpy import load_file
from serving import LiveServer, serving
from tiny import save_tiny

COMMAND = Path(sys.executable).with_name("cutaway")
PROMPT = list(range(50, 90))


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    path = tmp_path_factory.mktemp("models") / "tiny"
    save_tiny("llama", path)
    with serving(path, pace=0.01) as live, Client(live.address) as client:
        client.complete(token_ids=PROMPT, max_tokens=9, ignore_eos=True, request_id="one")
        yield live


@pytest.fixture
def run(live: LiveServer) -> Callable[..., Result]:
    def run(*args: str) -> Result:
        return CliRunner(env={"CUTAWAY_ADDRESS": live.address}).invoke(main, args)

    return run


def test_the_cache_is_drawn_with_its_numbers_and_a_map(run: Callable[..., Result], live: LiveServer) -> None:
    shown = run("inspect", "cache")
    assert shown.exit_code == 0, shown.output
    lines = {line[:18].strip(): line[18:] for line in shown.stdout.splitlines()}
    total = live.engine.scheduler.pool.capacity
    assert lines["cache"] == f"{total} blocks of 16 tokens, {size(total * 12288)} (F32)"
    assert lines["used"].endswith("  0.0% 0")
    assert lines["cached"].endswith(" 3")
    assert lines["retained"] == "3 of the cached, for 1 finished requests"
    assert lines["prefix cache"] == "0 of 40 prompt tokens found (0.0%)"
    assert "▓▓▓\n" in shown.stdout


def test_the_blocks_of_a_request_are_listed(run: Callable[..., Result]) -> None:
    shown = run("inspect", "cache", "one").stdout
    rows = re.findall(r"▓ retained +0 +(\d+) +(\d+-\d+) .* ([0-9a-f]{10}) +one/0", shown)
    assert rows == [("16", "0-15", rows[0][2]), ("16", "16-31", rows[1][2]), ("16", "32-47", rows[2][2])]
    assert run("inspect", "cache", "--blocks").stdout.count("one/0") == 3


def test_the_cache_is_told_to_scripts_as_json(run: Callable[..., Result]) -> None:
    told = json.loads(run("inspect", "cache", "--json").stdout)
    assert told["stats"]["blocks_cached"] == 3
    assert [block["filled"] for block in told["blocks"]] == [16, 16, 16]
    assert [len(block["hash"]) for block in told["blocks"]] == [32] * 3


def test_keys_and_values_are_saved_for_others_to_load(run: Callable[..., Result], tmp_path: Path) -> None:
    saved = run("inspect", "cache", "one", "--save", str(tmp_path / "kv.safetensors"))
    assert saved.stderr == f"{tmp_path}/kv.safetensors: keys and values of 48 positions\n"
    tensors = load_file(tmp_path / "kv.safetensors")
    assert {name: tensor.shape for name, tensor in tensors.items()} == {
        "blocks.*.attn.hook_rot_k": (3, 48, 2, 16),
        "blocks.*.attn.hook_v": (3, 48, 2, 16),
    }


def test_mistakes_are_one_line(run: Callable[..., Result], tmp_path: Path) -> None:
    for args, code, told in (
        (("inspect", "cache", "--save", "x"), 2, "--save: needs REQUEST_ID"),
        (("inspect", "cache", "two", "--save", "x"), 1, "no request 'two'"),
        (("inspect", "cache", "one", "--save", str(tmp_path / "no" / "x")), 1, "cannot be written"),
        (("top", "--interval", "0"), 2, "must be from 0.05 to 3600"),
    ):
        result = run(*args)
        assert (result.exit_code, told in result.stderr) == (code, True), result.stderr


def test_top_shows_what_runs_once_for_scripts(run: Callable[..., Result], live: LiveServer) -> None:
    asked = {"token_ids": PROMPT[:20], "max_tokens": 400, "ignore_eos": True, "request_id": "busy", "n": 2}
    with Client(live.address) as client, client.generate(**asked) as stream:
        next(stream)
        shown = run("top", "--once", "--interval", "0.3")
    assert shown.exit_code == 0, shown.output
    assert re.search(r"2 completions run, 0 wait, 0 requests are others'", shown.stdout)
    assert re.search(r"batch +\d\d\.\d steps/s of \d+\.\d ms, \d+ rows/s, \d+\.\d of your tokens/s", shown.stdout)
    assert re.search(r"phases +schedule [\d.]+%, prepare [\d.]+%, forward [\d.]+%", shown.stdout)
    assert re.search(r"rows +[▁▂▃▄▅▆▇█]+ 2", shown.stdout)
    assert re.search(r"busy +decode +20 +16 +\d+\+\d+ +\d+ +[\d.]+s", shown.stdout)
    assert re.search(r"one +finished +40 +0 +9 +3 +[\d.]+s", shown.stdout)


def test_top_redraws_on_a_terminal_until_ctrl_c(live: LiveServer) -> None:
    ours, theirs = pty.openpty()
    command = [COMMAND, "--address", live.address, "top", "--interval", "0.1"]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120", "LINES": "40"}
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    shown, end = b"", time.monotonic() + 20
    while shown.count(b"prefixes") < 3 and time.monotonic() < end:
        if select.select([ours], [], [], 0.5)[0]:
            shown += os.read(ours, 65536)
    assert shown.count(b"prefixes") >= 3
    process.send_signal(signal.SIGINT)
    while select.select([ours], [], [], 5)[0]:
        try:
            if not (more := os.read(ours, 65536)):
                break
        except OSError:  # the terminal has no other end any more
            break
        shown += more
    assert process.wait(10) == 130
    assert b"Traceback" not in shown
    os.close(ours)


def test_numbers_become_pictures() -> None:
    assert (bar(0.5, 4), bar(0, 4), bar(1, 4)) == ("██░░  50.0%", "░░░░   0.0%", "████ 100.0%")
    assert sparks([0, 1, 4, 8]) == " ▁▄█"
    assert sparks([]) == ""
    assert [size(n) for n in (0, 1023, 1024, 1536, 5 * 2**30, 2**60)] == [
        "0 B", "1023 B", "1 KiB", "1.5 KiB", "5 GiB", "1.049e+06 TiB",
    ]  # fmt: skip
