from __future__ import annotations

from pathlib import Path

import pytest
from web4.lora.v1 import gateway_pb2
from web4lora.pipeline_file import read_pipeline
from web4lora.upload import named_files

EXAMPLES = Path(__file__).parents[3] / "examples" / "web4"


@pytest.mark.parametrize("name", ["demo", "qwen2.5-coder-7b", "deepseek-coder-6.7b"])
def test_every_example_is_a_good_pipeline(name: str) -> None:
    file = read_pipeline(EXAMPLES / f"{name}.yaml")
    assert file.train_files
    assert file.eval_files
    assert file.suite_file
    assert all((file.suite_file.parent / named).is_file() for named in named_files(file.suite_file))


@pytest.mark.parametrize("name", ["qwen2.5-coder-7b", "deepseek-coder-6.7b"])
def test_the_missions_budgets(name: str) -> None:
    pipeline = read_pipeline(EXAMPLES / f"{name}.yaml").pipeline
    budgets = pipeline.verify.budgets
    assert (pipeline.train.loss_band.low, pipeline.train.loss_band.high) == (0.6, 1.0)
    assert (budgets.max_score_drop_points, budgets.min_size_reduction) == (2, 0.75)
    assert (budgets.min_tokens_per_second, budgets.max_memory_bytes) == (1, 26_000_000_000)


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
