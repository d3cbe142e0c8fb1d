"""The pipeline of a run, with its own figures: what is not known is left out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from web4lora_deployer.report import words
from web4lora_deployer.report.drawio import to_xml
from web4lora_deployer.report.facts import ReportFacts, VerifySummary, fact
from web4lora_deployer.report.layout import (
    BOX_WIDTH,
    GAP_X,
    GAP_Y,
    MARGIN,
    TOP,
    Diagram,
    Stage,
    Text,
    connect,
    fit,
    height_of,
    place,
)
from web4lora_deployer.report.picture import paint
from web4lora_deployer.suite import State

_INPUT, _TRAIN, _PACKAGE, _DEPLOY = "#475569", "#c2410c", "#6d28d9", "#0f766e"
_COLORS = {State.PASSED: "#15803d", State.UNDECIDED: "#a16207", State.FAILED: "#b91c1c"}
_SIGNS = {State.PASSED: "✓", State.UNDECIDED: "?", State.FAILED: "✗"}

Rows = list[tuple[str, str | None]]
DIAGRAM = "drawio_diagram.png"


def write_diagram(path: Path, facts: ReportFacts, summary: VerifySummary) -> None:
    """Write the picture, a PNG that draw.io opens and edits.

    Args:
        path: The file.
        facts: What was measured, with the run's facts.
        summary: Scores and verdict.
    """
    diagram = draw(facts, summary)
    paint(diagram, path, to_xml(diagram))


def draw(facts: ReportFacts, summary: VerifySummary) -> Diagram:
    """Lay the pipeline out: two rows, the second from right to left below the first."""
    run = facts.run
    upper = [_dataset(run), _train(run), _merge(run), _gguf(facts)]
    lower = [_base(run), _verify(facts, summary), _deploy(facts, summary), _quantize(facts)]
    upper_height, lower_height = height_of(upper), height_of(lower)
    lower_top = TOP + upper_height + GAP_Y
    data, train, merge, gguf = (place(stage, i, TOP, upper_height) for i, stage in enumerate(upper))
    base, verify, deploy, quant = (place(stage, i, lower_top, lower_height) for i, stage in enumerate(lower))
    right, left, top, bottom = (1.0, 0.5), (0.0, 0.5), (0.5, 0.0), (0.5, 1.0)
    arrows = (
        connect("data-train", data, train, (1.0, 0.35), (0.0, 0.35)),
        connect("base-train", base, train, (1.0, 0.35), (0.0, 0.75)),
        connect("train-merge", train, merge, right, left),
        connect("merge-gguf", merge, gguf, right, left),
        connect("gguf-quantize", gguf, quant, bottom, top),
        connect("quantize-deploy", quant, deploy, left, right),
        connect("deploy-verify", deploy, verify, left, right),
    )
    width = 2 * MARGIN + 4 * BOX_WIDTH + 3 * GAP_X
    height = lower_top + lower_height + 56
    return Diagram(
        title=f"{facts.name}: pipeline",
        width=width,
        height=height,
        texts=tuple(_titles(facts, summary, width, height)),
        boxes=(data, train, merge, gguf, base, verify, deploy, quant),
        arrows=arrows,
    )


def _titles(facts: ReportFacts, summary: VerifySummary, width: float, height: float) -> list[Text]:
    inner = width - 2 * MARGIN
    name = str(fact(facts.run, "name") or facts.name)
    run_id = fact(facts.run, "run_id")
    verdict = f"{_SIGNS[summary.state]} {summary.verdict}"
    color = _COLORS[summary.state]
    title = fit(f"{name}: from the dataset to a model that answers", inner * 0.7, 22, bold=True)
    texts = [
        Text("title", MARGIN, 20, inner * 0.72, (title,), 22, "#0f172a", True, pitch=30),
        Text("verdict", MARGIN, 54, inner, (fit(verdict, inner, 13, bold=True),), 13, color, True, pitch=22),
    ]
    if run_id:
        shown = fit(str(run_id), inner * 0.26, 13)
        texts.append(
            Text("run", MARGIN + inner * 0.72, 26, inner * 0.28, (shown,), 13, "#64748b", False, "right")
        )
    foot = "Made with Web4 LoRA Core. Opens in draw.io: the diagram lies inside this picture."
    texts.append(Text("foot", MARGIN, height - 34, inner, (foot,), 11, "#94a3b8"))
    return texts


def _known(rows: Rows) -> tuple[tuple[str, str], ...]:
    return tuple((name, value) for name, value in rows if value)


def _words(value: Any, write: Any = str) -> str:
    """Write a fact, "" when it is unknown."""
    return "" if value is None or value == "" else str(write(value))


def _time(run: Mapping[str, Any], stage: str) -> str:
    """Write how long a stage took; of one that was taken over: when it ran."""
    return _words(fact(run, "stages", stage, "seconds"), words.duration)


def _taken_over(run: Mapping[str, Any], stage: str) -> Rows:
    """Name the run that a stage was taken over from, whose time is shown."""
    return [("taken over from", _words(fact(run, "stages", stage, "reused_from_run")))]


def _digest(value: Any) -> str:
    return _words(value, words.short_digest)


def _dataset(run: Mapping[str, Any]) -> Stage:
    data = fact(run, "dataset") or {}
    cores = data.get("rows_by_core") or {}
    rows: Rows = [(f"rows, {core}", words.number(count)) for core, count in list(cores.items())[:3]]
    rows += [
        ("rows held out", _words(data.get("eval_rows"), words.number)),
        ("tokens", _words(data.get("tokens"), words.number)),
        ("of these trained", _words(data.get("trained_tokens"), words.number)),
        ("digest", _digest(data.get("digest"))),
    ]
    rows += _taken_over(run, "prepare")
    headline = _words(data.get("train_rows"), lambda count: f"{words.number(count)} rows")
    return Stage("dataset", "Dataset", _INPUT, _time(run, "prepare"), headline, _known(rows))


def _train(run: Mapping[str, Any]) -> Stage:
    train = fact(run, "train") or {}
    rows: Rows = [
        ("held-out loss", _words(train.get("held_out_loss"), words.loss)),
        ("steps", _words(train.get("steps"), words.number)),
        ("speed", _words(train.get("tokens_per_second"), lambda speed: f"{words.number(speed)} tokens/s")),
        ("trained parameters", _words(train.get("trained_parameters"), words.number)),
        ("peak memory", _words(train.get("peak_memory_bytes"), words.size)),
        ("device", _words(train.get("device"))),
        ("adapter", _digest(train.get("adapter_digest"))),
        ("goes on from", _digest(train.get("from_adapter_digest"))),
    ]
    rows += _taken_over(run, "train")
    headline = _words(train.get("final_loss"), lambda value: f"loss {words.loss(value)}")
    time = _time(run, "train") or _words(train.get("seconds"), words.duration)
    return Stage("train", "Train the adapter", _TRAIN, time, headline, _known(rows))


def _merge(run: Mapping[str, Any]) -> Stage:
    merge = fact(run, "package", "merge") or {}
    names = {"tensors": "tensors", "merged_tensors": "tensors merged", "dtype": "type", "verified": "checked"}
    rows: Rows = []
    for key, value in list(merge.items())[:6]:
        if key == "changed_at":  # told stage by stage below
            continue
        if isinstance(value, bool):
            text = "yes" if value else "no"
        elif key.endswith("_bytes"):
            text = words.size(value)
        elif key.endswith("_seconds") or key == "seconds":
            continue
        elif key.endswith("digest"):
            text = words.short_digest(str(value))
        elif isinstance(value, int):
            text = words.number(value)
        elif isinstance(value, float):
            text = f"{value:.3g}"
        elif isinstance(value, str):
            text = value
        else:
            continue
        rows.append((names.get(key, key.removesuffix("_bytes").replace("_", " ")), text))
    gates = merge.get("gates") or []
    passed = sum(bool(gate.get("passed")) for gate in gates)
    rows.append(("gates passed", f"{passed} of {len(gates)}" if gates else ""))
    rows += [
        (
            f"changed by {gate['stage'].rpartition(' ')[2]}",
            f"{len(gate.get('changed') or ())} of {gate['answers']} answers",
        )
        for gate in gates
        if gate.get("answers")
    ]
    time = _words(merge.get("seconds"), words.duration)
    headline = "adapter into base" if merge or fact(run, "package") else ""
    return Stage("merge", "Merge", _PACKAGE, time, headline, _known(rows))


def _gguf(facts: ReportFacts) -> Stage:
    run = facts.run
    known = fact(run, "package", "reference") or {}
    model = facts.reference.model if facts.reference else None
    size = known.get("size_bytes") or (model.size_bytes if model else None)
    rows: Rows = [
        ("type", _words(known.get("type"))),
        ("llama.cpp", _words(fact(run, "package", "llama_cpp_version"))),
        ("digest", _digest(model.digest if model else "")),
    ]
    return Stage("gguf", "GGUF, 16 bit", _PACKAGE, "", _words(size or None, words.size), _known(rows))


def _quantize(facts: ReportFacts) -> Stage:
    model = facts.deployed.model
    made = fact(facts.run, "package", "quantized") or []
    rows: Rows = [("deployed", model.label), ("digest", _digest(model.digest))]
    for quant in made[:5]:
        size, share = quant.get("size_bytes"), quant.get("size_reduction")
        text = " ".join(filter(None, [_words(size, words.size), _words(share, words.reduction)]))
        if quant.get("type") != model.label:
            rows.append((str(quant.get("type", "")), text))
    rows += _taken_over(facts.run, "package")
    share = facts.size_reduction
    headline = words.size(model.size_bytes) if model.size_bytes else ""
    if headline and share is not None:
        headline += f"  ({words.reduction(share)})"
    package = _time(facts.run, "package")
    time = f"package {package}" if package else ""  # of merge, GGUF and quantize together
    return Stage("quantize", "Quantize", _PACKAGE, time, headline, _known(rows))


def _deploy(facts: ReportFacts, summary: VerifySummary) -> Stage:
    model, run = facts.deployed.model, facts.run
    first = summary.time_to_first_token_seconds
    rows: Rows = [
        ("name", model.id or _words(fact(run, "deploy", "id"))),
        ("runtime", model.target or _words(fact(run, "deploy", "target"))),
        ("version", model.runtime_version or _words(fact(run, "deploy", "runtime_version"))),
        ("endpoint", model.endpoint or _words(fact(run, "deploy", "endpoint"))),
        ("context", words.number(model.context_tokens) + " tokens" if model.context_tokens else ""),
        ("first token", words.duration(first) if first else ""),
        ("memory", words.size(summary.memory_bytes) if summary.memory_bytes else ""),
    ]
    rows += _taken_over(run, "deploy")
    speed = f"{summary.tokens_per_second:.0f} tokens/s" if summary.tokens_per_second else ""
    headline = speed or model.target or _words(fact(run, "deploy", "target"))
    return Stage("deploy", "Deploy", _DEPLOY, _time(run, "deploy"), headline, _known(rows))


def _verify(facts: ReportFacts, summary: VerifySummary) -> Stage:
    rows: Rows = []
    for score in summary.scores[:8]:
        now = words.percent(score.deployed_percent)
        before = words.percent(score.reference_percent)
        rows.append((score.title, now if score.reference_percent is None else f"{before} → {now}"))
    kept, missed = (len(summary.gates_that(state)) for state in (State.PASSED, State.FAILED))
    headline = words.plural(len(facts.suite.prompts), "prompt")
    if summary.gates:
        count = len(summary.gates)
        headline = f"{missed} of {count} limits missed" if missed else f"{kept} of {count} limits kept"
        rows.append(("prompts", words.number(len(facts.suite.prompts))))
    color = _COLORS[summary.state]
    seconds = sum(measured.result.seconds for measured in facts.models.values())
    return Stage("verify", "Verify", color, words.duration(seconds), headline, _known(rows))


def _base(run: Mapping[str, Any]) -> Stage:
    base = fact(run, "base") or {}
    rows: Rows = [
        ("size", _words(base.get("size_bytes"), words.size)),
        ("digest", _digest(base.get("digest"))),
    ]
    return Stage("base", "Base model", _INPUT, "", _words(base.get("source")), _known(rows))
