"""What the real gateway keeps, deletes and frees: runs, artifacts and uploads, beside work in progress."""

from __future__ import annotations

import os

import grpc
import pytest
import sqlalchemy as sa
from web4.lora.v1 import artifacts_pb2, gateway_pb2, gateway_pb2_grpc
from web4lora_chassis.errors import FailedPrecondition, InvalidInput, NotFound, Unavailable
from web4lora_chassis.rpc import error_of, ref_of
from web4lora_gateway.database import RUNS, open_database
from web4lora_gateway.records import RunRecord, RunState


def delete(stack, run_id: str) -> None:
    stack.api.DeleteRun(gateway_pb2.DeleteRunRequest(id=run_id), timeout=30)


def refused(call):
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return error_of(caught.value)


def collected(stack, *, dry_run: bool = True, **fields):
    request = artifacts_pb2.CollectGarbageRequest(dry_run=dry_run, **fields)
    found = list(stack.artifacts.CollectGarbage(request, timeout=60))
    artifacts = {
        str(ref_of(each.artifact.ref)): list(each.artifact.kept_for)
        for each in found
        if each.HasField("artifact")
    }
    uploads = [each.upload for each in found if each.HasField("upload")]
    return artifacts, uploads


def unneeded(artifacts: dict[str, list[str]]) -> set[str]:
    return {name for name, kept_for in artifacts.items() if not kept_for}


def stored(stack) -> set[str]:
    return {str(manifest.ref) for manifest in stack.store.find()}


def test_a_run_is_deleted_with_its_folders_and_its_artifacts_stay(stack, states):
    stack.start()
    stack.hold("train")
    run = stack.create()
    stack.until(run.id, lambda run: run.stages[1].state == gateway_pb2.STAGE_STATE_RUNNING, "training")
    error = refused(lambda: delete(stack, run.id))
    assert isinstance(error, FailedPrecondition)
    assert error.reason == "RUN_AT_WORK"
    stack.release("train")
    assert stack.finish(run.id).state == gateway_pb2.RUN_STATE_SUCCEEDED
    artifacts = stored(stack)

    delete(stack, run.id)
    assert isinstance(refused(lambda: stack.get(run.id)), NotFound)
    assert isinstance(refused(lambda: delete(stack, run.id)), NotFound)
    assert isinstance(refused(lambda: delete(stack, "latest")), InvalidInput)
    assert not (stack.outputs / run.id).exists()
    assert not os.path.lexists(stack.outputs / "latest")
    assert stack.store.published(run.id) == []
    assert stored(stack) == artifacts
    assert list(stack.api.ListRuns(gateway_pb2.ListRunsRequest()).runs) == []

    stack.kill("gateway")
    stack.start("gateway")
    second = stack.finish(stack.create().id)
    assert second.id.endswith("_2"), "the id of a deleted run is not used again"
    assert states(second) == ["REUSED"] * 5 + ["SUCCEEDED"], "what it made can still be taken over"
    assert (stack.outputs / "latest").resolve() == stack.outputs / second.id


def test_latest_leads_to_the_newest_run_that_is_left(stack):
    stack.start()
    first, second = (stack.finish(stack.create().id) for _ in range(2))
    delete(stack, second.id)
    assert (stack.outputs / "latest").resolve() == stack.outputs / first.id


def test_a_run_that_is_kept_is_not_deleted_until_it_is_let_go(stack):
    stack.start()
    run = stack.finish(stack.create().id)
    kept = stack.api.KeepRun(gateway_pb2.KeepRunRequest(id="latest")).run
    assert (kept.id, kept.kept) == (run.id, True)
    assert stack.get(run.id).kept
    error = refused(lambda: delete(stack, run.id))
    assert error.reason == "RUN_KEPT"
    assert "--release" in error.fix
    released = stack.api.KeepRun(gateway_pb2.KeepRunRequest(id=run.id, release=True)).run
    assert not released.kept
    delete(stack, run.id)


def test_huge_fields_are_refused_by_name_and_no_list_breaks(stack):
    stack.start()
    pipeline = stack.pipeline()
    pipeline.base.model = "x" * (5 << 20)
    error = refused(lambda: stack.create(pipeline))
    assert isinstance(error, InvalidInput)
    assert error.message == "base.model has 5242880 bytes; at most 4096 are taken."
    assert list(stack.api.ListRuns(gateway_pb2.ListRunsRequest()).runs) == []


def test_lists_stay_within_what_clients_take_whatever_is_stored(stack):
    ids = [f"run_2026-01-01_{number}" for number in range(1, 6)]
    pipeline = {"name": "demo", "base": {"model": "x" * (5 << 20)}}
    database = open_database(f"sqlite:///{stack.root / 'home' / 'gateway' / 'gateway.sqlite'}")
    with database.begin() as connection:
        for run_id in ids:
            record = RunRecord(run_id, run_id, "", "", pipeline, state=RunState.FAILED, created_at=1.0)
            row = {"id": run_id, "request_id": run_id, "created_at": 1.0, "ended": True, "state": "FAILED"}
            connection.execute(sa.insert(RUNS).values(**row, document=record.to_json()))
    database.dispose()
    stack.start("gateway")
    with grpc.insecure_channel(stack.addresses["gateway"]) as line:  # takes 4 MiB, as any client does
        api = gateway_pb2_grpc.GatewayServiceStub(line)
        seen, token = [], ""
        while True:
            page = api.ListRuns(gateway_pb2.ListRunsRequest(page_token=token), timeout=30)
            seen += [each.id for each in page.runs]
            token = page.next_page_token
            if not token:
                break
        assert sorted(seen) == ids
        large = api.GetRun(gateway_pb2.GetRunRequest(id=ids[2]), timeout=30).run
        assert large.pipeline.base.model.endswith("(shortened)")
        assert len(list(api.WatchRun(gateway_pb2.WatchRunRequest(id=large.id), timeout=30))) == 1
        api.DeleteRun(gateway_pb2.DeleteRunRequest(id=large.id), timeout=30)


def test_what_nothing_needs_is_collected_and_the_rest_says_what_for(stack):
    stack.env["WEB4LORA_KEEP_NEW_HOURS"] = "0"
    stack.start()
    first = stack.finish(stack.create().id)
    other = stack.pipeline(learning_rate=0.001)
    second = stack.finish(stack.create(other).id)

    artifacts, uploads = collected(stack)
    assert uploads == []
    assert unneeded(artifacts) == set()
    adapters = {name: kept_for for name, kept_for in artifacts.items() if name.startswith("adapter/")}
    assert any(first.id in kept_for and second.id not in kept_for for kept_for in adapters.values())
    (dataset,) = [kept_for for name, kept_for in artifacts.items() if name.startswith("dataset/")]
    assert {first.id, second.id} <= set(dataset)
    gguf = [kept_for for name, kept_for in artifacts.items() if "q4_k_m" in name]
    assert all(any("the deployment demo:v" in reason for reason in kept_for) for kept_for in gguf)
    assert any("which serves as demo" in reason for kept_for in gguf for reason in kept_for)

    before = stored(stack)
    delete(stack, first.id)
    would_go = unneeded(collected(stack)[0])
    # The deployment keeps its model and what that was made from; its 16 bit model is needed by nobody.
    assert {name.partition("@")[0] for name in would_go} == {
        "gguf/demo-f16", "merged_model/demo", "report/demo",
    }  # fmt: skip
    assert stored(stack) == before, "a dry run deletes nothing"
    assert unneeded(collected(stack, dry_run=False)[0]) == would_go
    assert stored(stack) == before - would_go
    assert unneeded(collected(stack)[0]) == set()


def test_only_the_newest_runs_count_when_that_is_asked_for_and_those_that_are_kept(stack):
    stack.env["WEB4LORA_KEEP_NEW_HOURS"] = "0"
    stack.start()
    runs = [stack.finish(stack.create(stack.pipeline(learning_rate=rate)).id) for rate in (1e-3, 2e-3, 3e-3)]
    stack.api.KeepRun(gateway_pb2.KeepRunRequest(id=runs[0].id))
    artifacts = collected(stack, keep_runs=1)[0]
    reasons = {reason for kept_for in artifacts.values() for reason in kept_for}
    assert f"{runs[0].id}, kept" in reasons
    assert runs[2].id in reasons
    assert runs[1].id not in reasons
    assert unneeded(artifacts)


def test_work_in_progress_loses_nothing_to_a_collection(stack):
    """A job's outputs are in no record until it ends, and it may store anew what is old."""
    stack.env["WEB4LORA_KEEP_NEW_HOURS"] = "0"
    stack.start()
    first = stack.finish(stack.create().id)
    delete(stack, first.id)
    for kind in ("package", "verify"):
        stack.hold(kind)
    run = stack.create(stack.pipeline(learning_rate=0.001))
    for kind, number in (("package", 2), ("verify", 4)):
        at_work = lambda run, n=number: run.stages[n].state == gateway_pb2.STAGE_STATE_RUNNING  # noqa: E731
        stack.until(run.id, at_work, kind)
        artifacts, _ = collected(stack, dry_run=False)
        kept_for = {reason for reasons in artifacts.values() for reason in reasons}
        assert any(f"{run.id}, at work" in reason for reason in kept_for)
        assert unneeded(artifacts) == set()
        if kind == "package":
            stack.release(kind)
    stack.release("verify")
    last = stack.finish(run.id)
    assert last.state == gateway_pb2.RUN_STATE_SUCCEEDED, last.error
    for manifest in stack.store.find():
        stack.store.get(manifest.ref, stack.root / "out" / manifest.digest)


def test_new_artifacts_and_uploads_that_may_have_a_writer_are_left_alone(stack, monkeypatch):
    stack.start()
    source = stack.root / "file"
    source.write_text("x")
    stack.store.put("gguf", "new", {"file": source}, link=False)
    place = stack.root / "home" / "store" / "artifacts" / "gguf" / "cut" / "0123456789ab"
    place.mkdir(parents=True)
    (place / "model.gguf").write_bytes(b"x" * 100)
    artifacts, uploads = collected(stack, dry_run=False)
    assert uploads == []
    (reasons,) = artifacts.values()
    assert "new: stored 0 h ago, and left alone for 24 h" in reasons
    assert (place / "model.gguf").exists()

    stack.kill("gateway")
    stack.env["WEB4LORA_KEEP_NEW_HOURS"] = "0"
    stack.start("gateway")  # frees cut-off uploads by itself, and no artifact
    stack.wait(lambda: not place.exists(), "the upload to be freed")
    assert unneeded(collected(stack)[0])


def test_without_the_deployer_nothing_is_collected(stack):
    stack.start()
    stack.kill("deployer")
    error = refused(lambda: collected(stack, dry_run=False))
    assert isinstance(error, Unavailable)


def test_runs_go_by_the_settings_and_those_that_are_kept_stay(stack):
    stack.start()
    runs = [stack.finish(stack.create(stack.pipeline(learning_rate=rate)).id) for rate in (1e-3, 2e-3, 3e-3)]
    stack.api.KeepRun(gateway_pb2.KeepRunRequest(id=runs[0].id))
    stack.kill("gateway")
    stack.env["WEB4LORA_KEEP_RUNS"] = "1"
    stack.start("gateway")

    def left() -> list[str]:
        return [run.id for run in stack.api.ListRuns(gateway_pb2.ListRunsRequest()).runs]

    stack.wait(lambda: left() == [runs[2].id, runs[0].id], "the second run to go")


def test_a_disk_that_is_nearly_full_is_told_of(stack):
    stack.env["WEB4LORA_KEEP_FREE_GB"] = "1e9"
    stack.start()
    stack.wait(
        lambda: any(
            "GB left" in line
            for line in stack.api.GetGatewayInfo(gateway_pb2.GetGatewayInfoRequest()).warnings
        ),
        "the gateway's warning",
    )
    stack.hold("train")
    run = stack.create()
    stack.until(
        run.id, lambda run: "GB left" in run.stages[1].progress.message, "the warning in the progress"
    )
    stack.release("train")
    assert stack.finish(run.id).state == gateway_pb2.RUN_STATE_SUCCEEDED
