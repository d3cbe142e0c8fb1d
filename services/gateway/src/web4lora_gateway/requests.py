"""From a call to a run: checked, durable, and the same run again for the same request."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any

from google.protobuf.message import Message
from web4.lora.v1 import gateway_pb2
from web4lora_chassis.artifacts import ArtifactStore
from web4lora_chassis.errors import AlreadyExists, FailedPrecondition, InvalidInput

from web4lora_gateway.folder import taken
from web4lora_gateway.messages import stage_word
from web4lora_gateway.pipeline import Pipeline, check_artifacts, check_pipeline
from web4lora_gateway.records import STAGE_NAMES, RunRecord, StageResult
from web4lora_gateway.runs import RunBook
from web4lora_gateway.settings import GatewaySettings

_REQUEST_ID_LENGTH = 200


@dataclass(frozen=True)
class Requests:
    """Makes runs.

    Attributes:
        book: The runs.
        store: The artifacts.
        settings: Where folders are.
        start: Starts a run's workflow.
    """

    book: RunBook
    store: ArtifactStore
    settings: GatewaySettings
    start: Callable[[str], Coroutine[Any, Any, None]]

    async def create(self, request: gateway_pb2.CreateRunRequest) -> RunRecord:
        """Make the run that a Create request describes.

        Raises:
            InvalidInput: The pipeline or the request_id is out of bounds.
            NotFound: The dataset or the suite is not in the store.
            AlreadyExists: The request_id was used with another request.
        """
        _check_request_id(request.request_id)
        digest = _digest(request)
        made = await self._made(request.request_id, digest)
        if made is not None:
            return made
        from_stage = _stage(request.from_stage)
        pipeline = check_pipeline(request.pipeline)
        await asyncio.to_thread(check_artifacts, self.store, Pipeline.from_json(pipeline))
        return await self._make(request.request_id, digest, pipeline, from_stage, {})

    async def retry(self, request: gateway_pb2.RetryRunRequest) -> RunRecord:
        """Make a run that goes on where another one failed, or from a stage on.

        Raises:
            NotFound: No such run, or its dataset is gone.
            FailedPrecondition: The run is at work, a stage before `from_stage` has no result, or all have.
            AlreadyExists: The request_id was used with another request.
        """
        request_id = request.request_id or f"retry-{secrets.token_hex(16)}"
        _check_request_id(request_id)
        digest = _digest(request)
        made = await self._made(request_id, digest)
        if made is not None:
            return made
        old = await self.book.get(request.id or "")
        if not old.state.terminal:
            raise FailedPrecondition(
                f"{old.id} is at work.",
                fix=f"Wait for its end, or cancel it: `web4lora runs cancel {old.id}`.",
            )
        from_stage = _stage(request.from_stage) or next(
            (stage.name for stage in old.stages if not stage.state.done), ""
        )
        if not from_stage:
            raise FailedPrecondition(
                f"Every stage of {old.id} succeeded.", fix="Name the stage to run again from."
            )
        before = [old.stage(name) for name in STAGE_NAMES[: STAGE_NAMES.index(from_stage)]]
        missing = [stage.name for stage in before if stage.result is None]
        if missing:
            raise FailedPrecondition(
                f"{old.id} can't be retried from {from_stage}: its stage {missing[0]} never succeeded.",
                fix=f"Retry from {missing[0]}.",
            )
        taken_over = {
            stage.name: StageResult(
                stage.key, stage.reused_from_run or old.id, stage.result or {}, stage.versions
            )
            for stage in before
        }
        await asyncio.to_thread(check_artifacts, self.store, Pipeline.from_json(old.pipeline))
        return await self._make(request_id, digest, old.pipeline, from_stage, taken_over)

    async def _made(self, request_id: str, digest: str) -> RunRecord | None:
        """Return the run that this request made before, or None."""
        made = await self.book.by_request(request_id)
        if made is not None and made.request_digest != digest:
            raise AlreadyExists(
                f"The request_id {request_id!r} was used with another request, for {made.id}.",
                fix="Use a new request_id for a new run.",
            )
        return made

    async def _make(
        self,
        request_id: str,
        digest: str,
        pipeline: Mapping[str, Any],
        from_stage: str,
        taken_over: Mapping[str, StageResult],
    ) -> RunRecord:
        now = time.time()
        prefix = time.strftime("run_%Y-%m-%d_", time.localtime(now))
        outputs_dir = self.settings.outputs_dir

        def make(number: int) -> RunRecord:
            while taken(f"{prefix}{number}", self.store, outputs_dir):
                number += 1
            run_id = f"{prefix}{number}"
            return RunRecord(
                id=run_id,
                request_id=request_id,
                request_digest=digest,
                nonce=secrets.token_hex(4),
                pipeline=pipeline,
                from_stage=from_stage,
                taken_over=taken_over,
                created_at=now,
                output_dir=str(outputs_dir / run_id) if outputs_dir else "",
            )

        record, new = await self.book.create(make, prefix, request_id)
        if new:
            await self.start(record.id)
        elif record.request_digest != digest:  # another call with this request_id came first by a hair
            await self._made(request_id, digest)
        return record


def _check_request_id(request_id: str) -> None:
    if not 1 <= len(request_id) <= _REQUEST_ID_LENGTH:
        raise InvalidInput(
            f"request_id needs 1 to {_REQUEST_ID_LENGTH} characters.", metadata={"field": "request_id"}
        )


def _stage(name: gateway_pb2.StageName.ValueType) -> str:
    if name not in gateway_pb2.StageName.values():
        raise InvalidInput(f"{name} is not a stage.", metadata={"field": "from_stage"})
    return stage_word(name)


def _digest(request: Message) -> str:
    """Return a digest that tells two requests apart; maps are written in order."""
    data = type(request).DESCRIPTOR.full_name.encode() + request.SerializeToString(deterministic=True)
    return hashlib.sha256(data).hexdigest()
