"""Ollama as a runtime: the GGUF as a blob, a model made of it, its prompts compared with training's."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import web4lora_llamacpp
from web4lora_chassis.errors import FailedPrecondition, NotFound, Unavailable, Web4Error
from web4lora_chassis.jobs import Progress
from web4lora_chassis.jobs.byte_progress import byte_progress
from web4lora_chassis.model_files.gguf import GgufHeader, read_gguf

from web4lora_deployer.prompts.gate import (
    CountDifference,
    Difference,
    Prompt,
    Served,
    compare,
    prompts,
    refusal,
)
from web4lora_deployer.prompts.go_template import GoTemplate, chat_template, go_template
from web4lora_deployer.prompts.training_record import read_record
from web4lora_deployer.records.deployments import Deployment
from web4lora_deployer.runtimes.base import Deployed, Health, Report, RuntimeStatus, State
from web4lora_deployer.runtimes.ollama_api import OllamaApi
from web4lora_deployer.runtimes.ownership import Ownership
from web4lora_deployer.runtimes.tokens import tokenizer_log, tokenizer_of
from web4lora_deployer.settings import DeployerSettings

TARGET = "ollama"
_OLDEST = (0, 31, 2)
_NEWEST_SEEN = (0, 34)
_VERSION = re.compile(r"(\d+)\.(\d+)\.(\d+)")


class OllamaRuntime:
    """See `Runtime`."""

    target = TARGET

    def __init__(self, settings: DeployerSettings) -> None:
        self._api = OllamaApi(settings.ollama)
        self._cache = settings.cache
        self._home = settings.deployer_home
        self._own = Ownership(settings, TARGET, "Ollama", "ollama rm {}", self._api.digest)

    def probe(self) -> RuntimeStatus:
        """Ask for its version, and say whether that can take a quantized GGUF."""
        address = self._api.address
        try:
            version = self._api.version()
        except Unavailable:
            detail = f"not running at {address}: start Ollama, or set WEB4LORA_OLLAMA to its address"
            return RuntimeStatus(self.target, usable=False, address=address, detail=detail)
        match = _VERSION.match(version)
        if not match:
            detail = f"what answers at {address} is not Ollama, or not a released one: version {version!r}"
            return RuntimeStatus(self.target, usable=False, address=address, detail=detail)
        number = tuple(int(part) for part in match.groups())
        if number < _OLDEST:
            oldest = ".".join(map(str, _OLDEST))
            detail = (
                f"Ollama at {address} is {version}; {oldest} or newer is needed to take a quantized GGUF. "
                "Update Ollama, or deploy with `--target llama-server`."
            )
            return RuntimeStatus(self.target, usable=False, address=address, version=version, detail=detail)
        newer = number[:2] > _NEWEST_SEEN
        detail = f"newer than {'.'.join(map(str, _NEWEST_SEEN))}, the newest one tested" if newer else ""
        return RuntimeStatus(self.target, usable=True, address=address, version=version, detail=detail)

    def deploy(self, deployment: Deployment, file: Path, report: Report) -> Deployed:
        """Upload what is missing, create the model, and see that it is what was asked for."""
        self._api.version()  # out of reach is another error than too old
        status = self.probe()
        if not status.usable:
            raise FailedPrecondition(status.detail, reason="RUNTIME_NOT_USABLE")
        self._own.require_ours(_named(deployment))  # said before anything is uploaded
        if self._own.require_ours(deployment.id):  # made of the same, compared then, and not changed since
            template = GoTemplate("", deployment.parameters.system)
            shown = self._api.show(deployment.id)
            check_shown(shown, model_parameters(deployment), template, deployment.parameters.license)
        else:
            self._upload(deployment, file, report)
            with self._own.working(deployment.id, self._remove) as working:
                self._create_as_trained(replace(deployment, id=working), read_gguf(file), file, report)
                self._point(deployment.id, working)
        return Deployed(self._api.endpoint, deployment.id, status.version)

    def promote(self, deployment: Deployment) -> None:
        """Copy the candidate's manifest to the name; both then share their bytes."""
        if not self._own.require_ours(deployment.id):
            raise NotFound(f"Ollama no longer has {deployment.id}.", fix="Deploy it again.")
        self._point(_named(deployment), deployment.id)

    def withdraw(self, deployment: Deployment) -> None:
        """Delete the name if it is ours; the candidates keep their own."""
        self._own.release(_named(deployment), self._api.delete)

    def health(self, deployment: Deployment) -> Health:
        """See that Ollama is there and still has the model."""
        deployed = Deployed(self._api.endpoint, deployment.id, deployment.runtime_version)
        try:
            self._api.show(deployment.id)
        except NotFound:
            return Health(State.FAILED, "Ollama no longer has it; deploy it again", deployed, broken=True)
        except Web4Error as error:
            broken = isinstance(error, FailedPrecondition)  # it is there, and can't even show the model
            return Health(State.FAILED, error.message, deployed, broken)
        return Health(State.SERVING if deployment.loaded else State.STOPPED, "", deployed)

    def memory_bytes(self, deployment: Deployment) -> int:
        """Return what Ollama says that the model takes."""
        for model in self._api.loaded():
            if deployment.id in (model.get("name"), model.get("model")):
                return int(model.get("size", 0))
        return 0

    def unload(self, deployment: Deployment) -> None:
        """Free its memory until the next request."""
        self._api.unload(deployment.id)

    def restore(self, deployment: Deployment) -> None:
        """Nothing to do: Ollama keeps its models and loads them when asked."""

    def delete(self, deployment: Deployment) -> None:
        """Remove the candidate; its bytes go when no other name uses them."""
        self._own.release(deployment.id, self._api.delete)

    def _point(self, name: str, model: str) -> None:
        """Let a name stand for a model from now on."""
        if not self._own.move(name, self._api.digest(model), lambda: self._api.copy(model, name)):
            raise Unavailable(f"Ollama did not point {name} at {model}.", fix="Try again.")

    def _remove(self, model: str) -> None:
        """Delete a model that may be loaded."""
        self._api.unload(model)
        self._api.delete(model)

    def _upload(self, deployment: Deployment, file: Path, report: Report) -> None:
        """Bring the file in, unless Ollama has it."""
        advance = byte_progress(report, "upload", deployment.size_bytes)
        if self._api.has_blob(deployment.sha256):
            advance(deployment.size_bytes)
        else:
            self._api.put_blob(deployment.sha256, file, advance)

    def _create(self, deployment: Deployment, template: GoTemplate, report: Report) -> None:
        """Create the model and compare it with what was asked."""
        parameters = model_parameters(deployment)
        body: dict[str, Any] = {
            "model": deployment.id,
            "files": {Path(deployment.file).name: f"sha256:{deployment.sha256}"},
            "parameters": parameters,
        }
        optional = {
            "system": template.system, "template": template.text, "license": deployment.parameters.license,
        }  # fmt: skip
        body.update({key: value for key, value in optional.items() if value})
        self._api.create(body, lambda said: report(Progress(phase="create", message=said)))
        check_shown(self._api.show(deployment.id), parameters, template, deployment.parameters.license)

    def _create_as_trained(
        self, deployment: Deployment, header: GgufHeader, file: Path, report: Report
    ) -> None:
        """Create the model so that its prompts are training's: by Ollama's template, else a derived one.

        It is compared with the system message that the model's own template puts in. One of the user's own is
        given to it afterwards. A date that the template writes is that of training: what is set here stays.

        Raises:
            FailedPrecondition: They differ with both, or could not be compared.
        """
        records = [self._home / "models" / record for record in deployment.records]
        then = next((found for path in records if (found := read_record(path).rendered_at)), None)
        own = go_template(header, then)
        default = chat_template(header).default_system(then)
        served = Served(
            count=lambda messages, tools: self._api.prompt_tokens(deployment.id, messages, tools),
            render=lambda messages, tools: self._api.render(deployment.id, messages, tools),
            ends=lambda token: tokenizer.ends(token, deployment.parameters.stop),
            context_tokens=deployment.context_tokens,
        )
        llama = web4lora_llamacpp.ensure_built(self._cache, report)
        with tokenizer_of(llama, file, tokenizer_log(self._home, deployment.id)) as tokenizer:
            wanted: list[Prompt] = []
            for text in ("", own) if own else ("",):
                self._create(deployment, GoTemplate(text, default), report)
                wanted = wanted or prompts(records, header, tokenizer, report)
                finding = compare(wanted, tokenizer, served)
                if not isinstance(finding, Difference | CountDifference):
                    break
        if finding is not None:
            raise refusal(
                f"{deployment.id} on Ollama",
                finding,
                "Deploy it to llama-server or Docker Model Runner, which use the model's own template.",
            )
        system = deployment.parameters.system or default
        if system != default:
            self._create(deployment, GoTemplate(text, system), report)


def _named(deployment: Deployment) -> str:
    """Return the name people call, as Ollama has it."""
    return f"{deployment.name}:latest"


def model_parameters(deployment: Deployment) -> dict[str, Any]:
    """Return the model's parameters as /api/create takes them; it does not check them itself."""
    parameters: dict[str, Any] = {
        "num_ctx": deployment.context_tokens,
        "temperature": deployment.parameters.temperature,
    }
    if deployment.parameters.stop:
        parameters["stop"] = list(deployment.parameters.stop)
    return parameters


def check_shown(
    shown: Mapping[str, Any], parameters: Mapping[str, Any], template: GoTemplate, licence: str = ""
) -> None:
    """Compare what Ollama shows of a model with what was asked.

    Raises:
        FailedPrecondition: It made something else.
    """
    wanted = {f"{key} {value!r}": _has(shown, key, value) for key, value in parameters.items()}
    wanted["the system message"] = not template.system or shown.get("system") == template.system
    wanted["the template"] = not template.text or shown.get("template") == template.text
    wanted["the licence"] = not licence or str(shown.get("license", "")).strip() == licence.strip()
    missing = [name for name, found in wanted.items() if not found]
    if missing:
        raise FailedPrecondition(
            f"Ollama created the model without {', '.join(missing)}.",
            fix="Try again; if it happens again, this version of Ollama is not known to us.",
            reason="MODEL_NOT_AS_ASKED",
        )


def _has(shown: Mapping[str, Any], key: str, value: object) -> bool:
    """Say whether the text of `parameters`, one "name value" a line, holds a parameter."""
    lines = [line.split(maxsplit=1) for line in str(shown.get("parameters", "")).splitlines()]
    given = [words[1].strip() for words in lines if len(words) == 2 and words[0] == key]
    if isinstance(value, list):
        return set(given) >= {_quoted(text) for text in value}
    return any(_number(text) == value for text in given)


def _quoted(text: str) -> str:
    """Quote a text as Go's %q does, for the signs that stop texts are made of."""
    escapes = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\t": "\\t", "\r": "\\r"}
    return '"' + "".join(escapes.get(sign, sign) for sign in text) + '"'


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
