"""run.json: a run's facts for people and programs. Every key is there once its stage told it."""

from __future__ import annotations

import json
import math
from datetime import UTC, datetime
from typing import Any

from web4.lora.v1 import deployer_pb2, deployments_pb2, gateway_pb2, packager_pb2, trainer_pb2
from web4lora_chassis.rpc import to_json

from web4lora_gateway import __version__
from web4lora_gateway.records import RunRecord, StageRecord, StageState
from web4lora_gateway.stages import Deploy, Inputs, Package, Prepare, Promote, Train, Verify


def run_json(record: RunRecord) -> str:
    """Return the text of a run's run.json as of now."""
    inputs = Inputs.of(record)
    pipeline = inputs.pipeline
    data: dict[str, Any] = {
        "run_id": record.id,
        "name": pipeline.name,
        "state": str(record.state),
        "created": _time(record.created_at),
        "ended": _time(record.ended_at),
        "error": _error(record),
        "base": {"source": pipeline.base, "revision": pipeline.base_revision or None},
        "dataset": {"digest": pipeline.dataset.digest},
    }
    if prepared := inputs.find(Prepare):
        data["base"].update(digest=prepared.base.digest, size_bytes=prepared.base.size_bytes)
        data["dataset"].update(_dataset(prepared.dataset))
    if trained := inputs.find(Train):
        start = getattr(pipeline.train, "from")
        data["train"] = {**_train(trained), "from_adapter_digest": start or None}
    if packaged := inputs.find(Package):
        data["package"] = _package(packaged)
    if deployed := inputs.find(Deploy):
        data["deploy"] = _deploy(deployed.deployment)
    if pipeline.suite is not None and (tested := inputs.find(Verify)):
        data["verify"] = _verify(tested)
    if promoted := inputs.find(Promote):
        data["promote"] = _promote(promoted)
    data["stages"] = {stage.name: _stage(stage) for stage in record.stages}
    data["parameters"] = dict(record.pipeline)
    data["from_stage"] = record.from_stage or None
    data["versions"] = {"gateway": __version__}
    for stage in record.stages:
        data["versions"].update(sorted(stage.versions.items()))
    return json.dumps(_told(data), indent=2, ensure_ascii=False) + "\n"


def _error(record: RunRecord) -> dict[str, Any] | None:
    if record.error is None:
        return None
    error = record.error
    return {"reason": error.reason, "message": error.message, "fix": error.fix, **error.metadata}


def _dataset(report: trainer_pb2.DatasetReport) -> dict[str, Any]:
    return {
        "train_rows": report.train_rows,
        "eval_rows": report.eval_rows,
        "rows_by_core": dict(sorted(report.rows_by_core.items())),
        "tokens": report.tokens,
        "trained_tokens": report.trained_tokens,
        "answers": report.answers,
    }


def _train(result: trainer_pb2.TrainResult) -> dict[str, Any]:
    return {
        "final_loss": result.final_loss,
        "held_out_loss": result.held_out_loss if result.HasField("held_out_loss") else None,
        "verdict": result.verdict,
        "steps": result.steps,
        "exported_step": result.exported_step or None,
        "probe_score": result.probe_score if result.HasField("probe_score") else None,
        "tokens_per_second": result.tokens_per_second,
        "seconds": result.seconds,
        "device": result.device,
        "peak_memory_bytes": result.peak_memory_bytes,
        "trained_parameters": result.trained_parameters,
        "adapter_digest": result.adapter.digest,
        "events": list(result.events) or None,
    }


def _package(result: packager_pb2.PackageResult) -> dict[str, Any]:
    switchable = result.HasField("adapter_gguf")
    return {
        "reference": _gguf(result.reference),
        "quantized": [{**_gguf(quant), "size_reduction": quant.size_reduction} for quant in result.quantized],
        "adapter": _gguf(result.adapter_gguf) if switchable else None,
        "adapter_base": _gguf(result.adapter_base) if switchable else None,
        "llama_cpp_version": result.llama_cpp_version,
        "merge": to_json(result.merge),
    }


def _gguf(file: packager_pb2.GgufFile) -> dict[str, Any]:
    return {
        "type": file.type,
        "size_bytes": file.size_bytes,
        "digest": file.artifact.digest,
        **({"contents": file.contents} if file.contents else {}),
    }


def _deploy(deployment: deployments_pb2.Deployment) -> dict[str, Any]:
    return {
        "target": deployment.target,
        "endpoint": deployment.endpoint,
        "id": deployment.id,
        "model": deployment.model,
        "runtime_version": deployment.runtime_version,
    }


def _verify(result: deployer_pb2.VerifyResult) -> dict[str, Any]:
    state = deployer_pb2.TestState.Name(result.state)
    return {
        "state": state.removeprefix("TEST_STATE_").lower() if result.state else None,
        "passed": result.passed,
        "verdict": result.verdict,
        "scores": [to_json(score) for score in result.scores],
    }


def _promote(result: gateway_pb2.PromoteResult) -> dict[str, Any]:
    return {
        "outcome": gateway_pb2.PromoteOutcome.Name(result.outcome).removeprefix("PROMOTE_OUTCOME_").lower(),
        "candidate": result.candidate,
        "serving": result.serving.id or None,
        "summary": result.summary,
    }


def _stage(stage: StageRecord) -> dict[str, Any]:
    ended_at = stage.ended_at
    took = stage.work_seconds
    if not took and ended_at and stage.started_at and stage.state is not StageState.REUSED:
        took = ended_at - stage.started_at
    return {
        "state": str(stage.state),
        "seconds": round(took, 3) if took else None,  # of one that was taken over: when it ran
        "started": _time(stage.started_at),
        "ended": _time(ended_at),
        "reused_from_run": stage.reused_from_run or None,
        "job_id": stage.job_id or None,
        "key": stage.key or None,
    }


def _time(seconds: float) -> str | None:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds") if seconds else None


def _told(value: Any) -> Any:
    """Leave out what is not known, and numbers that JSON has not."""
    if isinstance(value, dict):
        known = {key: _told(inner) for key, inner in value.items()}
        return {key: inner for key, inner in known.items() if inner is not None}
    return None if isinstance(value, float) and not math.isfinite(value) else value
