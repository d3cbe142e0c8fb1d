from __future__ import annotations

from collections.abc import Callable

import pytest
from web4.lora.v1 import artifacts_pb2, deployer_pb2
from web4lora_chassis.artifacts import ArtifactRef
from web4lora_chassis.errors import InvalidInput
from web4lora_chassis.rpc import ref_message
from web4lora_deployer.specs import check_deploy, check_evaluate, check_verify
from web4lora_deployer.suite import Budgets
from web4lora_deployer.testing.report_messages import budgets_of


def ref(kind: str) -> artifacts_pb2.ArtifactRef:
    return ref_message(ArtifactRef(kind, "demo", "a" * 64))


def deploy_spec() -> deployer_pb2.DeploySpec:
    return deployer_pb2.DeploySpec(name="demo", gguf=ref("gguf"), files=ref("report"))


@pytest.mark.parametrize("target", ["ollama", "docker"])
def test_adapters_are_for_llama_server_alone(target: str) -> None:
    spec = deploy_spec()
    spec.adapters.add(name="tool", gguf=ref("gguf"))
    check_deploy(spec)
    spec.deploy.target = "llama-server"
    check_deploy(spec)
    spec.deploy.target = target
    with pytest.raises(InvalidInput, match=f"{target} takes no adapters: llama-server alone can switch"):
        check_deploy(spec)


def verify_spec() -> deployer_pb2.VerifySpec:
    settings = deployer_pb2.VerifySettings(suite=ref("suite"))
    return deployer_pb2.VerifySpec(
        name="demo", deployment="demo:v12345678", reference=ref("gguf"), verify=settings
    )


@pytest.mark.parametrize("target", ["auto", "ollama", "docker", "llama-server"])
def test_every_target_is_taken(target: str) -> None:
    spec = deploy_spec()
    spec.deploy.target = target
    check_deploy(spec)


def test_a_plain_spec_is_taken() -> None:
    check_deploy(deploy_spec())
    check_verify(verify_spec())


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
        ("adapters[0].gguf", lambda spec: spec.adapters.add(name="tool", gguf=ref("adapter"))),
        ("adapters[0].name", lambda spec: spec.adapters.add(name="A B", gguf=ref("gguf"))),
        (
            "adapters[1].name",
            lambda spec: spec.adapters.extend([deployer_pb2.AdapterSpec(name="a", gguf=ref("gguf"))] * 2),
        ),
        (
            "adapters",
            lambda spec: spec.adapters.extend(
                deployer_pb2.AdapterSpec(name=f"a{number}", gguf=ref("gguf")) for number in range(17)
            ),
        ),
    ],
)
def test_a_deploy_spec_out_of_bounds_names_the_field(
    field: str, change: Callable[[deployer_pb2.DeploySpec], None]
) -> None:
    spec = deploy_spec()
    change(spec)
    with pytest.raises(InvalidInput) as caught:
        check_deploy(spec)
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
        check_verify(spec)
    assert caught.value.metadata["field"] == field


def test_absent_limits_take_the_contracts_defaults_and_zero_is_a_limit() -> None:
    assert budgets_of(deployer_pb2.Budgets()) == Budgets()
    given = deployer_pb2.Budgets(max_score_drop_points=0, min_score_percent={"tool_call.valid": 95})
    assert budgets_of(given) == Budgets(max_score_drop_points=0, min_score_percent={"tool_call.valid": 95})


def test_limits_out_of_bounds_are_refused_before_a_job_is_made() -> None:
    verify, evaluate = verify_spec(), evaluate_spec()
    for budgets in (verify.verify.budgets, evaluate.budgets):
        budgets.min_size_reduction = 1.0
    for check, field in (
        (lambda: check_verify(verify), "verify.budgets"), (lambda: check_evaluate(evaluate), "budgets")
    ):  # fmt: skip
        with pytest.raises(InvalidInput) as caught:
            check()
        assert caught.value.metadata["field"] == f"{field}.min_size_reduction"


def evaluate_spec(**model: object) -> deployer_pb2.EvaluateSpec:
    asked = deployer_pb2.EvaluatedModel(**(model or {"deployment": "demo"}))  # type: ignore[arg-type]
    return deployer_pb2.EvaluateSpec(name="demo-eval", model=asked, suite=ref("suite"))


@pytest.mark.parametrize(
    "model",
    [
        {"deployment": "demo"},
        {"endpoint": "https://host:1/v1", "model": "m", "secret": "key", "context_tokens": 1, "parallel": 64},
    ],
)
def test_a_deployment_or_an_endpoint_is_evaluated(model: dict[str, object]) -> None:
    check_evaluate(evaluate_spec(**model))


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ({"parallel": 1}, "a deployment or an endpoint, one of both"),
        ({"deployment": "demo", "endpoint": "http://h/v1"}, "a deployment or an endpoint, one of both"),
        ({"endpoint": "h:1/v1", "model": "m"}, "which is no http://HOST:PORT/v1"),
        ({"endpoint": "http://key@h/v1", "model": "m"}, "which reports show"),
        ({"endpoint": "http://h/v1?key=k", "model": "m"}, "which reports show"),
        ({"endpoint": "http://h/v1"}, "no name of the model there"),
        ({"deployment": "demo", "secret": "key"}, "whose own name and address are used"),
        ({"endpoint": "http://h/v1", "model": "m", "parallel": 65}, "needs parallel 0 to 64"),
    ],
)
def test_a_model_that_can_not_be_evaluated(model: dict[str, object], said: str) -> None:
    with pytest.raises(InvalidInput, match=r"^model ") as caught:
        check_evaluate(evaluate_spec(**model))
    assert said in caught.value.message
    others = evaluate_spec()
    others.against.append(evaluate_spec(**model).model)
    with pytest.raises(InvalidInput, match=r"^against\[0\] "):
        check_evaluate(others)


def test_at_most_four_are_compared_with() -> None:
    spec = evaluate_spec()
    spec.against.extend([spec.model] * 5)
    with pytest.raises(InvalidInput, match="against names 5 models"):
        check_evaluate(spec)
