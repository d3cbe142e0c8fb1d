"""Chat data in JSON Lines, as the client checks it before it travels and the trainer before it trains."""

from __future__ import annotations

import json
from pathlib import Path

from tests.corpus.case import DEEP, Case, Kind, holds

FILE = "rows.jsonl"
ASK, SAY = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
GOOD = json.dumps({"messages": [ASK, SAY]}).encode()


def whole(folder: Path) -> None:
    (folder / FILE).write_bytes(GOOD + b"\n")


def trainer(folder: Path, _: Path) -> None:
    from web4lora_chassis.dataset import read_dataset

    read_dataset([folder / FILE])


def client(folder: Path, made: Path) -> None:
    from web4lora.client.upload import store_dataset
    from web4lora_chassis.artifacts.folder import FolderBackend
    from web4lora_chassis.artifacts.store import ArtifactStore

    store_dataset(ArtifactStore(FolderBackend(made)), "demo", [folder / FILE], [])


def unreadable(folder: Path) -> None:
    (folder / FILE).unlink()
    (folder / FILE).mkdir()


def row(**values: object) -> bytes:
    return json.dumps({"messages": [ASK, SAY], **values}).encode()


def content(text: str) -> bytes:
    return json.dumps({"messages": [{"role": "user", "content": text}, SAY]}).encode()


BROKEN = {
    "empty": b"",
    "blank": b"\n \n\t\n",
    "a byte order mark alone": b"\xef\xbb\xbf",
    "UTF-16": GOOD.decode().encode("utf-16"),
    "UTF-32": GOOD.decode().encode("utf-32"),
    "Latin-1": content("x").replace(b"x", b"\xe4"),
    "half of a sign of UTF-8": GOOD + b"\n" + b'{"messages": "\xf0\x9f',
    "zeros": bytes(4096),
    "a NUL within": GOOD + b"\n" + GOOD.replace(b"a", b"\0"),
    "a picture": b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 9,
    "one array": json.dumps([{"messages": [ASK, SAY]}] * 3).encode(),
    "an array without end": b"[" * 1_000_000,
    "over several lines": json.dumps({"messages": [ASK, SAY]}, indent=1).encode(),
    "no JSON": b"hello\n" * 1000,
    "a line of 16 MB": b'{"messages": "' + b"x" * (16 << 20),
    "a row of 5 MB": content("x" * (5 << 20)),
    "nested 100,000 deep": b'{"messages": ' + b"[" * DEEP + b"]" * DEEP + b"}",
    "objects 100,000 deep": b'{"a":' * DEEP,
    "meta 100,000 deep": b'{"meta": ' + b"[" * DEEP + b"]" * DEEP + b', "messages": []}',
    "a number of 5,000 digits": b'{"messages": [], "meta": ' + b"9" * 5000 + b"}",
    "no number": b'{"messages": [], "meta": NaN}',
    "a weight beyond all numbers": GOOD.replace(b'"b"', b'"b", "weight": 1e999'),
    "half a pair of surrogates": content("\ud800"),
    "half a pair in a key": row(**{"\udfff": 1}),
    "half a pair in the id": row(id="\ud83d"),
    "a key of many lines": row(**{"a\nb\x1b[31m": 1}),
    "a key of a million letters": row(**{"x" * 1_000_000: 1}),
    "an id of a million letters twice": row(id="x" * 1_000_000) + b"\n" + row(id="x" * 1_000_000),
    "an id of many lines twice": row(id="a\nb\x1b[31m") + b"\n" + row(id="a\nb\x1b[31m"),
    "a role of a million letters": json.dumps({"messages": [{"role": "x" * 1_000_000}]}).encode(),
    "a part of odd type": json.dumps(
        {"messages": [{"role": "user", "content": [{"type": "x\n" * 999}]}, SAY]}
    ).encode(),
    "messages of numbers": b'{"messages": [1, 2]}',
    "messages an object": b'{"messages": {"role": "user"}}',
    "a key twice": b'{"messages": [], "messages": []}',
    "a bad row in each of 100,000 lines": b"{}\n" * 100_000,
    "a bad row of its own kind in each of 5,000 lines": b"".join(
        row(**{f"k{number}": 1}) + b"\n" for number in range(5_000)
    ),
    "100,000 messages": json.dumps({"messages": [ASK] * 100_000}).encode(),
}

KIND = Kind(
    name="dataset",
    whole=whole,
    readers={"trainer": trainer, "client": client},
    cases=(
        *(Case(name, holds(FILE, data)) for name, data in BROKEN.items()),
        Case("a folder", unreadable),
        Case("not there", lambda folder: (folder / FILE).unlink()),
    ),
    names=r"rows\.jsonl",
    lines=22,
)
