"""The manifest of an artifact: its files, its origin, and the digest that names it."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Self

from web4lora_chassis.errors import DataLoss, InvalidInput, shown

KINDS = ("base_model", "dataset", "adapter", "merged_model", "gguf", "report", "suite")
MANIFEST_NAME = "manifest.json"
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,79}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_CHUNK_BYTES = 1 << 20
_PATH_BYTES = 512
_PART_BYTES = 200
_MOST_BYTES = 1 << 60
_ODD_SIGN = re.compile(r"[\x00-\x1f\x7f\\\ud800-\udfff]")
AGAIN = "Its bytes in the store were changed: delete the artifact, then make it again."
"""What to do about an artifact that is not what its digest says."""


@dataclass(frozen=True)
class FileEntry:
    """One file of an artifact.

    Attributes:
        path: Relative to the artifact, with forward slashes.
        sha256: 64 lower-case hex digits.
        size_bytes: Its size.
    """

    path: str
    sha256: str
    size_bytes: int

    def __post_init__(self) -> None:
        """Refuse paths that could leave the artifact's folder, and malformed digests."""
        parts = PurePosixPath(self.path).parts
        if not parts or self.path.startswith("/") or ".." in parts or _ODD_SIGN.search(self.path):
            raise InvalidInput(f"The artifact path {shown(self.path)} is not a plain relative path.")
        if str(PurePosixPath(self.path)) != self.path:
            raise InvalidInput(f"The artifact path {shown(self.path)} is not in its shortest form.")
        if len(self.path.encode()) > _PATH_BYTES or any(len(part.encode()) > _PART_BYTES for part in parts):
            raise InvalidInput(
                f"The artifact path {shown(self.path)} is too long.",
                fix=f"Give it {_PATH_BYTES} bytes or less, and each name in it {_PART_BYTES} or less.",
            )
        if not _SHA256.fullmatch(self.sha256) or not 0 <= self.size_bytes < _MOST_BYTES:
            raise InvalidInput(f"The artifact file {shown(self.path)} has a malformed digest or size.")


@dataclass(frozen=True)
class ArtifactRef:
    """Names one artifact: kind, name, digest, and its size in bytes."""

    kind: str
    name: str
    digest: str
    size_bytes: int = 0

    def __post_init__(self) -> None:
        """Refuse what would not be a safe path or key."""
        _check_name(self.kind, self.name)
        if not _SHA256.fullmatch(self.digest):
            raise InvalidInput(f"{shown(self.digest)} is not a SHA-256 digest.")

    def __str__(self) -> str:
        """Return `kind/name@digest12`, the form people read."""
        return f"{self.kind}/{self.name}@{self.digest[:12]}"

    @property
    def prefix(self) -> str:
        """The artifact's folder in the store, readable in an object browser."""
        return f"artifacts/{self.kind}/{self.name}/{self.digest[:12]}"

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON data."""
        return {"kind": self.kind, "name": self.name, "digest": self.digest, "size_bytes": self.size_bytes}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Read it back from JSON data; a size given as text, as protobuf does, is taken too."""
        return cls(str(data["kind"]), str(data["name"]), str(data["digest"]), int(data.get("size_bytes", 0)))


@dataclass(frozen=True)
class Manifest:
    """Everything there is to know of an artifact but its bytes.

    Attributes:
        kind: One of `KINDS`.
        name: Its name.
        files: Its files, sorted by path.
        inputs: The artifacts it was made from.
        parameters: The parameters it was made with; values as JSON text.
        tools: Versions of the tools that made it.
        created_by: The service that made it. Not part of the digest.
        created_at: When, as seconds since 1970. Not part of the digest.
    """

    kind: str
    name: str
    files: tuple[FileEntry, ...]
    inputs: tuple[ArtifactRef, ...] = ()
    parameters: Mapping[str, str] = field(default_factory=dict)
    tools: Mapping[str, str] = field(default_factory=dict)
    created_by: str = ""
    created_at: float = 0.0

    def __post_init__(self) -> None:
        """Refuse an artifact without files, with one path twice, or with what can't be stored."""
        _check_name(self.kind, self.name)
        if not math.isfinite(self.created_at):
            raise InvalidInput(f"The artifact {self.name!r} was made at no time that there is.")
        paths = [entry.path for entry in self.files]
        if not paths or paths != sorted(set(paths)):
            raise InvalidInput(f"The artifact {self.name!r} needs at least one file, each path once, sorted.")
        folders = {str(parent) for path in paths for parent in PurePosixPath(path).parents}
        for path in paths:
            if path == MANIFEST_NAME or path in folders:
                raise InvalidInput(
                    f"The artifact {self.name!r} can't hold a file at {path!r}: that is taken."
                )

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical manifest without who and when, 64 lower-case hex digits."""
        data = self.to_json()
        del data["created_by"], data["created_at"]
        text = json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return hashlib.sha256(text.encode("utf-8")).hexdigest()

    @property
    def size_bytes(self) -> int:
        """Sum of its files' sizes."""
        return sum(entry.size_bytes for entry in self.files)

    @property
    def ref(self) -> ArtifactRef:
        """The reference that names it."""
        return ArtifactRef(self.kind, self.name, self.digest, self.size_bytes)

    def file(self, path: str) -> FileEntry:
        """Return the file at a path.

        Raises:
            DataLoss: The artifact has no such file.
        """
        for entry in self.files:
            if entry.path == path:
                return entry
        raise DataLoss(f"{self.ref} has no file {shown(path)}.", fix=AGAIN)

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON data."""
        return {
            "kind": self.kind,
            "name": self.name,
            "files": [{"path": f.path, "sha256": f.sha256, "size_bytes": f.size_bytes} for f in self.files],
            "inputs": [ref.to_json() for ref in self.inputs],
            "parameters": dict(self.parameters),
            "tools": dict(self.tools),
            "created_by": self.created_by,
            "created_at": self.created_at,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Read it back from JSON data.

        Raises:
            DataLoss: It is not a manifest; the message says why in a few words.
        """
        try:
            parameters = _texts(data["parameters"], "parameters")
            for key, value in parameters.items():
                _require_json(key, value)
            return cls(
                kind=_text(data["kind"], "kind"),
                name=_text(data["name"], "name"),
                files=tuple(
                    FileEntry(_text(f["path"], "path"), _text(f["sha256"], "sha256"), _size(f["size_bytes"]))
                    for f in data["files"]
                ),
                inputs=tuple(ArtifactRef.from_json(ref) for ref in data["inputs"]),
                parameters=parameters,
                tools=_texts(data["tools"], "tools"),
                created_by=_text(data["created_by"], "created_by"),
                created_at=float(data["created_at"]),
            )
        except KeyError as error:
            raise DataLoss(f"{error} is missing", fix=AGAIN) from error
        except InvalidInput as error:
            raise DataLoss(error.message.rstrip("."), fix=AGAIN) from error
        except (TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
            raise DataLoss(shown(str(error), 200).strip("'\""), fix=AGAIN) from error


def _check_name(kind: str, name: str) -> None:
    """Refuse a kind or a name that would not be a safe part of a path or key."""
    if kind not in KINDS:
        raise InvalidInput(
            f"{shown(kind)} is not an artifact kind.", fix=f"The kinds are {', '.join(KINDS)}."
        )
    if not _NAME.fullmatch(name):
        raise InvalidInput(
            f"{shown(name)} is not an artifact name.",
            fix="Use 1 to 80 characters of a-z, 0-9, dot, underscore and dash, first a letter or digit.",
        )


def _text(value: object, what: str) -> str:
    """Return a text that can be hashed and sent; halves of surrogate pairs can't."""
    if not isinstance(value, str):
        raise ValueError(f"{what} is {shown(value)}, no text")
    value.encode()
    return value


def _texts(value: object, what: str) -> dict[str, str]:
    if not isinstance(value, dict):
        raise ValueError(f"{what} is {shown(value)}, no object")
    return {_text(key, f"a key of {what}"): _text(each, f"{what}.{key}") for key, each in value.items()}


def _size(value: object) -> int:
    if type(value) is not int:
        raise ValueError(f"size_bytes is {shown(value)}, no whole number")
    return value


def _require_json(key: str, value: str) -> None:
    """Refuse a parameter that is no JSON text: whoever asks for it reads it as that."""
    try:
        json.loads(value)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the parameter {shown(key)} is {shown(value)}, no JSON") from error


def hash_file(path: Path, progress: Callable[[int], None] | None = None) -> str:
    """Return the SHA-256 of a file as 64 lower-case hex digits.

    Args:
        path: The file.
        progress: Called with the number of bytes of each chunk read.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            if progress:
                progress(len(chunk))
    return digest.hexdigest()
