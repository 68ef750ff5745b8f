"""The server's log on stderr: as text for people, or as lines of JSON that name the request they belong to."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime

from cutaway_server.config import Config
from cutaway_server.service.caller import current

TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def start_logging(config: Config) -> None:
    """Log as the options say."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if config.log_format == "json" else logging.Formatter(TEXT))
    logging.basicConfig(level=config.log_level.upper(), handlers=[handler])


class JsonLines(logging.Formatter):
    """A JSON object a line. What is logged while a call is answered tells the call, its caller and its request."""

    def format(self, record: logging.LogRecord) -> str:
        """The line of one record."""
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        call = current()
        told = {
            "method": call.method,
            "request_id": call.request_id,
            "caller": call.caller.name,
            "tenant": call.caller.tenant,
        }
        line.update((key, value) for key, value in told.items() if value)
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)
