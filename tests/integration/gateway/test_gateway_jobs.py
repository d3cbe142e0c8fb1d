"""The deployer's jobs through the gateway, for work outside of a run."""

from __future__ import annotations

import grpc
import pytest
from web4.lora.v1 import deployer_pb2, jobs_pb2, jobs_pb2_grpc, trainer_pb2
from web4lora_chassis.artifacts import ArtifactRef
from web4lora_chassis.errors import InvalidInput, NotFound, Unavailable
from web4lora_chassis.rpc import error_of, ref_message


def deploy(request_id: str, name: str = "demo") -> jobs_pb2.CreateJobRequest:
    spec = deployer_pb2.DeploySpec(name=name, gguf=ref_message(ArtifactRef("gguf", "demo", "a" * 64)))
    spec.deploy.target = "llama-server"
    return jobs_pb2.CreateJobRequest(request_id=request_id, spec=jobs_pb2.JobSpec(deploy=spec))


def failure(call, request):
    with pytest.raises(grpc.RpcError) as raised:
        call(request)
    return error_of(raised.value)


def test_the_deployers_jobs_are_passed_on(stack):
    stack.start("deployer", "gateway")
    jobs = jobs_pb2_grpc.JobServiceStub(stack.channel)
    created = jobs.CreateJob(deploy("a")).job
    assert jobs.CreateJob(deploy("a")).job.id == created.id
    last = [answer.job for answer in jobs.WatchJob(jobs_pb2.WatchJobRequest(id=created.id), timeout=60)][-1]
    assert last.state == jobs_pb2.JOB_STATE_SUCCEEDED, last.error
    assert last.result.deploy.deployment.name == "demo"
    assert jobs.GetJob(jobs_pb2.GetJobRequest(id=created.id)).job == last
    stack.hold("deploy")
    held = jobs.CreateJob(deploy("b", "other")).job
    listed = jobs.ListJobs(jobs_pb2.ListJobsRequest(page_size=1))
    assert [job.id for job in listed.jobs] == [held.id]
    assert listed.next_page_token == held.id
    cancelled = jobs.CancelJob(jobs_pb2.CancelJobRequest(id=held.id)).job
    assert cancelled.state in (jobs_pb2.JOB_STATE_CANCELLING, jobs_pb2.JOB_STATE_CANCELLED)
    last = [answer.job for answer in jobs.WatchJob(jobs_pb2.WatchJobRequest(id=held.id), timeout=60)][-1]
    assert last.state == jobs_pb2.JOB_STATE_CANCELLED


def test_errors_are_passed_on_and_work_of_others_is_refused(stack):
    stack.start("deployer", "gateway")
    jobs = jobs_pb2_grpc.JobServiceStub(stack.channel)
    train = jobs_pb2.CreateJobRequest(
        request_id="a", spec=jobs_pb2.JobSpec(train=trainer_pb2.TrainSpec(name="demo"))
    )
    refused = failure(jobs.CreateJob, train)
    assert isinstance(refused, InvalidInput)
    assert (refused.message, refused.fix) == ("The deployer does no train jobs.", "Ask the trainer.")
    for call, request in (
        (jobs.GetJob, jobs_pb2.GetJobRequest(id="nothing")),
        (jobs.CancelJob, jobs_pb2.CancelJobRequest(id="nothing")),
        (lambda request: next(jobs.WatchJob(request)), jobs_pb2.WatchJobRequest(id="nothing")),
    ):
        assert isinstance(failure(call, request), NotFound)
    stack.kill("deployer")
    away = failure(jobs.CreateJob, deploy("b"))
    assert isinstance(away, Unavailable)
    assert "The deployer at" in away.message
