from __future__ import annotations

import math
from pathlib import Path

import pytest
from web4.lora.v1 import gateway_pb2
from web4lora_chassis.artifacts import ArtifactStore
from web4lora_chassis.artifacts.folder import FolderBackend
from web4lora_chassis.errors import InvalidInput, NotFound
from web4lora_gateway.pipeline import Pipeline, check_artifacts, check_pipeline


def pipeline() -> gateway_pb2.Pipeline:
    made = gateway_pb2.Pipeline(name="demo", base={"model": "smollm2-135m-instruct"})
    for ref, kind in ((made.dataset.artifact, "DATASET"), (made.verify.suite, "SUITE")):
        ref.kind, ref.name, ref.digest = f"ARTIFACT_KIND_{kind}", kind.lower(), "a" * 64
    return made


def test_absent_fields_take_their_defaults():
    given = pipeline()
    given.train.lora.rank = 8
    read = Pipeline.from_json(check_pipeline(given))
    train = read.train
    assert (train.lora.rank, train.lora.alpha, train.lora.dropout) == (8, 16, 0)
    assert list(train.lora.target_modules) == ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert (train.epochs, train.max_steps, train.learning_rate, train.schedule) == (1, 0, 2e-4, "cosine")
    assert (train.warmup_ratio, train.max_length_tokens, train.gradient_accumulation) == (0.03, 2048, 1)
    assert not train.HasField("tokens_per_batch")
    assert (train.gradient_checkpointing, train.dtype, train.seed) == ("auto", "auto", 17)
    assert (train.checkpoint_steps, train.held_out_evaluations, train.write_bin) == (0, 4, True)
    assert (train.loss_band.low, train.loss_band.high, train.max_grad_norm) == (0.6, 1.0, 1.0)
    assert read.quantizations == ("Q4_K_M",)
    assert (read.package.gguf_type, read.package.context_tokens, read.package.temperature) == (
        "auto",
        4096,
        0,
    )
    assert (read.deploy.target, read.deploy.context_tokens, read.deploy.parallel) == ("auto", 4096, 4)
    assert read.verify.budgets.max_score_drop_points == 2
    assert not read.verify.budgets.HasField("min_tokens_per_second")
    assert not given.train.HasField("epochs")


def test_a_given_zero_is_not_absent():
    given = pipeline()
    given.verify.budgets.max_score_drop_points = 0
    given.train.write_bin = False
    read = Pipeline.from_json(check_pipeline(given))
    assert read.verify.budgets.max_score_drop_points == 0
    assert not read.train.write_bin


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", ""),
        ("name", "1demo"),
        ("name", "Demo"),
        ("name", "d" * 64),
        ("base.model", " "),
        ("train.lora.rank", 0),
        ("train.lora.rank", 513),
        ("train.lora.alpha", 0.0),
        ("train.lora.dropout", 1.0),
        ("train.lora.last_layers", -1),
        ("train.epochs", 0.0),
        ("train.epochs", math.inf),
        ("train.max_steps", -1),
        ("train.learning_rate", -1e-4),
        ("train.learning_rate", math.nan),
        ("train.schedule", "step"),
        ("train.warmup_ratio", 1.5),
        ("train.max_length_tokens", 7),
        ("train.tokens_per_batch", 0),
        ("train.gradient_accumulation", 0),
        ("train.gradient_checkpointing", "maybe"),
        ("train.dtype", "int8"),
        ("train.seed", -1),
        ("train.checkpoint_steps", -1),
        ("train.held_out_evaluations", -1),
        ("train.max_grad_norm", 0.0),
        ("train.loss_band.low", -0.1),
        ("package.gguf_type", "F32"),
        ("package.context_tokens", 127),
        ("package.temperature", -1.0),
        ("deploy.target", "vllm"),
        ("deploy.parallel", 0),
        ("verify.budgets.max_score_drop_points", -1.0),
        ("verify.budgets.min_size_reduction", 1.1),
        ("verify.budgets.min_tokens_per_second", -1.0),
        ("verify.budgets.max_memory_bytes", 0),
    ],
)
def test_a_value_out_of_bounds_is_named(field, value):
    given = pipeline()
    message = given
    *path, last = field.split(".")
    for name in path:
        message = getattr(message, name)
    setattr(message, last, value)
    with pytest.raises(InvalidInput) as raised:
        check_pipeline(given)
    assert raised.value.metadata["field"] == field
    assert field in raised.value.message
    assert raised.value.fix


@pytest.mark.parametrize(("low", "high"), [(0.6, 0.6), (0.9, 0.2), (1.2, None), (None, 0.5)])
def test_the_loss_band_has_a_low_and_a_high_end(low, high):
    given = pipeline()
    if low is not None:
        given.train.loss_band.low = low
    if high is not None:
        given.train.loss_band.high = high
    with pytest.raises(InvalidInput) as raised:
        check_pipeline(given)
    assert raised.value.metadata["field"] == "train.loss_band"


@pytest.mark.parametrize("names", [["Q4_K_X"], ["q4_k_m"], ["Q8_0", "Q8_0"], ["F16"]])
def test_quantizations_are_known_and_named_once(names):
    given = pipeline()
    given.package.quantizations.extend(names)
    with pytest.raises(InvalidInput) as raised:
        check_pipeline(given)
    assert raised.value.metadata["field"] == "package.quantizations"


def test_scores_and_layers_are_checked():
    given = pipeline()
    given.verify.budgets.min_score_percent["tool_call.valid"] = 101
    with pytest.raises(InvalidInput) as raised:
        check_pipeline(given)
    assert raised.value.metadata["field"] == "verify.budgets.min_score_percent.tool_call.valid"
    given = pipeline()
    given.train.lora.target_modules.extend(["q_proj", "q_proj"])
    with pytest.raises(InvalidInput, match="each once"):
        check_pipeline(given)


def test_artifacts_must_be_named_and_of_the_right_kind():
    given = pipeline()
    given.dataset.artifact.Clear()
    with pytest.raises(InvalidInput, match=r"dataset\.artifact: no stored dataset"):
        check_pipeline(given)
    given = pipeline()
    given.dataset.artifact.kind = "ARTIFACT_KIND_SUITE"
    with pytest.raises(InvalidInput, match="is a suite, not a dataset"):
        check_pipeline(given)
    given = pipeline()
    given.verify.suite.digest = "abc"
    with pytest.raises(InvalidInput) as raised:
        check_pipeline(given)
    assert raised.value.metadata["field"] == "verify.suite"


def test_artifacts_must_be_there_and_hold_what_is_needed(tmp_path: Path):
    store = ArtifactStore(FolderBackend(tmp_path / "store"))
    text = tmp_path / "text"
    text.write_text("{}\n")

    def read(dataset_path: str, suite_path: str) -> Pipeline:
        given = pipeline()
        for ref, kind, path in (
            (given.dataset.artifact, "dataset", dataset_path),
            (given.verify.suite, "suite", suite_path),
        ):
            made = store.put(kind, kind, {path: text}, link=False)
            ref.digest, ref.size_bytes = made.digest, made.size_bytes
        return Pipeline.from_json(check_pipeline(given))

    check_artifacts(store, read("train/a.jsonl", "suite.yaml"))
    with pytest.raises(InvalidInput, match=r"train/\*\.jsonl"):
        check_artifacts(store, read("eval/a.jsonl", "suite.yaml"))
    with pytest.raises(InvalidInput, match=r"suite\.yaml"):
        check_artifacts(store, read("train/a.jsonl", "prompts.jsonl"))
    with pytest.raises(NotFound):
        check_artifacts(store, Pipeline.from_json(check_pipeline(pipeline())))


def test_a_model_is_promoted_once_it_passed_unless_the_file_says_otherwise():
    given = pipeline()
    assert Pipeline.from_json(check_pipeline(given)).deploy.promote == "passed"
    given.deploy.promote = "never"
    assert Pipeline.from_json(check_pipeline(given)).deploy.promote == "never"
    given.deploy.promote = "sometimes"
    with pytest.raises(InvalidInput, match="passed, always, never") as raised:
        check_pipeline(given)
    assert raised.value.metadata["field"] == "deploy.promote"


def test_a_pipeline_needs_no_suite_but_one_that_is_named_must_be_stored():
    given = pipeline()
    given.verify.ClearField("suite")
    assert Pipeline.from_json(check_pipeline(given)).suite is None
    given.verify.suite_file = "suite.yaml"
    with pytest.raises(InvalidInput, match="no stored suite is named"):
        check_pipeline(given)
