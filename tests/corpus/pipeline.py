"""Pipeline files, as the command reads them."""

from __future__ import annotations

from pathlib import Path

from tests.corpus.case import Case, Change, Kind, holds
from tests.corpus.suite import NO_YAML

FILE = "demo.yaml"
GOOD = """name: web4-demo
dataset:
  train_files: [train.jsonl]
base:
  model: smollm2-135m-instruct
train:
  epochs: 1
"""


def whole(folder: Path) -> None:
    (folder / FILE).write_text(GOOD)
    (folder / "train.jsonl").touch()


def command(folder: Path, _: Path) -> None:
    from web4lora.pipeline_file import read_pipeline

    read_pipeline(folder / FILE)


def changed(old: str, new: str) -> Change:
    assert old in GOOD
    return holds(FILE, GOOD.replace(old, new, 1))


CHANGES: dict[str, Change] = {
    "2 MiB of blanks": holds(FILE, " " * (2 << 20)),
    "a name of 100,000 letters": changed("web4-demo", "x" * 100_000),
    "a name of many lines": changed("web4-demo", '"a\\nb\\e[31m"'),
    "a name that is a mapping": changed("web4-demo", "{a: b}"),
    "epochs endless": changed("epochs: 1", "epochs: .inf"),
    "epochs no number": changed("epochs: 1", "epochs: .nan"),
    "epochs of 5,000 digits": changed("epochs: 1", f"epochs: {'9' * 5000}"),
    "epochs a list": changed("epochs: 1", "epochs: [1]"),
    "an unknown key of 100,000 letters": changed("epochs", "x" * 1_000),
    "a file with a NUL": changed("train.jsonl", '"a\\0b"'),
    "a file of 10,000 letters": changed("train.jsonl", "x" * 10_000),
    "a file of someone's home": changed("train.jsonl", "~nobody-here/x.jsonl"),
    "a file that is a list": changed("train.jsonl", "[a]"),
    "a base's path of 10,000 letters": changed("smollm2-135m-instruct", f"./{'x' * 10_000}"),
    "a base with a NUL": changed("smollm2-135m-instruct", '"./a\\0b"'),
    "a hundred thousand files": changed("[train.jsonl]", f"[{', '.join(['x.jsonl'] * 100_000)}]"),
    "a mapping for the data": changed("dataset:\n  train_files: [train.jsonl]", "dataset: x"),
}

KIND = Kind(
    name="pipeline",
    whole=whole,
    readers={"command": command},
    cases=(
        *(Case(name, holds(FILE, data)) for name, data in NO_YAML.items()),
        *(Case(name, change) for name, change in CHANGES.items()),
    ),
    names=r"demo\.yaml",
    lines=21,
)
