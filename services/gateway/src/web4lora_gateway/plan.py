"""Plan a stage: take an earlier result over, or run it, with which spec."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from web4.lora.v1 import deployments_pb2
from web4lora_chassis.artifacts import ArtifactStore
from web4lora_chassis.errors import NotFound
from web4lora_chassis.rpc import ref_of, to_json

from web4lora_gateway.database import Waiting
from web4lora_gateway.keys import stage_key
from web4lora_gateway.outcomes import DoCalls, DoJob, Plan, Reuse
from web4lora_gateway.pools import STORE, Pool
from web4lora_gateway.records import RunRecord, StageResult
from web4lora_gateway.run_json import run_json
from web4lora_gateway.stage_results import StageResults
from web4lora_gateway.stages import AnyStage, CallStage, Inputs, JobStage
from web4lora_gateway.workers import Workers

Call = Callable[[], Coroutine[Any, Any, Any]]
Patiently = Callable[[str, Call], Awaitable[Any]]
"""Makes a call again until whom it needs is in reach; given that one's name and the call."""


@dataclass(frozen=True)
class Planner:
    """Decides for stages.

    Attributes:
        results: Earlier results by key.
        store: The artifacts.
        workers: Asked for their versions and for what is deployed.
        waiting: Told why the database is waited for: a disk that is full now must not end a run.
    """

    results: StageResults
    store: ArtifactStore
    workers: Workers
    waiting: Waiting

    async def plan(self, record: RunRecord, stage: AnyStage, patiently: Patiently) -> Plan:
        """Return what to do for a stage of a run.

        Args:
            record: The run.
            stage: The stage whose turn it is.
            patiently: Makes the calls.

        Raises:
            Cancelled: The run was cancelled while someone was waited for.
            Web4Error: Someone refused.
        """
        await self.results.holds.settled(self.waiting)
        inputs = Inputs.of(record, lambda: run_json(record))
        if isinstance(stage, CallStage):
            deployer = self.workers.deployer
            decision = await patiently(str(deployer), lambda: stage.decide(inputs, deployer))
            return DoCalls(stage_key(stage.name, asdict(decision)), decision)
        worker = self.workers.of_kind(stage.worker)[0]
        spec = stage.spec(inputs)
        versions: Mapping[str, str] = {}
        if stage.asks_first:
            info = await patiently(str(worker), lambda: self.workers.info_of(stage.worker))
            versions = info.versions
            stage.complete(spec, info)
        key = stage.key(inputs, spec, versions)
        earlier = await self._earlier(record, stage, inputs, key)
        if earlier is not None and await self._holds(record, earlier, stage, inputs, patiently):
            return Reuse(earlier.key, earlier)
        versions = (
            versions or (await patiently(str(worker), lambda: self.workers.info_of(stage.worker))).versions
        )
        return DoJob(key, to_json(spec), versions)

    async def _earlier(
        self, record: RunRecord, stage: JobStage[Any, Any], inputs: Inputs, key: str
    ) -> StageResult | None:
        if record.forced(stage.name):
            return None
        before = record.taken_over.get(stage.name)
        if before is not None and (not record.forked_from or before.key == key):
            return before
        return await self.results.find(key, self.waiting) if stage.reusable(inputs) else None

    async def _holds(
        self,
        record: RunRecord,
        earlier: StageResult,
        stage: JobStage[Any, Any],
        inputs: Inputs,
        patiently: Patiently,
    ) -> bool:
        """Tell whether all that an earlier result names is still there, and stays."""
        result = stage.read(earlier.result)
        refs = stage.artifacts(result)
        # Held first and looked for after: who deletes does it the other way round, so one sees the other.
        if not await self.results.holds.hold(record.id, [ref.digest for ref in refs], self.waiting):
            return False
        try:
            for ref in refs:
                await patiently("the artifact store", threaded(self.store.manifest, ref_of(ref)))
            wanted = stage.deployment(inputs, result)
            if wanted is None:
                return True
            deployer = self.workers.deployer
            return _serves(await patiently(str(deployer), lambda: deployer.deployment(wanted.id)), wanted)
        except NotFound:
            return False


def threaded(
    function: Callable[..., Any], *args: Any, pool: Pool = STORE
) -> Callable[[], Coroutine[Any, Any, Any]]:
    """Return what makes a blocking call off the event loop, in the threads for its kind."""
    return lambda: pool.run(function, *args)


def _serves(found: deployments_pb2.Deployment, wanted: deployments_pb2.Deployment) -> bool:
    same = (found.id, found.target, found.context_tokens, found.gguf.digest) == (
        wanted.id,
        wanted.target,
        wanted.context_tokens,
        wanted.gguf.digest,
    )
    return same and found.state == deployments_pb2.DEPLOYMENT_STATE_SERVING
