"""Manifests of artifacts, and the files they name, as every part gets them out of the store."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.corpus.case import Case, Change, Kind, edited, holds, no_json

SHA = "a" * 64


def store_of(folder: Path) -> Any:
    from web4lora_chassis.artifacts.folder import FolderBackend
    from web4lora_chassis.artifacts.store import ArtifactStore

    return ArtifactStore(FolderBackend(folder / "store"))


def whole(folder: Path) -> None:
    (folder / "a.bin").write_bytes(b"abc")
    ref = store_of(folder).put("gguf", "demo", {"x/a.bin": folder / "a.bin"}, parameters={"source": "x"})
    (folder / "ref.json").write_text(json.dumps(ref.to_json()))
    (folder / "prefix").write_text(ref.prefix)


def get(folder: Path, made: Path) -> None:
    from web4lora_chassis.artifacts import ArtifactRef

    store_of(folder).get(ArtifactRef.from_json(json.loads((folder / "ref.json").read_text())), made)


def named(change: Callable[[Any], object]) -> Change:
    """Change the manifest, and let the reference name the changed one, as who made both would."""

    def apply(folder: Path) -> None:
        import hashlib

        place = folder / "store" / (folder / "prefix").read_text()
        data = json.loads((place / "manifest.json").read_text())
        change(data)
        text = json.dumps(data)
        plain = {key: value for key, value in data.items() if key not in ("created_by", "created_at")}
        packed = json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        digest = hashlib.sha256(packed.encode("utf-8", "surrogatepass")).hexdigest()
        moved = place.with_name(digest[:12])
        if moved != place:
            place.rename(moved)
        (moved / "manifest.json").write_text(text)
        ref = json.loads((folder / "ref.json").read_text())
        (folder / "ref.json").write_text(json.dumps({**ref, "digest": digest}))

    return apply


def raw(change: Change) -> Change:
    """Change the manifest where it lies."""
    return lambda folder: change(folder / "store" / (folder / "prefix").read_text())


def a_file(**values: Any) -> Change:
    return named(lambda data: data["files"][0].update(values))


def sets(**values: Any) -> Change:
    return named(lambda data: data.update(values))


def the_stored(change: Callable[[Path], object]) -> Change:
    """Change the stored file's bytes."""

    def apply(folder: Path) -> None:
        path = folder / "store" / (folder / "prefix").read_text() / "x" / "a.bin"
        path.chmod(0o644)
        change(path)

    return apply


def a_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("/etc/passwd")


FILES: dict[str, Any] = {
    "a path above": {"path": "../a.bin"},
    "a path at the root": {"path": "/a.bin"},
    "a path round about": {"path": "x/../../a.bin"},
    "a path of Windows": {"path": "..\\a.bin"},
    "a path with a NUL": {"path": "x/a\0b"},
    "a path of half a character": {"path": "x/\ud800"},
    "a path of many lines": {"path": "x/a\nb\x1b[31m"},
    "a path of 10,000 letters": {"path": "x" * 10_000},
    "a path of 10,000 folders": {"path": "x/" * 10_000 + "x"},
    "a path that is the manifest": {"path": "manifest.json"},
    "no path": {"path": ""},
    "a path that is a number": {"path": 7},
    "a path that is a list": {"path": ["x"]},
    "a size below 0": {"size_bytes": -1},
    "a size that is a half": {"size_bytes": 3.5},
    "a size that is true": {"size_bytes": True},
    "a size beyond all numbers": {"size_bytes": float("inf")},
    "a size that is no number": {"size_bytes": float("nan")},
    "a size that is a word": {"size_bytes": "many"},
    "a size that is a list": {"size_bytes": [3]},
    "a size of 2^80": {"size_bytes": 1 << 80},
    "another size": {"size_bytes": 4},
    "a digest too short": {"sha256": "abc"},
    "a digest in capitals": {"sha256": "A" * 64},
    "a digest of other letters": {"sha256": "g" * 64},
    "a digest with a line end": {"sha256": SHA + "\n"},
    "a digest that is a number": {"sha256": 7},
    "another digest": {"sha256": SHA},
}
FIELDS: dict[str, Any] = {
    "a kind of nobody": {"kind": "virus"},
    "a kind that is a list": {"kind": ["gguf"]},
    "a name that is a path": {"name": "../demo"},
    "a name that is a number": {"name": 7},
    "a name that is null": {"name": None},
    "a name of many lines": {"name": "a\nb"},
    "no files": {"files": []},
    "files that are an object": {"files": {"a": 1}},
    "a file that is a text": {"files": ["x/a.bin"]},
    "a file twice": {"files": [{"path": "a", "sha256": SHA, "size_bytes": 1}] * 2},
    "a file within a file": {
        "files": [{"path": path, "sha256": SHA, "size_bytes": 1} for path in ("a", "a/b")]
    },
    "100,000 files that are not there": {
        "files": [{"path": f"x{n:06}", "sha256": SHA, "size_bytes": 1} for n in range(100_000)]
    },
    "inputs that are a text": {"inputs": "x"},
    "an input without a digest": {"inputs": [{"kind": "gguf", "name": "x"}]},
    "an input of an odd size": {
        "inputs": [{"kind": "gguf", "name": "x", "digest": SHA, "size_bytes": float("inf")}]
    },
    "parameters that are a list": {"parameters": [["a", "b"]]},
    "parameters that are a text": {"parameters": "ab"},
    "a parameter that is a number": {"parameters": {"source": 7}},
    "a parameter that is no JSON": {"parameters": {"source": "{oops"}},
    "a parameter of half a character": {"parameters": {"source": "\ud800"}},
    "tools that are a list": {"tools": ["torch"]},
    "a tool that is an object": {"tools": {"torch": {}}},
    "made by a number": {"created_by": 7},
    "made at a word": {"created_at": "noon"},
    "made at no number": {"created_at": float("nan")},
    "made at the end of time": {"created_at": float("inf")},
}

KIND = Kind(
    name="manifest",
    whole=whole,
    readers={"store": get},
    cases=(
        *(Case(case.name, raw(case.damage)) for case in no_json("manifest.json")),
        Case("17 MiB", raw(holds("manifest.json", b" " * (17 << 20)))),
        Case("not there", raw(lambda folder: (folder / "manifest.json").unlink())),
        Case("changed since", raw(edited("manifest.json", lambda data: data["tools"].update(x="1")))),
        *(Case(f"a key less: {key}", named(lambda data, key=key: data.pop(key))) for key in (
            "kind", "name", "files", "inputs", "parameters", "tools",
        )),
        *(Case(f"file: {name}", a_file(**values)) for name, values in FILES.items()),
        *(Case(name, sets(**values)) for name, values in FIELDS.items()),
        Case("stored file: cut off", the_stored(lambda path: path.write_bytes(b"ab"))),
        Case("stored file: another", the_stored(lambda path: path.write_bytes(b"abd"))),
        Case("stored file: not there", the_stored(lambda path: path.unlink())),
        Case("stored file: a link elsewhere", the_stored(a_link)),
    ),
    names=r"manifest|gguf/demo|a\.bin|x000000",
)  # fmt: skip
