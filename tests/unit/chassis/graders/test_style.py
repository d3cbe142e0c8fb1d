from __future__ import annotations

import pytest
from web4lora_chassis.graders import style
from web4lora_chassis.graders.style import RULE_NAMES, StyleRules

WANTED = {"class": "Cache", "methods": ["get", "put"]}
GOOD = """```ts
/** Keeps values. */
export class Cache {
  private readonly values: Map<string, string> = new Map();

  constructor(private readonly limit: number) {}

  get(key: string): string | undefined {
    return this.values.get(key);
  }

  put(key: string, value: string): void { this.values.set(key, value); }
}
```"""


def broken(text: str, rules: StyleRules | None = None) -> set[str]:
    """The rules that an answer breaks."""
    total, *checks = style.grade(text, WANTED, rules)
    failed = {check.name.removeprefix("style.") for check in checks if not check.passed}
    assert total.name == "style.all_rules"
    assert total.passed is (not failed)
    assert all(check.reason for check in checks if not check.passed)
    return failed


def test_a_good_answer_passes_every_rule() -> None:
    assert broken(GOOD) == set()
    assert len(style.grade(GOOD, WANTED)) == len(RULE_NAMES) + 1


@pytest.mark.parametrize(
    ("old", "new", "rule"),
    [
        ("```ts\n", "Here you are:\n```ts\n", {"one_block"}),
        ("```ts\n", "```typescript\n", {"one_block"}),
        ("}\n```", "}\n```\nDone.", {"one_block"}),
        ("}\n```", "}\n```\n```ts\n```", {"one_block"}),
        ("export class", "class", {"one_class", "class_name", "methods", "jsdoc", "private_readonly",
                                   "typed_parameters", "return_types"}),
        ("class Cache", "class Cash", {"class_name"}),
        ("  get(", "  fetch(", {"methods"}),
        ("  put(", "  drop(): void {}\n  put(", {"methods"}),
        ("/** Keeps values. */\n", "", {"jsdoc"}),
        ("/** Keeps values. */", "// Keeps values.", {"jsdoc"}),
        ("/** Keeps values. */", "/** */", {"jsdoc"}),
        ("/** Keeps values. */", "/** Keeps. */\n/** Values. */", {"jsdoc", "max_lines"} - {"max_lines"}),
        ("/** Keeps values. */", "/** Keeps values. */\n", {"jsdoc"}),
        ("private readonly values", "private values", {"private_readonly"}),
        ("private readonly values", "readonly values", {"private_readonly"}),
        ("private readonly values", "#values", {"private_readonly"}),
        ("private readonly limit", "readonly limit", {"private_readonly"}),
        ("private readonly limit", "public limit", {"private_readonly"}),
        ("limit: number", "limit", {"typed_parameters"}),
        ("get(key: string)", "get(key)", {"typed_parameters"}),
        ("get(key: string)", "get(key = 'a')", {"typed_parameters"}),
        ("value: string): void", "value: string)", {"return_types"}),
        ("get(key);", "get(\"key\");", {"quotes"}),
        ("get(key);", "get(key)", {"semicolons"}),
        ("new Map();", "new Map()", {"semicolons"}),
        ("    return", "   return", {"indentation"}),
        ("    return", "      return", {"indentation"}),
        ("    return", "\treturn", {"indentation"}),
        ("  get(", "get(", {"indentation"}),
        ("Map<string, string>", "Map<string, any>", {"no_any"}),
        ("return this", "return <any>this", {"no_any"}),
        ("this.values.set(key, value);", "console.log(key);", {"no_console"}),
        ("}\n```", "}\nexport default Cache;\n```", {"no_default_export"}),
        ("}\n```", "}\nexport { Cache as default };\n```", {"no_default_export"}),
        ("}\n```", "\n```", {"parses"}),
    ],
)  # fmt: skip
def test_one_broken_rule_is_the_one_reported(old: str, new: str, rule: set[str]) -> None:
    assert old in GOOD
    # Room for the lines that some changes add.
    assert rule <= broken(GOOD.replace(old, new, 1), StyleRules(max_lines=20))
    if "parses" not in rule:
        assert broken(GOOD.replace(old, new, 1), StyleRules(max_lines=20)) == rule


@pytest.mark.parametrize("text", ["", "```ts\n```", "```ts\n\n```"])
def test_no_code_fails_every_rule(text: str) -> None:
    assert broken(text) - {"one_block"} == set(RULE_NAMES) - {"one_block"}


def test_a_block_that_never_ends_is_still_looked_at() -> None:
    assert broken(GOOD.removesuffix("\n```")) == {"one_block"}


def test_limits_and_rules_come_from_the_rule_file() -> None:
    assert broken(GOOD, StyleRules(max_lines=5)) == {"max_lines"}
    assert broken(GOOD, StyleRules(max_lines=5, off=frozenset(["max_lines"]))) == set()
    assert (
        broken(GOOD.replace("class Cache", "class Cash"), StyleRules(off=frozenset(["class_name"]))) == set()
    )
    assert broken(GOOD, StyleRules(fence="typescript")) == {"one_block"}
    assert broken(GOOD.replace("get(key);", 'get("a");'), StyleRules(quotes="double")) == set()
    assert broken(GOOD, StyleRules(indent_spaces=4)) == {"indentation"}
    more = GOOD.replace("  put(", "  size(): number { return 0; }\n  put(")
    assert broken(more, StyleRules(max_lines=20, extra_methods=True)) == set()


@pytest.mark.parametrize(
    "body",
    [
        "    return this.values\n      .filter((v) => v)\n      .map((v) => {\n        return v;\n      });",
        "    switch (key) {\n      case 'a':\n        return 1;\n      default:\n        return 2;\n    }",
        "    for (let i = 0; i < 3; i++) {\n      use(i);\n    }\n    for (const k of this.all) use(k);",
        "    if (key) return 'a';\n    else {\n      return `\n  free text\n`;\n    }",
        "    const found =\n      this.values.get(key);\n    return found ?? '';",
        "    return {\n      key,\n      nested: [\n        1,\n      ],\n    };",
        "    try {\n      this.use(key);\n    } catch (error) {\n      throw new Error('no');\n    }",
        "    do {\n      key = '';\n    } while (key);",
    ],
)
def test_usual_layouts_are_right(body: str) -> None:
    text = GOOD.replace("    return this.values.get(key);", body)
    assert broken(text, StyleRules(max_lines=30)) == set()


def test_setters_and_constructors_need_no_return_type() -> None:
    text = GOOD.replace("  get(", "  set size(value: number) {}\n\n  get(")
    rules = StyleRules(max_lines=30, extra_methods=True)
    assert broken(text, rules) == set()


def test_odd_bytes_do_not_break_the_parser() -> None:
    assert "parses" in broken("```ts\nexport class \ud800 {\x00\n```")
