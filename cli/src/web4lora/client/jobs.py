"""Jobs of the deployer: create one, follow it, end it."""

from __future__ import annotations

from collections.abc import Iterator

from web4.lora.v1 import jobs_pb2

from web4lora.client.calls import Calls

_JOB_TERMINAL = (jobs_pb2.JOB_STATE_SUCCEEDED, jobs_pb2.JOB_STATE_FAILED, jobs_pb2.JOB_STATE_CANCELLED)


class Jobs(Calls):
    """The client's methods for the deployer's jobs."""

    def create_job(self, request: jobs_pb2.CreateJobRequest) -> jobs_pb2.Job:
        """Create a job of the deployer.

        Raises:
            InvalidInput: Its spec is out of bounds.
            Unavailable: The gateway or the deployer is out of reach.
        """
        return self._call(self._jobs.CreateJob, request).job

    def watch_job(self, job_id: str) -> Iterator[jobs_pb2.Job]:
        """Yield snapshots of a job of the deployer, the current one first, until it has ended.

        A gateway or deployer that goes away is waited for: up to a minute, since jobs go on when it is back.

        Raises:
            NotFound: No such job.
            Unavailable: The gateway was never there, or stayed away.
        """
        return self._follow(
            self._jobs.WatchJob,
            jobs_pb2.WatchJobRequest(id=job_id),
            snapshot_of=lambda answer: answer.job,
            ended=lambda job: job.state in _JOB_TERMINAL,
        )

    def cancel_job(self, job_id: str) -> jobs_pb2.Job:
        """Ask a job of the deployer to end; its process is stopped within seconds.

        Raises:
            NotFound: No such job.
        """
        request = jobs_pb2.CancelJobRequest(id=job_id)
        return self._call(self._jobs.CancelJob, request).job
