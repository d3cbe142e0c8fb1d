"""The manifest of an artifact: its files, its origin, and the digest that names it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Self

from web4lora_chassis.errors import DataLoss, InvalidInput

KINDS = ("base_model", "dataset", "adapter", "merged_model", "gguf", "report", "suite")
MANIFEST_NAME = "manifest.json"
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,79}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_CHUNK_BYTES = 1 << 20


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
        if not parts or self.path.startswith("/") or "\\" in self.path or ".." in parts or "\0" in self.path:
            raise InvalidInput(f"The artifact path {self.path!r} is not a plain relative path.")
        if str(PurePosixPath(self.path)) != self.path:
            raise InvalidInput(f"The artifact path {self.path!r} is not in its shortest form.")
        if not _SHA256.fullmatch(self.sha256) or self.size_bytes < 0:
            raise InvalidInput(f"The artifact file {self.path!r} has a malformed digest or size.")


@dataclass(frozen=True)
class ArtifactRef:
    """Names one artifact: kind, name, digest, and its size in bytes."""

    kind: str
    name: str
    digest: str
    size_bytes: int = 0

    def __post_init__(self) -> None:
        """Refuse what would not be a safe path or key."""
        if self.kind not in KINDS:
            raise InvalidInput(
                f"{self.kind!r} is not an artifact kind.", fix=f"The kinds are {', '.join(KINDS)}."
            )
        if not _NAME.fullmatch(self.name):
            raise InvalidInput(
                f"{self.name!r} is not an artifact name.",
                fix="Use 1 to 80 characters of a-z, 0-9, dot, underscore and dash, first a letter or digit.",
            )
        if not _SHA256.fullmatch(self.digest):
            raise InvalidInput(f"{self.digest!r} is not a SHA-256 digest.")

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
        """Refuse an artifact without files, with one path twice, or with one that can't be stored."""
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
        raise DataLoss(f"{self.ref} has no file {path!r}.")

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
            DataLoss: It is not a manifest.
        """
        try:
            return cls(
                kind=data["kind"],
                name=data["name"],
                files=tuple(FileEntry(f["path"], f["sha256"], int(f["size_bytes"])) for f in data["files"]),
                inputs=tuple(ArtifactRef.from_json(ref) for ref in data["inputs"]),
                parameters=dict(data["parameters"]),
                tools=dict(data["tools"]),
                created_by=data["created_by"],
                created_at=float(data["created_at"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError, InvalidInput) as error:
            raise DataLoss(f"Not an artifact manifest: {error!r}.") from error


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
