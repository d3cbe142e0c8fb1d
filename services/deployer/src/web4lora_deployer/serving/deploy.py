"""Deploy a GGUF as a candidate: fetch, choose a runtime, bring it in under its own id, see it answer.

What serves under the name stays: pointing the name at the candidate is a step of its own, see `promotion`.
A crash between any two steps leaves the old model serving; doing it again finishes. Nothing that is deployed
is ever changed: a file with other parameters, or in another runtime, is another candidate.
"""

from __future__ import annotations

import json
import logging
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from web4lora_chassis.artifacts import ArtifactRef, ArtifactStore, Manifest
from web4lora_chassis.errors import FailedPrecondition, InvalidInput, NotFound, Web4Error, shown
from web4lora_chassis.jobs import Progress
from web4lora_chassis.jobs.byte_progress import byte_progress
from web4lora_chassis.model_files.gguf import read_gguf
from web4lora_chassis.model_files.trained_conversations import TRAINED_CONVERSATIONS, require_small
from web4lora_chassis.pipeline.deploy import AUTO, DeploySettings
from web4lora_chassis.pipeline.package import DEFAULT_CONTEXT_TOKENS

from web4lora_deployer.prompts.gate import own_prompts
from web4lora_deployer.prompts.training_record import find_record, model_file, read_record, trained_system
from web4lora_deployer.records import names
from web4lora_deployer.records.deployments import Adapter, Deployment, Deployments, Parameters
from web4lora_deployer.runtimes import choose, llama_server, open_runtime
from web4lora_deployer.runtimes.base import Deployed, Report, Runtime, State
from web4lora_deployer.serving.adapters import require_adapter
from web4lora_deployer.serving.first_answer import first_answer
from web4lora_deployer.serving.promotion import make_room
from web4lora_deployer.serving.whole_model import require_model
from web4lora_deployer.settings import DeployerSettings

log = logging.getLogger(__name__)

_MODELFILE = "modelfile.json"
_PACKAGE_AGAIN = "Package the adapter again: `web4lora run FILE --from package`."
_MOST_TEMPERATURE = 100.0


@dataclass(frozen=True)
class DeployRequest:
    """What to deploy, and how.

    Attributes:
        name: What people will call it.
        gguf: The artifact of one GGUF file.
        files: The packager's report with modelfile.json; None when there is none.
        target: A runtime, or "auto".
        context_tokens: Context length of one request; None takes the packager's advice, else 4096.
        parallel: Requests answered at once, where the runtime lets us choose.
        parameters: Fields of `Parameters` that win over the report's.
        adapters: Artifacts of adapters to load beside the GGUF, by what people call them, in order.
    """

    name: str
    gguf: ArtifactRef
    files: ArtifactRef | None = None
    target: str = AUTO
    context_tokens: int | None = None
    parallel: int = DeploySettings().parallel
    parameters: Mapping[str, Any] = field(default_factory=dict)
    adapters: Mapping[str, ArtifactRef] = field(default_factory=dict)


@dataclass(frozen=True)
class DeployOutcome:
    """A deployment that serves.

    Attributes:
        deployment: Its record.
        deployed: Where it answers.
        ready_seconds: From the call to the first answer.
        unchanged: The same was deployed already and went on serving.
        passed_over: Runtimes that "auto" tried before, and what each said.
    """

    deployment: Deployment
    deployed: Deployed
    ready_seconds: float
    unchanged: bool
    passed_over: tuple[str, ...] = ()


def deploy(
    request: DeployRequest,
    settings: DeployerSettings,
    store: ArtifactStore,
    work_dir: Path,
    report: Report,
) -> DeployOutcome:
    """Deploy a model under its own id, beside what serves under its name.

    The same again is left as it is, and looked at once more.

    Args:
        request: What to deploy, and how.
        settings: Where the runtimes and the records are.
        store: Holds the artifacts.
        work_dir: For small files on the way.
        report: Takes progress.

    Raises:
        InvalidInput: A name, a file or a parameter that can't be deployed.
        NotFound: An artifact is not in the store.
        Unavailable: The runtime or the store is out of reach.
        FailedPrecondition: The runtime can't take the model, or the model does not answer.
        ResourceExhausted: Memory or disk don't suffice.
        DataLoss: Bytes are not what their digest says.
    """
    started = time.monotonic()
    names.check_name(request.name)
    deployments = Deployments(settings.deployer_home)
    runtime = _runtime(request, settings)
    wanted = _fetch(request, runtime.target, deployments, store, work_dir, report)
    make_room(wanted, deployments, settings)
    before = _existing(deployments, wanted.id)
    if before is not None:
        wanted = _again(before, wanted, runtime, deployments)
    else:
        deployments.forget_scales(wanted)
    try:
        deployed = runtime.deploy(wanted, deployments.path(wanted), report)
        report(Progress(phase="first answer", message=f"{wanted.id} on {runtime.target}"))
        first_answer(deployed)
    except BaseException:
        _undo(wanted, before, runtime, deployments)
        raise
    ready_seconds = time.monotonic() - started
    wanted = replace(
        wanted, endpoint=deployed.endpoint, model=deployed.model, runtime_version=deployed.version
    )
    deployments.save(wanted)
    unchanged = before is not None and before.loaded and before.generation == wanted.generation
    return DeployOutcome(wanted, deployed, ready_seconds, unchanged)


def _runtime(request: DeployRequest, settings: DeployerSettings) -> Runtime:
    """Return the runtime to use, which is there and can take a model."""
    target = llama_server.TARGET if request.adapters and request.target == AUTO else request.target
    runtime = choose(settings) if target == AUTO else open_runtime(target, settings)
    if request.adapters and runtime.target != llama_server.TARGET:
        raise llama_server.only_here(runtime.target)
    status = runtime.probe()
    if not status.usable:
        raise FailedPrecondition(
            f"{runtime.target} can't be deployed to: {status.detail}",
            fix="Put that right, or choose another target; `web4lora doctor` shows what was found.",
            reason="RUNTIME_NOT_USABLE",
            metadata={"target": runtime.target},
        )
    return runtime


def _fetch(
    request: DeployRequest,
    target: str,
    deployments: Deployments,
    store: ArtifactStore,
    work_dir: Path,
    report: Report,
) -> Deployment:
    """Fetch the GGUFs onto this machine, verified, and say what is wanted of them."""
    model = _fetch_gguf(request.gguf, deployments, store, report)
    files, adapters, records = [model], [], []
    try:
        header = read_gguf(deployments.models / model.file)
        require_model(deployments.models / model.file, header)
        for name, ref in request.adapters.items():
            _require_one_base(name, store.manifest(ref), store.manifest(request.gguf))
            file = _fetch_gguf(ref, deployments, store, report, name)
            files.append(file)
            require_adapter(name, deployments.models / file.file, header)
            adapters.append(Adapter(name, ref, file.file, file.sha256, file.size_bytes))
        for each in files:
            records += _fetch_record(each, deployments, store)
        if not records:
            own_prompts(header)  # said here, before anything is uploaded or loaded
    except (InvalidInput, FailedPrecondition):
        for path in (*(each.file for each in files), *records):
            deployments.drop_file(path)
        raise
    parameters = replace(_parameters(request.files, store, work_dir), **request.parameters)
    context_tokens = request.context_tokens or parameters.context_tokens or DEFAULT_CONTEXT_TOKENS
    wanted = Deployment(
        id="",
        name=request.name,
        target=target,
        gguf=request.gguf,
        file=model.file,
        sha256=model.sha256,
        size_bytes=model.size_bytes,
        parameters=parameters,
        context_tokens=min(context_tokens, header.context_tokens or context_tokens),
        parallel=request.parallel,
        generation=secrets.token_hex(8),
        created_at=time.time(),
        adapters=tuple(adapters),
        records=tuple(records),
        trained_system=trained_system(read_record(deployments.models / records[0])) if records else "",
    )
    deployment_id = names.deployment_id_of(request.name, wanted.identity)
    return replace(wanted, id=deployment_id, model=deployment_id)


@dataclass(frozen=True)
class _Gguf:
    """A GGUF on this machine: the artifact, and its file relative to the folder of models."""

    ref: ArtifactRef
    file: str
    sha256: str
    size_bytes: int


def _fetch_gguf(
    ref: ArtifactRef, deployments: Deployments, store: ArtifactStore, report: Report, name: str = ""
) -> _Gguf:
    """Fetch a GGUF onto this machine; progress tells its name, where it has one beside the model's."""
    entry = model_file(store.manifest(ref))
    folder = deployments.models / entry.sha256[:16]
    store.get(ref, folder, only=[entry.path], advance=byte_progress(report, "fetch", entry.size_bytes, name))
    return _Gguf(ref, f"{folder.name}/{entry.path}", entry.sha256, entry.size_bytes)


def _fetch_record(gguf: _Gguf, deployments: Deployments, store: ArtifactStore) -> list[str]:
    """Fetch the record of a model's training beside its file; there is none of a model from elsewhere."""
    holder = find_record(gguf.ref, store)
    if holder is None:
        return []
    folder = (deployments.models / gguf.file).parent
    require_small(store.manifest(holder).file(TRAINED_CONVERSATIONS).size_bytes)
    store.get(holder, folder, only=[TRAINED_CONVERSATIONS])
    record = f"{folder.name}/{TRAINED_CONVERSATIONS}"
    try:
        read_record(folder / TRAINED_CONVERSATIONS)
    except (InvalidInput, FailedPrecondition):
        deployments.drop_file(record)
        raise
    return [record]


def _require_one_base(name: str, adapter: Manifest, base: Manifest) -> None:
    """Refuse an adapter that was trained on another base, as far as both say what they were made from.

    Bases of one architecture and size can't be told apart by their files.
    """
    trained_on, served = (
        {ref.digest: ref for ref in manifest.inputs if ref.kind == "base_model"}
        for manifest in (adapter, base)
    )
    if trained_on and served and not trained_on.keys() & served.keys():
        raise FailedPrecondition(
            f"The adapter {name} was trained on {next(iter(trained_on.values()))}, this base is made from "
            f"{next(iter(served.values()))}.",
            fix="Deploy it on the base it was trained on: base.*.gguf in the folder of its run.",
            reason="BASE_MISMATCH",
        )


def _parameters(files: ArtifactRef | None, store: ArtifactStore, work_dir: Path) -> Parameters:
    """Read the packager's modelfile.json; nothing is known of a model that came without one.

    Raises:
        InvalidInput: It has the wrong form. `stop` must be a list: Ollama takes a text at creation, and then
            refuses every chat.
    """
    if files is None or all(entry.path != _MODELFILE for entry in store.manifest(files).files):
        return Parameters()
    store.get(files, work_dir / "files", only=[_MODELFILE])
    return read_modelfile(work_dir / "files" / _MODELFILE)


def read_modelfile(path: Path) -> Parameters:
    """Read a modelfile.json, see `_parameters`."""
    try:
        return read_parameters(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError) as error:
        raise InvalidInput(f"{_MODELFILE} can't be read: {error}.", fix=_PACKAGE_AGAIN) from error


def read_parameters(data: object) -> Parameters:
    """Check the content of a modelfile.json, see `_parameters`."""
    if not isinstance(data, dict):
        raise InvalidInput(f"{_MODELFILE} is not a JSON object.", fix=_PACKAGE_AGAIN)
    wanted: dict[str, type | tuple[type, ...]] = {
        "stop": list, "system": str, "temperature": (int, float), "license": str, "context_tokens": int,
    }  # fmt: skip
    given = {key: value for key, value in data.items() if key in wanted and value is not None}
    for key, value in given.items():
        if not isinstance(value, wanted[key]) or isinstance(value, bool):
            raise InvalidInput(
                f"{_MODELFILE}: {key} is {shown(value)}, of the wrong type.", fix=_PACKAGE_AGAIN
            )
    stop = given.get("stop", [])
    if not all(isinstance(text, str) and text for text in stop):
        raise InvalidInput(
            f"{_MODELFILE}: stop is {shown(stop)}; it must be a list of texts.", fix=_PACKAGE_AGAIN
        )
    texts = [*stop, given.get("system", ""), given.get("license", "")]
    if any("\ud800" <= sign <= "\udfff" for text in texts for sign in text):
        raise InvalidInput(f"{_MODELFILE} holds half of a pair of surrogates.", fix=_PACKAGE_AGAIN)
    for key, most in (("temperature", _MOST_TEMPERATURE), ("context_tokens", 1 << 31)):
        if not 0 <= given.get(key, 0) <= most:
            raise InvalidInput(
                f"{_MODELFILE}: {key} is {shown(given[key])}, not 0 to {most}.", fix=_PACKAGE_AGAIN
            )
    return Parameters(
        stop=tuple(stop),
        system=given.get("system", ""),
        temperature=float(given.get("temperature", 0.0)),
        license=given.get("license", ""),
        context_tokens=given.get("context_tokens", 0),
    )


def _existing(deployments: Deployments, deployment_id: str) -> Deployment | None:
    try:
        return deployments.get(deployment_id)
    except NotFound:
        return None


def _again(before: Deployment, wanted: Deployment, runtime: Runtime, deployments: Deployments) -> Deployment:
    """Return the deployment that is there already and wanted again.

    It is left as it is, so that nothing is started anew, unless it is not loaded or has failed.

    Raises:
        FailedPrecondition: What is there is something else.
    """
    if before.identity != wanted.identity:  # 32 bits of a digest, or a record of an earlier version
        raise FailedPrecondition(
            f"{wanted.id} is there already, as another file or with other parameters.",
            fix=f"`web4lora deployments delete {wanted.id}`, then deploy again.",
            reason="ID_TAKEN",
        )
    serves = before.loaded and runtime.health(before).state is not State.FAILED
    there = all((deployments.models / file).is_file() for file in before.files)
    kept = before if there else replace(before, file=wanted.file, adapters=wanted.adapters)
    kept = replace(kept, records=wanted.records or before.records)
    for file in set(wanted.files) - set(kept.files):  # the same bytes under another file name
        deployments.drop_file(file)
    return replace(
        kept,
        loaded=True,
        generation=before.generation if serves else wanted.generation,
        trained_system=wanted.trained_system or before.trained_system,
    )


def _undo(wanted: Deployment, before: Deployment | None, runtime: Runtime, deployments: Deployments) -> None:
    """Leave what was there before a deployment that did not succeed."""
    # A record that never answered is what a killed attempt left; it goes, unless people call it.
    kept = before is not None and (bool(before.endpoint) or deployments.promoted(before))
    try:
        if before is not None and kept:
            deployments.save(before)
            return
        runtime.delete(wanted)
    except Web4Error as error:  # the reason why the deployment failed matters more
        log.warning("cleaning up after %s: %s", wanted.id, error)
    finally:
        if not kept:
            deployments.remove(wanted)
