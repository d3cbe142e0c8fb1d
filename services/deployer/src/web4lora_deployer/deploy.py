"""Deploy a GGUF as a candidate: fetch, choose a runtime, bring it in under its own id, see it answer.

What serves under the name stays: pointing the name at the candidate is a step of its own, see `promotion`.
A crash between any two steps leaves the old model serving; doing it again finishes.
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
from web4lora_chassis.errors import FailedPrecondition, InvalidInput, NotFound, Web4Error
from web4lora_chassis.jobs import Progress

from web4lora_deployer import names
from web4lora_deployer.adapters import require_adapter
from web4lora_deployer.deployments import Adapter, Deployment, Deployments, Parameters
from web4lora_deployer.first_answer import first_answer
from web4lora_deployer.gguf_file import read_facts, require_model
from web4lora_deployer.promotion import leave_others, make_room
from web4lora_deployer.runtimes import AUTO, choose, llama_server, open_runtime
from web4lora_deployer.runtimes.base import Deployed, Report, Runtime, State
from web4lora_deployer.settings import DeployerSettings

log = logging.getLogger(__name__)

DEFAULT_CONTEXT_TOKENS = 4096
DEFAULT_PARALLEL = 4
_MODELFILE = "modelfile.json"


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
    parallel: int = DEFAULT_PARALLEL
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
    """

    deployment: Deployment
    deployed: Deployed
    ready_seconds: float
    unchanged: bool


def deploy(
    request: DeployRequest,
    settings: DeployerSettings,
    store: ArtifactStore,
    work_dir: Path,
    report: Report,
) -> DeployOutcome:
    """Deploy a model under its own id, beside what serves under its name.

    The file that serves under the name already is deployed in place: with other settings it is started
    again, in another runtime its name moves there once it has answered.

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
        wanted = _in_place_of(before, wanted, runtime)
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
    wanted = leave_others(wanted, deployments, settings)
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
    """Bring the GGUFs onto this machine, verified, and say what is wanted of them."""
    model = _bring("", request.gguf, deployments, store, report)
    brought = [model]
    try:
        facts = read_facts(deployments.models / model.file)
        require_model(deployments.models / model.file, facts)
        for name, ref in request.adapters.items():
            _require_one_base(name, store.manifest(ref), store.manifest(request.gguf))
            brought.append(_bring(name, ref, deployments, store, report))
            require_adapter(name, deployments.models / brought[-1].file, facts)
    except (InvalidInput, FailedPrecondition):
        for each in brought:
            deployments.drop_file(each.file)
        raise
    parameters = replace(_parameters(request.files, store, work_dir), **request.parameters)
    context_tokens = request.context_tokens or parameters.context_tokens or DEFAULT_CONTEXT_TOKENS
    adapters = tuple(brought[1:])
    digests = [(adapter.name, adapter.sha256) for adapter in adapters]
    deployment_id = names.candidate_id(request.name, model.sha256, digests)
    return Deployment(
        id=deployment_id,
        name=request.name,
        target=target,
        gguf=request.gguf,
        file=model.file,
        sha256=model.sha256,
        size_bytes=model.size_bytes,
        parameters=parameters,
        context_tokens=min(context_tokens, facts.context_tokens or context_tokens),
        parallel=request.parallel,
        generation=secrets.token_hex(8),
        model=deployment_id,
        created_at=time.time(),
        adapters=adapters,
    )


def _bring(
    name: str, ref: ArtifactRef, deployments: Deployments, store: ArtifactStore, report: Report
) -> Adapter:
    """Bring one GGUF onto this machine: an adapter, or the model itself, which has no name of its own."""
    manifest = store.manifest(ref)
    if len(manifest.files) != 1:
        raise InvalidInput(
            f"{ref} has {len(manifest.files)} files; exactly one GGUF can be deployed.",
            fix="Merge a split model into one file first: llama-gguf-split --merge.",
        )
    entry = manifest.files[0]
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        report(Progress(phase="fetch", done=done, total=entry.size_bytes, unit="bytes", message=name))

    folder = deployments.models / entry.sha256[:16]
    store.get(ref, folder, advance=advance)
    return Adapter(name, ref, f"{folder.name}/{entry.path}", entry.sha256, entry.size_bytes)


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
    return read_parameters(json.loads((work_dir / "files" / _MODELFILE).read_text(encoding="utf-8")))


def read_parameters(data: object) -> Parameters:
    """Check the content of a modelfile.json, see `_parameters`."""
    if not isinstance(data, dict):
        raise InvalidInput(f"{_MODELFILE} is not a JSON object.")
    wanted: dict[str, type | tuple[type, ...]] = {
        "stop": list, "system": str, "temperature": (int, float), "license": str, "context_tokens": int,
    }  # fmt: skip
    given = {key: value for key, value in data.items() if key in wanted and value is not None}
    for key, value in given.items():
        if not isinstance(value, wanted[key]) or isinstance(value, bool):
            raise InvalidInput(f"{_MODELFILE}: {key} is {value!r}, of the wrong type.")
    stop = given.get("stop", [])
    if not all(isinstance(text, str) and text for text in stop):
        raise InvalidInput(f"{_MODELFILE}: stop is {stop!r}; it must be a list of texts.")
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


def _in_place_of(before: Deployment, wanted: Deployment, runtime: Runtime) -> Deployment:
    """Return what is wanted in place of an earlier deployment of the same file.

    What is the same already is left as it is, so that nothing is started anew, unless it has failed.
    """
    if _same(before, wanted):
        serves = before.loaded and runtime.health(before).state is not State.FAILED
        generation = before.generation if serves else wanted.generation
        return replace(before, gguf=wanted.gguf, adapters=wanted.adapters, loaded=True, generation=generation)
    others = dict.fromkeys((*before.leaving, before.target))
    return replace(wanted, leaving=tuple(target for target in others if target != wanted.target))


def _same(before: Deployment, wanted: Deployment) -> bool:
    """Say whether what is deployed is what is wanted."""
    left, right = (
        (record.target, record.files, record.parameters, record.context_tokens, record.parallel)
        for record in (before, wanted)
    )
    return left == right


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
