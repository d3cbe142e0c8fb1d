"""Which runs a List call asks for, and the labels that runs are found by."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import sqlalchemy as sa
from google.protobuf.timestamp_pb2 import Timestamp
from web4.lora.v1 import gateway_pb2
from web4lora_chassis.errors import InvalidInput

from web4lora_gateway.database import RUNS

_MOST_LABELS = 32
_KEY = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._/-]{0,61}[A-Za-z0-9])?")
_VALUE = re.compile(r"([A-Za-z0-9]([A-Za-z0-9._@:/+-]{0,61}[A-Za-z0-9])?)?")


def conditions(request: gateway_pb2.ListRunsRequest) -> list[sa.ColumnElement[bool]]:
    """Return what holds of the runs that a request asks for.

    Raises:
        InvalidInput: It asks for what no run can have.
    """
    return list(_conditions(request))


def _conditions(request: gateway_pb2.ListRunsRequest) -> Iterator[sa.ColumnElement[bool]]:
    if request.states:
        yield RUNS.c.state.in_([_state(state) for state in request.states])
    if request.name:
        yield RUNS.c.name == request.name
    if request.owner:
        yield RUNS.c.owner == request.owner
    for key, value in checked_labels(request.labels).items():
        yield RUNS.c.labels[key].as_string() == value
    if request.HasField("created_after"):
        yield RUNS.c.created_at >= _seconds(request.created_after)
    if request.HasField("created_before"):
        yield RUNS.c.created_at < _seconds(request.created_before)


def checked_labels(labels: Mapping[str, str]) -> dict[str, str]:
    """Return labels that a run may have, sorted.

    Raises:
        InvalidInput: There are too many, or one is of another form.
    """
    if len(labels) > _MOST_LABELS:
        raise InvalidInput(
            f"A run has at most {_MOST_LABELS} labels; these are {len(labels)}.", metadata={"field": "labels"}
        )
    for key, value in labels.items():
        if not _KEY.fullmatch(key) or not _VALUE.fullmatch(value):
            raise InvalidInput(
                f"{f'{key}={value}'!r} is no label.",
                fix="A key has 1 to 63 letters, digits and -._/ between them, a value 0 to 63 and also @:+.",
                metadata={"field": "labels"},
            )
    return dict(sorted(labels.items()))


def _state(state: gateway_pb2.RunState.ValueType) -> str:
    if state not in gateway_pb2.RunState.values() or not state:
        raise InvalidInput(f"{state} is no state of a run.", metadata={"field": "states"})
    return gateway_pb2.RunState.Name(state).removeprefix("RUN_STATE_")


def _seconds(time: Timestamp) -> float:
    """Return seconds since 1970, as runs have them."""
    return float(time.seconds + time.nanos / 1e9)
