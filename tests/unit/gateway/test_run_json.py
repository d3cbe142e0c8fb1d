from __future__ import annotations

import json
from typing import Any

from web4.lora.v1 import gateway_pb2
from web4lora_chassis.jobs import JobFailure
from web4lora_gateway.pipeline import check_pipeline
from web4lora_gateway.records import RunRecord, RunState, StageResult, StageState
from web4lora_gateway.run_json import run_json
from web4lora_gateway.run_messages import run_message


def ref(kind: str, digit: str) -> dict[str, Any]:
    return {"kind": f"ARTIFACT_KIND_{kind}", "name": "demo", "digest": digit * 64, "size_bytes": "7"}


def record() -> RunRecord:
    pipeline = gateway_pb2.Pipeline(name="demo", base={"model": "smollm2-135m-instruct"})
    for target, kind in ((pipeline.dataset.artifact, "DATASET"), (pipeline.verify.suite, "SUITE")):
        target.kind, target.name, target.digest = f"ARTIFACT_KIND_{kind}", "demo", "a" * 64
    return RunRecord(
        id="run_2026-11-22_1",
        request_id="mine",
        request_digest="",
        nonce="00",
        pipeline=check_pipeline(pipeline),
        created_at=1795300000.5,
    )


def done(made: RunRecord, name: str, result: dict[str, Any], **fields: Any) -> RunRecord:
    return made.with_stage(
        name, state=StageState.SUCCEEDED, result=result, started_at=10.0, ended_at=12.5, key="k", **fields
    )


def whole() -> RunRecord:
    made = record().changed(state=RunState.SUCCEEDED)
    dataset = {"train_rows": "840", "eval_rows": "100", "rows_by_core": {"tool": "420"}, "tokens": "9"}
    made = done(made, "prepare", {"base": ref("BASE_MODEL", "b"), "dataset": dataset})
    made = done(
        made,
        "train",
        {
            "adapter": ref("ADAPTER", "c"),
            "final_loss": 0.3,
            "steps": "226",
            "held_out_loss": 0.0,
            "events": ["memory ran out"],
        },
        versions={"trainer": "0.1.0", "torch": "2.13.0"},
        job_id="train-1",
    )
    made = done(
        made,
        "package",
        {
            "reference": {"artifact": ref("GGUF", "d"), "type": "F16", "size_bytes": "271"},
            "quantized": [
                {"artifact": ref("GGUF", "e"), "type": "Q4_K_M", "size_bytes": "105", "size_reduction": 0.61}
            ],
            "merge": {"adapter_tensors": 240},
            "llama_cpp_version": "b1",
        },
    )
    deployment = {"id": "demo:v1", "target": "llama-server", "endpoint": "http://127.0.0.1:8480/v1"}
    made = done(made, "deploy", {"deployment": deployment})
    score = {"name": "tool_call.valid", "prompts": 40, "deployed_percent": 99.0, "drop_points": 0.0}
    made = done(made, "verify", {"passed": True, "verdict": "usable", "scores": [score]})
    promoted = {"outcome": "PROMOTE_OUTCOME_PROMOTED", "candidate": "demo:v1", "serving": deployment}
    return done(made, "promote", promoted)


def test_every_stage_adds_its_facts():
    facts = json.loads(run_json(whole()))
    assert facts["run_id"] == "run_2026-11-22_1"
    assert facts["state"] == "SUCCEEDED"
    assert facts["created"] == "2026-11-21T22:26:40.500+00:00"
    assert facts["base"] == {"source": "smollm2-135m-instruct", "digest": "b" * 64, "size_bytes": 7}
    assert facts["dataset"]["rows_by_core"] == {"tool": 420}
    assert facts["dataset"]["train_rows"] == 840
    assert facts["train"]["steps"] == 226
    assert facts["train"]["held_out_loss"] == 0
    assert facts["train"]["adapter_digest"] == "c" * 64
    assert facts["train"]["events"] == ["memory ran out"]
    assert facts["package"]["reference"] == {"type": "F16", "size_bytes": 271, "digest": "d" * 64}
    assert facts["package"]["quantized"][0]["size_reduction"] == 0.61
    assert facts["package"]["merge"] == {"adapter_tensors": 240}
    assert facts["deploy"]["endpoint"] == "http://127.0.0.1:8480/v1"
    assert facts["verify"]["scores"][0]["deployed_percent"] == 99
    assert facts["promote"] == {
        "outcome": "promoted", "candidate": "demo:v1", "serving": "demo:v1", "summary": "",
    }  # fmt: skip
    assert facts["stages"]["train"] == {
        "state": "SUCCEEDED", "seconds": 2.5, "started": "1970-01-01T00:00:10.000+00:00",
        "ended": "1970-01-01T00:00:12.500+00:00", "job_id": "train-1", "key": "k",
    }  # fmt: skip
    assert facts["parameters"]["train"]["lora"]["rank"] == 16
    assert facts["versions"] == {"gateway": "0.1.0", "torch": "2.13.0", "trainer": "0.1.0"}


def test_a_stage_that_was_taken_over_has_the_seconds_of_when_it_ran():
    fields = {"state": StageState.REUSED, "reused_from_run": "run_2026-11-21_1"}
    made = whole().with_stage("train", **fields, work_seconds=481.25, ended_at=10.06)
    assert json.loads(run_json(made))["stages"]["train"]["seconds"] == 481.25
    assert run_message(made).stages[1].work_seconds == 481.25
    unknown = whole().with_stage("train", **fields, ended_at=10.06)
    assert "seconds" not in json.loads(run_json(unknown))["stages"]["train"]


def test_a_result_kept_before_seconds_were_is_read():
    assert StageResult(**{"key": "k", "run_id": "r", "result": {}, "versions": {}}).work_seconds == 0


def test_what_is_not_known_is_left_out():
    facts = json.loads(run_json(record()))
    for name in ("train", "package", "deploy", "verify", "promote", "error", "ended"):
        assert name not in facts
    assert facts["stages"]["train"] == {"state": "PENDING"}


def test_a_loss_that_is_no_number_leaves_the_json_whole():
    made = done(record(), "train", {"adapter": ref("ADAPTER", "c"), "final_loss": "NaN"})
    text = run_json(made)
    assert "NaN" not in text
    assert "final_loss" not in json.loads(text)["train"]


def test_an_error_is_named():
    failed = record().changed(error=JobFailure("OUT_OF_MEMORY", "no memory", "buy some"))
    assert json.loads(run_json(failed))["error"]["message"] == "no memory"


def test_a_record_survives_the_database():
    made = whole().changed(
        taken_over={"train": StageResult("k", "run_2026-11-21_1", {"a": 1}, {"torch": "2"})},
        error=JobFailure("X", "y", "z", {"field": "w"}),
    )
    assert RunRecord.from_json(json.loads(json.dumps(made.to_json()))) == made


def test_a_run_becomes_a_message():
    message = run_message(
        whole().with_stage("deploy", state=StageState.REUSED, reused_from_run="run_2026-11-21_1")
    )
    assert message.state == gateway_pb2.RUN_STATE_SUCCEEDED
    assert [stage.WhichOneof("result") for stage in message.stages] == [
        "prepare_result", "train_result", "package_result", "deploy_result", "verify_result",
        "promote_result",
    ]  # fmt: skip
    assert message.stages[3].state == gateway_pb2.STAGE_STATE_REUSED
    assert message.create_time.ToMilliseconds() == 1795300000500
    empty = run_message(record().with_stage("train", result={}))
    assert empty.stages[1].WhichOneof("result") == "train_result"
    assert empty.stages[0].WhichOneof("result") is None


def test_a_run_that_ended_before_there_was_a_last_stage_is_told_as_it_was_made():
    made = whole()
    data = json.loads(json.dumps(made.changed(stages=made.stages[:-1]).to_json()))
    old = RunRecord.from_json(data)
    assert "promote" not in json.loads(run_json(old))["stages"]
    assert [stage.name for stage in run_message(old).stages] == list(range(1, 6))
    assert old.stage("promote").state is StageState.PENDING
    assert old.forced("promote") is False


def test_a_run_at_work_when_the_last_stage_came_gets_it():
    made = whole().changed(stages=whole().stages[:-1], state=RunState.RUNNING)
    later = made.with_stage("promote", state=StageState.RUNNING)
    assert [stage.name for stage in later.stages][-2:] == ["verify", "promote"]
    assert later.stage("promote").state is StageState.RUNNING
    assert later.with_stage("promote", state=StageState.SUCCEEDED).stages[:-1] == made.stages


def test_revisions_grow_even_when_the_clock_does_not():
    made = record()
    for _ in range(3):
        later = made.changed()
        assert later.revision > made.revision
        made = later
