"""What changed since the last report of the same name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from web4lora_deployer.report import words
from web4lora_deployer.report.eval_json import SCHEMA
from web4lora_deployer.report.facts import ReportFacts, VerifySummary, fact
from web4lora_deployer.suite.budgets import points

_COMPARABLE = (SCHEMA, "web4lora.eval/1")  # what is compared here is the same in both


def changes(facts: ReportFacts, summary: VerifySummary) -> str:
    """Compare with the last report; "" when there is none.

    Args:
        facts: What was measured, with the last eval.json.
        summary: The scores.

    Returns:
        A section in Markdown.
    """
    before = facts.previous
    if not before:
        return ""
    title = "## What changed since last time\n\n"
    if before.get("schema") not in _COMPARABLE:
        return f"{title}The last report has another form ({str(before.get('schema'))[:40]}): not compared."
    rows = [*_scores(before, summary), *_figures(before, summary)]
    moved = [row for row in rows if row[1] != row[2]]
    when = str(before.get("measured_at") or "")[:10]
    model = fact(before, "models", "deployed", "id") or "the last model"
    head = f"Against {model}" + (f", measured {when}" if when else "") + "."
    if fact(before, "suite", "digest") != facts.suite.digest:
        head += " **The suite itself has changed since, so scores are not strictly comparable.**"
    if not moved:
        return f"{title}{head} Nothing moved."
    lines = ["| figure | last time | now | change |", "| :-- | --: | --: | --: |"]
    lines += ["| " + " | ".join(row) + " |" for row in moved]
    same = (
        f"\n\n{words.plural(len(rows) - len(moved), 'figure')} as before." if len(moved) < len(rows) else ""
    )
    return title + head + "\n\n" + "\n".join(lines) + same


def _scores(before: Mapping[str, Any], summary: VerifySummary) -> list[list[str]]:
    old = {score["name"]: score["deployed_percent"] for score in before.get("scores") or []}
    rows = []
    for score in summary.scores:
        if score.name in old:
            was, now = float(old[score.name]), score.deployed_percent
            rows.append([score.title, words.percent(was), words.percent(now), _signed(now - was, " points")])
    return rows


def _figures(before: Mapping[str, Any], summary: VerifySummary) -> list[list[str]]:
    rows = []
    old_speed, speed = before.get("tokens_per_second"), summary.tokens_per_second
    if old_speed and speed:
        row = ["tokens/s", f"{old_speed:.1f}", f"{speed:.1f}", _signed(100 * (speed / old_speed - 1), " %")]
        rows.append(row)
    old_first, first = before.get("time_to_first_token_seconds"), summary.time_to_first_token_seconds
    if old_first and first:
        change = _signed(100 * (first / old_first - 1), " %")
        rows.append(["first token", words.duration(old_first), words.duration(first), change])
    old_memory, memory = before.get("memory_bytes"), summary.memory_bytes
    if old_memory and memory:
        change = _signed(100 * (memory / old_memory - 1), " %")
        rows.append(["memory", words.size(old_memory), words.size(memory), change])
    return rows


def _signed(value: float, unit: str) -> str:
    text = points(value)
    return f"{text if text.startswith('−') else '+' + text}{unit}"
