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
    def put_down(self, run_id: str) -> None:
        pass

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


def test_a_run_that_is_taken_up_twice_in_one_process_is_carried_on_by_one_after_the_other():
    at_work: list[str] = []
    ended: list[str] = []

    class Followed(RunWorkflow):
        async def _through_all_stages(self, run_id: str) -> None:
            assert run_id not in at_work
            at_work.append(run_id)
            await asyncio.sleep(0)
            at_work.remove(run_id)
            ended.append(run_id)
            if len(ended) == 1:
                raise asyncio.CancelledError  # the engine says so of one that another is to go on with

    async def main() -> None:
        nobody: Any = None
        workflow = Followed(Book(), nobody, nobody, nobody, nobody, nobody)  # type: ignore[arg-type]
        both = [asyncio.create_task(workflow._run("run_1")) for _ in range(2)]
        await asyncio.sleep(0)
        assert workflow.at_work("run_1")
        await asyncio.gather(*both, return_exceptions=True)
        assert ended == ["run_1", "run_1"]
        assert not workflow.at_work("run_1")
        assert not workflow._turns

    asyncio.run(main())
