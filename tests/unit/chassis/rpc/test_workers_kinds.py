"""Every kind of job in the contract has a result of its name and exactly one worker that takes it."""

from __future__ import annotations

from pathlib import Path

from web4.lora.v1 import jobs_pb2
from web4lora_chassis.rpc.jobs import worker_of
from web4lora_chassis.settings import Settings
from web4lora_deployer.__main__ import deployer
from web4lora_deployer.settings import DeployerSettings
from web4lora_packager.__main__ import packager
from web4lora_packager.settings import PackagerSettings
from web4lora_trainer.__main__ import trainer


def test_each_kind_has_a_result_and_one_worker(tmp_path: Path) -> None:
    kinds = {
        name: worker_of(getattr(jobs_pb2.JobSpec(), name))
        for name in jobs_pb2.JobSpec.DESCRIPTOR.fields_by_name
    }
    assert list(kinds) == list(jobs_pb2.JobResult.DESCRIPTOR.fields_by_name)
    workers = (
        trainer(Settings(home=tmp_path)),
        packager(PackagerSettings(home=tmp_path)),
        deployer(DeployerSettings(home=tmp_path)),
    )
    assert {kind: worker.name for worker in workers for kind in worker.checks} == kinds
