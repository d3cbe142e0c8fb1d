"""The workflow engine, DBOS, set up for us: our database, our log, no pickle, nothing sent anywhere."""

from __future__ import annotations

import json
import logging
from typing import Any

from dbos import DBOS, DBOSConfig
from dbos import Serializer as SerializerBase

from web4lora_gateway.database import let_the_engine_wait

WORKFLOW_VERSION = "web4lora-run-1"
"""Pinned, so that a newer gateway goes on with an older one's runs: none takes them up under another version.

When the order of the steps changes, it stays: there the workflow asks `await DBOS.patch_async("the change")`,
which is true for runs that have not come so far, and goes the old way for the others.
"""


class JsonSerializer(SerializerBase):
    """Keeps inputs and results of steps as JSON: readable, and unable to run code when read."""

    def serialize(self, data: Any) -> str:
        """Return data as JSON text; an error becomes its text."""
        return json.dumps(data, default=lambda error: {"__error__": f"{type(error).__name__}: {error}"})

    def deserialize(cls, serialized_data: str) -> Any:
        """Return the data of JSON text."""
        data = json.loads(serialized_data)
        if isinstance(data, dict) and "__error__" in data:
            return RuntimeError(data["__error__"])
        return data

    def name(self) -> str:
        """Return the name that is kept with the data."""
        return "web4lora_json"


def open_engine(database_url: str, gateway: str) -> None:
    """Set DBOS up; `DBOS.launch()` starts it once the workflows are registered.

    Args:
        database_url: sqlite:///path or postgresql://…
        gateway: The name of this gateway, which no other one has.
    """
    let_the_engine_wait()
    engine_log = logging.getLogger("dbos")
    engine_log.addHandler(logging.NullHandler())  # so that it adds no handler of its own
    config: DBOSConfig = {
        "name": "web4lora-gateway",
        "system_database_url": database_url,
        "application_version": WORKFLOW_VERSION,
        "executor_id": gateway,
        "log_level": "WARNING",
        "enable_otlp": False,
        "serializer": JsonSerializer(),
    }
    DBOS(config=config)
    engine_log.propagate = True
