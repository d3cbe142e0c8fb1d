from __future__ import annotations

from typing import Any

import pytest
from web4.lora.v1 import gateway_pb2, jobs_pb2, trainer_pb2
from web4lora_chassis.errors import InvalidInput
from web4lora_chassis.jobs import JobFailure
from web4lora_gateway.outcomes import Done, Failed
from web4lora_gateway.pipeline import Pipeline, check_pipeline
from web4lora_gateway.stages import Deploy, Inputs, Package, Prepare, Train, Verify
from web4lora_gateway.workers import WorkerInfo


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
    return Inputs(Pipeline.from_json(check_pipeline(pipeline)), results, lambda: "{}")


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
    assert Deploy().spec(given).gguf.digest == "2" * 64
    spec = Verify().spec(given)
    assert (spec.reference.digest, spec.deployment, spec.run_json) == ("1" * 64, "demo:v2", "{}")


def test_all_artifacts_of_a_package_must_be_there_but_not_all_are_for_people():
    result = Package().read(PACKAGE)
    assert [artifact.digest[0] for artifact in Package().artifacts(result)] == [
        "0",
        "1",
        "2",
        "3",
        "4",
    ]
    assert [artifact.digest[0] for artifact in Package().files(result)] == ["1", "2", "3", "4"]


def test_a_checkpoint_that_nobody_asked_for_is_no_artifact():
    result = Package().read({name: made for name, made in PACKAGE.items() if name != "merged"})
    assert [artifact.digest[0] for artifact in Package().artifacts(result)] == ["1", "2", "3", "4"]


def test_the_text_of_run_json_does_not_decide_a_verification_but_the_deployment_does():
    stage = Verify()

    def identity(run_json: str, **deployment: Any) -> Any:
        given = inputs(package=PACKAGE, deploy={"deployment": {"id": "demo:v2", **deployment}})
        given = Inputs(given.pipeline, given.results, lambda: run_json)
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
    assert Prepare().reusable(inputs(model, revision)) is fixed


def test_the_base_is_converted_and_tested_only_when_that_is_asked_for():
    assert not Package().spec(inputs(prepare=PREPARED, train=TRAINED)).base_gguf
    asked = inputs(compare_base=True, prepare=PREPARED, train=TRAINED)
    assert Package().spec(asked).base_gguf
    made = PACKAGE | {"base_gguf": ref("GGUF", "5")}
    result = Package().read(made)
    assert "5" in [artifact.digest[0] for artifact in Package().artifacts(result)]
    assert "5" not in [artifact.digest[0] for artifact in Package().files(result)]
    deployed = {"deployment": {"id": "demo:v2"}}
    assert Verify().spec(inputs(package=made, deploy=deployed)).base_gguf.digest == "5" * 64
    assert not Verify().spec(inputs(package=PACKAGE, deploy=deployed)).HasField("base_gguf")


def test_an_adapter_of_its_own_is_for_people_and_must_be_there_to_be_taken_over():
    made = PACKAGE | {
        "adapter_gguf": {"artifact": ref("GGUF", "6")}, "adapter_base": {"artifact": ref("GGUF", "7")},
    }  # fmt: skip
    result = Package().read(made)
    for told in (Package().artifacts(result), Package().files(result)):
        assert {"6", "7"} <= {artifact.digest[0] for artifact in told}
    assert len(Package().files(Package().read(PACKAGE))) == len(told) - 2


def test_what_is_deployed_and_how_it_is_tested_do_not_depend_on_who_is_promoted():
    given = inputs(package=PACKAGE, deploy={"deployment": {"id": "demo:v2", "promoted": True}})
    assert not Deploy().spec(given).deploy.HasField("promote")
    stage = Verify()
    other = inputs(package=PACKAGE, deploy={"deployment": {"id": "demo:v2"}})
    assert stage.identity(given, stage.spec(given)) == stage.identity(other, stage.spec(other))


def prepared(context: int, tokens: int, too_long: int = 0) -> trainer_pb2.PrepareResult:
    data = trainer_pb2.DatasetReport(tokens=tokens, rows_too_long=too_long)
    return trainer_pb2.PrepareResult(context_tokens=context, dataset=data)


def with_settings(package: dict[str, Any], deploy: dict[str, Any]) -> Inputs:
    pipeline = gateway_pb2.Pipeline(name="demo", base={"model": "m"}, package=package, deploy=deploy)
    artifact = pipeline.dataset.artifact
    artifact.kind, artifact.name, artifact.digest = "ARTIFACT_KIND_DATASET", "demo", "a" * 64
    return Inputs(Pipeline.from_json(check_pipeline(pipeline)), {}, lambda: "{}")


@pytest.mark.parametrize(
    ("package", "deploy", "context", "tokens", "field", "words"),
    [
        ({"context_tokens": 8192}, {}, 2048, 9000, "package.context_tokens", "8192 is more than the 2048"),
        ({}, {"context_tokens": 2049}, 2048, 9000, "deploy.context_tokens", "2049 is more than the 2048"),
        ({"importance_matrix": True}, {}, 2048, 324, "package.importance_matrix", "has 324 tokens"),
        ({"importance_matrix": True}, {}, 0, 1023, "package.importance_matrix", "1,024 at least"),
        (
            {"importance_matrix": True, "importance_matrix_chunks": 5}, {}, 2048, 2559,
            "package.importance_matrix_chunks", "5 chunks of 512 tokens are more than the 2,559",
        ),
    ],
)  # fmt: skip
def test_what_the_base_or_the_data_can_not_give_is_refused_once_prepared(
    package: dict[str, Any], deploy: dict[str, Any], context: int, tokens: int, field: str, words: str
) -> None:
    with pytest.raises(InvalidInput, match=words) as caught:
        Prepare().accept(with_settings(package, deploy), prepared(context, tokens))
    assert caught.value.metadata["field"] == field
    assert caught.value.fix


def test_all_that_does_not_fit_is_said_at_once():
    asked = with_settings({"context_tokens": 8192, "importance_matrix": True}, {"context_tokens": 4096})
    with pytest.raises(InvalidInput) as caught:
        Prepare().accept(asked, prepared(2048, 10))
    fields = caught.value.metadata["field"].splitlines()
    assert fields == ["deploy.context_tokens", "package.context_tokens", "package.importance_matrix"]


def test_contexts_are_told_to_the_trainer_and_do_not_decide_what_it_prepares():
    stage, plain = Prepare(), with_settings({}, {})
    asked = with_settings({"context_tokens": 8192}, {"context_tokens": 4096})
    spec = stage.spec(asked)
    assert dict(spec.context_tokens) == {"package.context_tokens": 8192, "deploy.context_tokens": 4096}
    assert stage.identity(asked, spec) == stage.identity(plain, stage.spec(plain))


@pytest.mark.parametrize(
    ("package", "deploy", "context", "tokens", "too_long"),
    [
        ({}, {}, 128, 10, 0),
        ({"context_tokens": 2048}, {"context_tokens": 2048}, 2048, 10, 0),
        ({"context_tokens": 8192}, {}, 0, 10, 0),
        ({"importance_matrix": True}, {}, 2048, 1024, 0),
        ({"importance_matrix": True, "importance_matrix_chunks": 5}, {}, 2048, 2560, 0),
        ({"importance_matrix": True}, {}, 2048, 10, 3),
        ({"importance_matrix_chunks": 5}, {}, 2048, 10, 0),
    ],
)
def test_what_fits_goes_on(
    package: dict[str, Any], deploy: dict[str, Any], context: int, tokens: int, too_long: int
) -> None:
    Prepare().accept(with_settings(package, deploy), prepared(context, tokens, too_long))


@pytest.mark.parametrize(
    ("asked", "setting", "goes_to"), [("", "ollama", "ollama"), ("docker", "ollama", "docker")]
)
def test_a_run_without_a_target_goes_where_the_deployer_is_set_to(asked, setting, goes_to):
    stage = Deploy()
    spec = stage.spec(inputs(package=PACKAGE))
    if asked:
        spec.deploy.target = asked
    stage.complete(spec, WorkerInfo({}, target=setting))
    assert spec.deploy.target == goes_to


def test_what_an_adapter_begins_with_decides_a_training_and_who_is_told_of_it_does_not():
    keys = {}
    for name, value in (("plain", ""), ("report_to", "tensorboard"), ("from", "9" * 64), ("from", "8" * 64)):
        given = inputs(prepare=PREPARED)
        if name == "report_to":
            given.pipeline.train.report_to.append(value)
        elif value:
            setattr(given.pipeline.train, name, value)
        spec = Train().spec(given)
        assert list(spec.train.report_to) == ([value] if name == "report_to" else [])
        keys[name + value] = Train().key(given, spec, {})
    assert keys["plain"] == keys["report_totensorboard"]
    assert len(set(keys.values())) == 3


def test_a_jobs_end_is_the_stages_outcome():
    done = jobs_pb2.Job(id="train-1", state=jobs_pb2.JOB_STATE_SUCCEEDED)
    done.result.train.steps = 7
    assert Train().outcome(done) == Done({"steps": "7"}, "train-1")
    error = jobs_pb2.JobError(reason="OUT_OF_MEMORY", message="no", fix="Buy.", metadata={"a": "b"})
    failed = jobs_pb2.Job(id="train-2", state=jobs_pb2.JOB_STATE_FAILED, error=error)
    assert Train().outcome(failed) == Failed(JobFailure("OUT_OF_MEMORY", "no", "Buy.", {"a": "b"}))
    cancelled = Train().outcome(jobs_pb2.Job(id="train-3", state=jobs_pb2.JOB_STATE_CANCELLED))
    assert isinstance(cancelled, Failed)
    assert cancelled.error.message == "The trainer's job train-3 was cancelled there."
