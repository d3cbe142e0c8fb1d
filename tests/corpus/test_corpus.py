"""Each damaged or hostile file ends in one clear line, within bounds, and leaves nothing half made."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from web4lora_chassis import errors

from tests.corpus.case import Case, Kind

ROOT = Path(__file__).parents[2]
KINDS = sorted(
    path.stem
    for path in Path(__file__).parent.glob("*.py")
    if path.stem not in ("case", "child") and not path.stem.startswith("test_")
)
LINE_LENGTH = 500
PLACE = re.compile(r":\d+: ")
"""A file's line and what is wrong there says what to correct."""


def kind_of(name: str) -> Kind:
    kind: Kind = importlib.import_module(f"tests.corpus.{name}").KIND
    return kind


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.timeout(600)
def test_every_case_ends_in_one_clear_line(name: str, tmp_path: Path) -> None:
    kind = kind_of(name)
    results = read_all(name, tmp_path)
    wanted = [
        (reader, case.name)
        for reader in kind.readers
        for case in kind.cases
        if reader in (case.readers or kind.readers)
    ]
    assert [(result["reader"], result["case"]) for result in results] == wanted
    cases = {case.name: case for case in kind.cases}
    wrong = [
        f"{result['reader']}, {result['case']}: {what}"
        for result in results
        if (what := problem(kind, cases[result["case"]], result))
    ]
    assert not wrong, "\n".join(wrong)


def read_all(name: str, folder: Path) -> list[dict[str, Any]]:
    """Return what came of each case of a kind."""
    one_thread = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}  # or a fork would lose others
    child = subprocess.run(
        [sys.executable, "-m", "tests.corpus.child", name, folder],
        cwd=ROOT, env={**os.environ, **one_thread}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert child.returncode == 0, child.stderr[-4000:]
    return [json.loads(line) for line in child.stdout.splitlines()]


def problem(kind: Kind, case: Case, result: dict[str, Any]) -> str:
    """Say what is wrong with how a case ended; empty when it is as it should be."""
    raised = result["raised"]
    error = getattr(errors, raised, None)
    if error is None or error is errors.Internal:
        return f"{raised} {result.get('message', '')}{result.get('trace', '')}"
    message = str(result["message"]).replace(result["folder"], "…")
    lines = message.split("\n")
    shown = f"{raised}: {message[:1000]!r}"
    if len(lines) > kind.lines or max(map(len, lines)) > LINE_LENGTH:
        return f"{len(lines)} lines, the longest of {max(map(len, lines))} signs: {shown}"
    if not all(line.isprintable() for line in lines):
        return f"can't be printed: {shown}"
    if not re.search(kind.names, message):
        return f"does not name the file: {shown}"
    if not re.search(case.says, message):
        return f"does not say {case.says!r}: {shown}"
    if not result["fix"] and ";" not in message and not PLACE.search(message):
        return f"does not say what to do: {shown}"
    if result["left"]:
        return f"left behind: {result['left'][:5]}"
    return ""


def test_there_are_enough_cases_of_every_kind() -> None:
    kinds = {name: kind_of(name) for name in KINDS}
    assert {"gguf", "safetensors", "adapter", "tokenizer", "template", "dataset", "suite", "manifest"} <= set(
        kinds
    )
    for name, kind in kinds.items():
        names = [case.name for case in kind.cases]
        assert len(names) >= 5, name
        assert len(set(names)) == len(names), name
    assert sum(len(kind.cases) for kind in kinds.values()) >= 60


@pytest.mark.parametrize(
    ("result", "said"),
    [
        ({"raised": "foreign KeyError", "trace": "…"}, "foreign"),
        ({"raised": "nothing: killed by signal 24"}, "killed"),
        ({"raised": "Internal", "message": "x.json: a defect", "fix": "y"}, "Internal"),
        ({"raised": "InvalidInput", "message": "x.json:\nodd", "fix": "y"}, "2 lines"),
        ({"raised": "InvalidInput", "message": f"x.json: {'y' * 600}", "fix": "y"}, "608 signs"),
        ({"raised": "InvalidInput", "message": "x.json: \x1b[31m odd", "fix": "y"}, "printed"),
        ({"raised": "InvalidInput", "message": "x.json: \ud800 odd", "fix": "y"}, "printed"),
        ({"raised": "InvalidInput", "message": "a file is odd", "fix": "y"}, "does not name"),
        ({"raised": "InvalidInput", "message": "x.json is even", "fix": "y"}, "does not say 'odd'"),
        ({"raised": "InvalidInput", "message": "x.json is odd", "fix": ""}, "what to do"),
        ({"raised": "InvalidInput", "message": "x.json is odd", "fix": "y", "left": ["part"]}, "left behind"),
        ({"raised": "InvalidInput", "message": "x.json is odd", "fix": "y", "left": []}, ""),
    ],
)
def test_what_must_not_come_is_told(result: dict[str, Any], said: str) -> None:
    kind = Kind("x", lambda _: None, {}, (), names=r"x\.json")
    found = problem(kind, Case("x", lambda _: None, "odd"), {"folder": "/nowhere", "left": [], **result})
    assert said in found
    assert bool(found) == bool(said)
