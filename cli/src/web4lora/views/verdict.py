"""The end of a run for people: scores, the verdict, what is good and what is not, sample answers."""

from __future__ import annotations

from collections.abc import Iterable

from rich.table import Table
from rich.text import Text
from web4.lora.v1 import deployer_pb2, gateway_pb2

from web4lora.views import human
from web4lora.views.console import BAD, OK, OPEN, STYLES, line, out
from web4lora.views.stages import tested

_SAMPLE_LINES = 14
_PASSED, _FAILED = deployer_pb2.TEST_STATE_PASSED, deployer_pb2.TEST_STATE_FAILED
_UNDECIDED = deployer_pb2.TEST_STATE_UNDECIDED
_SIGNS: dict[int, str] = {_PASSED: OK, _FAILED: BAD, _UNDECIDED: OPEN}
TESTS: dict[int, str] = {_PASSED: "passed", _FAILED: "limits missed", _UNDECIDED: "undecided"}
"""How a run's tests came out, in a word for lists."""
_GROUPS = (("good", _PASSED, ""), ("not good", _FAILED, "red"), ("undecided", _UNDECIDED, "yellow"))


def verify_result(run: gateway_pb2.Run) -> deployer_pb2.VerifyResult | None:
    """Return what a run's tests found, or None when they did not run."""
    for stage in run.stages:
        if stage.WhichOneof("result") == "verify_result" and tested(stage.verify_result):
            return stage.verify_result
    return None


def show_scores(run: gateway_pb2.Run) -> None:
    """Print the scores, the verdict and what to do; nothing when nothing was tested."""
    result = verify_result(run)
    if result is not None:
        show_result(result, _quantization(run), "16 bit")


def show_result(result: deployer_pb2.VerifyResult, model: str, reference: str) -> None:
    """Print what tests found: scores, the verdict, what is good, what is not, what to do.

    Args:
        result: What they found.
        model: Heads the column of the model under test.
        reference: Heads that of the model that drops are measured from.
    """
    line()
    if result.scores:
        out.print(score_table(result, model, reference))
    sign = _SIGNS[state_of(result)]
    _row("verdict", f"{sign} {result.verdict}" if result.verdict else sign, style=STYLES[sign])
    for name, state, style in _GROUPS:
        gates = [gate for gate in result.gates if state_of(gate) == state]
        if gates:
            _row(name, "; ".join(_about(gate, result) for gate in gates), style=style)
    for number, text in enumerate(result.advice):
        _row("" if number else "to do", text)


def state_of(result: deployer_pb2.VerifyResult | deployer_pb2.Gate) -> int:
    """Return how tests or a limit came out; those from before states were told have `passed` alone."""
    return result.state or (_PASSED if result.passed else _FAILED)


def missed(result: deployer_pb2.VerifyResult) -> bool:
    """Tell whether a limit was missed; one that is undecided was not."""
    return state_of(result) == _FAILED


def _about(gate: deployer_pb2.Gate, result: deployer_pb2.VerifyResult) -> str:
    """Return what a limit is about and what was measured; of a missed one the limit too."""
    kind, _, name = gate.name.rpartition(": ")
    title = next((score.title for score in result.scores if score.name == name and score.title), name)
    about = f"{title} (drop)" if "drop" in kind else title
    text = f"{about} {gate.measured.partition(' (')[0]}"
    return f"{text}, the limit is {gate.limit}" if state_of(gate) == _FAILED else text


def score_table(result: deployer_pb2.VerifyResult, model: str, reference: str = "16 bit") -> Table:
    """Return the table of scores; the base model's column only when it was measured."""
    has_base = any(score.HasField("base_percent") for score in result.scores)
    has_reference = any(score.HasField("reference_percent") for score in result.scores)
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    table.add_column("  test", no_wrap=True)
    if has_base:
        table.add_column("base", justify="right", no_wrap=True)
    if has_reference:
        table.add_column(reference, justify="right", no_wrap=True)
    table.add_column(model, justify="right", no_wrap=True)
    if has_reference:
        table.add_column("drop, 95 % interval", no_wrap=True)
    table.add_column("limit", overflow="fold")
    for score in result.scores:
        cells = [Text(f"  {score.title or score.name}")]
        if has_base:
            cells.append(_percent(score.base_percent if score.HasField("base_percent") else None))
        if has_reference:
            cells.append(_percent(score.reference_percent if score.HasField("reference_percent") else None))
        cells.append(_percent(score.deployed_percent))
        if has_reference:
            cells.append(Text(_drop(score)))
        cells.append(_limits(score.name, result.gates))
        table.add_row(*cells)
    return table


def show_samples(samples: Iterable[deployer_pb2.Sample]) -> None:
    """Print a question and the deployed model's answer for each core."""
    for sample in samples:
        sign = OK if sample.passed else BAD
        line()
        out.print(Text.assemble(f"  {sample.core:<11}", (sample.prompt.strip(), "bold")), soft_wrap=True)
        rows = sample.answer.strip().splitlines() or ["(nothing)"]
        for row in rows[:_SAMPLE_LINES]:
            line(f"             {row}", style="cyan")
        if len(rows) > _SAMPLE_LINES:
            line(f"             … {len(rows) - _SAMPLE_LINES} more lines", style="dim")
        line(
            f"             {sign} {'passes its test' if sample.passed else 'fails its test'}",
            style=STYLES[sign],
        )


def _quantization(run: gateway_pb2.Run) -> str:
    """Return the type of the deployed GGUF, for example Q4_K_M."""
    for stage in run.stages:
        if stage.WhichOneof("result") == "package_result" and stage.package_result.quantized:
            return str(stage.package_result.quantized[0].type)
    return "deployed"


def _row(name: str, text: str, style: str = "") -> None:
    """Print a labelled line; a terminal wraps it below itself."""
    if not out.is_terminal:
        line(f"  {name:<10} {text}")
        return
    grid = Table.grid(padding=(0, 1, 0, 0))
    grid.add_row(Text(f"  {name:<10}"), Text(text, style=style))
    out.print(grid)


def _percent(value: float | None) -> Text:
    return Text("–" if value is None else f"{value:.0f} %")


def _drop(score: deployer_pb2.Score) -> str:
    if not score.HasField("drop_points"):
        return ""
    text = human.signed(score.drop_points)
    if score.HasField("drop_low_points") and score.HasField("drop_high_points"):
        text += f"  ({human.signed(score.drop_low_points)} to {human.signed(score.drop_high_points)})"
    return text


def _limits(name: str, gates: Iterable[deployer_pb2.Gate]) -> Text:
    """Return a score's limits, each with its mark."""
    text = Text()
    for gate in gates:
        if gate.name.rpartition(":")[2].strip() != name:
            continue
        sign = _SIGNS[state_of(gate)]
        limit = gate.limit.replace("at most", "≤").replace("at least", "≥").replace(" points", "")
        text.append(f"{'  ' if text else ''}{limit} ")
        text.append(sign, STYLES[sign])
    return text
