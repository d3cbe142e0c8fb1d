from __future__ import annotations

from typing import Any

import pytest
from web4.lora.v1 import gateway_pb2
from web4lora_gateway.pipeline import Pipeline, check_pipeline
from web4lora_gateway.stages import BY_NAME, Inputs
from web4lora_gateway.stages.prepare import names_content


def ref(kind: str, digit: str) -> dict[str, Any]:
    return {"kind": f"ARTIFACT_KIND_{kind}", "name": "demo", "digest": digit * 64, "size_bytes": "7"}


def inputs(
    model: str = "smollm2-135m-instruct", revision: str = "", *, compare_base: bool = False, **results: Any
) -> Inputs:
    pipeline = gateway_pb2.Pipeline(name="demo", base={"model": model, "revision": revision})
    pipeline.package.quantizations.extend(["Q8_0", "Q4_K_M"])
    for target, kind in ((pipeline.dataset.artifact, "DATASET"), (pipeline.verify.suite, "SUITE")):
        target.kind, target.name, target.digest = f"ARTIFACT_KIND_{kind}", "demo", "a" * 64
    pipeline.verify.compare_base = compare_base
    return Inputs(Pipeline.from_json(check_pipeline(pipeline)), results, "{}")


PREPARED = {"base": ref("BASE_MODEL", "8")}
TRAINED = {"adapter": ref("ADAPTER", "9")}
PACKAGE = {
    "merged": ref("MERGED_MODEL", "0"),
    "reference": {"artifact": ref("GGUF", "1")},
    "quantized": [{"artifact": ref("GGUF", "2")}, {"artifact": ref("GGUF", "3")}],
    "files": ref("REPORT", "4"),
}


def test_the_first_quantization_is_deployed_and_measured_against_16_bit():
    deployed = {"deployment": {"id": "demo:v2", "gguf": ref("GGUF", "2"), "context_tokens": 4096}}
    given = inputs(package=PACKAGE, deploy=deployed)
    assert BY_NAME["deploy"].spec(given).gguf.digest == "2" * 64
    spec = BY_NAME["verify"].spec(given)
    assert (spec.reference.digest, spec.deployment, spec.run_json) == ("1" * 64, "demo:v2", "{}")


def test_all_artifacts_of_a_package_must_be_there_but_not_all_are_for_people():
    result = BY_NAME["package"].read(PACKAGE)
    assert [artifact.digest[0] for artifact in BY_NAME["package"].artifacts(result)] == [
        "0",
        "1",
        "2",
        "3",
        "4",
    ]
    assert [artifact.digest[0] for artifact in BY_NAME["package"].files(result)] == ["1", "2", "3", "4"]


def test_the_text_of_run_json_does_not_decide_a_verification_but_the_deployment_does():
    stage = BY_NAME["verify"]

    def identity(run_json: str, **deployment: Any) -> Any:
        given = inputs(package=PACKAGE, deploy={"deployment": {"id": "demo:v2", **deployment}})
        given = Inputs(given.pipeline, given.results, run_json)
        return stage.identity(given, stage.spec(given))

    first = identity("{}", context_tokens=4096)
    assert identity('{"a": 1}', context_tokens=4096, endpoint="http://127.0.0.1:9/v1") == first
    assert identity("{}", context_tokens=2048) != first
    assert identity("{}", context_tokens=4096, runtime_version="b2") != first


@pytest.mark.parametrize(
    ("model", "revision", "fixed"),
    [
        ("smollm2-135m-instruct", "", True),
        ("Qwen/Qwen2.5-Coder-7B-Instruct", "", False),
        ("Qwen/Qwen2.5-Coder-7B-Instruct", "main", False),
        ("Qwen/Qwen2.5-Coder-7B-Instruct", "0123456789" * 4, True),
        ("/models/mine", "", False),
        ("model.gguf", "", False),
        ("./mine", "", False),
    ],
)
def test_only_names_that_mean_the_same_bytes_for_ever_are_taken_over(model, revision, fixed):
    assert names_content(inputs(model, revision)) is fixed


def test_the_base_is_converted_and_tested_only_when_that_is_asked_for():
    assert not BY_NAME["package"].spec(inputs(prepare=PREPARED, train=TRAINED)).base_gguf
    asked = inputs(compare_base=True, prepare=PREPARED, train=TRAINED)
    assert BY_NAME["package"].spec(asked).base_gguf
    made = PACKAGE | {"base_gguf": ref("GGUF", "5")}
    result = BY_NAME["package"].read(made)
    assert "5" in [artifact.digest[0] for artifact in BY_NAME["package"].artifacts(result)]
    assert "5" not in [artifact.digest[0] for artifact in BY_NAME["package"].files(result)]
    deployed = {"deployment": {"id": "demo:v2"}}
    assert BY_NAME["verify"].spec(inputs(package=made, deploy=deployed)).base_gguf.digest == "5" * 64
    assert not BY_NAME["verify"].spec(inputs(package=PACKAGE, deploy=deployed)).HasField("base_gguf")


def test_an_adapter_of_its_own_is_for_people_and_must_be_there_to_be_taken_over():
    made = PACKAGE | {
        "adapter_gguf": {"artifact": ref("GGUF", "6")}, "adapter_base": {"artifact": ref("GGUF", "7")},
    }  # fmt: skip
    result = BY_NAME["package"].read(made)
    for told in (BY_NAME["package"].artifacts(result), BY_NAME["package"].files(result)):
        assert {"6", "7"} <= {artifact.digest[0] for artifact in told}
    assert len(BY_NAME["package"].files(BY_NAME["package"].read(PACKAGE))) == len(told) - 2


def test_what_is_deployed_and_how_it_is_tested_do_not_depend_on_who_is_promoted():
    given = inputs(package=PACKAGE, deploy={"deployment": {"id": "demo:v2", "promoted": True}})
    assert not BY_NAME["deploy"].spec(given).deploy.HasField("promote")
    stage = BY_NAME["verify"]
    other = inputs(package=PACKAGE, deploy={"deployment": {"id": "demo:v2"}})
    assert stage.identity(given, stage.spec(given)) == stage.identity(other, stage.spec(other))
