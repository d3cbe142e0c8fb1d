"""The Python client: what the command does, for programs."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar
from urllib.parse import urlsplit

import grpc
from web4.lora.v1 import (
    artifacts_pb2,
    artifacts_pb2_grpc,
    deployer_pb2,
    gateway_pb2,
    gateway_pb2_grpc,
    jobs_pb2,
)
from web4lora_chassis.artifacts import ArtifactRef, ArtifactStore, Manifest, open_store
from web4lora_chassis.errors import InvalidInput, NotFound, Unavailable, Web4Error
from web4lora_chassis.rpc import channel, error_of, ref_message, ref_of
from web4lora_chassis.settings import Settings, load

from web4lora.deployable import adapter_spec, deploy_spec
from web4lora.docker_login import registry_login
from web4lora.evaluation import Asked, evaluate_request, report_name
from web4lora.home import load_settings
from web4lora.pipeline_file import PipelineFile, read_pipeline
from web4lora.upload import store_dataset, store_suite

_CALL_SECONDS = 30.0
_LOAD_SECONDS = 900.0  # a large model is loaded before its name moves
_SET_SECONDS = 40.0  # the deployer waits for llama-server to take them
_AWAY_SECONDS = 60.0
_PAGE = 100
STAGES = tuple(name.removeprefix("STAGE_NAME_").lower() for name in gateway_pb2.StageName.keys()[1:])
_KIND_PREFIX = "ARTIFACT_KIND_"
_TERMINAL = (
    gateway_pb2.RUN_STATE_SUCCEEDED,
    gateway_pb2.RUN_STATE_FAILED,
    gateway_pb2.RUN_STATE_CANCELLED,
)

_JOB_TERMINAL = (jobs_pb2.JOB_STATE_SUCCEEDED, jobs_pb2.JOB_STATE_FAILED, jobs_pb2.JOB_STATE_CANCELLED)
_LOGIN = "registry-login"

R = TypeVar("R")


class Client:
    """Speaks to a gateway. Every method blocks; each raises a subclass of `Web4Error` when it fails.

    Args:
        settings: Which gateway and which store; read from the environment when absent.

    Example:
        >>> with Client() as client:
        ...     run = client.run("examples/web4/demo.yaml")
        ...     for snapshot in client.watch(run.id):
        ...         print(snapshot.state)
    """

    def __init__(self, settings: Settings | None = None) -> None:
        self._settings = settings or load_settings()
        self._channel = channel(self._settings.gateway_address, self._settings)
        self._gateway = gateway_pb2_grpc.GatewayServiceStub(self._channel)
        self._artifacts = artifacts_pb2_grpc.ArtifactServiceStub(self._channel)
        self._store: ArtifactStore | None = None

    def __enter__(self) -> Self:
        """Return the client; leaving the block closes its connection."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the connection."""
        self.close()

    def close(self) -> None:
        """Close the connection to the gateway."""
        self._channel.close()

    def info(self) -> gateway_pb2.GetGatewayInfoResponse:
        """Return the gateway's version, store, services and runtimes."""
        return self._call(self._gateway.GetGatewayInfo, gateway_pb2.GetGatewayInfoRequest())

    def run(
        self,
        pipeline: str | Path | PipelineFile | gateway_pb2.Pipeline,
        *,
        from_stage: str = "",
        request_id: str = "",
        overrides: Iterable[str] = (),
    ) -> gateway_pb2.Run:
        """Start a run.

        Args:
            pipeline: A pipeline file; its dataset and suite are checked and stored first. Or a message, whose
                dataset and suite are stored already.
            from_stage: Run this stage and those after it even if the same inputs were run before.
            request_id: Makes the call repeatable: the same key and pipeline give the same run.
            overrides: Settings that win over the file, as `train.epochs=2`.

        Returns:
            The run, durable from now on.

        Raises:
            InvalidInput: The file or the data is wrong; the message names file and line.
            NotFound: A file is not there.
            Unavailable: The gateway or the store is out of reach.
        """
        file: PipelineFile | None = None
        if isinstance(pipeline, gateway_pb2.Pipeline):
            message = pipeline
        else:
            file = (
                pipeline if isinstance(pipeline, PipelineFile) else read_pipeline(Path(pipeline), overrides)
            )
            message = self._stored(file)
        request = gateway_pb2.CreateRunRequest(
            request_id=request_id or uuid.uuid4().hex, pipeline=message, from_stage=stage_value(from_stage)
        )
        try:
            return self._call(self._gateway.CreateRun, request).run
        except Web4Error as error:
            raise (file.located(error) if file else error) from error

    def get_run(self, run_id: str = "latest") -> gateway_pb2.Run:
        """Return a run as it is now.

        Raises:
            NotFound: No such run.
        """
        return self._call(self._gateway.GetRun, gateway_pb2.GetRunRequest(id=run_id)).run

    def list_runs(self) -> Iterator[gateway_pb2.Run]:
        """Yield all runs, newest first; pages are fetched as they are needed."""
        token = ""
        while True:
            request = gateway_pb2.ListRunsRequest(page_size=_PAGE, page_token=token)
            answer = self._call(self._gateway.ListRuns, request)
            yield from answer.runs
            if not (token := answer.next_page_token):
                return

    def watch(self, run_id: str = "latest") -> Iterator[gateway_pb2.Run]:
        """Yield snapshots of a run, the current one first, until it has ended.

        A gateway that goes away is waited for: up to a minute, since runs go on when it is back.

        Raises:
            NotFound: No such run.
            Unavailable: The gateway was never there, or stayed away.
        """
        seen = -1
        away_since = 0.0
        while True:
            stream = self._gateway.WatchRun(gateway_pb2.WatchRunRequest(id=run_id))
            try:
                for answer in stream:
                    away_since = 0.0
                    run_id = answer.run.id  # "latest" must not change while it is watched
                    if answer.run.revision > seen:
                        seen = answer.run.revision
                        yield answer.run
                    if ended(answer.run):
                        return
            except grpc.RpcError as call:
                error = self._error(call)
                away_since = away_since or time.monotonic()
                if seen < 0 or not isinstance(error, Unavailable):
                    raise error from call
                if time.monotonic() - away_since > _AWAY_SECONDS:
                    raise Unavailable(
                        f"{error.message} It has been away for {_AWAY_SECONDS:.0f} s.",
                        fix=f"{run_id} goes on when it is back: `web4lora up`, then "
                        f"`web4lora runs watch {run_id}`.",
                        reason=error.reason,
                    ) from call
            finally:
                stream.cancel()
            time.sleep(1)

    def wait(self, run_id: str = "latest") -> gateway_pb2.Run:
        """Return a run once it has ended; see `watch`."""
        last = gateway_pb2.Run()
        for snapshot in self.watch(run_id):
            last = snapshot
        return last

    def cancel(self, run_id: str = "latest") -> gateway_pb2.Run:
        """Ask a run to end; the job at work is stopped within seconds.

        Raises:
            NotFound: No such run.
        """
        return self._call(self._gateway.CancelRun, gateway_pb2.CancelRunRequest(id=run_id)).run

    def retry(self, run_id: str = "latest", *, from_stage: str = "", request_id: str = "") -> gateway_pb2.Run:
        """Run a run's pipeline again from a stage, as a new run.

        Args:
            run_id: The run, which must have ended.
            from_stage: The first stage to run again; absent: the first one that did not succeed.
            request_id: Makes the call repeatable.

        Raises:
            NotFound: No such run.
            FailedPrecondition: It is at work, or a stage before `from_stage` never succeeded.
        """
        request = gateway_pb2.RetryRunRequest(
            id=run_id, from_stage=stage_value(from_stage), request_id=request_id or uuid.uuid4().hex
        )
        return self._call(self._gateway.RetryRun, request).run

    def deployments(self) -> list[deployer_pb2.Deployment]:
        """Return what is deployed, newest first."""
        request = gateway_pb2.GatewayServiceListDeploymentsRequest()
        return [
            _seen_from_here(each) for each in self._call(self._gateway.ListDeployments, request).deployments
        ]

    def deployment(self, name: str) -> deployer_pb2.Deployment:
        """Return a deployment by its id, or the promoted one of a name; the newest when none is promoted.

        Raises:
            NotFound: Nothing of that name is deployed.
        """
        deployments = self.deployments()
        found = [deployment for deployment in deployments if name in (deployment.id, deployment.name)]
        for deployment in sorted(found, key=lambda each: not each.promoted):
            return deployment
        known = ", ".join(dict.fromkeys(deployment.name for deployment in deployments))
        raise NotFound(
            f"No model called {name!r} is deployed.",
            fix=f"These are: {known}." if known else "Nothing is: `web4lora run PIPELINE.yaml` deploys one.",
        )

    def promote(self, deployment_id: str) -> deployer_pb2.Deployment:
        """Point a deployment's name at it, once it has answered; safe to repeat.

        Raises:
            NotFound: No such deployment.
            FailedPrecondition: It does not answer.
            ResourceExhausted: Memory does not suffice to load it.
            Unavailable: Its runtime is out of reach.
        """
        request = gateway_pb2.GatewayServicePromoteDeploymentRequest(id=deployment_id)
        answer = self._call(self._gateway.PromoteDeployment, request, _LOAD_SECONDS)
        return _seen_from_here(answer.deployment)

    def roll_back(self, name: str, *, from_id: str = "") -> deployer_pb2.Deployment:
        """Point a name back at the candidate that served under it before.

        Args:
            name: The name people call.
            from_id: The candidate to go back from, which makes the call safe to repeat: when the name stands
                for another one already, that one is returned.

        Raises:
            NotFound: Nothing serves under the name.
            FailedPrecondition: There is no earlier candidate, or it does not answer.
            ResourceExhausted: Memory does not suffice to load it.
            Unavailable: Its runtime is out of reach.
        """
        request = gateway_pb2.GatewayServiceRollbackDeploymentRequest(name=name, from_id=from_id)
        answer = self._call(self._gateway.RollbackDeployment, request, _LOAD_SECONDS)
        return _seen_from_here(answer.deployment)

    def delete_deployment(self, deployment_id: str) -> None:
        """Take a deployment out of its runtime, and its name too when that stands for it.

        What is gone already is no error.

        Raises:
            Unavailable: Its runtime is out of reach.
        """
        request = gateway_pb2.GatewayServiceDeleteDeploymentRequest(id=deployment_id)
        self._call(self._gateway.DeleteDeployment, request, _LOAD_SECONDS)

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
    ) -> deployer_pb2.DeployerJob:
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
        spec = deploy_spec(source, name, run_of=self.get_run, open_store=lambda: self.store)
        for field, value in (("target", target), ("context_tokens", context_tokens), ("parallel", parallel)):
            if value:
                setattr(spec.deploy, field, value)
        spec.parameters.stop.extend(stop)
        for field, given in (("system", system), ("temperature", temperature), ("license", license_text)):
            if given is not None:
                setattr(spec.parameters, field, given)
        spec.adapters.extend(
            adapter_spec(each, file, run_of=self.get_run, open_store=lambda: self.store)
            for each, file in (adapters or {}).items()
        )
        request = deployer_pb2.CreateDeployerJobRequest(
            request_id=request_id or uuid.uuid4().hex, deploy=spec
        )
        return self.create_job(request)

    def set_adapters(self, deployment: str, scales: Mapping[str, float]) -> deployer_pb2.Deployment:
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
        request = gateway_pb2.GatewayServiceSetAdaptersRequest(id=deployment, scales=scales)
        return _seen_from_here(self._call(self._gateway.SetAdapters, request, _SET_SECONDS).deployment)

    def use_adapter(self, deployment: str, adapter: str) -> deployer_pb2.Deployment:
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
    ) -> deployer_pb2.DeployerJob:
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
        held = registry_login(reference.partition("/")[0]) if login is None else dict(login)
        spec = deployer_pb2.PushSpec(
            deployment=deployment,
            reference=reference,
            plain_http=plain_http,
            secret=_LOGIN if held else "",
        )
        request = deployer_pb2.CreateDeployerJobRequest(request_id=request_id or uuid.uuid4().hex, push=spec)
        if held:
            request.secrets[_LOGIN] = json.dumps(held)
        return self.create_job(request)

    def evaluate(
        self,
        model: str | Asked,
        suite: str | Path,
        *,
        against: Iterable[str | Asked] = (),
        budgets: deployer_pb2.Budgets | None = None,
        name: str = "",
        request_id: str = "",
    ) -> deployer_pb2.DeployerJob:
        """Start to run a test suite on a model, wherever it answers.

        Args:
            model: A deployment's name or id, or `MODEL@http://HOST:PORT/v1`; as `Asked` also with a key.
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
        asked, *others = [
            words if isinstance(words, Asked) else Asked.of(words) for words in (model, *against)
        ]
        spec = deployer_pb2.EvaluateSpec(name=name or report_name(asked), budgets=budgets)
        spec.suite.CopyFrom(ref_message(store_suite(self.store, spec.name, Path(suite))))
        return self.create_job(evaluate_request(asked, spec, others, request_id or uuid.uuid4().hex))

    def create_job(self, request: deployer_pb2.CreateDeployerJobRequest) -> deployer_pb2.DeployerJob:
        """Create a job of the deployer.

        Raises:
            InvalidInput: Its spec is out of bounds.
            Unavailable: The gateway or the deployer is out of reach.
        """
        wrapped = gateway_pb2.GatewayServiceCreateDeployerJobRequest(request=request)
        return self._call(self._gateway.CreateDeployerJob, wrapped).job

    def watch_job(self, job_id: str) -> Iterator[deployer_pb2.DeployerJob]:
        """Yield snapshots of a job of the deployer, the current one first, until it has ended.

        A gateway or deployer that goes away is waited for: up to a minute, since jobs go on when it is back.

        Raises:
            NotFound: No such job.
            Unavailable: The gateway was never there, or stayed away.
        """
        seen = -1
        away_since = 0.0
        while True:
            stream = self._gateway.WatchDeployerJob(
                gateway_pb2.GatewayServiceWatchDeployerJobRequest(id=job_id)
            )
            try:
                for answer in stream:
                    away_since = 0.0
                    if answer.job.job.revision > seen:
                        seen = answer.job.job.revision
                        yield answer.job
                    if answer.job.job.state in _JOB_TERMINAL:
                        return
            except grpc.RpcError as call:
                error = self._error(call)
                away_since = away_since or time.monotonic()
                away = time.monotonic() - away_since > _AWAY_SECONDS
                if seen < 0 or away or not isinstance(error, Unavailable):
                    raise error from call
            finally:
                stream.cancel()
            time.sleep(1)

    def cancel_job(self, job_id: str) -> deployer_pb2.DeployerJob:
        """Ask a job of the deployer to end; its process is stopped within seconds.

        Raises:
            NotFound: No such job.
        """
        request = gateway_pb2.GatewayServiceCancelDeployerJobRequest(id=job_id)
        return self._call(self._gateway.CancelDeployerJob, request).job

    def artifacts(self, kind: str = "", name: str = "") -> Iterator[artifacts_pb2.Artifact]:
        """Yield the artifacts of a kind and a name, newest first; empty means any.

        Raises:
            InvalidInput: There is no such kind.
        """
        token = ""
        while True:
            request = artifacts_pb2.ListArtifactsRequest(
                kind=_kind_value(kind), name=name, page_size=_PAGE, page_token=token
            )
            answer = self._call(self._artifacts.ListArtifacts, request)
            yield from answer.artifacts
            if not (token := answer.next_page_token):
                return

    def artifact(self, name: str) -> artifacts_pb2.Artifact:
        """Return an artifact's manifest.

        Args:
            name: `kind/name@digest`, the digest in full or its first 8 or more digits, or just those; or
                `kind/name` for the newest.

        Raises:
            NotFound: No such artifact.
            InvalidInput: The name has another form, or a short digest fits more than one.
        """
        if "@" not in name and "/" in name:
            kind, _, plain = name.partition("/")
            for artifact in self.artifacts(kind, plain):
                return artifact
            raise NotFound(f"There is no artifact {name}.", fix="`web4lora artifacts list` shows them.")
        return self._call(self._artifacts.GetArtifact, artifacts_pb2.GetArtifactRequest(name=name)).artifact

    def get_artifact(self, artifact: str | artifacts_pb2.ArtifactRef | ArtifactRef, target: Path) -> Manifest:
        """Bring an artifact's files below a folder, each verified before it is seen there.

        Args:
            artifact: Its name as for `artifact`, or its reference.
            target: The folder, made when missing. Files in it may be links into the store and are read-only.

        Raises:
            NotFound: No such artifact.
            DataLoss: Bytes are not what their digest says.
            Unavailable: The gateway or the store is out of reach.
        """
        if isinstance(artifact, str):
            artifact = self.artifact(artifact).ref
        ref = ref_of(artifact) if isinstance(artifact, artifacts_pb2.ArtifactRef) else artifact
        return self.store.get(ref, target)

    @property
    def store(self) -> ArtifactStore:
        """The artifact store: the one the settings name; else, on one machine, the gateway's own.

        Raises:
            Unavailable: The gateway is out of reach.
        """
        if self._store is None:
            settings = self._settings
            theirs = self.info().store
            here = settings.gateway_address.startswith(("127.", "localhost:", "[::1]:"))
            if here and "store" not in settings.model_fields_set and urlsplit(theirs).scheme == "file":
                settings = load(
                    type(settings), **{**settings.model_dump(exclude_unset=True), "store": theirs}
                )
            self._store = open_store(settings)
        return self._store

    def _stored(self, file: PipelineFile) -> gateway_pb2.Pipeline:
        """Store what a pipeline file names; return its pipeline with the references."""
        message = gateway_pb2.Pipeline()
        message.CopyFrom(file.pipeline)
        dataset = store_dataset(self.store, message.name, file.train_files, file.eval_files)
        message.dataset.artifact.CopyFrom(ref_message(dataset))
        if file.suite_file:
            suite = store_suite(self.store, message.name, file.suite_file)
            message.verify.suite.CopyFrom(ref_message(suite))
        return message

    def _call(self, method: Callable[..., R], request: Any, seconds: float = _CALL_SECONDS) -> R:
        try:
            return method(request, timeout=seconds)
        except grpc.RpcError as call:
            raise self._error(call) from call

    def _error(self, call: grpc.RpcError) -> Web4Error:
        address = self._settings.gateway_address
        error = error_of(call, f"The gateway at {address}")
        if isinstance(error, Unavailable) and error.reason == Unavailable.default_reason:
            return Unavailable(
                f"The gateway at {address} is out of reach.",
                fix="`web4lora up` starts it here; `web4lora status` tells more.",
                reason="GATEWAY_AWAY",
            )
        return error


def ended(run: gateway_pb2.Run) -> bool:
    """True when a run will never change again."""
    return run.state in _TERMINAL


def _seen_from_here(deployment: deployer_pb2.Deployment) -> deployer_pb2.Deployment:
    """Return a deployment with an address for this machine: a deployer in a container has its own for it."""
    deployment.endpoint = deployment.endpoint.replace("//host.docker.internal", "//127.0.0.1", 1)
    return deployment


def stage_value(name: str) -> gateway_pb2.StageName.ValueType:
    """Return the contract's value of a stage's name; empty stands for none.

    Raises:
        InvalidInput: There is no such stage.
    """
    if name and name not in STAGES:
        raise InvalidInput(f"{name!r} is not a stage.", fix=f"The stages are {', '.join(STAGES)}.")
    return gateway_pb2.StageName.Value(f"STAGE_NAME_{name.upper() or 'UNSPECIFIED'}")


def _kind_value(name: str) -> artifacts_pb2.ArtifactKind.ValueType:
    kinds = [kind.removeprefix(_KIND_PREFIX).lower() for kind in artifacts_pb2.ArtifactKind.keys()[1:]]
    if name and name not in kinds:
        raise InvalidInput(f"{name!r} is not an artifact kind.", fix=f"The kinds are {', '.join(kinds)}.")
    return artifacts_pb2.ArtifactKind.Value(f"{_KIND_PREFIX}{name.upper() or 'UNSPECIFIED'}")
