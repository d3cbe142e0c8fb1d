"""Whether other runtimes or models gave the same greedy answers, and which prompts they differ at."""

from __future__ import annotations

from collections import Counter

from web4lora_deployer.report import words
from web4lora_deployer.report.facts import CAUSES, Comparison, ReportFacts
from web4lora_deployer.report.marks import fenced, plain, table
from web4lora_deployer.suite import score_suite

_SHOWN_TEXTS = 8


def same_answers(facts: ReportFacts) -> str:
    """Return the section in Markdown; "" when nothing was compared."""
    if not facts.comparisons:
        return ""
    parts = ["## The same answers?", *(_comparison(facts, each) for each in facts.comparisons)]
    if len(facts.comparisons) > 1:
        parts.append(_scores(facts))
    return "\n\n".join(parts)


def _comparison(facts: ReportFacts, comparison: Comparison) -> str:
    count, total = len(comparison.differences), len(facts.suite.prompts)
    names = f"**{plain(facts.deployed.model.label)}** and **{plain(comparison.other.model.label)}**"
    file = {True: "the same file", False: "different files", None: "files that are not known here"}
    what = f"{names} serve {file[comparison.same_file]}"
    if not count:
        return f"{what}: all {words.plural(total, 'answer')} are the same, sign by sign."
    causes = Counter(difference.cause for difference in comparison.differences)
    counts = "; ".join(f"{causes[cause]} × {CAUSES[cause]}" for cause in CAUSES if causes[cause])
    differ = f"{count} {'differs' if count == 1 else 'differ'}"
    head = f"{what}: {total - count} of {words.plural(total, 'answer')} are the same, {differ} ({counts})."
    rows = [[plain(each.id), plain(each.core), plain(each.reason)] for each in comparison.differences]
    if comparison.same_file is False:  # other weights say other things: the list is for who wants to look
        return f"{head}\n\n{_folded('Which ones', table(['prompt', 'core', 'how'], rows, left=3))}"
    text = f"{head}\n\n{table(['prompt', 'core', 'why'], rows, left=3)}"
    shown = []
    for each in comparison.differences[:_SHOWN_TEXTS]:
        shown.append(f"**{plain(each.id)}**, {plain(facts.deployed.model.label)}:\n\n{fenced(each.text)}")
        shown.append(f"{plain(comparison.other.model.label)}:\n\n{fenced(each.other_text)}")
    return f"{text}\n\n{_folded('Both texts', chr(10).join([chr(10).join((part, '')) for part in shown]))}"


def _scores(facts: ReportFacts) -> str:
    """Return all scores side by side."""
    models = [facts.deployed, *(comparison.other for comparison in facts.comparisons)]
    columns = [
        {score.name: score.deployed_percent for score in score_suite(facts.suite, each.result, None, None)}
        for each in models
    ]
    rows = [
        [title, *(words.percent(column.get(name)) for column in columns)]
        for name, title in facts.suite.score_titles.items()
        if name in columns[0]
    ]
    return table(["test", *(plain(each.model.label) for each in models)], rows)


def _folded(title: str, text: str) -> str:
    return f"<details><summary>{title}</summary>\n\n{text.strip()}\n\n</details>"
