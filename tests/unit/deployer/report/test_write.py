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
from web4lora_chassis.graders.tool_call import ANY_CALL, grade_constrained
from web4lora_deployer.report import Comparison, Difference, ReportFacts, SpeedLimit, write_reports
from web4lora_deployer.report.eval_json import eval_json
from web4lora_deployer.report.facts import summarize
from web4lora_deployer.report.markdown import eval_log
from web4lora_deployer.suite import Answer, Budgets, Reply, State

from tests.unit.deployer.report.conftest import answers


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
    assert (summary.state, summary.passed) == (State.UNDECIDED, False)
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
    lines = text.splitlines()
    assert lines[0] == "# 🟡 web4-demo: undecided: no limit missed, 1 of 9 kept, 8 undecided"
    screen = {line.split("|")[1].strip(): line.split("|")[2] for line in lines[4:9] if line.startswith("| ")}
    assert list(screen) == ["", ":--", "✅ good", "🟡 undecided", "what to do"]
    assert screen["✅ good"].strip() == "size reduction 61.1 % smaller"
    assert "tool call, valid (drop) 2.5 points; " in screen["🟡 undecided"]
    assert "about 62 prompts of its kind for tool call, valid, up to about 3,012 for " in screen["what to do"]
    assert "Low, though no limit is set for it: helps with the rest 0 %" in screen["what to do"]
    assert "`deploy.promote: passed` takes an undecided model" in screen["what to do"]
    heads = [line for line in text.splitlines() if line.startswith("## ")]
    assert heads == [
        "## Tool calls: 40 prompts", "## House style (TypeScript): 20 prompts", "## Guardrails: 40 prompts",
        "## All answers", "## Speed and memory", "## From adapter to file", "## Limits",
        "## Failing examples", "## How it was measured",
    ]  # fmt: skip
    assert "| tool call, valid | 40 | 100 % | 97.5 % | 87 to 100 % | 2.5 (" in text
    assert "40 prompts can't tell; about 3,012 that go the same way would" in text
    assert "![scores](scores.png)" in text
    assert "Left out: no moon." in text
    assert "run_2026-11-22_1" in text


def test_the_first_screen_names_what_was_missed_and_what_to_do(facts: ReportFacts) -> None:
    floors = {"guardrail.helps": 50.0, "style.all_rules": 50.0, "answers.ends": 96.0}
    missed = replace(facts, budgets=Budgets(None, 0.7, 500, 1, floors))
    summary = summarize(missed)
    assert summary.state is State.FAILED
    text = log(missed)
    assert text.startswith("# ❌ web4-demo: failed: 4 of 6 limits missed, 2 kept\n")
    screen = text.partition("## ")[0]
    assert "| ❌ not good | helps with the rest 0.0 %; size reduction 61.1 % smaller; " in screen
    for words in (
        "Training has not brought it there (helps with the rest)", "name a smaller type first",
        "For more tokens/s", "lower `deploy.context_tokens`",
    ):  # fmt: skip
        assert words in screen
    # What 16 bit could and the deployed model can't is no matter of training.
    lost = replace(facts, deployed=facts.reference, reference=facts.deployed, budgets=Budgets(30.0))
    assert "Quantizing" not in log(lost)
    broken = {prompt.id: "no" for prompt in facts.suite.prompts}
    worse = replace(
        facts.deployed, result=replace(facts.deployed.result, answers=answers(facts.suite, broken))
    )
    advice = summarize(replace(facts, deployed=worse)).advice
    assert advice[0].startswith("Quantizing costs too much here (tool call, valid; tool call, right tool; ")
    beside = summarize(replace(facts, deployed=worse, with_diagram=False)).advice
    assert beside[0].startswith("16 bit is better at this")


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
    bare = replace(facts, reference=None, run={}, budgets=Budgets(max_score_drop_points=None))
    text = log(bare)
    assert text.startswith("# ✅ web4-demo: measured, with no limits to keep\n")
    assert "drawio_diagram.png" in text
    assert "drawio_diagram.png" not in log(replace(bare, with_diagram=False))
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


LIMIT = SpeedLimit(60, 30, 80.0, 400.0, 2)


def compared(facts: ReportFacts, same_file: bool | None, *differences: Difference) -> ReportFacts:
    model = replace(facts.deployed.model, label="other", target="ollama")
    other = replace(facts.deployed, model=model)
    return replace(facts, reference=other, comparisons=(Comparison(other, same_file, differences),))


def test_the_share_of_llama_bench(facts: ReportFacts) -> None:
    assert "## Throughput" not in log(facts)
    text = log(replace(facts, speed_limit=LIMIT))
    # 100 prompts of 60 + 30 tokens in 52.3 s.
    assert "| Q4_K_M (llama-server) | 4 | 100 in 52 s | 6,000 (not told) | 57.4 | 72 % | 172 | 43 % |" in text
    assert "16 bit (" not in text.partition("## Throughput")[2].partition("## ")[0], "another file"
    data = eval_json(replace(facts, speed_limit=LIMIT), summarize(facts), datetime(2026, 11, 22, tzinfo=UTC))
    assert data["throughput"]["deployed"]["llama_bench_answer_share"] == pytest.approx(0.717, abs=1e-3)
    assert data["throughput"]["reference"]["llama_bench_answer_share"] is None
    assert data["llama_bench"]["threads"] == 2


def test_what_each_stage_was_held_against_and_which_changed_answers(facts: ReportFacts) -> None:
    text = log(facts)
    section = text[text.index("## From adapter to file") :].partition("\n## ")[0]
    assert "\n\nChanged at: quantize Q4_K_M, 1 of 8 answers, all near ties.\n\n" in section
    assert "| merge | base plus adapter | rounding to F16 | off by 0.0002 | ✅ |" in section
    assert "| tools.jsonl:7 | 3 | \\| (40.0 %) | \\`x\\` (30.0 %) | 0.2 | near tie |" in section
    gates = [
        {"stage": "convert", "name": "same next tokens", "limit": "none", "measured": "not compared: why"}
    ]
    uncompared = {**facts.run, "package": {**facts.run["package"], "merge": {"gates": gates}}}
    row = "| convert | same next tokens | none | not compared: why | 🟡 |"
    assert row in log(replace(facts, run=uncompared))
    old = {**facts.run, "package": {"reference": {"type": "F16"}, "merge": {"tensors": 272}}}
    assert "From adapter to file" not in log(replace(facts, run=old))


def test_each_prompt_that_differs_is_named_with_its_reason(facts: ReportFacts) -> None:
    same = log(compared(facts, True))
    assert "serve the same file: all 100 answers are the same, sign by sign." in same
    assert "drops are measured" not in same
    why = 'at token 3 "a" | "b": nearly as likely'
    difference = Difference(facts.suite.prompts[3].id, "tool", "rounding", why, "a", "```b")
    text = log(compared(facts, True, difference))
    assert "99 of 100 answers are the same, 1 differs (1 × a near tie, decided by rounding)" in text
    assert f"| {facts.suite.prompts[3].id} | tool | at token 3" in text
    assert "````text\n```b\n````" in text
    assert "prompts that other passed" in text
    assert text.count("<details>") == text.count("</details>")
    other_file = log(compared(facts, False, difference))
    assert "serve different files" in other_file
    assert "Both texts" not in other_file


def test_repeats_and_constrained_answers_are_told_apart(facts: ReportFacts, tmp_path: Path) -> None:
    suite = replace(facts.suite, repeats=2)
    core = replace(suite.core("tool"), json_schema=ANY_CALL)
    suite = replace(suite, cores=(core, *suite.cores[1:]))
    result = facts.deployed.result
    prompt = suite.prompts[0]
    wavered = replace(result.answers[0], reply=replace(result.answers[0].reply, text="else"))
    held = Answer(prompt.id, "tool", Reply("{}"), tuple(grade_constrained("{}", prompt.check)))
    result = replace(result, repeats=((wavered, *result.answers[1:]),), constrained=(held,))
    deployed = replace(facts.deployed, result=result)
    told = replace(facts, suite=suite, deployed=deployed, reference=None)
    text = log(told)
    assert "Asked 2 times, so many of the 100 prompts got the same text each time: Q4_K_M 99." in text
    assert "| tool call, constrained, valid | 1 | 0 % |" in text
    assert "each asked 2 times" in text
    assert "scored apart and enter no other score" in text
    write_reports(tmp_path, told)
    data = json.loads((tmp_path / "eval.json").read_text(encoding="utf-8"))
    schema = json.loads(files("web4lora_deployer.report").joinpath("eval.schema.json").read_text())
    jsonschema.validate(data, schema)
    first = data["answers"][0]["deployed"]
    assert first["repeats"]["asked"] == 2
    assert first["repeats"]["different_texts"] == 2
    assert first["constrained"]["checks"] == {
        "tool_call_constrained.valid": False,
        "tool_call_constrained.right_tool": False,
        "tool_call_constrained.exact": False,
    }
    write_reports(tmp_path / "compared", compared(facts, True))
    compared_data = json.loads((tmp_path / "compared" / "eval.json").read_text(encoding="utf-8"))
    jsonschema.validate(compared_data, schema)
    assert set(compared_data) <= set(schema["properties"])
