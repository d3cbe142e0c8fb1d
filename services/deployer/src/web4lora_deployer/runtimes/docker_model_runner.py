"""Docker Model Runner as a runtime: the GGUF as an OCI model, streamed in, tagged, its context bounded."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any

import httpx2
import psutil
import web4lora_llamacpp
from web4lora_chassis.errors import DataLoss, FailedPrecondition, NotFound, Unavailable, Web4Error
from web4lora_chassis.jobs import Progress
from web4lora_chassis.jobs.byte_progress import byte_progress
from web4lora_chassis.model_files.gguf import GgufHeader, read_gguf

from web4lora_deployer.prompts.gate import Served, prompts, require_same_prompts
from web4lora_deployer.records.deployments import Deployment
from web4lora_deployer.registry.oci import OciModel, build, tar_chunks, tar_size_bytes
from web4lora_deployer.runtimes.base import Deployed, Health, Report, RuntimeStatus, State
from web4lora_deployer.runtimes.http import (
    PROBE_SECONDS,
    client,
    ends_answer,
    prompt_tokens,
    reaching,
    refused,
)
from web4lora_deployer.runtimes.ownership import Ownership
from web4lora_deployer.runtimes.tokens import tokenizer_log, tokenizer_of
from web4lora_deployer.settings import DeployerSettings

TARGET = "docker"
WHAT = "Docker Model Runner"
USUAL_ADDRESSES = (
    "http://localhost:12434",
    "http://model-runner.docker.internal",
    "http://host.docker.internal:12434",
)
_CALL_SECONDS = 60.0
_LOAD_SECONDS = 900.0  # it checks and stores the whole file before it answers
_ENABLE = (
    "Docker Desktop: Settings, AI, Enable Docker Model Runner with host-side TCP 12434; "
    "else set WEB4LORA_DOCKER_MODEL_RUNNER to its address"
)


class DockerModelRunnerRuntime:
    """See `Runtime`."""

    target = TARGET

    def __init__(self, settings: DeployerSettings) -> None:
        given = settings.docker_model_runner
        self._addresses = (given,) if given else USUAL_ADDRESSES
        self._found = ""
        self._servers: dict[str, psutil.Process] = {}
        self._cache = settings.cache
        self._home = settings.deployer_home
        self._own = Ownership(settings, TARGET, WHAT, "docker model rm {}", self._digest)

    def probe(self) -> RuntimeStatus:
        """Try its addresses; the first one that answers as Model Runner does is used from then on."""
        answers = _probe_all(self._addresses)
        for address, said in answers.items():
            if not said:
                self._found = address
                return RuntimeStatus(self.target, usable=True, address=address, version=_version(address))
        tried = [f"{address} ({said})" for address, said in answers.items()]
        detail = f"not found; tried {', '.join(tried)}. {_ENABLE}"
        return RuntimeStatus(self.target, usable=False, address=self._addresses[0], detail=detail)

    def deploy(self, deployment: Deployment, file: Path, report: Report) -> Deployed:
        """Bring the model in unless it is there, tag it, bound its context, and look at the result."""
        version = self._version()
        self._own.require_ours(_named(deployment))  # said before anything is uploaded
        header = read_gguf(file)
        model = build(deployment, file, header)
        if self._own.require_ours(deployment.id):  # what is there already is looked at, and never changed
            self._try(deployment, model, header, file, report)
        else:
            if self._inspect(model.digest) is None:
                self._load(model, deployment, report)
            with self._own.working(deployment.id, self._delete) as working:
                report(Progress(phase="tag", message=deployment.id))
                self._tag(model.digest, working)
                self._try(replace(deployment, id=working), model, header, file, report)
                self._point(deployment.id, model.digest)
            self.restore(deployment)
        return Deployed(f"{self._address()}/engines/v1", deployment.id, version)

    def promote(self, deployment: Deployment) -> None:
        """Move the name's tag `latest` to the candidate."""
        digest = self._own.require_ours(deployment.id)
        if not digest:
            raise NotFound(f"{WHAT} no longer has {deployment.id}.", fix="Deploy it again.")
        self._point(_named(deployment), digest)

    def withdraw(self, deployment: Deployment) -> None:
        """Remove the name's tag if it is ours; the candidates keep their own."""
        self._own.release(_named(deployment), self._delete)

    def health(self, deployment: Deployment) -> Health:
        """See that Model Runner is there and still has the model."""
        deployed = Deployed(deployment.endpoint, deployment.model, deployment.runtime_version)
        try:
            shown = self._inspect(deployment.id)
        except Web4Error as error:
            broken = isinstance(error, FailedPrecondition)  # it is there, and can't even show the model
            return Health(State.FAILED, error.message, deployed, broken)
        if shown is None:
            return Health(State.FAILED, f"{WHAT} no longer has it; deploy it again", deployed, broken=True)
        return Health(State.SERVING if deployment.loaded else State.STOPPED, "", deployed)

    def memory_bytes(self, deployment: Deployment) -> int:
        """Return the resident memory of the process that it runs for the model, when it is on this machine.

        Model Runner itself does not tell. The process has the model's digest in its arguments.
        """
        process = self._servers.get(deployment.id)
        if process is None or not process.is_running():
            shown = self._inspect(deployment.id) or {}
            process = _process_of(str(shown.get("id", "")).removeprefix("sha256:"))
        if process is None:
            self._servers.pop(deployment.id, None)
            return 0
        self._servers[deployment.id] = process
        try:
            return int(process.memory_info().rss)
        except psutil.Error:  # it ended just now, or is another user's
            return 0

    def unload(self, deployment: Deployment) -> None:
        """Free its memory until the next request."""
        self._post("unload the model", "/engines/unload", {"models": [deployment.id]})

    def restore(self, deployment: Deployment) -> None:
        """Set the context again, which Model Runner forgets when it is restarted."""
        if self._inspect(deployment.id) is not None and not self._configured(deployment):
            self._configure(deployment)

    def delete(self, deployment: Deployment) -> None:
        """Remove the candidate's tag; the bytes go with the last one."""
        self._own.release(deployment.id, self._delete)

    def _try(
        self, deployment: Deployment, model: OciModel, header: GgufHeader, file: Path, report: Report
    ) -> None:
        """Bound a model's context; see that it is what was asked for and is given training's prompts."""
        check_shown(self._inspect(deployment.id), model, deployment)
        self.restore(deployment)
        deployed = Deployed(f"{self._address()}/engines/v1", deployment.id, "")
        self._compare_prompts(deployment, deployed, header, file, report)

    def _point(self, name: str, digest: str) -> None:
        """Let a name stand for a model from now on."""
        if not self._own.move(name, digest, lambda: self._tag(digest, name)):
            raise Unavailable(f"{WHAT} did not point {name} at {digest}.", fix="Try again.")

    def _digest(self, reference: str) -> str:
        """Return the digest that a tag stands for; empty when there is no such tag."""
        shown = self._inspect(reference) or {}
        tags = [normalise(str(tag)) for tag in shown.get("tags") or []]
        return str(shown.get("id", "")) if normalise(reference) in tags else ""

    def _compare_prompts(
        self, deployment: Deployment, deployed: Deployed, header: GgufHeader, file: Path, report: Report
    ) -> None:
        """See that the model is given what it was in training, and ends its answers as there.

        Model Runner tells how many tokens it was; which ones, a llama-server of ours says of the same file.
        """

        def count(messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> int:
            return prompt_tokens(WHAT, deployed.endpoint, deployed.model, messages, tools, _LOAD_SECONDS)

        def ends(token: int) -> bool:
            return ends_answer(WHAT, deployed.endpoint, deployed.model, token, _LOAD_SECONDS)

        llama = web4lora_llamacpp.ensure_built(self._cache, report)
        with tokenizer_of(llama, file, tokenizer_log(self._home, deployed.model)) as tokenizer:
            records = [self._home / "models" / record for record in deployment.records]
            wanted = prompts(records, header, tokenizer, report)
            served = Served(count, tokenizer.render, ends, deployment.context_tokens)
            require_same_prompts(deployed.model, wanted, tokenizer, served)

    def _address(self) -> str:
        """Return the address that works.

        Raises:
            Unavailable: None does.
        """
        if not self._found:
            status = self.probe()
            if not status.usable:
                raise Unavailable(f"{WHAT} was {status.detail}", reason="RUNTIME_UNAVAILABLE")
        return self._found if "://" in self._found else f"http://{self._found}"

    def _version(self) -> str:
        return _version(self._address())

    def _load(self, model: OciModel, deployment: Deployment, report: Report) -> None:
        """Stream the model in, without a copy on the way."""
        advance = byte_progress(report, "upload", deployment.size_bytes)
        headers = {"Content-Type": "application/x-tar", "Content-Length": str(tar_size_bytes(model))}
        answer = self._call(
            lambda http: http.post("/models/load", content=tar_chunks(model, advance), headers=headers),
            _LOAD_SECONDS,
        )
        if "blob digest mismatch" in answer.text:
            raise DataLoss(
                f"{deployment.id} arrived at {WHAT} as other bytes.",
                fix="Try again; if it happens again, the disk or the memory is at fault.",
            )
        if answer.status_code != httpx2.codes.OK or '"error"' in answer.text.replace("&#34;", '"'):
            raise refused(WHAT, "take the model", answer.status_code, answer.text)

    def _tag(self, model: str, reference: str) -> None:
        name, _, tag = reference.rpartition(":")
        answer = self._call(lambda http: http.post(f"/models/{model}/tag", params={"repo": name, "tag": tag}))
        if answer.status_code != httpx2.codes.CREATED:
            raise refused(WHAT, f"tag the model as {reference}", answer.status_code, answer.text)

    def _configure(self, deployment: Deployment) -> None:
        self._post("set the model's context", "/engines/_configure", configuration(deployment))

    def _configured(self, deployment: Deployment) -> bool:
        """Say whether Model Runner has the context that we set; only newer ones tell."""
        digest = self._digest(deployment.id)
        answer = self._call(lambda http: http.get("/engines/_configure"))
        if answer.status_code != httpx2.codes.OK:
            return False
        size = configuration(deployment)["context-size"]
        return any(
            digest
            and entry.get("ModelID") == digest
            and (entry.get("Config") or {}).get("context-size") == size
            for entry in answer.json() or []
        )

    def _post(self, doing: str, path: str, body: Mapping[str, Any]) -> None:
        answer = self._call(lambda http: http.post(path, json=dict(body)))
        if not answer.is_success:
            raise refused(WHAT, doing, answer.status_code, answer.text)

    def _inspect(self, reference: str) -> Mapping[str, Any] | None:
        """Return what Model Runner knows of a model; None when it has no such model."""
        answer = self._call(lambda http: http.get(f"/models/{reference}"))
        if answer.status_code == httpx2.codes.NOT_FOUND:
            return None
        if answer.status_code != httpx2.codes.OK:
            raise refused(WHAT, "show the model", answer.status_code, answer.text)
        try:
            data = answer.json()
        except ValueError as error:
            raise refused(WHAT, "show the model", answer.status_code, answer.text) from error
        return data if isinstance(data, dict) else None

    def _delete(self, reference: str) -> None:
        answer = self._call(lambda http: http.delete(f"/models/{reference}"))
        if answer.status_code not in (httpx2.codes.OK, httpx2.codes.NOT_FOUND):
            raise refused(WHAT, f"delete {reference}", answer.status_code, answer.text)

    def _call(
        self, call: Callable[[httpx2.Client], httpx2.Response], seconds: float = _CALL_SECONDS
    ) -> httpx2.Response:
        address = self._address()
        with reaching(WHAT, address), client(address, seconds) as http:
            return call(http)


def configuration(deployment: Deployment) -> dict[str, Any]:
    """Return what to ask of /engines/_configure: a whole context for each request, no hoard of prompts."""
    return {
        "model": deployment.id,
        "context-size": deployment.context_tokens * deployment.parallel,
        "runtime-flags": [
            "--parallel", str(deployment.parallel), "--cache-ram", "0",
            "--temp", f"{deployment.parameters.temperature:g}",
        ],
    }  # fmt: skip


def _named(deployment: Deployment) -> str:
    """Return the name people call, as Model Runner has it."""
    return f"{deployment.name}:latest"


def check_shown(shown: Mapping[str, Any] | None, model: OciModel, deployment: Deployment) -> None:
    """Compare what Model Runner shows of a model with what was asked.

    Raises:
        FailedPrecondition: It has something else.
    """
    shown = shown or {}
    config = shown.get("config") or {}
    wanted = {
        "id": (model.digest, shown.get("id")),
        **{name: (value, config.get(name)) for name, value in model.described.items() if value},
        "tag": (True, normalise(deployment.id) in [normalise(str(tag)) for tag in shown.get("tags") or []]),
    }
    for name, (expected, found) in wanted.items():
        if expected != found:
            raise FailedPrecondition(
                f"{WHAT} has {deployment.id} with {name} {found!r} in place of {expected!r}.",
                fix="Try again; if it happens again, this version is not known to us.",
                reason="MODEL_NOT_AS_ASKED",
            )


def normalise(reference: str) -> str:
    """Return a model's name as Model Runner lists it: `foo` is docker.io/ai/foo:latest."""
    name, _, tag = reference.rpartition(":") if ":" in reference.rpartition("/")[2] else (reference, "", "")
    parts = name.split("/")
    if len(parts) == 1:
        parts = ["ai", *parts]
    if not any(sign in parts[0] for sign in ".:") and parts[0] != "localhost":
        parts = ["docker.io", *parts]
    return f"{'/'.join(parts)}:{tag or 'latest'}"


def _process_of(digest: str) -> psutil.Process | None:
    """Return the process on this machine that serves a model; None when there is none that we may see."""
    for process in psutil.process_iter(["cmdline"]) if digest else ():
        words = process.info["cmdline"] or []
        if "--model" in words and any(f"/{digest}/" in word for word in words):
            return process
    return None


def _probe_all(addresses: Sequence[str]) -> dict[str, str]:
    """Ask at all addresses at once; looking a name up can take longer than any time limit of ours."""
    answers = dict.fromkeys(addresses, "no answer in time")

    def probe_one(address: str) -> None:
        answers[address] = _probe(address)

    threads = [Thread(target=probe_one, args=(address,), daemon=True) for address in addresses]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 2 * PROBE_SECONDS
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    return dict(answers)


def _probe(address: str) -> str:
    """Ask at an address; return why Model Runner is not there, or nothing when it is."""
    try:
        with client(address, PROBE_SECONDS) as http:
            status = http.get("/engines/status")
            models = http.get("/models")
    except httpx2.TimeoutException:
        return "no answer in time"
    except httpx2.HTTPError:
        return "nothing listens there"
    if "llama.cpp" not in status.text or status.status_code != httpx2.codes.OK:
        return "something else answers there"
    return "" if models.status_code == httpx2.codes.OK else "it does not let us manage models"


def _version(address: str) -> str:
    """Return the version; empty for one too old to tell."""
    try:
        with client(address, PROBE_SECONDS) as http:
            return str(http.get("/version").json()["version"])
    except (httpx2.HTTPError, ValueError, KeyError, TypeError):
        return ""
