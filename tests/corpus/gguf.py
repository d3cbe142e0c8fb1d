"""GGUF files: the cases of `test_gguf_hostile`, and those that only the whole model shows."""

from __future__ import annotations

from pathlib import Path

from web4lora_chassis.model_files.gguf import read_gguf
from web4lora_deployer.serving.whole_model import require_model

from tests.corpus.case import Case, Kind, holds
from tests.unit.chassis.model_files.test_gguf_hostile import (
    ARCHITECTURE,
    ARRAY,
    HOSTILE,
    STRING,
    U32,
    WITHOUT_A_MODEL,
    a_list,
    header,
    nested,
    pair,
    tensor,
    text,
)

FILE = "model.gguf"


def read(folder: Path, _: Path) -> None:
    path = folder / FILE
    found = read_gguf(path)
    found.cache_bytes(1 << 20)
    require_model(path, found)


def whole(folder: Path) -> None:
    (folder / FILE).write_bytes(header(ARCHITECTURE, tensor(b"w", 1, 4), tensors=1, keys=1) + bytes(64))


MORE = {
    "an adapter": header(
        pair(b"general.type", STRING, text(b"adapter")), tensor(b"w", 1, 4), tensors=1, keys=1
    ),
    "one of several files": header(
        ARCHITECTURE, pair(b"split.count", U32, b"\x03\0\0\0"), tensor(b"w", 1, 4), tensors=1, keys=2
    ),
    "a list of lists of lists": header(pair(b"a", ARRAY, a_list(ARRAY, 1, nested(6)))),
}  # fmt: skip

KIND = Kind(
    name="GGUF",
    whole=whole,
    readers={"deployer": read},
    cases=tuple(
        Case(name, holds(FILE, data)) for name, data in {**HOSTILE, **WITHOUT_A_MODEL, **MORE}.items()
    ),
    names=r"model\.gguf|The GGUF",
)
