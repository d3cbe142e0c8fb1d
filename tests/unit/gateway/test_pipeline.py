from __future__ import annotations

import math
from pathlib import Path

import pytest
from web4.lora.v1 import gateway_pb2
from web4lora_chassis.artifacts import ArtifactStore
from web4lora_chassis.artifacts.folder import FolderBackend
from web4lora_chassis.errors import InvalidInput, NotFound
from web4lora_gateway.pipeline import Pipeline, artifact_problems, check_pipeline


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
    assert (train.warmup_ratio, train.gradient_accumulation) == (0.03, 1)
    assert not train.HasField("tokens_per_batch")
    assert (train.gradient_checkpointing, train.dtype, train.seed) == ("auto", "auto", 17)
    assert (train.checkpoint_steps, train.held_out_evaluations, train.write_bin) == (0, 4, True)
    assert (train.loss_band.low, train.loss_band.high, train.max_grad_norm) == (0.6, 1.0, 1.0)
    assert read.quantizations == ("Q4_K_M",)
    assert (read.package.gguf_type, read.package.temperature) == ("auto", 0)
    assert read.deploy.parallel == 4
    assert read.verify.budgets.max_score_drop_points == 2
    assert not read.verify.budgets.HasField("min_tokens_per_second")
    assert not given.train.HasField("epochs")


def test_a_default_that_depends_on_model_or_machine_stays_absent():
    read = Pipeline.from_json(check_pipeline(pipeline()))
    assert not read.train.HasField("tokens_per_batch"), "the trainer knows its device"
    assert not read.train.HasField("max_length_tokens"), "the trainer knows the base model"
    assert not read.package.HasField("importance_matrix_chunks"), "the packager knows the data"
    assert not read.package.HasField("context_tokens"), "the packager knows the model's own"
    assert not read.deploy.HasField("context_tokens"), "the deployer asks the packager's advice"
    assert not read.deploy.HasField("target"), "the deployer has a setting for it"


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
        ("name", "demo-"),
        ("name", "two--dashes"),
        ("name", "my_model"),
        ("base.model", " "),
        ("train.lora.rank", 0),
        ("train.lora.rank", 513),
        ("train.lora.alpha", 0.0),
        ("train.lora.dropout", 0.97),
        ("train.lora.last_layers", -1),
        ("train.epochs", 0.0),
        ("train.epochs", 1e-4),
        ("train.epochs", math.inf),
        ("train.max_steps", -1),
        ("train.max_steps", 20_000_000),
        ("train.learning_rate", -1e-4),
        ("train.learning_rate", 1e-9),
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
        ("train.checkpoint_steps", 20_000_000),
        ("train.held_out_evaluations", -1),
        ("train.max_grad_norm", 0.0),
        ("train.loss_band.low", -0.1),
        ("package.gguf_type", "F32"),
        ("package.context_tokens", 127),
        ("package.temperature", -1.0),
        ("deploy.target", "vllm"),
        ("deploy.parallel", 0),
        ("verify.budgets.max_score_drop_points", -1.0),
        ("verify.budgets.min_size_reduction", 1.0),
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


@pytest.mark.parametrize(
    ("types", "wanted", "possible"),
    [
        ([], 0.75, False),  # Q4_K_M
        (["Q4_K_M", "Q3_K_M"], 0.75, False),  # the first one is deployed
        (["Q3_K_M", "Q4_K_M"], 0.75, True),
        (["Q4_K_M"], 0.71, True),
        (["Q8_0"], 0.47, False),
        (["Q8_0"], 0.46, True),
        (["IQ1_S"], 0.95, False),
    ],
)
def test_a_file_smaller_than_its_type_can_be_is_refused_at_once(types, wanted, possible):
    given = pipeline()
    given.package.quantizations.extend(types)
    given.package.importance_matrix = True
    given.verify.budgets.min_size_reduction = wanted
    if possible:
        check_pipeline(given)
        return
    with pytest.raises(InvalidInput, match="bits a weight") as raised:
        check_pipeline(given)
    assert raised.value.metadata["field"] == "verify.budgets.min_size_reduction"
    assert raised.value.fix.startswith("Ask for less")


@pytest.mark.parametrize(
    "names",
    [["Q4_K_X"], ["q4_k_m"], ["Q8_0", "Q8_0"], ["F16"], ["Q3_K"], ["Q4_K"], ["Q5_K"], ["IQ2_XXS"], [""]],
)
def test_quantizations_are_known_and_named_once(names):
    given = pipeline()
    given.package.quantizations.extend(names)
    with pytest.raises(InvalidInput) as raised:
        check_pipeline(given)
    assert raised.value.metadata["field"] == "package.quantizations"


def test_a_type_that_needs_a_matrix_is_taken_with_one_and_not_first_for_an_adapter():
    given = pipeline()
    given.package.quantizations.extend(["IQ2_XXS", "Q8_0"])
    given.package.importance_matrix = True
    assert Pipeline.from_json(check_pipeline(given)).quantizations == ("IQ2_XXS", "Q8_0")
    given.package.adapter_gguf = True
    with pytest.raises(InvalidInput, match="Put another type first") as raised:
        check_pipeline(given)
    assert raised.value.metadata["field"] == "package.adapter_gguf"


def test_all_that_is_wrong_is_listed():
    given = pipeline()
    given.name, given.train.lora.rank, given.deploy.target = "Demo", 0, "vllm"
    given.package.quantizations.extend(["Q8_0", "Q4_K"])
    with pytest.raises(InvalidInput) as raised:
        check_pipeline(given)
    fields = ["name", "train.lora.rank", "package.quantizations", "deploy.target"]
    assert raised.value.metadata["field"].splitlines() == fields
    lines = raised.value.message.splitlines()
    assert [line.partition(": ")[0] for line in lines] == fields
    assert "did you mean Q4_K_M?" in lines[2]


def test_a_limit_that_nothing_would_be_measured_for_is_refused():
    given = pipeline()
    given.verify.ClearField("suite")
    given.verify.budgets.min_score_percent["tool_call.valid"] = 95
    given.verify.budgets.min_tokens_per_second = 1
    with pytest.raises(InvalidInput, match="no suite is named") as raised:
        check_pipeline(given)
    assert raised.value.metadata["field"].splitlines() == [
        "verify.budgets.min_score_percent.tool_call.valid",
        "verify.budgets.min_tokens_per_second",
    ]


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
    for name in ("1abc", "q proj", "", "q" * 101):
        given = pipeline()
        given.train.lora.target_modules.append(name)
        with pytest.raises(InvalidInput, match="not the name of a layer"):
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

    def wrong(dataset_path: str, suite_path: str) -> list[str]:
        return [problem.text for problem in artifact_problems(store, read(dataset_path, suite_path))]

    assert wrong("train/a.jsonl", "suite.yaml") == []
    (no_rows,) = wrong("eval/a.jsonl", "suite.yaml")
    assert "train/*.jsonl" in no_rows
    (no_suite,) = wrong("train/a.jsonl", "prompts.jsonl")
    assert "suite.yaml" in no_suite
    assert len(wrong("eval/a.jsonl", "prompts.jsonl")) == 2
    with pytest.raises(NotFound):
        list(artifact_problems(store, Pipeline.from_json(check_pipeline(pipeline()))))


def test_proof_without_tests_is_refused():
    given = pipeline()
    given.deploy.promote = "proven"
    assert check_pipeline(given)["deploy"]["promote"] == "proven"
    given.verify.ClearField("suite")
    with pytest.raises(InvalidInput, match="nothing is proven without tests") as caught:
        check_pipeline(given)
    assert caught.value.metadata["field"] == "deploy.promote"


def test_a_model_is_promoted_once_it_passed_unless_the_file_says_otherwise():
    given = pipeline()
    assert Pipeline.from_json(check_pipeline(given)).deploy.promote == "passed"
    given.deploy.promote = "never"
    assert Pipeline.from_json(check_pipeline(given)).deploy.promote == "never"
    given.deploy.promote = "sometimes"
    with pytest.raises(InvalidInput, match="passed, proven, always, never") as raised:
        check_pipeline(given)
    assert raised.value.metadata["field"] == "deploy.promote"


def test_a_pipeline_needs_no_suite_but_one_that_is_named_must_be_stored():
    given = pipeline()
    given.verify.ClearField("suite")
    assert Pipeline.from_json(check_pipeline(given)).suite is None
    given.verify.suite_file = "suite.yaml"
    with pytest.raises(InvalidInput, match="no stored suite is named"):
        check_pipeline(given)
