from __future__ import annotations

from pathlib import Path

import pytest
from web4.lora.v1 import deployer_pb2
from web4lora.client.evaluation import EvalModel, budgets_of, evaluate_request, report_name, suite_file
from web4lora_chassis.errors import InvalidInput, NotFound

EXAMPLES = Path(__file__).parents[4] / "examples" / "web4"


def test_models_are_named_as_people_do() -> None:
    assert EvalModel.of("web4-demo:v1a2b3c4d") == EvalModel("web4-demo:v1a2b3c4d")
    assert EvalModel.of("m:latest@https://host:1/v1") == EvalModel("m:latest", "https://host:1/v1")
    assert report_name(EvalModel("Qwen/Qwen2.5 Coder:7b")) == "qwen-qwen2-5-coder-7b-eval"
    assert report_name(EvalModel("模型")) == "model-eval"
    assert len(report_name(EvalModel("x" * 200))) <= 80


def test_keys_go_into_the_secrets_and_nowhere_else() -> None:
    model = EvalModel("m", "http://h/v1", api_key="sk-1", context_tokens=2048, parallel=2)
    others = [EvalModel("demo"), EvalModel("n", "http://i/v1", api_key="sk-2")]
    request = evaluate_request(model, deployer_pb2.EvaluateSpec(name="m-eval"), others, "r")
    assert dict(request.secrets) == {"model": "sk-1", "against-1": "sk-2"}
    spec = request.spec.evaluate
    assert "sk-" not in str(spec) + repr(model)
    assert (spec.model.endpoint, spec.model.model, spec.model.secret) == ("http://h/v1", "m", "model")
    assert (spec.model.context_tokens, spec.model.parallel) == (2048, 2)
    assert [each.deployment for each in spec.against] == ["demo", ""]
    assert [each.secret for each in spec.against] == ["", "against-1"]


def test_limits_come_from_the_pipeline_and_one_by_one() -> None:
    budgets = budgets_of(["min_score_percent.tool_call.valid=90", "max_memory_bytes=3 GB"], None)
    assert dict(budgets.min_score_percent) == {"tool_call.valid": 90}
    assert budgets.max_memory_bytes == 3_000_000_000
    assert not budgets.HasField("max_score_drop_points")
    both = budgets_of(["min_score_percent.style.all_rules=1"], EXAMPLES / "demo.yaml")
    assert both.min_score_percent["style.all_rules"] == 1
    assert both.min_score_percent["tool_call.valid"] == 95
    assert both.max_score_drop_points == 2


@pytest.mark.parametrize(
    ("limit", "problem"),
    [
        ("min_speed=1", "--limit min_speed=1: min_speed is not a key here"),
        ("min_tokens_per_second=fast", "needs a number"),
        ("min_tokens_per_second", "write KEY=VALUE"),
        ("min_size_reduction=[1", "is not a value"),
    ],
)
def test_a_limit_that_is_none(limit: str, problem: str) -> None:
    with pytest.raises(InvalidInput, match="--limit") as caught:
        budgets_of([limit], None)
    assert problem in caught.value.message


def test_the_suite_is_the_one_given_the_pipelines_or_the_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert suite_file(tmp_path / "mine.yaml", None) == tmp_path / "mine.yaml"
    assert suite_file(None, EXAMPLES / "demo.yaml").name == "suite.yaml"
    monkeypatch.chdir(EXAMPLES)
    assert suite_file(None, None) == EXAMPLES / "suite.yaml"
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NotFound, match=r"suite\.yaml here or above"):
        suite_file(None, None)
