"""Facts of a test as a real run yields them, from the sample's own answers, some of them broken."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest
from web4lora_chassis.graders import GRADERS, grade_end
from web4lora_chassis.graders.check import Check
from web4lora_deployer.report import Measured, ReportFacts, ServedModel
from web4lora_deployer.suite import Answer, Budgets, Latency, Reply, Suite, SuiteResult, load_suite

RUN = {
    "run_id": "run_2026-11-22_1",
    "name": "web4-demo",
    "base": {"source": "smollm2-135m-instruct", "digest": "9f2c" * 16, "size_bytes": 271_000_000},
    "dataset": {
        "train_rows": 840,
        "eval_rows": 100,
        "rows_by_core": {"tool": 420, "style": 210, "guardrail": 210},
        "tokens": 107_648,
        "trained_tokens": 34_610,
    },
    "train": {"final_loss": 0.314, "held_out_loss": 0.29, "steps": 226, "tokens_per_second": 602.4},
    "package": {
        "reference": {"type": "F16", "size_bytes": 271_000_000},
        "quantized": [
            {"type": "Q4_K_M", "size_bytes": 105_400_000, "size_reduction": 0.611},
            {"type": "Q8_0", "size_bytes": 144_800_000, "size_reduction": 0.466},
        ],
        "llama_cpp_version": "b1-0c1e570",
        "merge": {
            "tensors": 272,
            "seconds": 2.5,
            "changed_at": "changed at: quantize Q4_K_M, 1 of 8 answers, all near ties",
            "gates": [
                {
                    "stage": "merge",
                    "name": "base plus adapter",
                    "measured": "off by 0.0002",
                    "limit": "rounding to F16",
                    "passed": True,
                },
                {
                    "stage": "quantize Q4_K_M",
                    "name": "same next tokens",
                    "measured": "1 of 8 answers change, all near ties; divergence 0.01, at most 0.2",
                    "limit": "none",
                    "passed": True,
                    "answers": 8,
                    "changed": [
                        {
                            "id": "tools.jsonl:7",
                            "token": 3,
                            "before": "|",
                            "after": "`x`",
                            "before_probability": 0.4,
                            "after_probability": 0.3,
                            "kl": 0.2,
                            "near_tie": True,
                        }
                    ],
                },
            ],
        },
    },
    "stages": {"prepare": {"seconds": 3.2}, "train": {"seconds": 221}, "deploy": {"seconds": 4}},
}


@pytest.fixture(scope="session")
def suite() -> Suite:
    return load_suite(Path(__file__).parents[4] / "examples" / "web4")


def answers(suite: Suite, spoil: dict[str, str]) -> tuple[Answer, ...]:
    """Answer every prompt as wanted, but for those in `spoil`."""
    made = []
    for prompt in suite.prompts:
        text = spoil.get(prompt.id, prompt.expected)
        core = suite.core(prompt.core)
        checks = GRADERS[core.grader].grade(text, prompt.check, core.rules)
        reply = Reply(text, "stop", 60, 30, 0.05, 0.3, 120.0, True)
        made.append(Answer(prompt.id, prompt.core, reply, (*checks, grade_end(text, "stop"))))
    return tuple(made)


@pytest.fixture
def facts(suite: Suite) -> ReportFacts:
    ids = {core.name: [p.id for p in suite.prompts if p.core == core.name] for core in suite.cores}
    refusals = {p.id: "<REFUSAL> No | `x` <b>" for p in suite.prompts if p.check == {"refuse": False}}
    deployed = {
        ids["tool"][4]: "````\nno | call\n````",
        ids["style"][2]: "```ts\nclass A {}\n```",
        **refusals,
    }
    odd = Answer("unicode-1", "robustness", Reply("x"), (Check("robustness.unicode", False, "is | broken"),))
    latency = (
        Latency(1, 8, 0.061, 0.12, 131.2, 98.0, True),
        Latency(4, 8, 0.21, 0.4, 52.1, 160.0, True),
    )
    return ReportFacts(
        name="web4-demo",
        suite=suite,
        deployed=Measured(
            ServedModel(
                "Q4_K_M",
                "web4-demo:v1a2b3c4d",
                "1a2b3c4d" * 8,
                105_400_000,
                "llama-server",
                "http://127.0.0.1:8480/v1",
                "b1-0c1e570",
                4096,
                4,
            ),
            SuiteResult(answers(suite, deployed), (odd,), latency, 312_000_000, 52.3, 4, ("no moon",)),
        ),
        reference=Measured(
            ServedModel("16 bit", digest="d" * 64, size_bytes=271_000_000),
            SuiteResult(answers(suite, refusals), seconds=58.0, parallel=4),
        ),
        budgets=Budgets(min_score_percent={"tool_call.valid": 90}, min_size_reduction=0.6),
        run=RUN,
        measured_at=datetime(2026, 11, 22, 18, 0, tzinfo=UTC),
    )
