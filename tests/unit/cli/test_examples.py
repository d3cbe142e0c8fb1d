from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
from web4.lora.v1 import gateway_pb2
from web4lora.client.upload import named_files
from web4lora.pipeline_file import read_pipeline
from web4lora_deployer.suite.budgets import Budgets, Measurements, judge

EXAMPLES = Path(__file__).parents[3] / "examples" / "web4"


@pytest.mark.parametrize("name", ["demo", "qwen2.5-coder-7b", "deepseek-coder-6.7b"])
def test_every_example_is_a_good_pipeline(name: str) -> None:
    file = read_pipeline(EXAMPLES / f"{name}.yaml")
    assert file.train_files
    assert file.eval_files
    assert file.suite_file
    assert all((file.suite_file.parent / named).is_file() for named in named_files(file.suite_file))


@pytest.mark.parametrize("name", ["demo", "qwen2.5-coder-7b", "deepseek-coder-6.7b"])
def test_an_example_leaves_the_runtime_to_the_deployers_setting(name: str) -> None:
    assert not read_pipeline(EXAMPLES / f"{name}.yaml").pipeline.deploy.HasField("target")


@pytest.mark.parametrize("name", ["qwen2.5-coder-7b", "deepseek-coder-6.7b"])
def test_the_missions_budgets(name: str) -> None:
    pipeline = read_pipeline(EXAMPLES / f"{name}.yaml").pipeline
    budgets = pipeline.verify.budgets
    assert (pipeline.train.loss_band.low, pipeline.train.loss_band.high) == (0.6, 1.0)
    assert (budgets.max_score_drop_points, budgets.min_size_reduction) == (2, 0.68)
    assert (budgets.min_tokens_per_second, budgets.max_memory_bytes) == (1, 26_000_000_000)


@dataclass(frozen=True)
class Shape:
    layers: int
    width: int
    keys: int
    inner: int
    vocabulary: int


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("qwen2.5-coder-7b", Shape(28, 3584, 512, 18944, 152064)),
        ("deepseek-coder-6.7b", Shape(32, 4096, 4096, 11008, 32256)),
    ],
)
def test_a_good_7b_keeps_the_size_budget(name: str, shape: Shape) -> None:
    """Worked out of the model's shapes and of which tensors llama-quantize gives 6.5625 bits in Q4_K_M."""
    pipeline = read_pipeline(EXAMPLES / f"{name}.yaml").pipeline
    assert list(pipeline.package.quantizations) == ["Q4_K_M"]
    eighth = shape.layers // 8
    larger_layers = sum(
        layer < eighth or layer >= 7 * shape.layers // 8 or (layer - eighth) % 3 == 2
        for layer in range(shape.layers)
    )
    attention = 2 * shape.width**2 + shape.width * shape.keys
    values, feed = shape.width * shape.keys, shape.width * shape.inner
    table = shape.vocabulary * shape.width
    weights = shape.layers * (attention + values + 3 * feed) + 2 * table
    larger = larger_layers * (values + feed) + table
    reduction = 1 - (4.5 * (weights - larger) + 6.5625 * larger) / (16 * weights)
    assert reduction == pytest.approx(0.695, abs=0.003)
    wanted = Budgets(
        max_score_drop_points=None, min_size_reduction=pipeline.verify.budgets.min_size_reduction
    )
    (gate,) = judge([], Measurements(reduction, None, None), wanted)
    assert gate.passed, gate


def test_the_demo_explains_every_key() -> None:
    text = (EXAMPLES / "demo.yaml").read_text("utf-8")

    def missing(message: object, skip: tuple[str, ...]) -> list[str]:
        found = []
        for field in message.fields:  # type: ignore[attr-defined]
            if field.name in skip:
                continue
            if f"{field.name}:" not in text:
                found.append(field.full_name)
            if field.message_type is not None and not field.message_type.GetOptions().map_entry:
                found += missing(field.message_type, skip)
        return found

    assert missing(gateway_pb2.Pipeline.DESCRIPTOR, ("artifact", "suite")) == []
