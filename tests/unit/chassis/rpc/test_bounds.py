"""Bounds on requests and answers: every field by one walk, whatever the call."""

from __future__ import annotations

import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from web4.lora.v1 import artifacts_pb2, deployer_pb2, gateway_pb2, jobs_pb2, packager_pb2, trainer_pb2
from web4lora_chassis.errors import InvalidInput
from web4lora_chassis.rpc.bounds import (
    ANSWER_BYTES,
    LIST_ITEMS,
    REQUEST_BYTES,
    TEXT_BYTES,
    check_request,
    fitting,
    shortened,
    within_bounds,
)

CONTRACT = (artifacts_pb2, deployer_pb2, gateway_pb2, jobs_pb2, packager_pb2, trainer_pb2)
REQUESTS = [
    GetMessageClass(method.input_type)
    for file in CONTRACT
    for service in file.DESCRIPTOR.services_by_name.values()
    for method in service.methods
]
HUGE = "x" * (5 << 20)


def refused(request: Message) -> InvalidInput:
    with pytest.raises(InvalidInput) as caught:
        check_request(request)
    return caught.value


@pytest.mark.parametrize("kind", REQUESTS, ids=lambda kind: kind.DESCRIPTOR.name)
def test_every_text_and_list_of_every_request_is_bounded(kind: type[Message]) -> None:
    count = 0
    for path in _paths(kind.DESCRIPTOR):
        request = kind()
        name = _overfill(request, path)
        error = refused(request)
        assert name.removeprefix("pipeline.") in error.message, error.message
        assert len(error.message) < 200
        count += 1
    assert count or not [
        field for field in kind.DESCRIPTOR.fields if field.type == FieldDescriptor.TYPE_STRING
    ]


def test_what_people_send_is_taken() -> None:
    request = gateway_pb2.CreateRunRequest(request_id="r", pipeline={"name": "demo"})
    request.pipeline.base.model = "/" + "m" * (TEXT_BYTES - 1)
    request.pipeline.dataset.train_files.extend(f"data/part-{number:05}.jsonl" for number in range(4000))
    check_request(request)
    job = jobs_pb2.CreateJobRequest(request_id="r", secrets={"key": "k" * 4096})
    job.spec.verify.run_json = "{" + " " * (2 << 20) + "}"
    check_request(job)


def test_many_fields_that_are_each_within_bounds_are_not_too_many_together() -> None:
    request = gateway_pb2.CreateRunRequest(request_id="r")
    request.pipeline.dataset.train_files.extend(
        "f" * TEXT_BYTES for _ in range(REQUEST_BYTES // TEXT_BYTES + 1)
    )
    assert "it may have 262144" in refused(request).message


def test_a_field_is_named_as_a_pipeline_file_names_it() -> None:
    request = gateway_pb2.CreateRunRequest()
    request.pipeline.base.model = HUGE
    error = refused(request)
    assert error.message == "base.model has 5242880 bytes; at most 4096 are taken."
    assert error.metadata["field"] == "base.model"
    request.pipeline.base.model = "a\0b"
    assert "NUL" in refused(request).message


def test_an_answer_that_is_too_large_is_shortened_and_says_so() -> None:
    run = gateway_pb2.Run(id="run_1")
    run.pipeline.base.model = HUGE
    run.error.metadata["log"] = HUGE
    answer = within_bounds(gateway_pb2.GetRunResponse(run=run))
    assert answer.ByteSize() <= ANSWER_BYTES
    assert answer.run.id == "run_1"
    assert answer.run.pipeline.base.model.endswith("(shortened)")
    assert run.pipeline.base.model == HUGE, "what is stored stays as it is"
    many = gateway_pb2.ListRunsResponse(
        runs=[gateway_pb2.Run(id=f"{number:060}") for number in range(90_000)]
    )
    assert 0 < within_bounds(many).ByteSize() <= ANSWER_BYTES
    small = gateway_pb2.GetRunResponse(run=gateway_pb2.Run(id="run_2"))
    assert within_bounds(small) is small


def test_a_page_carries_what_fits_and_the_next_one_goes_on_behind_it() -> None:
    runs = [gateway_pb2.Run(id=f"run_{number}", output_dir="o" * (1 << 20)) for number in range(10)]
    seen: list[str] = []
    rest = runs
    while rest:
        taken, token = fitting(rest, "", lambda run: run.id)
        assert gateway_pb2.ListRunsResponse(runs=taken, next_page_token=token).ByteSize() <= ANSWER_BYTES
        seen += [run.id for run in taken]
        rest = rest[len(taken) :]
        assert token == (taken[-1].id if rest else "")
    assert seen == [run.id for run in runs]
    taken, token = fitting(
        [gateway_pb2.Run(id="a", output_dir=HUGE), gateway_pb2.Run(id="b")], "t", lambda run: run.id
    )
    assert gateway_pb2.ListRunsResponse(runs=taken, next_page_token=token).ByteSize() <= ANSWER_BYTES


def test_data_is_shortened_before_it_is_read_into_a_message() -> None:
    data = {"base": {"model": HUGE}, "files": ["a", HUGE], "rank": 16, "flag": True, "none": None}
    short = shortened(data)
    assert len(short["base"]["model"]) < 40_000
    assert short["base"]["model"].endswith("(shortened)")
    assert short["files"][0] == "a"
    assert len(short["files"][1]) < 40_000
    assert (short["rank"], short["flag"], short["none"]) == (16, True, None)


def _paths(descriptor, before=()):
    """Yield the way to every text, list and map of a message."""
    for field in descriptor.fields:
        is_map = field.message_type is not None and field.message_type.GetOptions().map_entry
        if field.is_repeated or is_map or field.type in (field.TYPE_STRING, field.TYPE_BYTES):
            yield (*before, field)
        if field.message_type is not None and not is_map:
            yield from _paths(field.message_type, (*before, field))


def _overfill(request: Message, path) -> str:
    """Put too much into the last field of a way; return its name."""
    message, names = request, []
    for field in path[:-1]:
        names.append(field.name)
        message = getattr(message, field.name)
        if field.is_repeated:
            message = message.add()
            names[-1] += "[0]"
    field = path[-1]
    names.append(field.name)
    value = getattr(message, field.name)
    if not field.is_repeated:
        setattr(message, field.name, HUGE if field.type == field.TYPE_STRING else HUGE.encode())
    elif field.message_type is not None and field.message_type.GetOptions().map_entry:
        kind = field.message_type.fields_by_name["value"]
        for number in range(5 * LIST_ITEMS):
            value[str(number)] = "" if kind.type == kind.TYPE_STRING else 0
    elif field.message_type is not None:
        for _ in range(5 * LIST_ITEMS):
            value.add()
    else:
        value.extend(([""] if field.type == field.TYPE_STRING else [0]) * 5 * LIST_ITEMS)
    return ".".join(names)
