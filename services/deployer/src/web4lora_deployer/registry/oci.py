"""A GGUF as an OCI model, as Docker Model Runner takes it: config, manifest, the tar that carries them.

Where the written model specification and Model Runner's code differ, the code wins: it reads `created`.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from web4lora_chassis.model_files.gguf import GgufHeader

from web4lora_deployer.records.deployments import Deployment

MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
CONFIG_TYPE = "application/vnd.docker.ai.model.config.v0.1+json"
GGUF_TYPE = "application/vnd.docker.ai.gguf.v3"
LICENSE_TYPE = "application/vnd.docker.ai.license"
_FILE_PATH = "org.cncf.model.filepath"
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class Blob:
    """One blob: bytes in memory or, for the model, a file.

    Attributes:
        media_type: What it is.
        sha256: 64 lower-case hex digits.
        size_bytes: Its size.
        source: Its bytes, or the file that holds them.
        path: Its file name in the model; empty for the config.
    """

    media_type: str
    sha256: str
    size_bytes: int
    source: bytes | Path
    path: str = ""

    @property
    def descriptor(self) -> dict[str, Any]:
        """Its entry in the manifest."""
        entry: dict[str, Any] = {
            "mediaType": self.media_type,
            "size": self.size_bytes,
            "digest": f"sha256:{self.sha256}",
        }
        return {**entry, "annotations": {_FILE_PATH: self.path}} if self.path else entry


@dataclass(frozen=True)
class OciModel:
    """A model as OCI has it.

    Attributes:
        manifest: The manifest's bytes, whose digest names the model.
        config: The model's description.
        layers: The GGUF and, when known, the licence.
    """

    manifest: bytes
    config: Blob
    layers: tuple[Blob, ...]

    @property
    def described(self) -> Mapping[str, Any]:
        """What its config says of it: format, quantization, context_size and so on."""
        assert isinstance(self.config.source, bytes)
        described: Mapping[str, Any] = json.loads(self.config.source)["config"]
        return described

    @property
    def digest(self) -> str:
        """The model's id: "sha256:…"."""
        return f"sha256:{hashlib.sha256(self.manifest).hexdigest()}"


def build(deployment: Deployment, file: Path, header: GgufHeader) -> OciModel:
    """Describe a deployment's GGUF. The same deployment gives the same bytes.

    Args:
        deployment: What is wanted. Its context length is always written: without one, Model Runner takes the
            model's own maximum, and memory with it.
        file: The GGUF.
        header: Its metadata.
    """
    layers = [Blob(GGUF_TYPE, deployment.sha256, deployment.size_bytes, file, "model.gguf")]
    if deployment.parameters.license:
        layers.append(_blob(LICENSE_TYPE, deployment.parameters.license.encode(), "LICENSE"))
    described = {
        "format": "gguf",
        "quantization": header.quantization,
        "parameters": _parameters(header.parameters),
        "architecture": header.architecture,
        "size": f"{deployment.size_bytes / 1e6:.2f} MB",
        "context_size": deployment.context_tokens,
        "gguf": {
            "general.architecture": header.architecture,
            "general.name": deployment.name,
            "general.version": deployment.id.rpartition(":")[2],
            "general.description": f"{deployment.name}, made by Web4 LoRA Core from {deployment.gguf}",
            "general.license": deployment.parameters.license,
        },
    }
    config = {
        "config": described,
        "descriptor": {"created": datetime.fromtimestamp(int(deployment.created_at), UTC).isoformat()},
        "rootfs": {"type": "rootfs", "diff_ids": [f"sha256:{layer.sha256}" for layer in layers]},
    }
    config_blob = _blob(CONFIG_TYPE, _json(config), "")
    manifest = {
        "schemaVersion": 2,
        "mediaType": MANIFEST_TYPE,
        "config": config_blob.descriptor,
        "layers": [layer.descriptor for layer in layers],
    }
    return OciModel(_json(manifest), config_blob, tuple(layers))


def tar_size_bytes(model: OciModel) -> int:
    """Return how long the tar of a model is."""
    sizes = [*(blob.size_bytes for blob in (*model.layers, model.config)), len(model.manifest)]
    return sum(tarfile.BLOCKSIZE + _padded(size) for size in sizes) + 2 * tarfile.BLOCKSIZE


def tar_chunks(model: OciModel, advance: Callable[[int], None]) -> Iterator[bytes]:
    """Yield the tar that /models/load takes, piece by piece: the blobs, then the manifest.

    Args:
        model: What to put into it.
        advance: Called with the number of bytes of the model's file just sent.
    """
    for blob in (*model.layers, model.config):
        yield _header(f"blobs/sha256/{blob.sha256}", blob.size_bytes)
        if isinstance(blob.source, bytes):
            yield blob.source
        else:
            with blob.source.open("rb") as source:
                while chunk := source.read(_CHUNK_BYTES):
                    yield chunk
                    advance(len(chunk))
        yield b"\0" * (_padded(blob.size_bytes) - blob.size_bytes)
    yield _header("manifest.json", len(model.manifest))
    yield model.manifest
    yield b"\0" * (_padded(len(model.manifest)) - len(model.manifest) + 2 * tarfile.BLOCKSIZE)


def _blob(media_type: str, data: bytes, path: str) -> Blob:
    return Blob(media_type, hashlib.sha256(data).hexdigest(), len(data), data, path)


def _json(data: object) -> bytes:
    return json.dumps(data, separators=(",", ":"), ensure_ascii=False).encode()


def _parameters(count: int) -> str:
    """Write a number of weights as people do: 134.52 M."""
    for unit, size in (("B", 1e9), ("M", 1e6)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return str(count)


def _header(name: str, size_bytes: int) -> bytes:
    entry = tarfile.TarInfo(name)
    entry.size = size_bytes
    entry.mode = 0o644
    return entry.tobuf(tarfile.GNU_FORMAT)


def _padded(size_bytes: int) -> int:
    return -(-size_bytes // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
