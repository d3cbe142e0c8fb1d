"""Deployments: make one, choose which serves, switch its adapters, push it, test it."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path

from web4.lora.v1 import deployer_pb2, deployments_pb2, jobs_pb2
from web4lora_chassis.errors import NotFound
from web4lora_chassis.rpc import ref_message

from web4lora.client.deployable import adapter_spec, deploy_spec
from web4lora.client.docker_login import registry_login
from web4lora.client.evaluation import EvalModel, evaluate_request, report_name
from web4lora.client.jobs import Jobs
from web4lora.client.runs import Runs
from web4lora.client.upload import store_suite

_LOAD_SECONDS = 900.0  # a large model is loaded before its name moves
_SET_SECONDS = 40.0  # the deployer waits for llama-server to take them
_LOGIN = "registry-login"


class Deployments(Runs, Jobs):
    """The client's methods for deployments: a run's model is deployed, tested and pushed by jobs."""

    def deployments(self) -> list[deployments_pb2.Deployment]:
        """Return what is deployed, newest first."""
        request = deployments_pb2.ListDeploymentsRequest()
        return [
            _seen_from_here(each)
            for each in self._call(self._deployments.ListDeployments, request).deployments
        ]

    def deployment(self, name: str) -> deployments_pb2.Deployment:
        """Return a deployment by its id, or the promoted one of a name; the newest when none is promoted.

        Raises:
            NotFound: Nothing of that name is deployed.
        """
        request = deployments_pb2.GetDeploymentRequest(id=name)
        try:
            return _seen_from_here(self._call(self._deployments.GetDeployment, request).deployment)
        except NotFound as error:
            known = ", ".join(dict.fromkeys(each.name for each in self.deployments()))
            fix = f"These are: {known}." if known else "Nothing is: `web4lora run PIPELINE.yaml` deploys one."
            raise NotFound(f"No model called {name!r} is deployed.", fix=fix) from error

    def promote(self, deployment_id: str) -> deployments_pb2.Deployment:
        """Point a deployment's name at it, once it has answered; safe to repeat.

        Raises:
            NotFound: No such deployment.
            FailedPrecondition: It does not answer.
            ResourceExhausted: Memory does not suffice to load it.
            Unavailable: Its runtime is out of reach.
        """
        request = deployments_pb2.PromoteDeploymentRequest(id=deployment_id)
        answer = self._call(self._deployments.PromoteDeployment, request, _LOAD_SECONDS)
        return _seen_from_here(answer.deployment)

    def roll_back(self, name: str, *, from_id: str = "") -> deployments_pb2.Deployment:
        """Point a name back at the deployment that served under it before.

        Args:
            name: The name people call.
            from_id: The deployment to go back from, which makes the call safe to repeat: when the name stands
                for another one already, that one is returned.

        Raises:
            NotFound: Nothing serves under the name.
            FailedPrecondition: There is no earlier one, or it does not answer.
            ResourceExhausted: Memory does not suffice to load it.
            Unavailable: Its runtime is out of reach.
        """
        request = deployments_pb2.RollbackDeploymentRequest(name=name, from_id=from_id)
        answer = self._call(self._deployments.RollbackDeployment, request, _LOAD_SECONDS)
        return _seen_from_here(answer.deployment)

    def delete_deployment(self, deployment_id: str) -> None:
        """Take a deployment out of its runtime, and its name too when that stands for it.

        What is gone already is no error.

        Raises:
            Unavailable: Its runtime is out of reach.
        """
        request = deployments_pb2.DeleteDeploymentRequest(id=deployment_id)
        self._call(self._deployments.DeleteDeployment, request, _LOAD_SECONDS)

    def deploy(
        self,
        source: str | Path,
        name: str = "",
        *,
        target: str = "",
        context_tokens: int = 0,
        parallel: int = 0,
        stop: Iterable[str] = (),
        system: str | None = None,
        temperature: float | None = None,
        license_text: str | None = None,
        adapters: Mapping[str, str | Path] | None = None,
        request_id: str = "",
    ) -> jobs_pb2.Job:
        """Start to deploy a model as a candidate, beside what serves under its name; see `promote`.

        Args:
            source: A run's id or folder, or a GGUF file, which is stored first unless it is there.
            name: What people will call it; empty takes the run's name.
            target: "auto", "ollama", "docker" or "llama-server"; empty takes the deployer's own setting.
            context_tokens: Context length of one request; 0 takes the packager's advice, else 4096.
            parallel: Requests answered at once; 0 takes 4.
            stop: Texts that end an answer, besides the model's own end token; none takes the report's.
            system: System message of conversations that have none; None takes the report's.
            temperature: Of requests that name none; None takes the report's, else 0.
            license_text: The licence, its name or its text; None takes the report's.
            adapters: GGUF files of LoRA adapters on the source, which is their base then, by what people will
                call them. For llama-server alone; `set_adapters` switches. The first one is applied at first.
            request_id: Makes the call repeatable.

        Returns:
            The job; `watch_job` follows it.

        Raises:
            InvalidInput: A name, file or setting that can't be deployed.
            NotFound: There is no such file or run.
            FailedPrecondition: The run has no packaged model.
        """
        spec = deploy_spec(source, name, run_of=self.get_run, open_store=lambda: self.store_to_write)
        for field, value in (("target", target), ("context_tokens", context_tokens), ("parallel", parallel)):
            if value:
                setattr(spec.deploy, field, value)
        spec.parameters.stop.extend(stop)
        for field, given in (("system", system), ("temperature", temperature), ("license", license_text)):
            if given is not None:
                setattr(spec.parameters, field, given)
        spec.adapters.extend(
            adapter_spec(each, file, run_of=self.get_run, open_store=lambda: self.store_to_write)
            for each, file in (adapters or {}).items()
        )
        request = jobs_pb2.CreateJobRequest(
            request_id=request_id or uuid.uuid4().hex, spec=jobs_pb2.JobSpec(deploy=spec)
        )
        return self.create_job(request)

    def set_adapters(self, deployment: str, scales: Mapping[str, float]) -> deployments_pb2.Deployment:
        """Set how strongly a deployment's adapters are applied, without a restart; safe to repeat.

        Answers at work end as they began. The scales are kept: a server that starts again begins with them.

        Args:
            deployment: Its id or name.
            scales: By the adapter's name: 0 is not at all, 1 as it was trained, at most 2. An adapter that is
                not named keeps its scale.

        Returns:
            The deployment.

        Raises:
            NotFound: No such deployment.
            InvalidInput: It has no such adapter, or a scale is out of bounds.
            Unavailable: llama-server does not take them in time; it gets them once it does.
        """
        request = deployments_pb2.SetAdaptersRequest(id=deployment, scales=scales)
        return _seen_from_here(self._call(self._deployments.SetAdapters, request, _SET_SECONDS).deployment)

    def use_adapter(self, deployment: str, adapter: str) -> deployments_pb2.Deployment:
        """Apply one of a deployment's adapters as it was trained, and no other; see `set_adapters`."""
        others = {each.name: 0.0 for each in self.deployment(deployment).adapters}
        return self.set_adapters(deployment, {**others, adapter: 1.0})

    def push(
        self,
        deployment: str,
        reference: str,
        *,
        plain_http: bool = False,
        login: Mapping[str, str] | None = None,
        request_id: str = "",
    ) -> jobs_pb2.Job:
        """Start to push a deployment to an OCI registry.

        Args:
            deployment: Its id or name.
            reference: `registry/repository[:tag]`.
            plain_http: Speak without TLS also to a registry beyond this machine.
            login: `username` and `password`, or `identity_token`; None takes Docker's own for the registry.
            request_id: Makes the call repeatable.

        Returns:
            The job; `watch_job` follows it.

        Raises:
            InvalidInput: The reference has another form.
            FailedPrecondition: Docker's configuration can't be read.
        """
        credentials = registry_login(reference.partition("/")[0]) if login is None else dict(login)
        spec = deployer_pb2.PushSpec(
            deployment=deployment,
            reference=reference,
            plain_http=plain_http,
            secret=_LOGIN if credentials else "",
        )
        request = jobs_pb2.CreateJobRequest(
            request_id=request_id or uuid.uuid4().hex, spec=jobs_pb2.JobSpec(push=spec)
        )
        if credentials:
            request.secrets[_LOGIN] = json.dumps(credentials)
        return self.create_job(request)

    def evaluate(
        self,
        model: str | EvalModel,
        suite: str | Path,
        *,
        against: Iterable[str | EvalModel] = (),
        budgets: deployer_pb2.Budgets | None = None,
        name: str = "",
        request_id: str = "",
    ) -> jobs_pb2.Job:
        """Start to run a test suite on a model, wherever it answers.

        Args:
            model: A deployment's name or id, or `MODEL@http://HOST:PORT/v1`; as `EvalModel` also with a key.
            suite: The suite file, which is stored first with the files it names.
            against: Models to compare with, prompt by prompt; drops are measured from the first one.
            budgets: Limits of the verdict; none is set by default.
            name: Name of the report; empty makes one of the model's.
            request_id: Makes the call repeatable.

        Returns:
            The job; `watch_job` follows it.

        Raises:
            InvalidInput: The suite is not YAML, or a model's address has another form.
            NotFound: A file is not there.
            Unavailable: The gateway, the deployer or the store is out of reach.
        """
        first, *others = [
            each if isinstance(each, EvalModel) else EvalModel.of(each) for each in (model, *against)
        ]
        spec = deployer_pb2.EvaluateSpec(name=name or report_name(first), budgets=budgets)
        spec.suite.CopyFrom(ref_message(store_suite(self.store_to_write, spec.name, Path(suite))))
        return self.create_job(evaluate_request(first, spec, others, request_id or uuid.uuid4().hex))


def _seen_from_here(deployment: deployments_pb2.Deployment) -> deployments_pb2.Deployment:
    """Return a deployment with an address for this machine: a deployer in a container has its own for it."""
    deployment.endpoint = deployment.endpoint.replace("//host.docker.internal", "//127.0.0.1", 1)
    return deployment
