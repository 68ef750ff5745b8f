"""Starts what is measured and stops it: our server, the peers' servers, and workers that answer lines of JSON."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO
from urllib.error import URLError
from urllib.request import urlopen

START_SECONDS = 600  # a first start unpacks the model, builds the kernels, or compiles the network
STOP_SECONDS = 15
PASSIVE = {"OMP_WAIT_POLICY": "passive"}  # ours: see docs/decisions.md


class LaunchError(Exception):
    """Something did not start, or broke; the message ends with the last that it wrote."""


def unwind_on_sigterm() -> None:
    """Let SIGTERM end this program as Ctrl-C does: what it started is ended, too."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))


@contextmanager
def process(command: Sequence[str], environment: Mapping[str, str] | None = None) -> Iterator[Process]:
    """A process of its own group with pipes for stdin and stdout; its group is ended on leaving.

    It waits for work as it does by itself: this program's own OMP_WAIT_POLICY is not passed on.
    """
    with tempfile.TemporaryFile() as log:
        try:
            started = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True,
                env={**own_environment(), **(environment or {})},
            )  # fmt: skip
        except OSError as error:
            raise LaunchError(f"{command[0]} cannot be started: {error.strerror}") from None
        try:
            yield Process(started, log)
        finally:
            _end(started)


def own_environment() -> dict[str, str]:
    """This program's environment, without what it sets for its own threads."""
    return {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}


class Process:
    """A running process and what it writes to stderr."""

    def __init__(self, started: subprocess.Popen[str], log: IO[bytes]) -> None:
        self.started = started
        self._log = log

    def line(self) -> str:
        """The next line of its stdout."""
        assert self.started.stdout is not None
        watchdog = threading.Timer(START_SECONDS, self.started.kill)
        watchdog.start()
        try:
            line = self.started.stdout.readline()
        finally:
            watchdog.cancel()
        if not line:
            raise LaunchError(f"{self.started.args[0]!r} ended: {self.tail()}")  # type: ignore[index]
        return line

    def pause(self) -> None:
        """Stop it and all that it started, so that it takes nothing from another that is measured."""
        os.killpg(self.started.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on."""
        os.killpg(self.started.pid, signal.SIGCONT)

    def tail(self) -> str:
        """The last lines of its stderr."""
        self._log.seek(0)
        return self._log.read().decode(errors="replace")[-1500:].strip()


def _end(started: subprocess.Popen[str]) -> None:
    """Ask it to end; end it and all that it started if it does not."""
    if started.poll() is None:
        os.killpg(started.pid, signal.SIGCONT)
        started.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            started.wait(STOP_SECONDS)
    with suppress(ProcessLookupError):
        os.killpg(started.pid, signal.SIGKILL)
    started.wait()
    for pipe in (started.stdin, started.stdout):
        if pipe is not None:
            pipe.close()


@contextmanager
def our_server(options: Sequence[str]) -> Iterator[tuple[str, Process]]:
    """`cutaway-server` with these options on a free port of this machine: its address, and its process."""
    command = [sys.executable, "-m", "cutaway_server", "--listen", "127.0.0.1:0", "--log-level", "warning", *options]
    with process(command, PASSIVE) as server:
        line = server.line()
        if not line.startswith("listening on "):
            raise LaunchError(f"cutaway-server wrote {line!r}: {server.tail()}")
        server.started.stdout.close()  # type: ignore[union-attr]
        yield line.removeprefix("listening on ").strip(), server


@contextmanager
def http_server(command: Sequence[str], environment: Mapping[str, str], port: int) -> Iterator[Process]:
    """A server whose /health answers 200 once it serves."""
    with process(command, environment) as server:
        threading.Thread(target=_drain, args=(server.started.stdout,), daemon=True).start()
        end = time.monotonic() + START_SECONDS
        while not _healthy(port):
            if server.started.poll() is not None or time.monotonic() > end:
                raise LaunchError(f"{Path(command[0]).name} does not serve: {server.tail()}")
            time.sleep(0.3)
        yield server


def _drain(stream: Iterator[str]) -> None:
    for _ in stream:
        pass


def _healthy(port: int) -> bool:
    try:
        with urlopen(f"http://127.0.0.1:{port}/health", timeout=2) as answer:
            return bool(answer.status == 200)
    except (URLError, OSError):
        return False


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class Worker:
    """A process that answers each line of JSON with one; what else it prints is passed over."""

    def __init__(self, started: Process) -> None:
        self._process = started
        self.facts = self._answer()

    def ask(self, **question: object) -> dict[str, object]:
        """Send a question and wait for its answer. Raises LaunchError if it has none."""
        stdin = self._process.started.stdin
        assert stdin is not None
        stdin.write(json.dumps(question) + "\n")
        stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, object]:
        while not (line := self._process.line()).startswith("{"):
            pass
        answer: dict[str, object] = json.loads(line)
        if "error" in answer:
            raise LaunchError(str(answer["error"]))
        return answer


@contextmanager
def worker(command: Sequence[str], environment: Mapping[str, str] | None = None) -> Iterator[tuple[Worker, Process]]:
    """A worker that has said that it is ready, and its process."""
    with process(command, environment) as started:
        yield Worker(started), started
