import pytest
from web4lora_chassis.errors import InvalidInput
from web4lora_deployer.names import candidate_id, check_name, file_name, is_candidate_id


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


def test_a_candidate_is_named_by_its_file() -> None:
    deployment_id = candidate_id("web4-demo", "1a2b3c4d" + "0" * 56)
    assert deployment_id == "web4-demo:v1a2b3c4d"
    assert is_candidate_id(deployment_id)
    assert not is_candidate_id("web4-demo")
    assert not is_candidate_id("web4-demo:latest")
    assert file_name(deployment_id) == "web4-demo@v1a2b3c4d.json"
