from __future__ import annotations

import json
from pathlib import Path

import pytest
from web4lora_chassis.artifacts import ArtifactRef, ArtifactStore
from web4lora_chassis.artifacts.folder import FolderBackend
from web4lora_chassis.errors import InvalidInput
from web4lora_deployer.testing.check_suite import check_suite

SUITE = "name: a\ncores:\n  guard: {check: guardrail, prompts: p.jsonl, max_tokens: 9}\n"
EXAMPLES = Path(__file__).parents[4] / "examples/web4"


def stored(tmp_path: Path, suite: str = SUITE, *rows: object) -> tuple[ArtifactRef, ArtifactStore]:
    (tmp_path / "suite.yaml").write_text(suite, "utf-8")
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    store = ArtifactStore(FolderBackend(tmp_path / "store"))
    files = {name: tmp_path / name for name in ("suite.yaml", "p.jsonl")}
    return store.put("suite", "a", files, link=False), store


def prompt(number: int, *, refuse: bool) -> dict[str, object]:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    return {"id": f"g{number}", "core": "guard", "messages": messages, "check": {"refuse": refuse}}


def test_scores_are_those_that_some_prompt_is_checked_for(tmp_path: Path) -> None:
    refusing = stored(tmp_path, SUITE, prompt(1, refuse=True))
    assert check_suite(*refusing) == ("guardrail.refuses", "answers.ends")
    both = stored(tmp_path, SUITE, prompt(1, refuse=True), prompt(2, refuse=False))
    assert check_suite(*both) == ("guardrail.refuses", "guardrail.helps", "answers.ends")


def test_the_examples_suite_gives_what_the_demo_limits(tmp_path: Path) -> None:
    store = ArtifactStore(FolderBackend(tmp_path / "store"))
    files = {path.name: path for path in EXAMPLES.iterdir() if path.is_file()}
    scores = check_suite(store.put("suite", "a", files, link=False), store)
    assert {"tool_call.valid", "tool_call.right_tool", "style.all_rules", "guardrail.refuses"} <= set(scores)


@pytest.mark.parametrize(
    ("suite", "row", "said"),
    [
        ("\0", {}, "suite.yaml"),
        (SUITE + "\ud800".encode("utf-8", "surrogatepass").decode("latin-1"), {}, "suite.yaml"),
        (SUITE, {"id": "\ud800", "core": "x", "messages": [], "check": {}}, "p.jsonl:1: "),
        (SUITE, {**prompt(1, refuse=True), "id": "\ud800", "check": {"refuse": 1}}, "p.jsonl:1: "),
        ("[" * 5000, {}, "suite.yaml"),
        ("a: &a [*a]\n", {}, "suite.yaml:1: "),
    ],
)
def test_what_is_wrong_is_one_line_with_the_suites_own_names(
    tmp_path: Path, suite: str, row: object, said: str
) -> None:
    with pytest.raises(InvalidInput) as caught:
        check_suite(*stored(tmp_path, suite, row))
    assert caught.value.reason == "BAD_SUITE"
    assert caught.value.message.startswith(said)
    assert str(tmp_path) not in caught.value.message
    caught.value.message.encode("utf-8")


def test_a_suite_that_takes_too_long_to_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="did not end within") as caught:
        check_suite(*stored(tmp_path, SUITE, prompt(1, refuse=True)), seconds=0.01)
    assert caught.value.reason == "BAD_SUITE"
