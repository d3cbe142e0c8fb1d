"""Docker Model Runner as a runtime: the GGUF as an OCI model, streamed in, tagged, its context bounded."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import psutil
import web4lora_llamacpp
from web4lora_chassis.errors import DataLoss, FailedPrecondition, NotFound, Unavailable, Web4Error
from web4lora_chassis.jobs import Progress

from web4lora_deployer.deployments import Deployment
from web4lora_deployer.gguf_file import GgufFacts, read_facts
from web4lora_deployer.oci import OciModel, build, tar_chunks, tar_size_bytes
from web4lora_deployer.runtimes.base import Deployed, Health, Report, RuntimeStatus, State
from web4lora_deployer.runtimes.http import PROBE_SECONDS, client, prompt_tokens, reaching, refused
from web4lora_deployer.runtimes.tokens import tokenizer_log, tokenizer_of
from web4lora_deployer.settings import DeployerSettings
from web4lora_deployer.template_gate import Served, require_same_prompts

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

    def probe(self) -> RuntimeStatus:
        """Try its addresses; the first one that answers as Model Runner does is used from then on."""
        answers = _look_all(self._addresses)
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
        facts = read_facts(file)
        model = build(deployment, file, facts)
        if self._inspect(model.digest) is None:
            self._load(model, deployment, report)
        report(Progress(phase="tag", message=deployment.id))
        self._tag(model.digest, deployment.id)
        self._configure(deployment)
        check_shown(self._inspect(deployment.id), model, deployment)
        deployed = Deployed(f"{self._address()}/engines/v1", deployment.id, version)
        if facts.chat_template:
            self._compare_prompts(deployed, facts, file, report)
        return deployed

    def promote(self, deployment: Deployment) -> None:
        """Move the name's tag `latest` to the candidate."""
        shown = self._inspect(deployment.id)
        if shown is None:
            raise NotFound(f"{WHAT} no longer has {deployment.id}.", fix="Deploy it again.")
        self._tag(str(shown["id"]), f"{deployment.name}:latest")
        named = self._inspect(f"{deployment.name}:latest")
        if named is None or named.get("id") != shown["id"]:
            raise Unavailable(f"{WHAT} did not point {deployment.name} at {deployment.id}.", fix="Try again.")

    def withdraw(self, deployment: Deployment) -> None:
        """Remove the name's tag; the candidates keep their own."""
        self._delete(f"{deployment.name}:latest")

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
        self._delete(deployment.id)

    def _compare_prompts(self, deployed: Deployed, facts: GgufFacts, file: Path, report: Report) -> None:
        """See that the model is given as many tokens as in training: Model Runner tells no more."""

        def count(messages: Sequence[Mapping[str, str]]) -> int:
            return prompt_tokens(WHAT, deployed.endpoint, deployed.model, messages, _LOAD_SECONDS)

        llama = web4lora_llamacpp.ensure_built(self._cache, report)
        report(Progress(phase="compare templates", message="by their number of tokens"))
        with tokenizer_of(llama, file, tokenizer_log(self._home, deployed.model)) as tokenizer:
            require_same_prompts(deployed.model, facts, tokenizer, Served(count))

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
        done = 0

        def advance(count: int) -> None:
            nonlocal done
            done += count
            report(Progress(phase="upload", done=done, total=deployment.size_bytes, unit="bytes"))

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
        if answer.status_code != httpx.codes.OK or '"error"' in answer.text.replace("&#34;", '"'):
            raise refused(WHAT, "take the model", answer.status_code, answer.text)

    def _tag(self, model: str, reference: str) -> None:
        name, _, tag = reference.rpartition(":")
        answer = self._call(lambda http: http.post(f"/models/{model}/tag", params={"repo": name, "tag": tag}))
        if answer.status_code != httpx.codes.CREATED:
            raise refused(WHAT, f"tag the model as {reference}", answer.status_code, answer.text)

    def _configure(self, deployment: Deployment) -> None:
        self._post("set the model's context", "/engines/_configure", configuration(deployment))

    def _configured(self, deployment: Deployment) -> bool:
        """Say whether Model Runner has the context that we set; only newer ones tell."""
        answer = self._call(lambda http: http.get("/engines/_configure"))
        if answer.status_code != httpx.codes.OK:
            return False
        wanted = normalise(deployment.id)
        size = configuration(deployment)["context-size"]
        return any(
            normalise(str(entry.get("Model", ""))) == wanted
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
        if answer.status_code == httpx.codes.NOT_FOUND:
            return None
        if answer.status_code != httpx.codes.OK:
            raise refused(WHAT, "show the model", answer.status_code, answer.text)
        data = answer.json()
        return data if isinstance(data, dict) else None

    def _delete(self, reference: str) -> None:
        answer = self._call(lambda http: http.delete(f"/models/{reference}"))
        if answer.status_code not in (httpx.codes.OK, httpx.codes.NOT_FOUND):
            raise refused(WHAT, f"delete {reference}", answer.status_code, answer.text)

    def _call(
        self, ask: Callable[[httpx.Client], httpx.Response], seconds: float = _CALL_SECONDS
    ) -> httpx.Response:
        address = self._address()
        with reaching(WHAT, address), client(address, seconds) as http:
            return ask(http)


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


def check_shown(shown: Mapping[str, Any] | None, model: OciModel, deployment: Deployment) -> None:
    """Compare what Model Runner shows of a model with what was asked.

    Raises:
        FailedPrecondition: It has something else.
    """
    shown = shown or {}
    config = shown.get("config") or {}
    wanted = {
        "id": (model.digest, shown.get("id")),
        **{name: (asked, config.get(name)) for name, asked in model.described.items() if asked},
        "tag": (True, normalise(deployment.id) in [normalise(str(tag)) for tag in shown.get("tags") or []]),
    }
    for name, (asked, found) in wanted.items():
        if asked != found:
            raise FailedPrecondition(
                f"{WHAT} has {deployment.id} with {name} {found!r} in place of {asked!r}.",
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


def _look_all(addresses: Sequence[str]) -> dict[str, str]:
    """Ask at all addresses at once; looking a name up can take longer than any time limit of ours."""
    answers = dict.fromkeys(addresses, "no answer in time")

    def look(address: str) -> None:
        answers[address] = _look(address)

    threads = [Thread(target=look, args=(address,), daemon=True) for address in addresses]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 2 * PROBE_SECONDS
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    return dict(answers)


def _look(address: str) -> str:
    """Ask at an address; return why Model Runner is not there, or nothing when it is."""
    try:
        with client(address, PROBE_SECONDS) as http:
            status = http.get("/engines/status")
            models = http.get("/models")
    except httpx.TimeoutException:
        return "no answer in time"
    except httpx.HTTPError:
        return "nothing listens there"
    if "llama.cpp" not in status.text or status.status_code != httpx.codes.OK:
        return "something else answers there"
    return "" if models.status_code == httpx.codes.OK else "it does not let us manage models"


def _version(address: str) -> str:
    """Return the version; empty for one too old to tell."""
    try:
        with client(address, PROBE_SECONDS) as http:
            return str(http.get("/version").json()["version"])
    except (httpx.HTTPError, ValueError, KeyError, TypeError):
        return ""
