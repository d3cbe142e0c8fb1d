"""What each stage from the adapter to the GGUFs was held against, and which of them changed answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from web4lora_deployer.report.facts import ReportFacts, fact
from web4lora_deployer.report.marks import SIGNS, plain, table
from web4lora_deployer.suite import State


def stage_gates(facts: ReportFacts) -> str:
    """Return the section in Markdown; "" for a model of which no gates are told."""
    gates = fact(facts.run, "package", "merge", "gates") or []
    if not gates:
        return ""
    changed_at = fact(facts.run, "package", "merge", "changed_at")
    rows = [
        [
            plain(gate["stage"]), plain(gate["name"]), plain(gate["limit"]), plain(gate["measured"]),
            SIGNS[State.PASSED if gate.get("passed") else State.UNDECIDED],
        ]
        for gate in gates
    ]  # fmt: skip
    parts = [
        "## From adapter to file",
        f"{plain(changed_at[0].upper() + changed_at[1:])}." if changed_at else "",
    ]
    parts.append(table(["stage", "looked at", "wanted", "measured", ""], rows, left=4))
    changed = [_row(gate["stage"], each) for gate in gates for each in gate.get("changed") or ()]
    if changed:
        head = ["stage", "answer", "token", "likeliest before", "and after", "divergence", ""]
        parts.append(table(head, changed, left=2))
    return "\n\n".join(filter(None, parts))


def _row(stage: str, changed: Mapping[str, Any]) -> list[str]:
    def share(key: str) -> str:
        return f"{plain(changed[key])} ({100 * changed.get(f'{key}_probability', 0.0):.1f} %)"

    tie = "near tie" if changed.get("near_tie") else ""
    return [
        plain(stage), plain(changed["id"]), str(changed["token"]), share("before"), share("after"),
        f"{changed.get('kl', 0.0):.2g}", tie,
    ]  # fmt: skip
