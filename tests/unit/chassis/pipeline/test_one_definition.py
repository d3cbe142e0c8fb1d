"""What the contract's and the examples' comments say of bounds and defaults is what the rules say."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from web4.lora.v1 import deployer_pb2, gateway_pb2, packager_pb2, trainer_pb2
from web4lora_chassis.pipeline.dataset import DatasetSettings
from web4lora_chassis.pipeline.deploy import DeploySettings
from web4lora_chassis.pipeline.package import NEED_MATRIX, TYPES, PackageSettings
from web4lora_chassis.pipeline.rules import Flag, Names, Number, NumbersByName, Rule, StageSettings
from web4lora_chassis.pipeline.train import LoraSettings, LossBand, TrainSettings
from web4lora_chassis.pipeline.verify import BudgetSettings, VerifySettings

ROOT = Path(__file__).parents[4]
DEFINED: dict[str, tuple[type[StageSettings], Any]] = {
    "dataset": (DatasetSettings, gateway_pb2.DatasetSpec),
    "train": (TrainSettings, trainer_pb2.TrainSettings),
    "train.lora": (LoraSettings, trainer_pb2.LoraSettings),
    "train.loss_band": (LossBand, trainer_pb2.LossBand),
    "package": (PackageSettings, packager_pb2.PackageSettings),
    "deploy": (DeploySettings, deployer_pb2.DeploySettings),
    "verify": (VerifySettings, deployer_pb2.VerifySettings),
    "verify.budgets": (BudgetSettings, deployer_pb2.Budgets),
}
SET_BY_CLIENT = {"dataset": {"train_files", "eval_files", "artifact"}, "verify": {"suite", "suite_file"}}
SETTINGS = [
    pytest.param(path, name, rule, id=f"{path}.{name}")
    for path, (kind, _) in DEFINED.items()
    for name, rule in kind.rules().items()
]


def comments(message: str) -> dict[str, str]:
    """Return the comment of each field of a message, from the contract's own text."""
    [text] = [
        found[1]
        for file in sorted((ROOT / "proto/web4/lora/v1").glob("*.proto"))
        if (found := re.search(rf"^message {message} {{$(.*?)^}}$", file.read_text(), re.M | re.S))
    ]
    fields = re.findall(r"((?:^  //.*\n)+)^  [^/\n]*?(\w+) = \d+;$", text, re.M)
    return {name: " ".join(re.sub(r"^  // ?", "", said, flags=re.M).split()) for said, name in fields}


def agrees(said: str, rule: Rule) -> bool:
    """Tell whether words begin with a rule's default."""
    if rule.default_text:
        return said.startswith(rule.default_text)
    if isinstance(rule, Number):
        number = re.match(r"[\d.e-]*\d", said)
        return number is not None and float(number[0]) == rule.default
    if isinstance(rule, Flag):
        return said.startswith(str(rule.default).lower())
    if isinstance(rule, Names):
        return said.startswith(", ".join(rule.default))
    return re.match(r"[\w-]+", said)[0] == rule.default  # type: ignore[index]


@pytest.mark.parametrize("path", DEFINED)
def test_every_field_of_the_contract_is_a_setting(path: str) -> None:
    kind, message = DEFINED[path]
    known = {*kind.rules(), *kind.parts(), *SET_BY_CLIENT.get(path, ())}
    assert known == {field.name for field in message.DESCRIPTOR.fields}


@pytest.mark.parametrize(("path", "name", "rule"), SETTINGS)
def test_the_contract_says_the_default(path: str, name: str, rule: Rule) -> None:
    said = comments(DEFINED[path][1].DESCRIPTOR.name)[name]
    found = re.search(r"Default:? (.*)", said)
    if (rule.default is None and not rule.default_text) or isinstance(rule, NumbersByName):
        assert found is None, "no default, and the contract names one"
    else:
        assert found is not None
        assert agrees(found[1], rule), f"{found[1]!r} is not {rule.default_text or rule.default!r}"


@pytest.mark.parametrize(
    ("path", "name", "rule"), [each for each in SETTINGS if isinstance(each.values[2], Number)]
)
def test_the_contract_says_the_bounds(path: str, name: str, rule: Number) -> None:
    said = comments(DEFINED[path][1].DESCRIPTOR.name)[name].partition(" Default")[0]
    number = r"(\d[\d.e-]*\d|\d)"
    found = re.search(rf"([Aa]bove )?{number} to (below )?{number}(?!\d)", said)
    if rule.high == rule.below:  # without an upper end
        assert found is None
        return
    assert found is not None, f"{said!r} names no bounds"
    low, high = float(found[2]), float(found[4])
    assert (rule.above if found[1] else rule.low, rule.below if found[3] else rule.high) == (low, high)


def test_the_demo_says_every_default() -> None:
    text = (ROOT / "examples/web4/demo.yaml").read_text()
    said = told_in_yaml(text)
    for path, (kind, _) in DEFINED.items():
        for name, rule in kind.rules().items():
            if (
                (rule.default is None and not rule.default_text)
                or isinstance(rule, NumbersByName)
                or path == "train.loss_band"
            ):
                continue
            assert agrees(said[f"{path}.{name}"], rule), f"{path}.{name}: {said[f'{path}.{name}']!r}"
    band = LossBand()
    assert said["train.loss_band"] == f"{band.low} to {band.high}"


@pytest.mark.parametrize("name", ["deepseek-coder-6.7b.yaml", "qwen2.5-coder-7b.yaml"])
def test_what_the_other_examples_leave_at_its_default_is_so(name: str) -> None:
    text = (ROOT / "examples/web4" / name).read_text()
    told = re.findall(r"^  # (\w+): [^#]*#([^(]*?)\(default ([^)]*)\)", text, re.M | re.S)
    rules = {**PackageSettings.rules(), **DeploySettings.rules()}
    assert {key for key, _, _ in told} == {"adapter_gguf", "promote", "target"}
    for key, _, words in told:
        assert agrees(words, rules[key]), f"{key}: {words!r}"


def told_in_yaml(text: str) -> dict[str, str]:
    """Return what "(default …)" says beside each key, or above it; "" where nothing is said."""
    told: dict[str, str] = {}
    above: list[str] = []
    path: list[tuple[int, str]] = []
    for line in text.splitlines():
        key = re.match(r"( *)(?:# )?(\w+):(?: |$)", line)
        if key is None or (line.lstrip().startswith("#") and not re.match(r" +# \w+: \S+ +#", line)):
            above = [*above, line.strip("# ")] if line.lstrip().startswith("#") else []
            continue
        indent = len(key[1])
        path = [each for each in path if each[0] < indent] + [(indent, key[2])]
        here = " ".join(
            [*above, line.partition("#")[2].strip() if not line.strip().startswith("#") else line]
        )
        found = re.findall(r"\(default:? ([^)]*)\)", here)
        told[".".join(name for _, name in path)] = found[-1] if found else ""
        above = []
    return told


def test_a_type_is_known_once() -> None:
    assert len(set(TYPES)) == len(TYPES)
    assert set(TYPES) > NEED_MATRIX


def test_what_a_run_is_stored_with_is_what_a_worker_works_with() -> None:
    for kind, message in DEFINED.values():
        empty, filled = message(), message()
        kind.fill(filled)
        assert kind.problems(filled) == []
        assert kind.of(filled) == kind.of(empty) == kind()
