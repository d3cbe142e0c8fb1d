"""Runs: start one from a pipeline file, follow it, end it, run it again."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from web4.lora.v1 import gateway_pb2
from web4lora_chassis.dataset import problem_lines
from web4lora_chassis.errors import InvalidInput, NotFound, Web4Error
from web4lora_chassis.pipeline.dataset import DatasetSettings
from web4lora_chassis.pipeline.verify import BAD_SUITE
from web4lora_chassis.rpc import ref_message

from web4lora.client.artifacts import Artifacts
from web4lora.client.upload import row_problems, store_dataset, store_suite
from web4lora.pipeline_file import PipelineFile, WrongPipeline, changed_pipeline, read_pipeline

_DELETE_SECONDS = 300.0  # its folder may hold copies of models
_SUBMIT_SECONDS = 120.0  # the suite is read before
STAGES = tuple(name.removeprefix("STAGE_NAME_").lower() for name in gateway_pb2.StageName.keys()[1:])
STATES = tuple(name.removeprefix("RUN_STATE_").lower() for name in gateway_pb2.RunState.keys()[1:])
PRIORITIES = tuple(name.removeprefix("PRIORITY_").lower() for name in gateway_pb2.Priority.keys()[1:])
_TERMINAL = (
    gateway_pb2.RUN_STATE_SUCCEEDED,
    gateway_pb2.RUN_STATE_FAILED,
    gateway_pb2.RUN_STATE_CANCELLED,
)
UNENDED = tuple(
    state for state in STATES if gateway_pb2.RunState.Value(f"RUN_STATE_{state.upper()}") not in _TERMINAL
)
"""The states of runs that wait or are at work."""


class Runs(Artifacts):
    """The client's methods for runs; what a pipeline file names is stored first."""

    def read(self, path: Path, overrides: Iterable[str] = ()) -> PipelineFile:
        """Read a pipeline file; where it is wrong, say what is wrong with its data and its suite too.

        Args:
            path: The file.
            overrides: Settings that win over the file, as `train.epochs=2`.

        Raises:
            NotFound: The file can't be read.
            InvalidInput: Something is wrong; the message names file and line.
        """
        try:
            return read_pipeline(path, overrides)
        except WrongPipeline as wrong:
            there = [each for each in (*wrong.file.train_files, *wrong.file.eval_files) if each.is_file()]
            rows = problem_lines(row_problems(there))
            raise WrongPipeline(
                [*wrong.problems, *rows, *self._wrong_suite(wrong.file)], wrong.file
            ) from wrong

    def run(
        self,
        pipeline: str | Path | PipelineFile | gateway_pb2.Pipeline,
        *,
        from_stage: str = "",
        request_id: str = "",
        overrides: Iterable[str] = (),
        labels: Mapping[str, str] | None = None,
        validate_only: bool = False,
        priority: str = "",
        device: str = "",
        sweep: str = "",
        sweep_values: Mapping[str, str] | None = None,
    ) -> gateway_pb2.Run:
        """Start a run.

        Args:
            pipeline: A pipeline file; its dataset and suite are checked and stored first. Or a message, whose
                dataset and suite are stored already.
            from_stage: Run this stage and those after it even if the same inputs were run before.
            request_id: Makes the call repeatable: the same key and pipeline give the same run.
            overrides: Settings that win over the file, as `train.epochs=2`.
            labels: What the run is found by later.
            validate_only: Check all, the data and the suite too, which are stored for that, and make no run.
            priority: What comes first where runs wait: low, normal or high; empty: normal.
            device: Train only where this word is in the trainer's device, for example cuda; empty: on any.
            sweep: Id of the sweep that the run is one of; empty: of none.
            sweep_values: The values that the sweep gives it, by key.

        Returns:
            The run, durable from now on; with `validate_only` one without an id, every default filled in.

        Raises:
            InvalidInput: The file or the data is wrong; the message names file and line.
            NotFound: A file is not there.
            Unavailable: The gateway or the store is out of reach.
        """
        file: PipelineFile | None = None
        if isinstance(pipeline, gateway_pb2.Pipeline):
            message = pipeline
        else:
            file = pipeline if isinstance(pipeline, PipelineFile) else self.read(Path(pipeline), overrides)
            message = self._stored(file)
        request = gateway_pb2.CreateRunRequest(
            request_id=request_id or uuid.uuid4().hex,
            pipeline=message,
            from_stage=stage_value(from_stage),
            labels=labels,
            validate_only=validate_only,
            priority=priority_value(priority),
            device=device,
            sweep=sweep,
            sweep_values=sweep_values or {},
        )
        try:
            return self._call(self._gateway.CreateRun, request, _SUBMIT_SECONDS).run
        except Web4Error as error:
            raise (file.located(error) if file else error) from error

    def sweep(
        self,
        files: Sequence[PipelineFile],
        *,
        from_stage: str = "",
        priority: str = "",
        device: str = "",
        labels: Mapping[str, str] | None = None,
    ) -> list[gateway_pb2.Run]:
        """Start the runs of a sweep; see `read_sweep`.

        Args:
            files: The pipelines, one a run.
            from_stage: As in `run`.
            priority: As in `run`.
            device: As in `run`.
            labels: As in `run`.

        Returns:
            The runs, in the files' order; their `sweep` names what they have in common.
        """
        moment = datetime.now(UTC)
        sweep = f"sweep-{moment:%Y%m%d-%H%M%S}-{uuid.uuid4().hex[:4]}"
        return [
            self.run(
                file,
                from_stage=from_stage,
                priority=priority,
                device=device,
                labels=labels,
                sweep=sweep,
                sweep_values=file.sweep_values,
            )
            for file in files
        ]

    def sweep_runs(self, sweep: str) -> list[gateway_pb2.Run]:
        """Return the runs of a sweep, oldest first.

        Raises:
            NotFound: No run is of that sweep.
        """
        found = [run for run in self.list_runs() if run.sweep == sweep]
        if not found:
            raise NotFound(f"There is no sweep {sweep!r}.", fix="`web4lora sweeps list` shows all.")
        return found[::-1]

    def get_run(self, run_id: str = "latest") -> gateway_pb2.Run:
        """Return a run as it is now.

        Raises:
            NotFound: No such run.
        """
        return self._call(self._gateway.GetRun, gateway_pb2.GetRunRequest(id=run_id)).run

    def list_runs(
        self,
        *,
        states: Iterable[str] = (),
        name: str = "",
        owner: str = "",
        labels: Mapping[str, str] | None = None,
        created_after: datetime | None = None,
        created_before: datetime | None = None,
    ) -> Iterator[gateway_pb2.Run]:
        """Yield runs, newest first; pages are fetched as they are needed.

        Args:
            states: Only runs in one of these: "queued", "running", …; any when empty.
            name: Only runs of pipelines with this name; any when empty.
            owner: Only runs of this owner; any when empty.
            labels: Only runs with all of these.
            created_after: Only runs created then or later; with a time zone, else it is this machine's.
            created_before: Only runs created before then, likewise.

        Raises:
            InvalidInput: There is no such state, or a label is of another form.
        """
        request = gateway_pb2.ListRunsRequest(
            states=map(state_value, states), name=name, owner=owner, labels=labels
        )
        if created_after:
            request.created_after.FromDatetime(created_after.astimezone(UTC))
        if created_before:
            request.created_before.FromDatetime(created_before.astimezone(UTC))
        for page in self._pages(self._gateway.ListRuns, request):
            yield from page.runs

    def watch(self, run_id: str = "latest") -> Iterator[gateway_pb2.Run]:
        """Yield snapshots of a run, the current one first, until it has ended.

        A gateway that goes away is waited for: up to a minute, since runs go on when it is back.

        Raises:
            NotFound: No such run.
            Unavailable: The gateway was never there, or stayed away.
        """
        return self._follow(
            self._gateway.WatchRun,
            gateway_pb2.WatchRunRequest(id=run_id),
            snapshot_of=lambda answer: answer.run,
            ended=ended,
            command="web4lora runs watch",
        )

    def wait(self, run_id: str = "latest") -> gateway_pb2.Run:
        """Return a run once it has ended; see `watch`."""
        last = gateway_pb2.Run()
        for snapshot in self.watch(run_id):
            last = snapshot
        return last

    def cancel(self, run_id: str = "latest", *, keep: bool = False) -> gateway_pb2.Run:
        """Ask a run to end; the job at work is stopped within seconds.

        Args:
            run_id: The run.
            keep: End its training alone, after the step that it is at; the run goes on with what that made.

        Raises:
            NotFound: No such run.
            FailedPrecondition: With `keep`: the run is not training.
            Unavailable: With `keep`: the trainer is out of reach.
        """
        request = gateway_pb2.CancelRunRequest(id=run_id, keep=keep)
        return self._call(self._gateway.CancelRun, request).run

    def delete(self, run_id: str) -> None:
        """Delete a run that has ended: its record and its folders. What it made stays in the store.

        Raises:
            NotFound: No such run.
            FailedPrecondition: It is at work, or kept.
        """
        self._call(self._gateway.DeleteRun, gateway_pb2.DeleteRunRequest(id=run_id), _DELETE_SECONDS)

    def keep(self, run_id: str = "latest", *, release: bool = False) -> gateway_pb2.Run:
        """Keep a run and what it used and made, whatever the retention settings say, or no longer do.

        Raises:
            NotFound: No such run.
        """
        return self._call(self._gateway.KeepRun, gateway_pb2.KeepRunRequest(id=run_id, release=release)).run

    def retry(
        self,
        run_id: str = "latest",
        *,
        from_stage: str = "",
        request_id: str = "",
        overrides: Iterable[str] = (),
    ) -> gateway_pb2.Run:
        """Run a run's pipeline again from a stage, as a new run.

        Args:
            run_id: The run, which must have ended.
            from_stage: The first stage to run again; absent: the first one that did not succeed.
            request_id: Makes the call repeatable.
            overrides: Settings to change, as `train.epochs=2`: every finished stage whose inputs are the same
                is taken over.

        Raises:
            NotFound: No such run.
            InvalidInput: A setting is wrong.
            FailedPrecondition: It is at work, or a stage before `from_stage` never succeeded.
        """
        request = gateway_pb2.RetryRunRequest(
            id=run_id, from_stage=stage_value(from_stage), request_id=request_id or uuid.uuid4().hex
        )
        if changes := list(overrides):
            old = self.get_run(run_id)
            request.id = old.id  # "latest" may be another one by now
            request.pipeline.CopyFrom(changed_pipeline(old.pipeline, changes))
        return self._call(self._gateway.RetryRun, request, _SUBMIT_SECONDS).run

    def _stored(self, file: PipelineFile) -> gateway_pb2.Pipeline:
        """Store what a pipeline file names; return its pipeline with the references."""
        message = gateway_pb2.Pipeline()
        message.CopyFrom(file.pipeline)
        try:
            settings = DatasetSettings.of(message.dataset)
            dataset = store_dataset(
                self.store_to_write, message.name, file.train_files, file.eval_files, settings
            )
        except InvalidInput as error:
            lines = [error.message, *self._wrong_suite(file)]
            raise InvalidInput(
                "\n".join(lines), fix=error.fix, reason=error.reason, metadata=error.metadata
            ) from error
        message.dataset.artifact.CopyFrom(ref_message(dataset))
        if file.suite_file:
            suite = store_suite(self.store_to_write, message.name, file.suite_file)
            message.verify.suite.CopyFrom(ref_message(suite))
        return message

    def _wrong_suite(self, file: PipelineFile) -> list[str]:
        """Say what is wrong with the suite of a pipeline that can't be run, if the deployer can be asked."""
        if file.suite_file is None or not file.suite_file.is_file():
            return []
        # No name, no base: this pipeline is never run, and refused with what is wrong with its suite.
        request = gateway_pb2.CreateRunRequest(request_id=uuid.uuid4().hex)
        try:
            suite = store_suite(self.store_to_write, "suite", file.suite_file)
            request.pipeline.verify.suite.CopyFrom(ref_message(suite))
            self._call(self._gateway.CreateRun, request, _SUBMIT_SECONDS)
        except (InvalidInput, NotFound) as error:
            if request.pipeline.verify.suite.digest and error.reason != BAD_SUITE:
                return []
            others = len(error.metadata.get("field", "").splitlines())
            return file.located(error).message.splitlines()[others:]
        except Web4Error:
            pass  # what is known already is told
        return []


def ended(run: gateway_pb2.Run) -> bool:
    """True when a run will never change again."""
    return run.state in _TERMINAL


def priority_value(word: str) -> gateway_pb2.Priority.ValueType:
    """Return the contract's value of a priority; empty stands for the usual one.

    Raises:
        InvalidInput: There is no such priority.
    """
    if word and word not in PRIORITIES:
        raise InvalidInput(f"{word!r} is not a priority.", fix=f"The priorities are {', '.join(PRIORITIES)}.")
    return gateway_pb2.Priority.Value(f"PRIORITY_{word.upper() or 'UNSPECIFIED'}")


def stage_value(name: str) -> gateway_pb2.StageName.ValueType:
    """Return the contract's value of a stage's name; empty stands for none.

    Raises:
        InvalidInput: There is no such stage.
    """
    if name and name not in STAGES:
        raise InvalidInput(f"{name!r} is not a stage.", fix=f"The stages are {', '.join(STAGES)}.")
    return gateway_pb2.StageName.Value(f"STAGE_NAME_{name.upper() or 'UNSPECIFIED'}")


def state_value(name: str) -> gateway_pb2.RunState.ValueType:
    """Return the contract's value of a run's state.

    Raises:
        InvalidInput: There is no such state.
    """
    if name not in STATES:
        raise InvalidInput(f"{name!r} is no state of a run.", fix=f"The states are {', '.join(STATES)}.")
    return gateway_pb2.RunState.Value(f"RUN_STATE_{name.upper()}")
