"""Copies what a run made out of the artifact store, into a folder that has no ties to it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from web4.lora.v1 import artifacts_pb2, gateway_pb2
from web4lora_chassis.artifacts import ArtifactStore
from web4lora_chassis.errors import FailedPrecondition, InvalidInput
from web4lora_chassis.rpc import ref_of


def export_run(run: gateway_pb2.Run, store: ArtifactStore, target: Path) -> tuple[int, int]:
    """Copy a run's adapter, GGUF files, Modelfile, checksums and reports.

    Args:
        run: The run.
        store: Where its artifacts lie.
        target: A folder that is new or empty. It is put in place at once, when everything in it is verified.

    Returns:
        How many files, and their size in bytes.

    Raises:
        InvalidInput: The folder holds something.
        FailedPrecondition: The run has made nothing yet.
        DataLoss: Bytes are not what their digest says.
        Unavailable: The store is out of reach.
    """
    target = target.expanduser().absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InvalidInput(f"{target} holds something already.", fix="Name a folder that is new or empty.")
    refs = [ref_of(message) for message in _made(run)]
    if not refs:
        raise FailedPrecondition(f"{run.id} has made nothing yet.", fix="Wait for its first stages.")
    target.parent.mkdir(parents=True, exist_ok=True)
    count = size_bytes = 0
    with tempfile.TemporaryDirectory(prefix=".export-", dir=target.parent) as name:
        linked, copied = Path(name) / "linked", Path(name) / "copied"
        for ref in refs:
            for entry in store.get(ref, linked).files:
                place = copied / entry.path
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(linked / entry.path, place)  # the store's own files must not be changed
                count, size_bytes = count + 1, size_bytes + entry.size_bytes
            shutil.rmtree(linked)
        if target.exists():
            target.rmdir()
        copied.replace(target)
    return count, size_bytes


def _made(run: gateway_pb2.Run) -> Iterator[artifacts_pb2.ArtifactRef]:
    """Yield the artifacts that people want of a run: not the merged model, which the GGUF replaces."""
    for stage in run.stages:
        kind = stage.WhichOneof("result")
        if kind == "train_result":
            yield stage.train_result.adapter
        elif kind == "package_result":
            result = stage.package_result
            yield from (file.artifact for file in (result.reference, *result.quantized))
            yield result.files
        elif kind == "verify_result" and stage.verify_result.report.digest:
            yield stage.verify_result.report
