"""The packager's `modelfile.json`, as the deployer reads how a model wants to be used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.corpus.case import Case, Kind, having, no_json

FILE = "modelfile.json"


def deployer(folder: Path, _: Path) -> None:
    from web4lora_deployer.serving.deploy import read_modelfile

    read_modelfile(folder / FILE)


VALUES: dict[str, dict[str, Any]] = {
    "stops a text": {"stop": "</s>"},
    "stops of numbers": {"stop": [1, 2]},
    "an empty stop": {"stop": [""]},
    "a stop of half a character": {"stop": ["\ud800"]},
    "a million stops of numbers": {"stop": [1] * 1_000_000},
    "a system message that is a list": {"system": ["x"]},
    "a system message of half a character": {"system": "\ud800"},
    "a temperature that is a text": {"temperature": "hot"},
    "a temperature that is no number": {"temperature": float("nan")},
    "a temperature without end": {"temperature": float("inf")},
    "a temperature of 4,000 digits": {"temperature": 10**4000},
    "a temperature below 0": {"temperature": -1},
    "a context that is true": {"context_tokens": True},
    "a context that is a half": {"context_tokens": 2.5},
    "a context below 0": {"context_tokens": -1},
    "a context of 4,000 digits": {"context_tokens": 10**4000},
    "a licence that is a number": {"license": 7},
}

KIND = Kind(
    name="modelfile",
    whole=having(FILE, stop=["</s>"], system="", temperature=0.5, license="MIT", context_tokens=2048),
    readers={"deployer": deployer},
    cases=(
        *no_json(FILE),
        *(Case(name, having(FILE, **values)) for name, values in VALUES.items()),
        Case("not there", lambda folder: (folder / FILE).unlink()),
    ),
    names=r"modelfile\.json",
)
