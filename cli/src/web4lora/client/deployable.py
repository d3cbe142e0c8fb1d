"""Finds what `web4lora deploy` is asked for: the model that a run made, or a GGUF file, which is stored."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

from web4.lora.v1 import artifacts_pb2, deployer_pb2, gateway_pb2
from web4lora_chassis.artifacts import ArtifactStore, hash_file
from web4lora_chassis.errors import FailedPrecondition, InvalidInput, NotFound
from web4lora_chassis.rpc import ref_message, ref_of

from web4lora.home import short

_FILE = "model.gguf"  # the same for every file, so that the same bytes are the same artifact
_ADAPTER_FILE = "adapter.gguf"
_MAGIC = b"GGUF"
_RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def deploy_spec(
    source: str | Path,
    name: str,
    *,
    run_of: Callable[[str], gateway_pb2.Run],
    open_store: Callable[[], ArtifactStore],
) -> deployer_pb2.DeploySpec:
    """Return what to deploy: name, GGUF and, of a run, the packager's report.

    Args:
        source: A run's id, its folder, or a GGUF file.
        name: What people will call it; empty takes the run's name.
        run_of: Returns a run by its id.
        open_store: Returns the store; a file is brought into it unless it is there.

    Raises:
        InvalidInput: A file without a name, or a name that is not allowed.
        NotFound: There is no such file or run.
        FailedPrecondition: The run has no packaged model.
    """
    path = Path(source)
    if path.is_file():
        if not name:
            raise InvalidInput(
                f"{short(path)} comes without a name.", fix=f"`web4lora deploy {short(path)} --name NAME`"
            )
        gguf = _of_a_run(path, run_of, open_store) or _stored(path, name, _FILE, open_store)
        return deployer_pb2.DeploySpec(name=name, gguf=gguf)
    if path.is_dir():
        run_id = _run_id(path)
    elif path.suffix == ".gguf" or len(path.parts) > 1:
        raise NotFound(f"{source} is not there.", fix="Name a GGUF file, a run's folder or a run's id.")
    else:
        run_id = str(source)
    run = run_of(run_id)
    for stage in run.stages:
        if stage.WhichOneof("result") == "package_result" and stage.package_result.quantized:
            package = stage.package_result
            return deployer_pb2.DeploySpec(
                name=name or run.pipeline.name, gguf=package.quantized[0].artifact, files=package.files
            )
    raise FailedPrecondition(
        f"{run.id} has no packaged model.",
        fix=f"`web4lora runs show {run.id}` tells how far it got; `web4lora runs retry {run.id}` goes on.",
    )


def adapter_spec(
    name: str,
    source: str | Path,
    *,
    run_of: Callable[[str], gateway_pb2.Run],
    open_store: Callable[[], ArtifactStore],
) -> deployer_pb2.AdapterSpec:
    """Return an adapter to deploy beside its base.

    Args:
        name: What people will call it.
        source: Its GGUF file.
        run_of: Returns a run by its id.
        open_store: Returns the store; the file is brought into it unless it is there.

    Raises:
        InvalidInput: It has no name, or is no GGUF.
        NotFound: There is no such file.
    """
    path = Path(source)
    if not name:
        raise InvalidInput(f"{source} comes without a name.", fix=f"`--adapter NAME={source}`")
    if not path.is_file():
        raise NotFound(
            f"{source} is not there.",
            fix="Name the adapter.gguf of a run that had `package.adapter_gguf: true`, or another GGUF file.",
        )
    gguf = _of_a_run(path, run_of, open_store) or _stored(path, name, _ADAPTER_FILE, open_store)
    return deployer_pb2.AdapterSpec(name=name, gguf=gguf)


def _of_a_run(
    path: Path, run_of: Callable[[str], gateway_pb2.Run], open_store: Callable[[], ArtifactStore]
) -> artifacts_pb2.ArtifactRef | None:
    """Return the artifact that a file in a run's folder was linked from; None when it is no such file.

    That says what the file was made from, so that base and adapter can be told to belong together.
    """
    try:
        run = run_of(_run_id(path.parent))
        results = [
            stage.package_result for stage in run.stages if stage.WhichOneof("result") == "package_result"
        ]
        for package in results:
            for gguf in (package.reference, *package.quantized, package.adapter_gguf, package.adapter_base):
                if gguf.file_name == path.name:
                    entry = open_store().manifest(ref_of(gguf.artifact)).file(path.name)
                    return gguf.artifact if entry.sha256 == hash_file(path) else None
    except NotFound:  # another gateway's run, or its artifacts are gone
        pass
    return None


def _stored(
    path: Path, name: str, file_name: str, open_store: Callable[[], ArtifactStore]
) -> artifacts_pb2.ArtifactRef:
    """Bring a GGUF file into the store, unless it is there."""
    with path.open("rb") as file:
        if file.read(len(_MAGIC)) != _MAGIC:  # told before gigabytes are copied; the deployer looks closer
            raise InvalidInput(
                f"{short(path)} is no GGUF file: it does not begin with GGUF.",
                fix="Name a .gguf made by the packager or by llama.cpp.",
            )
    return ref_message(open_store().put("gguf", name, {file_name: path}, created_by="client", link=False))


def _run_id(folder: Path) -> str:
    """Return the id of the run whose folder this is."""
    try:
        run_id = json.loads((folder / "run.json").read_text(encoding="utf-8"))["run_id"]
        if not isinstance(run_id, str) or not _RUN_ID.fullmatch(run_id):
            raise ValueError("not a run's id")
        return run_id
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise NotFound(
            f"{short(folder)} is no run's folder: it has no run.json that names a run.",
            fix="Name a folder like outputs/latest, or a GGUF file.",
        ) from error
