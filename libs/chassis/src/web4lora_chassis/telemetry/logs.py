"""What every process of ours logs: lines for people, or a JSON object a line for programs."""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime

from web4lora_chassis.telemetry import traces, work


class JsonLines(logging.Formatter):
    """A JSON object a line: time, level, service, logger, message; where known run, job, trace_id and error.

    Args:
        service: Whose lines they are.
    """

    def __init__(self, service: str) -> None:
        super().__init__()
        self._service = service

    def format(self, record: logging.LogRecord) -> str:
        """Return the line of a record."""
        fields = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "service": self._service,
            "logger": record.name,
            "message": record.getMessage(),
            **work.current(),
        }
        if found := traces.traceparent():
            fields["trace_id"] = found.split("-")[1]
        if record.exc_info:
            fields["error"] = self.formatException(record.exc_info)
        return json.dumps(fields, ensure_ascii=False)


def set_up(service: str, form: str) -> None:
    """Log to standard error from now on.

    Args:
        service: Whose lines they are.
        form: "text" or "json".
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("httpx2").setLevel(logging.WARNING)  # addresses may hold a key
    if form == "json":
        for handler in logging.getLogger().handlers:
            handler.setFormatter(JsonLines(service))
