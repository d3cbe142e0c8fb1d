"""eval_log.md: the report for people. The verdict first, then a table a core, then the rest."""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

from web4lora_deployer.report import words
from web4lora_deployer.report.advice import subject
from web4lora_deployer.report.changes import changes
from web4lora_deployer.report.diagram import DIAGRAM
from web4lora_deployer.report.eval_json import versions
from web4lora_deployer.report.facts import Measured, ReportFacts, VerifySummary, fact
from web4lora_deployer.report.marks import SIGNS, table
from web4lora_deployer.report.marks import code as _code
from web4lora_deployer.report.marks import fenced as _fenced
from web4lora_deployer.report.marks import plain as _plain
from web4lora_deployer.report.same_answers import same_answers
from web4lora_deployer.report.stage_gates import stage_gates
from web4lora_deployer.report.throughput import throughput
from web4lora_deployer.suite import Answer, Core, Gate, Score, State, Suite, score_details, state_of
from web4lora_deployer.suite.budgets import points
from web4lora_deployer.suite.robustness import TITLES as ROBUSTNESS_TITLES

_SHOWN_FAILURES = 8
_STATES = (
    "✅ passed: the whole 95 % interval keeps the limit. ❌ failed: the whole interval misses it. "
    "🟡 undecided: it reaches to both sides, or nothing was measured."
)


def eval_log(facts: ReportFacts, summary: VerifySummary, measured_at: datetime, plots: Sequence[str]) -> str:
    """Write the report.

    Args:
        facts: What was measured.
        summary: Scores, gates and verdict.
        measured_at: When.
        plots: File names of the plots that lie beside it.

    Returns:
        Markdown as GitHub reads it.
    """
    sections = [
        _head(facts, summary),
        *(_core(facts, summary, core) for core in facts.suite.cores),
        _all_answers(facts, summary),
        _speed(facts, summary),
        throughput(facts),
        _plots(plots),
        stage_gates(facts),
        same_answers(facts),
        changes(facts, summary),
        _gates(summary.gates),
        _failures(facts),
        _method(facts, measured_at),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _head(facts: ReportFacts, summary: VerifySummary) -> str:
    model = facts.deployed.model
    words_of = [f"**{_plain(model.id or facts.name)}**", model.label]
    if model.size_bytes:
        words_of.append(words.size(model.size_bytes))
    if facts.size_reduction:
        words_of.append(f"{words.reduction(facts.size_reduction)} against {_plain(facts.reference_label)}")
    if summary.tokens_per_second:
        words_of.append(f"{summary.tokens_per_second:.0f} tokens/s")
    if model.target:
        words_of.append(f"on {model.target}")
    lead = " · ".join(words_of)
    title = f"# {SIGNS[summary.state]} {_plain(facts.name)}: {_plain(summary.verdict)}"
    return "\n\n".join(filter(None, [title, lead, _at_a_glance(summary)]))


def _at_a_glance(summary: VerifySummary) -> str:
    """Say what is good, what is not, what can't be told, and what to do."""
    scores = {score.name: score for score in summary.scores}

    def gates_text(state: State) -> str:
        gates = [f"{subject(gate, scores)} {_short(gate.measured)}" for gate in summary.gates_that(state)]
        return "; ".join(map(_plain, gates))

    rows = [
        ["✅ good", gates_text(State.PASSED)],
        ["❌ not good", gates_text(State.FAILED)],
        ["🟡 undecided", gates_text(State.UNDECIDED)],
        ["what to do", " ".join(_plain_code(each) for each in summary.advice)],
    ]
    known = [row for row in rows if row[1]]
    return table(["", ""], known, left=2) if known else ""


def _short(measured: str) -> str:
    """Return a measured value without its interval."""
    return measured.partition(" (")[0]


def _plain_code(text: str) -> str:
    """Make a text of our own safe in a cell; what stands between backticks stays code."""
    return _plain(text).replace("\\`", "`")


def _core(facts: ReportFacts, summary: VerifySummary, core: Core) -> str:
    scores = [score for score in summary.scores if score.core == core.name]
    count = sum(prompt.core == core.name for prompt in facts.suite.prompts)
    text = (
        f"## {_plain(core.title)}: {words.plural(count, 'prompt')}\n\n{_score_table(facts, summary, scores)}"
    )
    results = {role: measured.result for role, measured in facts.models.items()}
    details = score_details(
        facts.suite, core.name, results["deployed"], results.get("reference"), results.get("base")
    )
    return f"{text}\n\n{_detail_table(facts, details)}" if details else text


def _score_table(facts: ReportFacts, summary: VerifySummary, scores: Sequence[Score]) -> str:
    heads = [measured.model.label for measured in facts.models.values()]
    with_drop = facts.reference is not None
    head = ["test", "prompts", *map(_plain, heads), "95 % interval"]
    head += ["drop, 95 % interval"] if with_drop else []
    rows = []
    for score in scores:
        low, high = score.deployed_low_percent, score.deployed_high_percent
        row = [score.title, str(score.prompts), *_percents(facts, score), f"{low:.0f} to {high:.0f} %"]
        rows.append([*row, *([_drop(score)] if with_drop else []), *_limits(summary.gates, score)])
    return table([*head, "limit", ""], rows)


def _percents(facts: ReportFacts, score: Score) -> list[str]:
    by_role = {
        "base": score.base_percent,
        "reference": score.reference_percent,
        "deployed": score.deployed_percent,
    }
    return [words.percent(by_role[role]) for role in facts.models]


def _drop(score: Score) -> str:
    if score.drop_points is None:
        return "–"
    low, high = points(score.drop_low_points or 0.0), points(score.drop_high_points or 0.0)
    return f"{points(score.drop_points)} ({low} to {high})"


def _limits(gates: Sequence[Gate], score: Score) -> list[str]:
    mine = [gate for gate in gates if gate.name in (f"score drop: {score.name}", f"score: {score.name}")]
    return ["; ".join(gate.limit for gate in mine) or "–", _sign(mine)]


def _sign(gates: Sequence[Gate]) -> str:
    return SIGNS[state_of(gates)] if gates else ""


def _detail_table(facts: ReportFacts, details: Sequence[Score]) -> str:
    heads = [_plain(measured.model.label) for measured in facts.models.values()]
    rows = [[score.title, str(score.prompts), *_percents(facts, score)] for score in details]
    if len(rows) <= 2:
        return table(["of these", "prompts", *heads], rows)
    # Only what somebody failed is worth a look; the rest is one line.
    failed = [row for row in rows if set(row[2:]) != {"100 %"}]
    kept = len(rows) - len(failed)
    more = f"{kept} of {len(rows)} rules were never broken." if kept else ""
    if not failed:
        return more
    return table(["rule", "prompts", *heads], failed) + (f"\n\n{more}" if more else "")


def _all_answers(facts: ReportFacts, summary: VerifySummary) -> str:
    scores = [score for score in summary.scores if not score.core]
    text = f"## All answers\n\n{_score_table(facts, summary, scores)}"
    if facts.suite.repeats > 1:
        text += f"\n\n{_stability(facts)}"
    odd = facts.deployed.result.robustness
    rows = []
    for name, title in ROBUSTNESS_TITLES.items():
        checks = [check for answer in odd for check in answer.checks if check.name == name]
        if checks:
            failed = next((check.reason for check in checks if not check.passed), "")
            passed = sum(check.passed for check in checks)
            rows.append([title, f"{passed} of {len(checks)}", _plain(failed)])
    return f"{text}\n\n{table(['odd prompts', 'passed', 'first failure'], rows, left=3)}" if rows else text


def _stability(facts: ReportFacts) -> str:
    """Tell how many prompts got the same answer each time."""
    parts = []
    for measured in facts.models.values():
        texts: dict[str, set[str]] = {}
        for answers in measured.result.passes:
            for answer in answers:
                texts.setdefault(answer.id, set()).add(answer.reply.text)
        same = sum(len(found) == 1 for found in texts.values())
        parts.append(f"{_plain(measured.model.label)} {same}")
    prompts = words.plural(len(facts.suite.prompts), "prompt")
    return (
        f"Asked {facts.suite.repeats} times, so many of the {prompts} got the same text each time: "
        f"{', '.join(parts)}. `eval.json` has each prompt's."
    )


def _speed(facts: ReportFacts, summary: VerifySummary) -> str:
    result = facts.deployed.result
    rows = [
        [
            str(latency.requests_at_once),
            words.duration(latency.first_token_seconds),
            words.duration(latency.slowest_first_token_seconds),
            f"{latency.tokens_per_second:.1f}",
            f"{latency.total_tokens_per_second:.1f}",
        ]
        for latency in result.latency
    ]
    head = [
        "requests at once",
        "first token, median",
        "slowest",
        "tokens/s of one, median",
        "tokens/s of all",
    ]
    parts = [table(head, rows)] if rows else []
    if summary.memory_bytes:
        parts.append(f"Resident memory of the runtime: {words.size(summary.memory_bytes)}.")
    elif facts.deployed.model.target:
        parts.append(f"Resident memory: {_plain(facts.deployed.model.target)} does not tell it here.")
    return "## Speed and memory\n\n" + "\n\n".join(parts) if parts else ""


def _plots(names: Sequence[str]) -> str:
    return "\n".join(f"![{name.partition('.')[0]}]({name})" for name in names)


def _gates(gates: Sequence[Gate]) -> str:
    if not gates:
        return "## Limits\n\nNone were set."
    rows = [[gate.name, gate.limit, gate.measured, SIGNS[gate.state], _plain(gate.note)] for gate in gates]
    text = "## Limits\n\n" + table(["limit", "wanted", "measured", "", "note"], rows, left=5)
    return f"{text}\n\n{_STATES}"


def _failures(facts: ReportFacts) -> str:
    deployed = facts.deployed
    blocks = []
    for core in facts.suite.cores:
        failed = [a for a in deployed.result.answers if a.core == core.name and not a.passed]
        if failed:
            blocks.append("\n\n".join(_core_failures(facts, core, failed)))
    if not blocks:
        return "## Failing examples\n\nNone: every answer passed all its checks."
    return "## Failing examples\n\n" + "\n\n".join(blocks)


def _core_failures(facts: ReportFacts, core: Core, failed: Sequence[Answer]) -> Iterator[str]:
    prompts = {prompt.id: prompt for prompt in facts.suite.prompts}
    reference = {a.id: a for a in facts.reference.result.answers} if facts.reference else {}
    # What quantization broke comes first: that is what a reviewer looks for.
    order = sorted(failed, key=lambda answer: not (reference.get(answer.id) and reference[answer.id].passed))
    summary = f"{html.escape(core.title)}: {len(failed)} of "
    yield f"<details><summary>{summary}{sum(p.core == core.name for p in prompts.values())} failed</summary>"
    for answer in order[:_SHOWN_FAILURES]:
        before = reference.get(answer.id)
        lost = f", which {_plain(facts.reference_label)} passed" if before and before.passed else ""
        yield f"**{_plain(answer.id)}**{lost}: {_plain(prompts[answer.id].question)}"
        yield _fenced(answer.reply.text)
        yield f"Wanted:\n\n{_fenced(prompts[answer.id].expected)}"
        yield "\n".join(_reasons(answer))
    if len(order) > _SHOWN_FAILURES:
        yield f"… and {len(order) - _SHOWN_FAILURES} more, all in `eval.json`."
    yield "</details>"


def _reasons(answer: Answer) -> Iterator[str]:
    """Tell why an answer failed, checks with the same reason together.

    The reason of all style rules says all that its parts do, so these are left out.
    """
    names: dict[str, list[str]] = {}
    for check in answer.checks:
        if not check.passed and (check.name == "style.all_rules" or not check.name.startswith("style.")):
            names.setdefault(check.reason, []).append(f"`{check.name}`")
    for reason, checks in names.items():
        yield f"- {', '.join(checks)}: {_plain(reason)}"


def _method(facts: ReportFacts, measured_at: datetime) -> str:
    suite, result = facts.suite, facts.deployed.result
    reference = f"{_plain(facts.reference_label)}, the reference"
    roles = {"base": "untrained base", "reference": reference, "deployed": "under test"}
    known = [(roles[role], measured) for role, measured in facts.models.items()]
    known += [("compared", measured) for measured in facts.all_models[len(known) :]]
    rows = [[role, *_model_cells(measured)] for role, measured in known]
    models = table(
        ["model", "name", "digest", "size", "runtime", "context", "at once", "time", "retries"], rows
    )
    lines = [
        f"Suite {_code(suite.name)} ({words.short_digest(suite.digest)}): "
        f"{words.plural(len(suite.prompts), 'prompt')}, the same for each model, each asked {_times(suite)} "
        f"through `/v1/chat/completions`: temperature 0, seed {suite.seed}, answers cut off at "
        + ", ".join(f"{core.max_tokens} tokens ({_plain(core.name)})" for core in suite.cores)
        + ".",
        "Greedy answers are the same each time but for one thing: a server that works on several requests in "
        "one batch adds floats up in another order, so a rare answer may differ from run to run.",
        f"Drops are paired: prompts that {_plain(facts.reference_label)} passed and the model under test "
        "failed, less those the other way round. Intervals are at 95 %: Wilson's for a score, Tango's score "
        "interval for a paired drop."
        + (" The repeats of a prompt count as one cluster." if suite.repeats > 1 else ""),
        _constrained_method(facts),
        _speed_method(facts),
        *(f"Left out: {_plain(note)}." for note in result.notes),
        "Versions: " + ", ".join(f"{name} {version}" for name, version in versions().items()) + ".",
        f"Measured {measured_at:%Y-%m-%d %H:%M} {measured_at:%Z}".rstrip() + f".{_run_line(facts.run)}",
    ]
    lines.append(f"![The pipeline with this run's figures]({DIAGRAM})" if facts.with_diagram else "")
    return "## How it was measured\n\n" + models + "\n\n" + "\n\n".join(filter(None, lines))


def _model_cells(measured: Measured) -> list[str]:
    model, result = measured.model, measured.result
    runtime = " ".join(filter(None, [model.target, model.runtime_version]))
    return [
        _plain(model.id or model.label),
        f"`{words.short_digest(model.digest)}`" if model.digest else "–",
        words.size(model.size_bytes) if model.size_bytes else "–",
        _plain(runtime) or "–",
        words.number(model.context_tokens) if model.context_tokens else "–",
        str(result.parallel),
        words.duration(result.seconds),
        str(result.retries),
    ]


def _speed_method(facts: ReportFacts) -> str:
    latency = facts.deployed.result.latency
    if not latency:
        return ""
    source = "the server's own figure" if latency[0].timed_by_server else "measured at the client"
    return (
        f"Speed: {latency[0].requests} requests each, their prompts made unique so that nothing is cached; "
        f"the time to the first token is measured at the client, tokens/s of one request is {source}."
    )


def _times(suite: Suite) -> str:
    return "once" if suite.repeats == 1 else f"{suite.repeats} times"


def _constrained_method(facts: ReportFacts) -> str:
    if not facts.deployed.result.constrained:
        return ""
    return (
        "Constrained: the tool calls were asked for once more with a JSON schema in `response_format`, so "
        "that the runtime allows no other tokens. These answers are scored apart and enter no other score."
    )


def _run_line(run: Mapping[str, Any]) -> str:
    run_id = fact(run, "run_id")
    return f" Run {_code(str(run_id))}." if run_id else ""
