from __future__ import annotations

import asyncio
from typing import Any

import pytest
from web4.lora.v1 import gateway_pb2
from web4lora_gateway.outcomes import Decision, Do, DoCalls, DoJob, Failed
from web4lora_gateway.pipeline import check_pipeline
from web4lora_gateway.records import RunRecord
from web4lora_gateway.workflow import RunWorkflow


class Book:
    async def get(self, run_id: str, _waiting: object = None) -> RunRecord:
        pipeline = gateway_pb2.Pipeline(name="demo", base={"model": "smollm2-135m-instruct"})
        artifact = pipeline.dataset.artifact
        artifact.kind, artifact.name, artifact.digest = "ARTIFACT_KIND_DATASET", "demo", "a" * 64
        return RunRecord(run_id, "mine", "", "00", check_pipeline(pipeline))


@pytest.mark.parametrize(
    ("name", "plan"),
    [
        ("promote", DoJob("k", {})),
        ("train", DoCalls("k", Decision(Do.NOTHING))),
        ("verify", DoJob("k", {})),  # this pipeline has no suite
    ],
)
def test_a_plan_of_another_version_that_this_one_can_not_follow_is_told_in_one_line(name: str, plan: Any):
    nobody: Any = None
    workflow = RunWorkflow(Book(), nobody, nobody, nobody, nobody, nobody)  # type: ignore[arg-type]
    outcome = asyncio.run(workflow._work("run_2026-11-26_1", name, plan))
    assert isinstance(outcome, Failed)
    assert f"planned {name}" in outcome.error.message
    assert outcome.error.fix == f"Retry the run: `web4lora runs retry run_2026-11-26_1 --from {name}`."
