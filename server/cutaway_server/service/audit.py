"""The audit log: a line of JSON for each call, who made it and how it ended. Never what was asked or answered."""

from __future__ import annotations

import json
import logging
import os
import queue
import threading
from datetime import UTC, datetime
from pathlib import Path

from cutaway_server.service.caller import Call

log = logging.getLogger(__name__)

MAX_WAITING = 10_000  # lines that a slow disk may hold up
STOP_SECONDS = 5.0


class AuditError(Exception):
    """The log cannot be written."""


class AuditLog:
    """Appends to a file, on a thread of its own. A file that was moved away is made anew: rotate it by renaming."""

    def __init__(self, path: str) -> None:
        """Open the log.

        Raises:
            AuditError: it cannot be written.
        """
        self._path = Path(path)
        self._lines: queue.Queue[str | None] = queue.Queue(MAX_WAITING)
        self._lost = 0
        try:
            self._file = self._opened()
        except OSError as error:
            raise AuditError(f"--audit-log: {path!r} cannot be written: {error.strerror}") from None
        self._thread = threading.Thread(target=self._write, name="audit", daemon=True)
        self._thread.start()

    def record(self, call: Call, peer: str, code: str, seconds: float) -> None:
        """Take note of a call that is over. Returns at once; what a full queue loses is counted in the log."""
        caller = call.caller
        entry = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "method": call.method,
            "caller": caller.name,
            "proof": caller.proof,
            "tenant": caller.tenant,
            "peer": peer,
            "request_id": call.request_id,
            "code": code,
            "seconds": round(seconds, 6),
        }
        try:
            self._lines.put_nowait(json.dumps(entry))
        except queue.Full:
            self._lost += 1

    def stop(self) -> None:
        """Write what waits, and close."""
        try:
            self._lines.put(None, timeout=STOP_SECONDS)
        except queue.Full:
            log.error("the audit log is not written; its last %d lines are lost", MAX_WAITING)
            return
        self._thread.join(STOP_SECONDS)

    def _opened(self) -> int:
        return os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def _write(self) -> None:
        while (line := self._lines.get()) is not None:
            if self._lost:
                lost, self._lost = self._lost, 0
                log.error("the audit log is too slow: %d lines are lost", lost)
            try:
                self._reopen_if_moved()
                os.write(self._file, line.encode() + b"\n")
            except OSError as error:
                log.error("the audit log cannot be written: %s", error.strerror)
        os.close(self._file)

    def _reopen_if_moved(self) -> None:
        try:
            there = self._path.stat()
        except FileNotFoundError:
            there = None
        here = os.fstat(self._file)
        if there is None or (there.st_ino, there.st_dev) != (here.st_ino, here.st_dev):
            opened = self._opened()
            os.close(self._file)
            self._file = opened
