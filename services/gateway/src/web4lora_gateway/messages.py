"""Runs as messages of the contract."""

from __future__ import annotations

from google.protobuf.json_format import ParseDict
from google.protobuf.timestamp_pb2 import Timestamp
from web4.lora.v1 import gateway_pb2, jobs_pb2
from web4lora_chassis.jobs import JobFailure, Progress

from web4lora_gateway.records import RunRecord, StageRecord


def run_message(record: RunRecord) -> gateway_pb2.Run:
    """Return a run as a message."""
    message = gateway_pb2.Run(
        id=record.id,
        state=gateway_pb2.RunState.Value(f"RUN_STATE_{record.state}"),
        stages=[_stage_message(stage) for stage in record.stages],
        request_id=record.request_id,
        output_dir=record.output_dir,
        revision=record.revision,
    )
    ParseDict(dict(record.pipeline), message.pipeline, ignore_unknown_fields=True)
    _put_error(message.error, record.error)
    _put_time(message.create_time, record.created_at)
    _put_time(message.end_time, record.ended_at)
    return message


def stage_word(name: gateway_pb2.StageName.ValueType) -> str:
    """Return a stage's name as the gateway writes it; empty when unspecified."""
    return gateway_pb2.StageName.Name(name).removeprefix("STAGE_NAME_").lower() if name else ""


def _stage_message(stage: StageRecord) -> gateway_pb2.Stage:
    message = gateway_pb2.Stage(
        name=gateway_pb2.StageName.Value(f"STAGE_NAME_{stage.name.upper()}"),
        state=gateway_pb2.StageState.Value(f"STAGE_STATE_{stage.state}"),
        job_id=stage.job_id,
        reused_from_run=stage.reused_from_run,
    )
    if stage.progress != Progress():
        told = stage.progress
        message.progress.CopyFrom(
            jobs_pb2.Progress(
                phase=told.phase,
                done=told.done,
                total=told.total,
                unit=told.unit,
                seconds_left=told.seconds_left,
                figures=told.figures,
                message=told.message,
            )
        )
    _put_error(message.error, stage.error)
    _put_time(message.start_time, stage.started_at)
    _put_time(message.end_time, stage.ended_at)
    if stage.result is not None:
        field = getattr(message, f"{stage.name}_result")
        field.SetInParent()
        ParseDict(dict(stage.result), field, ignore_unknown_fields=True)
    return message


def _put_error(field: jobs_pb2.JobError, error: JobFailure | None) -> None:
    if error is not None:
        field.CopyFrom(
            jobs_pb2.JobError(
                reason=error.reason, message=error.message, fix=error.fix, metadata=error.metadata
            )
        )


def _put_time(field: Timestamp, seconds: float) -> None:
    if seconds:
        field.FromMilliseconds(int(seconds * 1000))
