"""Runs as messages of the contract."""

from __future__ import annotations

from web4.lora.v1 import gateway_pb2
from web4lora_chassis.errors import InvalidInput
from web4lora_chassis.jobs import Progress
from web4lora_chassis.rpc import from_json
from web4lora_chassis.rpc.bounds import shortened
from web4lora_chassis.rpc.jobs import failure_message, progress_message, timestamp

from web4lora_gateway.records import STAGE_NAMES, RunRecord, StageRecord, UnreadableRun


def run_message(record: RunRecord | UnreadableRun) -> gateway_pb2.Run:
    """Return a run as a message; of one whose document can't be read what is known, and that as its error."""
    if isinstance(record, UnreadableRun):
        return _unreadable_message(record)
    return gateway_pb2.Run(
        id=record.id,
        pipeline=from_json(gateway_pb2.Pipeline, shortened(record.pipeline)),
        state=gateway_pb2.RunState.Value(f"RUN_STATE_{record.state}"),
        stages=[_stage_message(stage) for stage in record.stages if stage.name in STAGE_NAMES],
        error=failure_message(record.error),
        request_id=record.request_id,
        create_time=timestamp(record.created_at),
        end_time=timestamp(record.ended_at),
        output_dir=record.output_dir,
        priority=gateway_pb2.Priority.Value(f"PRIORITY_{record.priority.upper()}"),
        device=record.device,
        sweep=record.sweep,
        sweep_values=record.sweep_values,
        forked_from=record.forked_from,
        revision=record.revision,
        owner=record.owner,
        kept=record.kept,
        labels=record.labels,
    )


def _unreadable_message(run: UnreadableRun) -> gateway_pb2.Run:
    states = dict(gateway_pb2.RunState.items())
    return gateway_pb2.Run(
        id=run.id,
        pipeline=gateway_pb2.Pipeline(name=run.name),
        state=states.get(f"RUN_STATE_{run.state}", gateway_pb2.RUN_STATE_UNSPECIFIED),
        error=failure_message(run.error),
        request_id=run.request_id,
        create_time=timestamp(run.created_at),
        revision=run.revision,
    )


def priority_word(priority: gateway_pb2.Priority.ValueType) -> str:
    """Return a priority as the gateway writes it.

    Raises:
        InvalidInput: There is no such priority.
    """
    if priority not in gateway_pb2.Priority.values():
        raise InvalidInput(f"{priority} is not a priority.", metadata={"field": "priority"})
    word = gateway_pb2.Priority.Name(priority or gateway_pb2.PRIORITY_NORMAL)
    return word.removeprefix("PRIORITY_").lower()


def stage_word(name: gateway_pb2.StageName.ValueType) -> str:
    """Return a stage's name as the gateway writes it; empty when unspecified."""
    return gateway_pb2.StageName.Name(name).removeprefix("STAGE_NAME_").lower() if name else ""


def _stage_message(stage: StageRecord) -> gateway_pb2.Stage:
    result = {} if stage.result is None else {f"{stage.name}_result": stage.result}
    message = from_json(gateway_pb2.Stage, result)
    message.MergeFrom(
        gateway_pb2.Stage(
            name=gateway_pb2.StageName.Value(f"STAGE_NAME_{stage.name.upper()}"),
            state=gateway_pb2.StageState.Value(f"STAGE_STATE_{stage.state}"),
            progress=progress_message(stage.progress) if stage.progress != Progress() else None,
            error=failure_message(stage.error),
            job_id=stage.job_id,
            reused_from_run=stage.reused_from_run,
            start_time=timestamp(stage.started_at),
            end_time=timestamp(stage.ended_at),
            work_seconds=stage.work_seconds,
        )
    )
    return message
