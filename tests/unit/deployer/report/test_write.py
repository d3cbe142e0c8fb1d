from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from PIL import Image
from web4lora_deployer.report import ReportFacts, write_reports
from web4lora_deployer.report.eval_json import eval_json
from web4lora_deployer.report.facts import summarize
from web4lora_deployer.report.markdown import eval_log
from web4lora_deployer.suite import Budgets


def test_all_files_and_the_summary(tmp_path: Path, facts: ReportFacts) -> None:
    summary = write_reports(tmp_path / "new" / "folder", facts)
    names = ["eval_log.md", "eval.json", "drawio_diagram.png", "scores.png", "latency.png"]
    assert [path.name for path in summary.files] == names
    assert all(path.stat().st_size > 500 for path in summary.files)
    for path in summary.files[2:]:
        with Image.open(path) as picture:
            picture.verify()
    assert (summary.time_to_first_token_seconds, summary.tokens_per_second) == (0.061, 131.2)
    assert summary.memory_bytes == 312_000_000
    assert not summary.passed
    scores = {score.name: score for score in summary.scores}
    assert list(scores) == list(facts.suite.score_names)
    assert (scores["tool_call.valid"].deployed_percent, scores["tool_call.valid"].drop_points) == (97.5, 2.5)
    assert (scores["guardrail.helps"].reference_percent, scores["guardrail.helps"].drop_points) == (0, 0)
    assert [sample.core for sample in summary.samples] == ["tool", "style", "guardrail"]
    assert [sample.passed for sample in summary.samples] == [True, True, False]
    assert summary.samples[0].prompt == facts.suite.prompts[0].question


def test_eval_json_is_as_its_schema_says(tmp_path: Path, facts: ReportFacts) -> None:
    schema = json.loads(files("web4lora_deployer.report").joinpath("eval.schema.json").read_text())
    for number, each in enumerate((facts, replace(facts, reference=None, run={}, budgets=Budgets()))):
        write_reports(tmp_path / str(number), each)
        data = json.loads((tmp_path / str(number) / "eval.json").read_text(encoding="utf-8"))
        jsonschema.validate(data, schema)
        assert set(data) <= set(schema["properties"]), "a field that the schema doesn't describe"
        assert data["suite"]["digest"] == facts.suite.digest
        assert len(data["answers"]) == 100
    assert "reference" not in data["answers"][0]


def log(facts: ReportFacts) -> str:
    return eval_log(facts, summarize(facts), datetime(2026, 11, 22, tzinfo=UTC), ["scores.png"])


def test_the_log_reads_from_the_verdict_down(facts: ReportFacts) -> None:
    text = log(facts)
    assert text.splitlines()[0].startswith("# ❌ web4-demo: usable, 4 of 9 limits missed")
    heads = [line for line in text.splitlines() if line.startswith("## ")]
    assert heads == [
        "## Tool calls: 40 prompts", "## House style (TypeScript): 20 prompts", "## Guardrails: 40 prompts",
        "## All answers", "## Speed and memory", "## Limits", "## Failing examples", "## How it was measured",
    ]  # fmt: skip
    assert "| tool call, valid | 40 | 100 % | 97.5 % | 87 to 100 % | 2.5 (" in text
    assert "40 prompts can't settle 2 points" in text
    assert "![scores](scores.png)" in text
    assert "Left out: no moon." in text
    assert "run_2026-11-22_1" in text


def test_tables_stay_whole_and_answers_stay_text(facts: ReportFacts) -> None:
    text = log(facts)
    width = 0
    for line in text.splitlines():
        if line.startswith("| "):
            cells = line.replace("\\|", "").count("|")
            assert width in (0, cells), line
            width = cells
        else:
            width = 0
    outside = "".join(text.split("```text")[0::2])
    assert "<REFUSAL>" not in outside, "GitHub would swallow it as HTML"
    assert "\n`````text\n````\nno | call\n````\n`````\n" in text
    assert text.count("<details>") == text.count("</details>") == 3
    assert "… and 12 more, all in `eval.json`." in text


def test_lost_answers_come_first(facts: ReportFacts) -> None:
    text = log(facts)
    tool = text[text.index("<summary>Tool calls") :]
    assert tool.split("**")[2].startswith(", which 16 bit passed:")


def test_a_passed_test_without_reference_run_or_limits(facts: ReportFacts) -> None:
    bare = replace(facts, reference=None, run={}, budgets=Budgets())
    text = log(bare)
    assert text.startswith("# ✅ web4-demo: measured, with no limits to keep\n")
    assert "None were set." in text
    assert "16 bit |" not in text


@pytest.fixture
def before(facts: ReportFacts) -> Any:
    return json.loads(json.dumps(eval_json(facts, summarize(facts), datetime(2026, 11, 22, tzinfo=UTC))))


def test_what_changed_since_last_time(facts: ReportFacts, before: Any) -> None:
    before["scores"][0]["deployed_percent"] = 100.0
    before["tokens_per_second"] = 164.0
    text = log(replace(facts, previous=before))
    assert "Against web4-demo:v1a2b3c4d, measured 2026-11-22.\n" in text
    assert "| tool call, valid | 100 % | 97.5 % | −2.5 points |" in text
    assert "| tokens/s | 164.0 | 131.2 | −20.0 % |" in text
    assert "8 figures as before." in text


def test_nothing_changed_another_suite_or_another_form(facts: ReportFacts, before: Any) -> None:
    assert "Nothing moved." in log(replace(facts, previous=before))
    before["suite"]["digest"] = "0" * 64
    assert "The suite itself has changed" in log(replace(facts, previous=before))
    other = log(replace(facts, previous={"schema": "web4lora.eval/0"}))
    assert "The last report has another form (web4lora.eval/0): not compared." in other
