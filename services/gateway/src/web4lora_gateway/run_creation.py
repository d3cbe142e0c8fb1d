"""From a call to a run: checked, durable, and the same run again for the same request."""

from __future__ import annotations

import asyncio
import hashlib
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from google.protobuf.json_format import ParseDict
from google.protobuf.message import Message
from web4.lora.v1 import gateway_pb2
from web4lora_chassis.artifacts import ArtifactStore
from web4lora_chassis.earlier_adapter import FIELD, adapter_of
from web4lora_chassis.errors import AlreadyExists, FailedPrecondition, InvalidInput, Web4Error
from web4lora_chassis.pipeline.rules import Problem, error_of
from web4lora_chassis.pipeline.verify import BAD_SUITE, unknown_scores
from web4lora_chassis.rpc import ref_of

from web4lora_gateway.folder import taken
from web4lora_gateway.pipeline import (
    SUITE,
    Pipeline,
    artifact_problems,
    check_pipeline,
    pipeline_problems,
)
from web4lora_gateway.records import STAGE_NAMES, RunRecord, RunState, StageRecord, StageResult
from web4lora_gateway.run_listing import checked_labels
from web4lora_gateway.run_messages import priority_word, stage_word
from web4lora_gateway.runs import RunBook
from web4lora_gateway.settings import GatewaySettings
from web4lora_gateway.workers import Workers

_REQUEST_ID_LENGTH = 200
_DEVICE = re.compile(r"[^\x00-\x1f]{0,64}")
_SWEEP = re.compile(r"([a-z0-9]+(-[a-z0-9]+)*)?")
_WORD_LENGTH = 64
_SWEPT = 32
_SWEPT_LENGTH = 200


@dataclass(frozen=True)
class RunCreator:
    """Makes runs.

    Attributes:
        book: The runs.
        store: The artifacts.
        workers: The deployer among them reads suites.
        settings: Where folders are.
        start: Starts a run's workflow.
        deleted: Returns the ids of deleted runs that begin in a way.
    """

    book: RunBook
    store: ArtifactStore
    workers: Workers
    settings: GatewaySettings
    start: Callable[[str], Coroutine[Any, Any, None]]
    deleted: Callable[[str], Awaitable[frozenset[str]]]

    async def create(self, request: gateway_pb2.CreateRunRequest, owner: str) -> RunRecord:
        """Make the run that a Create request describes.

        Args:
            request: The request.
            owner: Name of the principal that made it.

        Raises:
            InvalidInput: The pipeline, its suite or the request_id is wrong.
            NotFound: The dataset or the suite is not in the store.
            AlreadyExists: The request_id was used with another request.
            Unavailable: There is a suite, and the deployer is out of reach.
        """
        _check_request_id(request.request_id)
        digest = _digest(request)
        made = await self._made(request.request_id, digest)
        if made is not None:
            return await self._started(made)
        pipeline = await self._checked(request)
        facts = {
            "owner": owner,
            "labels": dict(request.labels),
            "priority": priority_word(request.priority),
            "device": _checked(request.device, "device", _DEVICE),
            "sweep": _checked(request.sweep, "sweep", _SWEEP),
            "sweep_values": _sweep_values(request.sweep_values),
        }
        return await self._make(request.request_id, digest, pipeline, _stage(request.from_stage), {}, facts)

    async def check(self, request: gateway_pb2.CreateRunRequest) -> gateway_pb2.Pipeline:
        """Check all that `create` does, make nothing, and return the pipeline with every default filled in.

        Raises:
            InvalidInput, NotFound, Unavailable: As `create`.
        """
        return ParseDict(await self._checked(request), gateway_pb2.Pipeline())

    async def _checked(self, request: gateway_pb2.CreateRunRequest) -> dict[str, Any]:
        _stage(request.from_stage)
        checked_labels(request.labels)
        if problems := pipeline_problems(request.pipeline):
            raise await self._with_suite(problems, request.pipeline)
        pipeline = await self._started_from(check_pipeline(request.pipeline))
        await self._check_inputs(Pipeline.from_json(pipeline))
        return pipeline

    async def _started_from(self, pipeline: dict[str, Any]) -> dict[str, Any]:
        """Put the digest of the adapter to go on from in the place of its run, which may be deleted some day.

        Raises:
            NotFound: No such run or adapter.
            FailedPrecondition: The run made no adapter.
        """
        named = pipeline.get("train", {}).get("from")
        if not named:
            return pipeline
        if re.fullmatch(r"[0-9a-f]+", named):
            digest = (await asyncio.to_thread(adapter_of, self.store, named)).digest
        else:
            run = await self.book.get(named)
            digest = (run.stage("train").result or {}).get("adapter", {}).get("digest", "")
            if not digest:
                raise FailedPrecondition(
                    f"{FIELD}: {run.id} has trained no adapter.",
                    fix="Name a run whose training succeeded.",
                    metadata={"field": FIELD},
                )
        return {**pipeline, "train": {**pipeline["train"], "from": digest}}

    async def retry(self, request: gateway_pb2.RetryRunRequest, owner: str) -> RunRecord:
        """Make a run that goes on where another one failed, or from a stage on.

        Args:
            request: The request.
            owner: Name of the principal that made it; the other run may be another's.

        Raises:
            InvalidInput: Its suite is wrong.
            NotFound: No such run, or its dataset is gone.
            FailedPrecondition: The run is at work, a stage before `from_stage` has no result, or all have.
            AlreadyExists: The request_id was used with another request.
        """
        request_id = request.request_id or f"retry-{secrets.token_hex(16)}"
        _check_request_id(request_id)
        digest = _digest(request)
        made = await self._made(request_id, digest)
        if made is not None:
            return await self._started(made)
        old = await self.book.get(request.id or "")
        if not old.state.terminal:
            raise FailedPrecondition(
                f"{old.id} is at work.",
                fix=f"Wait for its end, or cancel it: `web4lora runs cancel {old.id}`.",
            )
        if request.HasField("pipeline"):
            return await self._fork(request, request_id, digest, old, owner)
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
        taken_over = _results(old.id, before)
        await self._check_inputs(Pipeline.from_json(old.pipeline))
        facts = _facts_of(old) | {"owner": owner}
        return await self._make(request_id, digest, old.pipeline, from_stage, taken_over, facts)

    async def _fork(
        self, request: gateway_pb2.RetryRunRequest, request_id: str, digest: str, old: RunRecord, owner: str
    ) -> RunRecord:
        """Make a run of another pipeline; what an earlier one finished with the same inputs is taken over."""
        if problems := pipeline_problems(request.pipeline):
            raise await self._with_suite(problems, request.pipeline)
        pipeline = await self._started_from(check_pipeline(request.pipeline))
        await self._check_inputs(Pipeline.from_json(pipeline))
        taken_over = _results(old.id, [stage for stage in old.stages if stage.result is not None])
        facts = {**_facts_of(old), "owner": owner, "sweep": "", "sweep_values": {}, "forked_from": old.id}
        from_stage = _stage(request.from_stage)
        return await self._make(request_id, digest, pipeline, from_stage, taken_over, facts)

    async def _made(self, request_id: str, digest: str) -> RunRecord | None:
        """Return the run that this request made before, or None."""
        made = await self.book.by_request(request_id)
        if made is not None and made.request_digest != digest:
            raise AlreadyExists(
                f"The request_id {request_id!r} was used with another request, for {made.id}.",
                fix="Use a new request_id for a new run.",
            )
        return made

    async def _check_inputs(self, pipeline: Pipeline) -> None:
        """Look into what a run starts from, so that hours of training don't end at a misspelt word."""
        problems = await asyncio.to_thread(lambda: list(artifact_problems(self.store, pipeline)))
        if problems:
            raise await self._with_suite(problems, pipeline)
        if pipeline.suite is None:
            return
        scores = await self.workers.deployer.suite_scores(pipeline.suite)
        if problems := list(unknown_scores(pipeline.verify, scores)):
            raise error_of(problems)

    async def _with_suite(
        self, problems: list[Problem], pipeline: gateway_pb2.Pipeline | Pipeline
    ) -> InvalidInput:
        """Return the error for a wrong pipeline, and for its suite where that can be read: all at once."""
        suite = pipeline.verify.suite
        if not suite.digest or any(problem.field == SUITE for problem in problems):
            return error_of(problems)
        try:
            scores = await self.workers.deployer.suite_scores(ref_of(suite))
        except Web4Error as error:
            found = error_of(problems)
            if error.reason != BAD_SUITE:  # said once the pipeline is right
                return found
            lines = f"{found.message}\n{error.message}"
            return InvalidInput(lines, fix="Correct them.", reason=BAD_SUITE, metadata=found.metadata)
        return error_of([*problems, *unknown_scores(pipeline.verify, scores)])

    async def _make(
        self,
        request_id: str,
        digest: str,
        pipeline: Mapping[str, Any],
        from_stage: str,
        taken_over: Mapping[str, StageResult],
        facts: Mapping[str, Any],
    ) -> RunRecord:
        now = time.time()
        prefix = time.strftime("run_%Y-%m-%d_", time.localtime(now))
        outputs_dir = self.settings.outputs_dir

        deleted = await self.deleted(prefix)

        def make(number: int) -> RunRecord:
            while f"{prefix}{number}" in deleted or taken(f"{prefix}{number}", self.store, outputs_dir):
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
                **facts,
            )

        async def made_and_started() -> tuple[RunRecord, bool]:
            record, new = await self.book.create(make, prefix, request_id)
            if new:
                await self.start(record.id)
            return record, new

        # A caller that goes away in between leaves no run that nobody starts.
        record, new = await self.book.finish(made_and_started())
        if (
            not new and record.request_digest != digest
        ):  # another call with this request_id came first by a hair
            await self._made(request_id, digest)
        return record

    async def _started(self, record: RunRecord) -> RunRecord:
        """Start a run that was made before, if the gateway was killed before it started it."""
        if record.state is RunState.QUEUED:
            await self.book.finish(self.start(record.id))
        return record


def _check_request_id(request_id: str) -> None:
    if not 1 <= len(request_id) <= _REQUEST_ID_LENGTH:
        raise InvalidInput(
            f"request_id needs 1 to {_REQUEST_ID_LENGTH} characters.", metadata={"field": "request_id"}
        )


def _results(run_id: str, stages: Iterable[StageRecord]) -> dict[str, StageResult]:
    """Return what stages of a run came to, by name."""
    return {
        stage.name: StageResult(
            stage.key, stage.reused_from_run or run_id, stage.result or {}, stage.versions, stage.work_seconds
        )
        for stage in stages
    }


def _facts_of(record: RunRecord) -> dict[str, Any]:
    """Return what a run that follows another has of it besides what it does."""
    names = ("labels", "priority", "device", "sweep", "sweep_values")
    return {name: getattr(record, name) for name in names}


def _sweep_values(values: Mapping[str, str]) -> dict[str, str]:
    if len(values) > _SWEPT or any(len(text) > _SWEPT_LENGTH for pair in values.items() for text in pair):
        raise InvalidInput(
            f"sweep_values holds more than {_SWEPT} values, or longer ones than {_SWEPT_LENGTH} characters.",
            metadata={"field": "sweep_values"},
        )
    return dict(values)


def _checked(text: str, field: str, form: re.Pattern[str]) -> str:
    """Return a field of a request that has its form."""
    if len(text) > _WORD_LENGTH or not form.fullmatch(text):
        raise InvalidInput(
            f"{text[:80]!r} is no {field}; see the contract's CreateRunRequest.", metadata={"field": field}
        )
    return text


def _stage(name: gateway_pb2.StageName.ValueType) -> str:
    if name not in gateway_pb2.StageName.values():
        raise InvalidInput(f"{name} is not a stage.", metadata={"field": "from_stage"})
    return stage_word(name)


def _digest(request: Message) -> str:
    """Return a digest that tells two requests apart; maps are written in order."""
    data = type(request).DESCRIPTOR.full_name.encode() + request.SerializeToString(deterministic=True)
    return hashlib.sha256(data).hexdigest()
