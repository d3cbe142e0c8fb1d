"""JSON data is read as protobuf's own parser reads it, whichever way it is read."""

import math

import pytest
from google.protobuf.json_format import MessageToDict, ParseDict, ParseError
from web4.lora.v1 import deployer_pb2, gateway_pb2, jobs_pb2, trainer_pb2
from web4lora_chassis.rpc import from_json, json_data, to_json


def full(message, depth=4):
    """Fill every field of a message that is of no oneof, so that a new kind of field is tested too."""
    for field in message.DESCRIPTOR.fields:
        if field.containing_oneof and len(field.containing_oneof.fields) > 1:
            continue
        kind = field.message_type
        if kind is not None and kind.GetOptions().map_entry:
            value = kind.fields_by_name["value"]
            if value.message_type is None:
                getattr(message, field.name)["a key"] = scalar(value)
            else:
                full(getattr(message, field.name)["a key"], depth - 1)
        elif kind is not None:
            if depth:
                inner = getattr(message, field.name)
                full(inner.add() if field.is_repeated else inner, depth - 1)
        elif field.is_repeated:
            getattr(message, field.name).extend([scalar(field)] * 2)
        else:
            setattr(message, field.name, scalar(field))
    return message


def scalar(field):
    if field.enum_type is not None:
        return field.enum_type.values[-1].number
    return {
        field.CPPTYPE_STRING: b"\x00\xff" if field.type == field.TYPE_BYTES else "ü\n",
        field.CPPTYPE_BOOL: True,
        field.CPPTYPE_DOUBLE: 0.1,
        field.CPPTYPE_FLOAT: 0.5,
    }.get(field.cpp_type, 7)


MESSAGES = [
    gateway_pb2.Pipeline,
    gateway_pb2.Run,
    trainer_pb2.TrainResult,
    trainer_pb2.DatasetReport,
    deployer_pb2.VerifyResult,
    jobs_pb2.JobSpec,
    jobs_pb2.JobResult,
]


@pytest.mark.parametrize("made", MESSAGES)
def test_every_field_comes_back(made):
    message = full(made())
    assert from_json(made, to_json(message)) == message


@pytest.mark.parametrize("kind", [field.name for field in jobs_pb2.JobResult.DESCRIPTOR.fields])
def test_every_result_comes_back_without_protobufs_slow_parser(kind, monkeypatch):
    message = jobs_pb2.JobResult()
    full(getattr(message, kind))
    getattr(message, kind).SetInParent()
    slow = []
    monkeypatch.setattr(
        json_data, "ParseDict", lambda *given, **named: slow.append(kind) or ParseDict(*given, **named)
    )
    assert from_json(jobs_pb2.JobResult, to_json(message)) == message
    if kind in ("train", "package", "prepare"):
        assert not slow


@pytest.mark.parametrize(
    "data",
    [
        {"train": {"steps": 3}},  # a number, which to_json writes as text
        {"train": {"finalLoss": 0.5}},  # the other spelling of JSON
        {"train": {"final_loss": "0.5"}},
        {"train": {"final_loss": None, "nothing": 1}},
        {"train": {"adapter": {"kind": "ARTIFACT_KIND_OF_TOMORROW"}}},
        {"train": {"adapter": {"kind": 2}}},
        {"tomorrow": {}},
    ],
)
def test_what_is_written_otherwise_is_read_as_protobuf_reads_it(data):
    wanted = ParseDict(data, jobs_pb2.JobResult(), ignore_unknown_fields=True)
    assert from_json(jobs_pb2.JobResult, data) == wanted


@pytest.mark.parametrize("number", [math.inf, -math.inf, math.nan])
def test_numbers_that_json_has_not(number):
    data = MessageToDict(trainer_pb2.TrainResult(final_loss=number), preserving_proto_field_name=True)
    found = from_json(trainer_pb2.TrainResult, data).final_loss
    assert found == number or (math.isnan(found) and math.isnan(number))


@pytest.mark.parametrize(
    "data",
    [
        {"train": {"steps": "many"}},
        {"train": {"steps": "--3"}},
        {"train": {"final_loss": "1,5"}},
        {"train": {"verdict": 5}},
        {"train": {"events": "one"}},
    ],
)
def test_what_is_no_such_message_is_refused(data):
    with pytest.raises(ParseError):
        from_json(jobs_pb2.JobResult, data)
