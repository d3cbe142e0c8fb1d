"""eval.json: the report for programs. Its form is described in eval.schema.json beside this file."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from datetime import datetime
from importlib.metadata import version
from typing import Any

from web4lora_deployer.report.facts import Comparison, Measured, ReportFacts, VerifySummary
from web4lora_deployer.report.throughput import throughput_of
from web4lora_deployer.suite import Answer, Score, score_details

SCHEMA = "web4lora.eval/2"
_PACKAGES = ("web4lora-deployer", "httpx2", "tree-sitter", "tree-sitter-typescript")


def eval_json(facts: ReportFacts, summary: VerifySummary, measured_at: datetime) -> dict[str, Any]:
    """Return the report as JSON data."""
    prompts = {prompt.id: prompt for prompt in facts.suite.prompts}
    answers: list[dict[str, Any]] = [
        {"id": prompt.id, "core": prompt.core, "question": prompt.question, "wanted": prompt.expected}
        for prompt in prompts.values()
    ]
    for role, measured in facts.models.items():
        constrained = {answer.id: answer for answer in measured.result.constrained}
        for index, (row, answer) in enumerate(zip(answers, measured.result.answers, strict=True)):
            row[role] = _answer(answer)
            if facts.suite.repeats > 1:
                row[role]["repeats"] = _repeats([each[index] for each in measured.result.passes])
            if answer.id in constrained:
                row[role]["constrained"] = _answer(constrained[answer.id])
    speeds = {role: throughput_of(facts, measured) for role, measured in facts.models.items()}
    return {
        "schema": SCHEMA,
        "name": facts.name,
        "measured_at": measured_at.isoformat(timespec="seconds"),
        "state": summary.state.lower(),
        "passed": summary.passed,
        "verdict": summary.verdict,
        "advice": list(summary.advice),
        "run_id": facts.run.get("run_id"),
        "suite": {
            "name": facts.suite.name,
            "digest": facts.suite.digest,
            "seed": facts.suite.seed,
            "prompts": len(facts.suite.prompts),
            "repeats": facts.suite.repeats,
        },
        "models": {role: _model(measured) for role, measured in facts.models.items()},
        "scores": [_score(score) for score in summary.scores],
        "details": [_score(score) for score in details(facts)],
        "gates": [
            asdict(gate) | {"state": gate.state.lower(), "passed": gate.passed} for gate in summary.gates
        ],
        "time_to_first_token_seconds": summary.time_to_first_token_seconds or None,
        "tokens_per_second": summary.tokens_per_second or None,
        "memory_bytes": summary.memory_bytes or None,
        "size_reduction": facts.size_reduction,
        "latency": [asdict(latency) for latency in facts.deployed.result.latency],
        "throughput": {role: speed.to_json() for role, speed in speeds.items() if speed},
        "llama_bench": asdict(facts.speed_limit) if facts.speed_limit else None,
        "comparisons": [_comparison(facts, comparison) for comparison in facts.comparisons],
        "robustness": [{"id": a.id} | _answer(a) for a in facts.deployed.result.robustness],
        "answers": answers,
        "notes": list(facts.deployed.result.notes),
        "versions": versions(),
    }


def details(facts: ReportFacts) -> Iterable[Score]:
    """Return the scores that only explain others, such as each rule of the house style."""
    reference = facts.reference.result if facts.reference else None
    base = facts.base.result if facts.base else None
    for core in facts.suite.cores:
        yield from score_details(facts.suite, core.name, facts.deployed.result, reference, base)


def versions() -> dict[str, str]:
    """Return the versions of what measured."""
    return {name: version(name) for name in _PACKAGES}


def _score(score: Score) -> dict[str, Any]:
    return asdict(score)


def _model(measured: Measured) -> dict[str, Any]:
    known = {key: value for key, value in asdict(measured.model).items() if value}
    result = measured.result
    return known | {
        "seconds": round(result.seconds, 3),
        "requests_at_once": result.parallel,
        "output_tokens": result.output_tokens,
        "retries": result.retries,
    }


def _comparison(facts: ReportFacts, comparison: Comparison) -> dict[str, Any]:
    speed = throughput_of(facts, comparison.other)
    return {
        "model": _model(comparison.other),
        "same_file": comparison.same_file,
        "same_answers": len(facts.suite.prompts) - len(comparison.differences),
        "differences": [asdict(difference) for difference in comparison.differences],
        "throughput": speed.to_json() if speed else None,
    }


def _repeats(answers: Sequence[Answer]) -> dict[str, Any]:
    """Tell how stable a prompt's answers are."""
    names = [check.name for check in answers[0].checks]
    passed = [{check.name for check in answer.checks if check.passed} for answer in answers]
    return {
        "asked": len(answers),
        "different_texts": len({answer.reply.text for answer in answers}),
        "passed": {name: sum(name in each for each in passed) for name in names},
    }


def _answer(answer: Answer) -> dict[str, Any]:
    reply = answer.reply
    return {
        "text": reply.text,
        "finish_reason": reply.finish_reason,
        "prompt_tokens": reply.prompt_tokens,
        "output_tokens": reply.output_tokens,
        "first_token_seconds": round(reply.first_token_seconds, 4),
        "seconds": round(reply.seconds, 4),
        "tokens_per_second": round(reply.tokens_per_second, 2),
        "checks": {check.name: check.passed for check in answer.checks},
        "reasons": {check.name: check.reason for check in answer.checks if not check.passed},
    }
