from itertools import product

import pytest
from web4.lora.v1 import gateway_pb2
from web4lora_chassis.errors import InvalidInput
from web4lora_chassis.pipeline.check import problems_of
from web4lora_deployer.records.names import check_name, deployment_id_of, file_name, is_deployment_id, is_name


@pytest.mark.parametrize("name", ["web4-demo", "a", "qwen2.5-coder_7b", "x" * 80])
def test_names_that_every_runtime_takes(name: str) -> None:
    check_name(name)


@pytest.mark.parametrize(
    "name", ["", "Web4", "a b", "-a", "a-", "a..b", "a--b", "../a", "a/b", "a:b", "x" * 81, "ä", "a\n"]
)
def test_names_that_some_runtime_would_refuse(name: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        check_name(name)
    assert caught.value.metadata["field"] == "name"


def test_a_candidate_is_named_by_all_that_makes_it_what_it_is() -> None:
    deployment_id = deployment_id_of("web4-demo", {"file": "a" * 64, "parallel": 4})
    assert deployment_id == deployment_id_of("web4-demo", {"parallel": 4, "file": "a" * 64})
    assert deployment_id != deployment_id_of("web4-demo", {"file": "a" * 64, "parallel": 1})
    assert is_deployment_id(deployment_id)
    assert not is_deployment_id("web4-demo")
    assert not is_deployment_id("web4-demo:latest")
    assert file_name("web4-demo:v1a2b3c4d") == "web4-demo@v1a2b3c4d.json"


@pytest.mark.parametrize("name", ["a", "a-b", "qwen2-5-coder-7b", "x" * 63, "a1-1a"])
def test_what_may_be_a_pipelines_name_may_be_a_deployments(name: str) -> None:
    pipeline = gateway_pb2.Pipeline(name=name, base={"model": "m"})
    assert problems_of(pipeline) == []
    check_name(name)


def test_what_may_not_be_a_deployments_name_may_not_be_a_pipelines() -> None:
    signs = "aZ0-._ "
    for letters in product(signs, repeat=4):
        name = "".join(letters)
        if not is_name(name):
            assert problems_of(gateway_pb2.Pipeline(name=name, base={"model": "m"})), name
