"""Test suites: `suite.yaml`, prompts, rules and schemas, as the client stores and the deployer reads them."""

from __future__ import annotations

import json
from pathlib import Path

from tests.corpus.case import DEEP, Case, Change, Kind, holds

FILE, ROWS, RULES, SCHEMA = "suite.yaml", "rows.jsonl", "rules.yaml", "calls.json"
SUITE = """name: mine
cores:
  calls:
    check: tool_call
    prompts: rows.jsonl
    max_tokens: 8
    constrained: true
    json_schema: calls.json
  style:
    check: style
    prompts: [style.jsonl]
    max_tokens: 8
    rules: rules.yaml
"""
BOTH, DEPLOYER = (), ("deployer",)


def row(**changes: object) -> str:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    base = {"id": "c-1", "core": "calls", "messages": messages, "check": {"tool": "a", "args": {}}}
    return json.dumps({**base, **changes})


def whole(folder: Path) -> None:
    (folder / FILE).write_text(SUITE)
    (folder / ROWS).write_text(row())
    (folder / "style.jsonl").write_text(row(id="s-1", core="style", check={"class": "A", "methods": []}))
    (folder / RULES).write_text("max_lines: 30\n")
    (folder / SCHEMA).write_text('{"type": "object"}')


def client(folder: Path, made: Path) -> None:
    from web4lora.client.upload import store_suite
    from web4lora_chassis.artifacts.folder import FolderBackend
    from web4lora_chassis.artifacts.store import ArtifactStore

    store_suite(ArtifactStore(FolderBackend(made)), "demo", folder / FILE)


def deployer(folder: Path, _: Path) -> None:
    from web4lora_deployer.suite import load_suite
    from web4lora_deployer.testing.check_suite import scores_of

    scores_of(load_suite(folder))


def suite(old: str, new: str) -> Change:
    assert old in SUITE
    return holds(FILE, SUITE.replace(old, new, 1))


def style(check: object) -> Change:
    return holds("style.jsonl", row(id="s", core="style", check=check))


def a_link_out(folder: Path) -> None:
    (folder / ROWS).unlink()
    (folder / ROWS).symlink_to("/etc/passwd")


LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + n)}: &{chr(98 + n)} [{', '.join([f'*{chr(97 + n)}'] * 9)}]\n" for n in range(12)
)
NO_YAML: dict[str, str | bytes] = {
    "empty": b"",
    "zeros": bytes(64),
    "not UTF-8": b"name: \xff\xfe\n",
    "UTF-16": SUITE.encode("utf-16"),
    "a list": "- a\n- b\n",
    "words": "just words\n",
    "two documents": "a: 1\n---\nb: 2\n",
    "a tab": "name:\n\tx: 1\n",
    "an open list": "name: [" + "\n" * 9,
    "nested 5,000 deep": "a: " + "[" * 5_000 + "]" * 5_000 + "\n",
    "nested 5,000 deep and open": "a: " + "{a: " * 5_000,
    "nested 900,000 deep and open": "a: " + "[" * 900_000,
    "a million keys": "".join(f"k{n}: {n}\n" for n in range(1_000_000)),
    "blocks 1,000 deep": "".join(f"{' ' * n}a:\n" for n in range(1_000)),
    "laughs by the billion": LAUGHS,
    "a list that holds itself": "a: &a [*a]\n",
    "merged by the billion": "a: &a {x: 1}\n"
    + "".join(f"b{n}: &b{n} {{<<: [*{'a' if not n else f'b{n - 1}'}, *a]}}\n" for n in range(40)),
    "a Python object": "name: !!python/object/apply:os.system ['true']\n",
    "a tag of nobody": "name: !nobody x\n",
    "a set": "name: !!set {a, b}\n",
    "binary that is none": "name: !!binary x\n",
    "a date that can't be": "name: 2024-13-99\n",
    "a time that can't be": "name: 2024-01-01T99:99:99Z\n",
    "an integer that is none": "name: !!int x\n",
    "a float that is none": "name: !!float x\n",
    "a number of 5,000 digits": f"name: {'9' * 5000}\n",
    "a base of sixty": f"name: {'9:' * 5000}59\n",
    "a key that is a list": "? [a, b]\n: 1\n",
    "a key that is an object": "? {a: b}\n: 1\n",
    "a key of 1,000 letters": f"{'x' * 1_000}: 1\n",
    "a key of many lines": '"a\\nb\\e[31m": 1\n',
    "half a pair of surrogates": 'name: "\\ud800"\n',
    "half a pair in a key": '"\\ud800": 1\n',
    "a control sign": "name: \x07\n",
    "a directive of the future": "%YAML 9.9\n---\na: 1\n",
    "10,000 unknown keys": "".join(f"k{n}: 1\n" for n in range(10_000)),
    "a key twice": "name: a\nname: b\n",
}
"""What any YAML file of ours may hold instead."""

CHANGES: dict[str, Change] = {
    "a name of 10,000 letters": suite("mine", "x" * 10_000),
    "a name that is a list": suite("mine", "[a]"),
    "tokens a text": suite("max_tokens: 8", "max_tokens: many"),
    "tokens below 0": suite("max_tokens: 8", "max_tokens: -8"),
    "tokens endless": suite("max_tokens: 8", "max_tokens: .inf"),
    "tokens of 4,000 digits": suite("max_tokens: 8", f"max_tokens: {'9' * 4000}"),
    "cores a list": holds(FILE, "name: mine\ncores: [a]\n"),
    "a core that is a number": holds(FILE, "name: mine\ncores: {a: 7}\n"),
    "no core": holds(FILE, "name: mine\ncores: {}\n"),
    "a timeout that is no number": suite("name: mine", "name: mine\ntimeout_seconds: .nan"),
    "a check of nobody": suite("check: style", "check: taste"),
    "a rule of nobody": holds(RULES, "rules: {jsdok: true}\n"),
    "rules that are a list": holds(RULES, "- a\n"),
    "a fence that is none": holds(RULES, 'fence: "ts\\n"\n'),
    "a schema that is a list": holds(SCHEMA, "[1]"),
    "a schema 100,000 deep": holds(SCHEMA, b'{"a":' * DEEP + b"1" + b"}" * DEEP),
    "a schema that is no JSON": holds(SCHEMA, "{oops"),
    "a schema that is no UTF-8": holds(SCHEMA, b"\xff"),
    "no prompts": holds(ROWS, "\n\n"),
    "a prompt that is no JSON": holds(ROWS, row() + "\n{oops"),
    "a prompt 100,000 deep": holds(ROWS, "[" * DEEP + "]" * DEEP),
    "a prompt that is no number": holds(ROWS, '{"id": NaN}'),
    "a number of 5,000 digits": holds(ROWS, '{"id": ' + "9" * 5000 + "}"),
    "prompts of UTF-16": holds(ROWS, row().encode("utf-16")),
    "prompts that are zeros": holds(ROWS, bytes(4096)),
    "prompts that are one array": holds(ROWS, f"[{row()}]"),
    "half a pair of surrogates": holds(ROWS, row(id="\ud800")),
    "an id of a million letters twice": holds(ROWS, f"{row(id='x' * 1_000_000)}\n" * 2),
    "an id of many lines twice": holds(ROWS, row(id="a\nb\x1b[31m") + "\n" + row(id="a\nb\x1b[31m")),
    "a key of many lines": holds(ROWS, row(**{"a\nb\x1b[31m": 1})),
    "a core of a million letters": holds(ROWS, row(core="x" * 1_000_000)),
    "a role of many lines": holds(ROWS, row(messages=[{"role": "a\nb", "content": "x"}] * 2)),
    "messages an object": holds(ROWS, row(messages={"role": "user"})),
    "a tool that is a list": holds(ROWS, row(check={"tool": ["a"], "args": {}})),
    "a check with a key too many": holds(ROWS, row(check={"tool": "a", "args": {}, "x" * 9999: 1})),
    "a wrong prompt in each of 10,000 lines": holds(ROWS, "{}\n" * 10_000),
    "style of odd methods": style({"class": "A", "methods": [7]}),
    "style of a class that is none": style({"class": 7, "methods": []}),
    "prompts that are a link to elsewhere": a_link_out,
}  # fmt: skip
PLACES: dict[str, str] = {
    "above": "../rows.jsonl",
    "at the root": "/etc/passwd",
    "above, by a way round": "a/../../rows.jsonl",
    "not there": "nowhere.jsonl",
    "of a NUL": '"a\\0b"',
    "of many lines": '"a\\nb"',
    "of half a character": '"\\ud800"',
    "of 10,000 letters": "x" * 10_000,
    "that is a number": "7",
    "that is this folder": ".",
}

KIND = Kind(
    name="suite",
    whole=whole,
    readers={"client": client, "deployer": deployer},
    cases=(
        *(Case(f"suite.yaml: {name}", holds(FILE, data), readers=DEPLOYER) for name, data in NO_YAML.items()),
        *(Case(f"rules.yaml: {name}", holds(RULES, data), "rules", DEPLOYER)
          for name, data in NO_YAML.items() if name not in ("words", "empty")),
        *(Case(name, change, readers=DEPLOYER) for name, change in CHANGES.items()),
        *(Case(f"prompts {name}", suite("rows.jsonl", place)) for name, place in PLACES.items()),
        Case("no suite.yaml", lambda folder: (folder / FILE).unlink()),
        *(Case(f"stored, {name}", holds(FILE, NO_YAML[name]), readers=("client",)) for name in (
            "not UTF-8", "UTF-16", "an open list", "nested 5,000 deep", "nested 5,000 deep and open",
            "a control sign", "a directive of the future",
        )),
    ),
    names=r"suite\.yaml|rows\.jsonl|style\.jsonl|rules\.yaml|calls\.json",
    lines=22,
)  # fmt: skip
