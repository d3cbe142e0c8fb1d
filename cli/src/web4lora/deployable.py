"""Finds what `web4lora deploy` is asked for: the model that a run made, or a GGUF file, which is stored."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from web4.lora.v1 import artifacts_pb2, deployer_pb2, gateway_pb2
from web4lora_chassis.artifacts import ArtifactStore
from web4lora_chassis.errors import FailedPrecondition, InvalidInput, NotFound
from web4lora_chassis.rpc import ref_message

from web4lora.home import short

_FILE = "model.gguf"  # the same for every file, so that the same bytes are the same artifact
_MAGIC = b"GGUF"


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
        return deployer_pb2.DeploySpec(name=name, gguf=_stored(path, name, open_store))
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


def _stored(path: Path, name: str, open_store: Callable[[], ArtifactStore]) -> artifacts_pb2.ArtifactRef:
    """Bring a GGUF file into the store, unless it is there."""
    if not name:
        raise InvalidInput(
            f"{short(path)} comes without a name.", fix=f"`web4lora deploy {short(path)} --name NAME`"
        )
    with path.open("rb") as file:
        if file.read(len(_MAGIC)) != _MAGIC:  # told before gigabytes are copied; the deployer looks closer
            raise InvalidInput(
                f"{short(path)} is no GGUF file: it does not begin with GGUF.",
                fix="Name a .gguf made by the packager or by llama.cpp.",
            )
    return ref_message(open_store().put("gguf", name, {_FILE: path}, created_by="client", link=False))


def _run_id(folder: Path) -> str:
    """Return the id of the run whose folder this is."""
    try:
        return str(json.loads((folder / "run.json").read_text(encoding="utf-8"))["run_id"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise NotFound(
            f"{short(folder)} is no run's folder: it has no run.json that names a run.",
            fix="Name a folder like outputs/latest, or a GGUF file.",
        ) from error
