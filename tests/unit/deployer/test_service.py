from __future__ import annotations

from collections.abc import Callable

import pytest
from web4.lora.v1 import artifacts_pb2, deployer_pb2
from web4lora_chassis.artifacts import ArtifactRef
from web4lora_chassis.errors import InvalidInput
from web4lora_chassis.rpc import ref_message
from web4lora_deployer.results import budgets_of
from web4lora_deployer.service import check
from web4lora_deployer.suite import Budgets


def ref(kind: str) -> artifacts_pb2.ArtifactRef:
    return ref_message(ArtifactRef(kind, "demo", "a" * 64))


def deploy_spec() -> deployer_pb2.DeploySpec:
    return deployer_pb2.DeploySpec(name="demo", gguf=ref("gguf"), files=ref("report"))


def verify_spec() -> deployer_pb2.VerifySpec:
    settings = deployer_pb2.VerifySettings(suite=ref("suite"))
    return deployer_pb2.VerifySpec(
        name="demo", deployment="demo:v12345678", reference=ref("gguf"), verify=settings
    )


@pytest.mark.parametrize("target", ["auto", "ollama", "docker", "llama-server"])
def test_every_target_is_taken(target: str) -> None:
    spec = deploy_spec()
    spec.deploy.target = target
    check("deploy", spec)


def test_a_plain_spec_is_taken() -> None:
    check("deploy", deploy_spec())
    check("verify", verify_spec())


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("name", lambda spec: setattr(spec, "name", "A B")),
        ("gguf", lambda spec: spec.gguf.CopyFrom(ref("adapter"))),
        ("gguf", lambda spec: spec.ClearField("gguf")),
        ("files", lambda spec: spec.files.CopyFrom(ref("gguf"))),
        ("deploy.target", lambda spec: setattr(spec.deploy, "target", "toaster")),
        ("deploy.context_tokens", lambda spec: setattr(spec.deploy, "context_tokens", 127)),
        ("deploy.parallel", lambda spec: setattr(spec.deploy, "parallel", 65)),
    ],
)
def test_a_deploy_spec_out_of_bounds_names_the_field(
    field: str, change: Callable[[deployer_pb2.DeploySpec], None]
) -> None:
    spec = deploy_spec()
    change(spec)
    with pytest.raises(InvalidInput) as caught:
        check("deploy", spec)
    assert caught.value.metadata["field"] == field


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("verify.suite", lambda spec: spec.verify.ClearField("suite")),
        ("reference", lambda spec: spec.reference.CopyFrom(ref("suite"))),
        ("base_gguf", lambda spec: spec.base_gguf.CopyFrom(ref("adapter"))),
        ("deployment", lambda spec: spec.ClearField("deployment")),
        ("run_json", lambda spec: setattr(spec, "run_json", "[")),
        ("run_json", lambda spec: setattr(spec, "run_json", "[]")),
    ],
)
def test_a_verify_spec_out_of_bounds_names_the_field(
    field: str, change: Callable[[deployer_pb2.VerifySpec], None]
) -> None:
    spec = verify_spec()
    change(spec)
    with pytest.raises(InvalidInput) as caught:
        check("verify", spec)
    assert caught.value.metadata["field"] == field


def test_absent_limits_take_the_contracts_defaults_and_zero_is_a_limit() -> None:
    assert budgets_of(deployer_pb2.Budgets()) == Budgets()
    given = deployer_pb2.Budgets(max_score_drop_points=0, min_score_percent={"tool_call.valid": 95})
    assert budgets_of(given) == Budgets(max_score_drop_points=0, min_score_percent={"tool_call.valid": 95})
