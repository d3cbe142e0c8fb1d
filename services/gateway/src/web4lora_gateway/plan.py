"""Plan a stage: take an earlier result over, or run it, with which spec."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Any

from web4.lora.v1 import deployer_pb2
from web4lora_chassis.artifacts import ArtifactStore
from web4lora_chassis.errors import Internal, NotFound
from web4lora_chassis.rpc import ref_of
from web4lora_chassis.rpc.jobs import to_json

from web4lora_gateway.keys import stage_key
from web4lora_gateway.records import RunRecord, StageResult
from web4lora_gateway.results import StageResults
from web4lora_gateway.run_json import run_json
from web4lora_gateway.stages import Inputs, Stage
from web4lora_gateway.workers import Workers

Call = Callable[[], Coroutine[Any, Any, Any]]
Patiently = Callable[[str, Call], Awaitable[Any]]
"""Makes a call again until whom it needs is in reach; given that one's name and the call."""


@dataclass(frozen=True)
class Plan:
    """What to do for a stage.

    Attributes:
        key: Digest of everything that goes in.
        reused: An earlier result that still holds.
        spec: JSON data of the job's spec; set when there is nothing to take over.
        decision: What a stage without a job has to do; None for others.
        versions: Versions of the worker and its tools.
    """

    key: str
    reused: StageResult | None = None
    spec: Mapping[str, Any] | None = None
    decision: Mapping[str, Any] | None = None
    versions: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Planner:
    """Decides for stages.

    Attributes:
        results: Earlier results by key.
        store: The artifacts.
        workers: Asked for their versions and for what is deployed.
    """

    results: StageResults
    store: ArtifactStore
    workers: Workers

    async def plan(self, record: RunRecord, stage: Stage, patiently: Patiently) -> Plan:
        """Return what to do for a stage of a run.

        Args:
            record: The run.
            stage: The stage whose turn it is.
            patiently: Makes the calls.

        Raises:
            Cancelled: The run was cancelled while someone was waited for.
            Web4Error: Someone refused.
        """
        inputs = Inputs.of(record, run_json(record))
        spec = stage.spec(inputs)
        worker = self.workers.by_name[stage.worker]
        who = f"the {worker.name} at {worker.address}"
        if spec is None:
            return await self._decide(stage, inputs, lambda call: patiently(who, call))
        versions: Mapping[str, str] = {}
        if stage.key_tools:
            versions = (await patiently(who, worker.info)).versions
        tools = {tool: versions.get(tool, "") for tool in stage.key_tools}
        key = stage_key(stage.name, {"identity": stage.identity(inputs, spec), "tools": tools})
        earlier = await self._earlier(record, stage, inputs, key)
        if earlier is not None and await self._holds(earlier, stage, inputs, patiently):
            return Plan(earlier.key, reused=earlier)
        versions = versions or (await patiently(who, worker.info)).versions
        return Plan(key, spec=to_json(spec), versions=dict(versions))

    async def _decide(
        self, stage: Stage, inputs: Inputs, patiently: Callable[[Call], Awaitable[Any]]
    ) -> Plan:
        if stage.calls is None:
            raise Internal(f"The stage {stage.name} has neither a job nor calls.")
        calls = stage.calls
        decision = await patiently(lambda: calls.decide(inputs, self.workers))
        return Plan(stage_key(stage.name, decision), decision=decision)

    async def _earlier(self, record: RunRecord, stage: Stage, inputs: Inputs, key: str) -> StageResult | None:
        if record.forced(stage.name):
            return None
        if stage.name in record.taken_over:
            return record.taken_over[stage.name]
        return await self.results.find(key) if stage.reusable(inputs) else None

    async def _holds(self, earlier: StageResult, stage: Stage, inputs: Inputs, patiently: Patiently) -> bool:
        """Tell whether all that an earlier result names is still there."""
        result = stage.read(earlier.result)
        try:
            for ref in stage.artifacts(result):
                await patiently("the artifact store", threaded(self.store.manifest, ref_of(ref)))
            wanted = stage.deployment(inputs, result)
            if wanted is None:
                return True
            who = f"the deployer at {self.workers.deployer.address}"
            return _serves(await patiently(who, lambda: self.workers.deployment(wanted.id)), wanted)
        except NotFound:
            return False


def threaded(function: Callable[..., Any], *args: Any) -> Callable[[], Coroutine[Any, Any, Any]]:
    """Return what makes a blocking call off the event loop."""
    return lambda: asyncio.to_thread(function, *args)


def _serves(found: deployer_pb2.Deployment, wanted: deployer_pb2.Deployment) -> bool:
    same = (found.id, found.target, found.context_tokens, found.gguf.digest) == (
        wanted.id,
        wanted.target,
        wanted.context_tokens,
        wanted.gguf.digest,
    )
    return same and found.state == deployer_pb2.DEPLOYMENT_STATE_SERVING
