"""A gateway that serves the real contract over a real socket and plays a run by script."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_status import rpc_status
from web4.lora.v1 import (
    artifacts_pb2,
    artifacts_pb2_grpc,
    deployer_pb2,
    deployments_pb2,
    deployments_pb2_grpc,
    gateway_pb2,
    gateway_pb2_grpc,
    jobs_pb2,
)
from web4lora_chassis.artifacts import ArtifactRef, open_store
from web4lora_chassis.errors import FailedPrecondition, InvalidInput, NotFound, Web4Error
from web4lora_chassis.rpc import manifest_message, ref_message
from web4lora_chassis.rpc.errors import status_of
from web4lora_chassis.settings import Settings

RUN_ID = "run_2026-11-22_1"
GGUF = ArtifactRef("gguf", "web4-demo", "ab" * 32, 105_450_000)
STEP_SECONDS = 0.05


def _stage(name: str, state: str, **fields: Any) -> gateway_pb2.Stage:
    stage = gateway_pb2.Stage(
        name=gateway_pb2.StageName.Value(f"STAGE_NAME_{name}"),
        state=gateway_pb2.StageState.Value(f"STAGE_STATE_{state}"),
        **fields,
    )
    if state != "PENDING":
        stage.start_time.FromSeconds(1_795_357_000)
    if state not in ("PENDING", "RUNNING"):
        stage.end_time.FromSeconds(1_795_357_221)
    return stage


def results() -> dict[str, dict[str, Any]]:
    """What came of each stage, as fields of Stage."""
    from web4.lora.v1 import packager_pb2, trainer_pb2

    prepared = trainer_pb2.PrepareResult(
        dataset=trainer_pb2.DatasetReport(
            train_rows=840,
            eval_rows=100,
            rows_by_core={"tool": 420, "style": 210, "guardrail": 210},
            tokens=107_648,
            trained_tokens=34_610,
        ),
        estimate=trainer_pb2.TrainEstimate(peak_memory_bytes=1_900_000_000, seconds=240),
        device="cpu, 2 threads, fp32",
    )
    trained = trainer_pb2.TrainResult(
        final_loss=0.3,
        held_out_loss=0.29,
        settled=True,
        verdict="settled at 0.30, inside the band 0.1 to 0.6",
        steps=226,
        tokens_per_second=602,
        peak_memory_bytes=1_800_000_000,
    )
    packaged = packager_pb2.PackageResult(
        reference=packager_pb2.GgufFile(type="F16", size_bytes=271_000_000, loads=True),
        quantized=[
            packager_pb2.GgufFile(
                artifact=ref_message(GGUF),
                type="Q4_K_M",
                size_bytes=105_450_000,
                size_reduction=0.61,
                loads=True,
            )
        ],
    )
    deployed = deployer_pb2.DeployResult(deployment=deployment("http://127.0.0.1:8480/v1"))
    return {
        "PREPARE": {"prepare_result": prepared},
        "TRAIN": {"train_result": trained},
        "PACKAGE": {"package_result": packaged},
        "DEPLOY": {"deploy_result": deployed},
        "VERIFY": {"verify_result": verified()},
        "PROMOTE": {"promote_result": promoted()},
    }


def deployment(endpoint: str) -> deployments_pb2.Deployment:
    return deployments_pb2.Deployment(
        id="web4-demo:v1a2b3c4d",
        name="web4-demo",
        target="llama-server",
        endpoint=endpoint,
        model="web4-demo:v1a2b3c4d",
        state=deployments_pb2.DEPLOYMENT_STATE_SERVING,
        runtime_version="b1",
        promoted=True,
    )


def promoted() -> gateway_pb2.PromoteResult:
    serving = deployment("http://127.0.0.1:8480/v1")
    return gateway_pb2.PromoteResult(
        outcome=gateway_pb2.PROMOTE_OUTCOME_PROMOTED,
        candidate=serving.id,
        serving=serving,
        summary=f"web4-demo stands for {serving.id} now: every limit was kept.",
    )


def kept() -> gateway_pb2.PromoteResult:
    return gateway_pb2.PromoteResult(
        outcome=gateway_pb2.PROMOTE_OUTCOME_KEPT,
        candidate="web4-demo:v1a2b3c4d",
        summary="web4-demo:v1a2b3c4d is not promoted: 1 of 2 limits were missed.",
    )


def verified() -> deployer_pb2.VerifyResult:
    return deployer_pb2.VerifyResult(
        scores=[
            deployer_pb2.Score(
                name="tool_call.valid", title="tool call, valid", prompts=40, base_percent=0,
                reference_percent=99, deployed_percent=99, drop_points=0,
                drop_low_points=-2.1, drop_high_points=2.1,
            ),
            deployer_pb2.Score(
                name="style.all_rules", title="house style", prompts=20, base_percent=0,
                reference_percent=74, deployed_percent=71, drop_points=3,
                drop_low_points=-1, drop_high_points=7,
            ),
        ],
        gates=[
            deployer_pb2.Gate(
                name="score drop: tool_call.valid", limit="at most 2 points", measured="0.0", passed=True
            ),
            deployer_pb2.Gate(
                name="score drop: style.all_rules", limit="at most 2 points", measured="3.0 points",
                passed=False, note="20 prompts can't tell; about 189 that go the same way would",
            ),
        ],
        verdict="failed: 1 of 2 limits missed, 1 kept",
        time_to_first_token_seconds=0.12,
        tokens_per_second=128,
        memory_bytes=260_000_000,
        samples=[
            deployer_pb2.Sample(
                core="tool", prompt="Create an agent named atlas", passed=True,
                answer='{"tool": "create_agent", "args": {"name": "atlas"}}',
            )
        ],
    )  # fmt: skip


class ScriptedGateway(
    gateway_pb2_grpc.GatewayServiceServicer,
    deployments_pb2_grpc.DeploymentServiceServicer,
    artifacts_pb2_grpc.ArtifactServiceServicer,
):
    """Plays one run; `fail_in` names the stage that fails, `hold_in` the one that never ends by itself."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.fail_in = ""
        self.hold_in = ""
        self.output_dir = ""
        self.refuse_field = ""
        self.created: list[gateway_pb2.CreateRunRequest] = []
        self.retried: list[gateway_pb2.RetryRunRequest] = []
        self.endpoint = "http://127.0.0.1:9/v1"
        self.cancelled = threading.Event()
        self.kept: list[str] = []
        self.not_promoted = False
        self.called: list[Any] = []
        self.garbage: list[artifacts_pb2.CollectGarbageResponse] = []
        self.warnings: list[str] = []
        self.run = gateway_pb2.Run()
        self.snapshots: list[gateway_pb2.Run] = []

    def plan(self, pipeline: gateway_pb2.Pipeline) -> None:
        """Write the script of a run."""
        run = gateway_pb2.Run(id=RUN_ID, pipeline=pipeline, state=gateway_pb2.RUN_STATE_RUNNING, revision=1)
        run.create_time.FromSeconds(1_795_357_000)
        run.output_dir = self.output_dir
        names = list(results())
        run.stages.extend(_stage(name, "PENDING") for name in names)
        self.snapshots = []
        for index, name in enumerate(names):
            for done in (0, 113, 226) if name == "TRAIN" else (0,):
                progress = jobs_pb2.Progress(phase=name.lower())
                if name == "TRAIN":
                    progress = jobs_pb2.Progress(
                        phase="train", done=done, total=226, unit="steps", seconds_left=100.0,
                        figures={"loss": 0.31, "tokens_per_second": 602},
                    )  # fmt: skip
                run.stages[index].CopyFrom(_stage(name, "RUNNING", progress=progress))
                self._snap(run)
            if name == self.fail_in:
                error = jobs_pb2.JobError(
                    reason="OUT_OF_MEMORY",
                    message="Training needs about 21 GB, this machine has 16 GB free.",
                    fix="`tokens_per_batch: 512` needs 17 GB.",
                    metadata={"log": "/var/log/job.txt"},
                )
                run.stages[index].CopyFrom(_stage(name, "FAILED", error=error))
                run.state = gateway_pb2.RUN_STATE_FAILED
                run.error.CopyFrom(error)
                self._snap(run)
                return
            result = results()[name]
            if name == "PROMOTE" and self.not_promoted:
                result = {"promote_result": kept()}
            run.stages[index].CopyFrom(_stage(name, "SUCCEEDED", **result))
            self._snap(run)
        run.state = gateway_pb2.RUN_STATE_SUCCEEDED
        run.end_time.FromSeconds(1_795_357_999)
        self._snap(run)

    def _snap(self, run: gateway_pb2.Run) -> None:
        run.revision += 1
        self.snapshots.append(copy.deepcopy(run))

    # The contract's methods.

    def GetGatewayInfo(self, request: Any, context: Any) -> gateway_pb2.GetGatewayInfoResponse:
        return gateway_pb2.GetGatewayInfoResponse(
            version="0.1.0",
            store=self.settings.store,
            warnings=self.warnings,
            services=[
                gateway_pb2.ServiceStatus(
                    name="trainer",
                    address="127.0.0.1:1",
                    serving=True,
                    version="0.1.0",
                    detail="cpu, 2 threads",
                ),
                gateway_pb2.ServiceStatus(
                    name="packager", address="127.0.0.1:2", detail="connection refused"
                ),
            ],
        )

    def CreateRun(self, request: gateway_pb2.CreateRunRequest, context: Any) -> Any:
        if self.refuse_field:
            _abort(
                context,
                InvalidInput("needs 1 to 512.", fix="Choose less.", metadata={"field": self.refuse_field}),
            )
        self.created.append(request)
        self.plan(request.pipeline)
        return gateway_pb2.CreateRunResponse(run=self.snapshots[0])

    def GetRun(self, request: Any, context: Any) -> Any:
        self._known(request.id, context)
        return gateway_pb2.GetRunResponse(run=self.snapshots[-1])

    def ListRuns(self, request: Any, context: Any) -> Any:
        if request.page_token:
            return gateway_pb2.ListRunsResponse()
        token = RUN_ID if self.snapshots else ""
        runs = [run for run in self.snapshots[-1:] if not request.states or run.state in request.states]
        return gateway_pb2.ListRunsResponse(runs=runs, next_page_token=token)

    def WatchRun(self, request: Any, context: Any) -> Iterator[Any]:
        self._known(request.id, context)
        for snapshot in self.snapshots:
            held = [
                stage
                for stage in snapshot.stages
                if stage.state == gateway_pb2.STAGE_STATE_RUNNING
                and gateway_pb2.StageName.Name(stage.name) == f"STAGE_NAME_{self.hold_in}"
            ]
            yield gateway_pb2.WatchRunResponse(run=snapshot)
            if held:
                while not self.cancelled.wait(0.05):
                    if not context.is_active():
                        return
                held[0].state = gateway_pb2.STAGE_STATE_CANCELLED
                snapshot.state = gateway_pb2.RUN_STATE_CANCELLED
                snapshot.revision += 1
                yield gateway_pb2.WatchRunResponse(run=snapshot)
                return
            time.sleep(STEP_SECONDS)

    def CancelRun(self, request: Any, context: Any) -> Any:
        self._known(request.id, context)
        if request.keep:
            self.kept.append(request.id)
        else:
            self.cancelled.set()
        return gateway_pb2.CancelRunResponse(run=self.snapshots[-1])

    def RetryRun(self, request: gateway_pb2.RetryRunRequest, context: Any) -> Any:
        self._known(request.id, context)
        self.retried.append(request)
        if (
            not self.snapshots[-1].end_time.seconds
            and self.snapshots[-1].state != gateway_pb2.RUN_STATE_FAILED
        ):
            _abort(context, FailedPrecondition("It is at work.", fix="Cancel it first."))
        return gateway_pb2.RetryRunResponse(run=self.snapshots[0])

    def DeleteRun(self, request: gateway_pb2.DeleteRunRequest, context: Any) -> Any:
        self._known(request.id, context)
        if self.snapshots[-1].kept:
            _abort(context, FailedPrecondition(f"{request.id} is kept.", fix="Let go of it."))
        self.snapshots = []
        return gateway_pb2.DeleteRunResponse()

    def KeepRun(self, request: gateway_pb2.KeepRunRequest, context: Any) -> Any:
        self._known(request.id, context)
        self.snapshots[-1].kept = not request.release
        return gateway_pb2.KeepRunResponse(run=self.snapshots[-1])

    def CollectGarbage(self, request: artifacts_pb2.CollectGarbageRequest, context: Any) -> Iterator[Any]:
        self.called.append(request)
        yield from self.garbage

    def ListDeployments(self, request: Any, context: Any) -> Any:
        return deployments_pb2.ListDeploymentsResponse(deployments=[deployment(self.endpoint)])

    def GetDeployment(self, request: Any, context: Any) -> Any:
        found = deployment(self.endpoint)
        if request.id not in (found.id, found.name):
            _abort(context, NotFound(f"There is no deployment {request.id!r}.", fix="List them."))
        return deployments_pb2.GetDeploymentResponse(deployment=found)

    def PromoteDeployment(self, request: Any, context: Any) -> Any:
        self.called.append(request)
        found = deployment(self.endpoint)
        if request.id != found.id:
            _abort(context, NotFound(f"There is no deployment {request.id!r}.", fix="List them."))
        return deployments_pb2.PromoteDeploymentResponse(deployment=found)

    def RollbackDeployment(self, request: Any, context: Any) -> Any:
        self.called.append(request)
        if request.name != "web4-demo":
            _abort(context, NotFound(f"Nothing serves under the name {request.name!r}.", fix="List them."))
        return deployments_pb2.RollbackDeploymentResponse(deployment=deployment(self.endpoint))

    def DeleteDeployment(self, request: Any, context: Any) -> Any:
        self.called.append(request)
        return deployments_pb2.DeleteDeploymentResponse()

    def ListArtifacts(self, request: artifacts_pb2.ListArtifactsRequest, context: Any) -> Any:
        kind = artifacts_pb2.ArtifactKind.Name(request.kind).removeprefix("ARTIFACT_KIND_").lower()
        found = open_store(self.settings).find("" if kind == "unspecified" else kind, request.name)
        return artifacts_pb2.ListArtifactsResponse(artifacts=[manifest_message(each) for each in found])

    def GetArtifact(self, request: artifacts_pb2.GetArtifactRequest, context: Any) -> Any:
        digest = request.name.rpartition("@")[2]
        found = open_store(self.settings).find(digest=digest)
        if not found:
            _abort(context, NotFound(f"There is no artifact {request.name}."))
        return artifacts_pb2.GetArtifactResponse(artifact=manifest_message(found[0]))

    def _known(self, run_id: str, context: Any) -> None:
        if run_id not in (RUN_ID, "latest") or not self.snapshots:
            _abort(context, NotFound(f"There is no run {run_id}.", fix="`web4lora runs list` shows them."))


def _abort(context: Any, error: Web4Error) -> None:
    context.abort_with_status(rpc_status.to_status(status_of(error)))


def serve(gateway: ScriptedGateway, address: str = "127.0.0.1:0") -> tuple[grpc.Server, int]:
    """Serve it; return the server and its port."""
    server = grpc.server(futures.ThreadPoolExecutor(16))
    gateway_pb2_grpc.add_GatewayServiceServicer_to_server(gateway, server)
    deployments_pb2_grpc.add_DeploymentServiceServicer_to_server(gateway, server)
    artifacts_pb2_grpc.add_ArtifactServiceServicer_to_server(gateway, server)
    status = health.HealthServicer()
    status.set("web4.lora.v1.GatewayService", health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(status, server)
    port = server.add_insecure_port(address)
    server.start()
    return server, port


def play(root: Path, **script: Any) -> tuple[grpc.Server, int, ScriptedGateway]:
    """Serve a gateway with a store below a folder."""
    gateway = ScriptedGateway(Settings(home=root))
    for name, value in script.items():
        setattr(gateway, name, value)
    server, port = serve(gateway)
    return server, port, gateway
