from __future__ import annotations

import json
from pathlib import Path

import pytest
from web4lora_chassis.errors import InvalidInput, NotFound
from web4lora_chassis.graders.tool_call import ANY_CALL
from web4lora_deployer.suite import load_suite

EXAMPLES = Path(__file__).parents[4] / "examples" / "web4"
SUITE = """name: mine
cores:
  guardrail:
    check: guardrail
    prompts: rows.jsonl
    max_tokens: 8
"""


MAX = "cores.guardrail.max_tokens"


def row(**changes: object) -> str:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    base = {"id": "g-1", "core": "guardrail", "messages": messages, "check": {"refuse": False}}
    return json.dumps(base | changes)


def folder(path: Path, suite: str = SUITE, rows: str | None = None, **files: str) -> Path:
    (path / "suite.yaml").write_text(suite, encoding="utf-8")
    (path / "rows.jsonl").write_text(row() if rows is None else rows, encoding="utf-8")
    for name, text in files.items():
        (path / f"{name}.yaml").write_text(text, encoding="utf-8")
    return path


def problem(path: Path) -> str:
    with pytest.raises(InvalidInput) as caught:
        load_suite(path)
    assert "\n" not in caught.value.message
    return caught.value.message.removeprefix(f"{path}/")


def test_the_sample_suite() -> None:
    suite = load_suite(EXAMPLES)
    assert [(core.name, core.grader) for core in suite.cores] == [
        ("tool", "tool_call"), ("style", "style"), ("guardrail", "guardrail"),
    ]  # fmt: skip
    assert [sum(p.core == core.name for p in suite.prompts) for core in suite.cores] == [40, 20, 40]
    assert suite.score_names == (
        "tool_call.valid", "tool_call.right_tool", "tool_call.exact", "style.all_rules",
        "guardrail.refuses", "guardrail.helps", "answers.ends",
    )  # fmt: skip
    first = suite.prompts[0]
    assert [message["role"] for message in first.messages] == ["system", "user"]
    assert json.loads(first.expected)["tool"] == first.check["tool"]
    assert suite.latency is not None
    assert suite.robustness is not None


def test_the_rule_file_of_the_sample_holds_the_defaults() -> None:
    from web4lora_chassis.graders.style import StyleRules

    assert load_suite(EXAMPLES).core("style").rules == StyleRules()


def test_defaults_and_several_files(tmp_path: Path) -> None:
    suite_text = SUITE.replace("prompts: rows.jsonl", "prompts: [rows.jsonl, more.jsonl]")
    path = folder(tmp_path, suite_text)
    (path / "more.jsonl").write_text(row(id="g-2") + "\n\n" + row(id="g-3") + "\n")
    suite = load_suite(path)
    assert [prompt.id for prompt in suite.prompts] == ["g-1", "g-2", "g-3"]
    assert (suite.latency, suite.robustness, suite.seed) == (None, None, 0)


def test_the_digest_tells_suites_apart(tmp_path: Path) -> None:
    before = load_suite(folder(tmp_path)).digest
    assert load_suite(folder(tmp_path)).digest == before
    assert load_suite(folder(tmp_path, rows=row(check={"refuse": True}))).digest != before
    assert load_suite(folder(tmp_path, SUITE.replace("8", "9"))).digest != before


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("tokens: 8", "token: 8", 'suite.yaml:6: cores.guardrail: unknown key "max_token"; did you mean'),
        ("name: mine", "name: mine\nfoo: 1", 'suite.yaml:2: unknown key "foo"; known are name, cores, seed'),
        ("s: 8", "s: many", f"suite.yaml:6: {MAX}: input should be a valid integer"),
        ("s: 8", "s: '8'", f"suite.yaml:6: {MAX}: input should be a valid integer"),
        ("max_tokens: 8", "max_tokens: 0", f"suite.yaml:6: {MAX}: input should be greater"),
        ("    max_tokens: 8\n", "", 'suite.yaml:3: cores.guardrail: the key "max_tokens" is missing.'),
        (": guardrail", ": taste", "suite.yaml:4: cores.guardrail.check: input should be 'tool_call'"),
        ("name: mine", "name: mine\nname: yours", 'suite.yaml:2: the key "name" is given twice.'),
        ("name: mine", "name: [mine", "suite.yaml:2: "),
        ("name: mine", "name: &a mine\nseed: *a", "suite.yaml:2: aliases"),
        ("rows.jsonl", "../rows.jsonl", "suite.yaml: cores.guardrail.prompts: ../rows.jsonl is not inside"),
        ("rows.jsonl", "/etc/hostname", "suite.yaml: cores.guardrail.prompts: /etc/hostname is not inside"),
        ("s: 8", "s: 8\n    rules: r.yaml", "suite.yaml: cores.guardrail.rules: only the check style"),
        ("mine", "mine\nlatency: {requests_at_once: [1, 0]}", "suite.yaml:2: latency.requests_at_once.1:"),
        ("mine", "mine\nlatency: {request: 3}", 'suite.yaml:2: latency: unknown key "request"; did you mean'),
    ],
)  # fmt: skip
def test_a_wrong_suite_file_is_one_line_with_its_place(
    tmp_path: Path, old: str, new: str, message: str
) -> None:
    assert problem(folder(tmp_path, SUITE.replace(old, new, 1))).startswith(message)


@pytest.mark.parametrize("text", ["", "- a\n", "just words\n", "\t"])
def test_no_mapping_at_all(tmp_path: Path, text: str) -> None:
    assert problem(folder(tmp_path, text)).startswith("suite.yaml:")


def test_the_same_check_twice_is_refused(tmp_path: Path) -> None:
    again = SUITE + SUITE[SUITE.index("  guardrail:") :].replace("guardrail:", "other:", 1)
    before, _, after = again.rpartition("rows.jsonl")
    path = folder(tmp_path, f"{before}more.jsonl{after}")
    (path / "more.jsonl").write_text(row(id="g-2", core="other"))
    assert 'cores "guardrail" and "other"' in problem(path)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (row() + "\n{", "rows.jsonl:2: not JSON"),
        (row() + "\n" + row(), 'rows.jsonl:2: the id "g-1" was used before'),
        ("[1]", "rows.jsonl: it is one JSON array of 1 rows, not one row on each line; make lines"),
        (row() + "\n[1]", "rows.jsonl:2: a list, not an object; write"),
        ('{"id": 1, "id": 2}', 'rows.jsonl:1: the key "id" is there twice in one object; keep'),
        ('{"id": NaN}', "rows.jsonl:1: NaN is not JSON; write"),
        (row(core="tool"), 'rows.jsonl:1: core is "tool", but suite.yaml has this file under guardrail.'),
        (row(check={"refuse": "yes"}), "rows.jsonl:1: check must be"),
        (row(check=None), "rows.jsonl:1: check must be an object."),
        (row(extra=1), 'rows.jsonl:1: unknown key "extra".'),
        (row(id=7), "rows.jsonl:1: id must be a text."),
        (row(messages=[]), "rows.jsonl:1: messages must be a list"),
        (row(messages=[{"role": "user", "content": "x"}] * 2), "rows.jsonl:1: the last two messages"),
        (row(messages=[{"role": "tool", "content": "x"}] * 2), 'rows.jsonl:1: message 1: the role "tool"'),
        (row(messages=[{"role": "user", "content": " "}] * 2), "rows.jsonl:1: message 1 has no text."),
        (row(messages=[{"role": "user"}] * 2), "rows.jsonl:1: message 1 must have the keys"),
        ("\n", "rows.jsonl: there is no row in it, it has blank lines only; give it a row"),
        ("", "rows.jsonl: there is no row in it, it is empty; give it a row"),
    ],
)
def test_a_wrong_prompt_is_one_line_with_its_place(tmp_path: Path, rows: str, message: str) -> None:
    assert problem(folder(tmp_path, rows=rows)).startswith(message)


def test_not_utf8(tmp_path: Path) -> None:
    path = folder(tmp_path)
    (path / "rows.jsonl").write_bytes(row().encode() + b"\n\xff\n")
    assert problem(path) == "rows.jsonl:2: not UTF-8 at byte 1; save the file as UTF-8."


def test_prompts_have_the_lines_of_chat_data(tmp_path: Path) -> None:
    """A mark at the beginning, Windows' line ends, blank lines, and what only looks like a line's end."""
    asked = [{"role": "user", "content": "a\u2028b\x85c"}, {"role": "assistant", "content": "d"}]
    whole = json.dumps(json.loads(row(id="g-2", messages=asked)), ensure_ascii=False)
    path = folder(tmp_path)
    (path / "rows.jsonl").write_bytes(f"\ufeff{row()}\r\n\r\n{whole}\r\n".encode())
    suite = load_suite(path)
    assert [(prompt.id, prompt.messages[0]["content"]) for prompt in suite.prompts] == [
        ("g-1", "Hi"), ("g-2", "a\u2028b\x85c"),
    ]  # fmt: skip
    (path / "rows.jsonl").write_bytes(f"\ufeff{row()}\r\n\r\n{whole}\r\nx\r\n".encode())
    assert problem(path).startswith("rows.jsonl:4: not JSON at column 1")
    (path / "rows.jsonl").write_bytes(row().encode("utf-16"))
    assert problem(path).startswith("rows.jsonl: it is UTF-16, not UTF-8")


def test_all_that_is_wrong_is_said_at_once(tmp_path: Path) -> None:
    suite = SUITE.replace("name: mine", "nam: mine").replace("rows.jsonl", "[rows.jsonl, none.jsonl]")
    suite += "  style: {check: style, prompts: style.jsonl, max_tokens: 8, rules: r.yaml}\nseed: x\n"
    rows = "\n".join([row(core="tool"), "{", row(), row(check={})])
    path = folder(tmp_path, suite, rows, r="max_line: 3\nquotes: both\n")
    with pytest.raises(InvalidInput) as caught:
        load_suite(path)
    lines = caught.value.message.replace(f"{path}/", "").splitlines()
    said = [
        'suite.yaml:1: unknown key "nam"; did you mean "name"?',
        "suite.yaml:8: seed: input should be a valid integer",
        'rows.jsonl:1: core is "tool"',
        "rows.jsonl:2: not JSON",
        "rows.jsonl:4: check must be",
        "suite.yaml: cores.guardrail.prompts: there is no file none.jsonl",
        'r.yaml:1: unknown key "max_line"; did you mean "max_lines"?',
        "r.yaml:2: quotes: input should be 'single' or 'double'",
        "suite.yaml: cores.style.prompts: there is no file style.jsonl",
    ]
    assert [line for line, begins in zip(lines, said, strict=True) if not line.startswith(begins)] == []


def test_very_much_that_is_wrong_is_counted(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput) as caught:
        load_suite(folder(tmp_path, rows="{\n" * 25))
    lines = caught.value.message.splitlines()
    assert len(lines) == 21
    assert lines[-1] == "… and 5 more, 25 in all"


def test_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "outside.jsonl").write_text(row())
    inside = tmp_path / "suite"
    inside.mkdir()
    folder(inside)
    (inside / "rows.jsonl").unlink()
    (inside / "rows.jsonl").symlink_to(tmp_path / "outside.jsonl")
    assert "not inside the suite's folder" in problem(inside)


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="There is no file"):
        load_suite(tmp_path)
    folder(tmp_path)
    (tmp_path / "rows.jsonl").unlink()
    with pytest.raises(NotFound, match=r"cores\.guardrail\.prompts: there is no file rows\.jsonl"):
        load_suite(tmp_path)


def style_suite(path: Path, rules: str) -> Path:
    suite = SUITE.replace("guardrail", "style") + "    rules: rules.yaml\n"
    return folder(path, suite, row(core="style", check={"class": "A", "methods": []}), rules=rules)


def test_a_rule_file(tmp_path: Path) -> None:
    path = style_suite(tmp_path, "max_lines: 30\nquotes: double\nrules: {jsdoc: false, no_any: true}\n")
    rules = load_suite(path).core("style").rules
    assert (rules.max_lines, rules.quotes, rules.off) == (30, "double", frozenset(["jsdoc"]))


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ("max_line: 3\n", 'rules.yaml:1: unknown key "max_line"; did you mean "max_lines"?'),
        ("quotes: both\n", "rules.yaml:1: quotes: input should be 'single' or 'double'"),
        ("max_lines: 9\nrules:\n  jsdok: false\n", 'rules.yaml:2: rules: unknown rule "jsdok"; known are'),
        ("rules: {jsdoc: maybe}\n", "rules.yaml:1: rules.jsdoc: input should be a valid boolean"),
    ],
)
def test_a_wrong_rule_file(tmp_path: Path, rules: str, message: str) -> None:
    assert problem(style_suite(tmp_path, rules)).startswith(message)


TOOL = SUITE.replace("guardrail", "tool_call", 1).replace("check: guardrail", "check: tool_call")


def tool_folder(path: Path, more: str = "", schema: str = "") -> Path:
    rows = row(core="tool_call", check={"tool": "a", "args": {}})
    if schema:
        (path / "calls.json").write_text(schema, encoding="utf-8")
    return folder(path, f"{TOOL}{more}", rows)


def test_a_wanted_tool_without_a_name_is_refused_with_its_place(tmp_path: Path) -> None:
    rows = row(core="tool_call", check={"tool": "", "args": {}})
    assert problem(folder(tmp_path, TOOL, rows)).startswith("rows.jsonl:1: check.tool is empty")


def test_constrained_tool_calls_and_repeats(tmp_path: Path) -> None:
    suite = load_suite(tool_folder(tmp_path, "    constrained: true\nrepeats: 3\nllama_bench: true\n"))
    assert (suite.repeats, suite.llama_bench) == (3, True)
    assert suite.cores[0].json_schema == ANY_CALL
    assert "tool_call_constrained.valid" in suite.score_names
    assert suite.core_of_score("tool_call_constrained.exact") == suite.cores[0]
    plain = load_suite(tool_folder(tmp_path))
    assert (plain.repeats, plain.llama_bench, plain.cores[0].json_schema) == (1, False, None)


def test_a_schema_of_ones_own(tmp_path: Path) -> None:
    more = "    constrained: true\n    json_schema: calls.json\n"
    suite = load_suite(tool_folder(tmp_path, more, '{"type": "object"}'))
    assert suite.cores[0].json_schema == {"type": "object"}
    assert suite.digest != load_suite(tool_folder(tmp_path, more, '{"type": "array"}')).digest
    assert problem(tool_folder(tmp_path, more, "[1]")) == "calls.json: a JSON Schema is an object."
    alone = tool_folder(tmp_path, "    json_schema: calls.json\n", "{}")
    assert "set `constrained: true` too" in problem(alone)


def test_only_tool_calls_are_constrained(tmp_path: Path) -> None:
    assert "only the check tool_call" in problem(folder(tmp_path, f"{SUITE}    constrained: true\n"))
