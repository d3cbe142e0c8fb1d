"""Writes the reports of a test."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from web4lora_deployer.report.diagram import DIAGRAM, write_diagram
from web4lora_deployer.report.eval_json import eval_json
from web4lora_deployer.report.facts import ReportFacts, VerifySummary, summarize
from web4lora_deployer.report.markdown import eval_log
from web4lora_deployer.report.plots import plot_latency, plot_scores


def write_reports(folder: Path, facts: ReportFacts) -> VerifySummary:
    """Write eval_log.md, eval.json, scores.png and, when there is such a thing, latency.png and the diagram.

    Args:
        folder: Where; made when it is missing.
        facts: What was measured.

    Returns:
        Scores, limits and verdict, and the files written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    measured_at = facts.measured_at or datetime.now(UTC)
    summary = summarize(facts)
    plots = ["scores.png"]
    plot_scores(folder / "scores.png", facts, summary)
    if facts.deployed.result.latency:
        plots.append("latency.png")
        plot_latency(folder / "latency.png", facts)
    data = eval_json(facts, summary, measured_at)
    text = json.dumps(data, indent=2, ensure_ascii=False) + "\n"
    (folder / "eval.json").write_text(text, encoding="utf-8")
    log = eval_log(facts, summary, measured_at, plots)
    (folder / "eval_log.md").write_text(log, encoding="utf-8")
    names = ["eval_log.md", "eval.json", *plots]
    if facts.with_diagram:
        write_diagram(folder / DIAGRAM, facts, summary)
        names.insert(2, DIAGRAM)
    return replace(summary, files=tuple(folder / name for name in names))
