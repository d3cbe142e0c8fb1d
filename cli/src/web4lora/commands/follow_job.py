"""Follows a job of the deployer to its end; Ctrl-C cancels it and waits until it has stopped."""

from __future__ import annotations

import typer
from web4.lora.v1 import jobs_pb2
from web4lora_chassis.errors import FailedPrecondition

from web4lora.client import Client
from web4lora.views.console import err
from web4lora.views.job_progress import JobView

_INTERRUPTED = 130


def finish(client: Client, job: jobs_pb2.Job, *, quiet: bool, kept: str) -> jobs_pb2.Job:
    """Show a job until it has ended; return it when it succeeded.

    Args:
        client: The connection.
        job: The job.
        quiet: Show nothing.
        kept: What a cancelled job leaves, in a sentence.

    Raises:
        FailedPrecondition: It failed; the error is the job's own.
        typer.Exit: It was cancelled, by Ctrl-C or by somebody else.
    """
    job = _followed(client, job, quiet=quiet)
    if job.state == jobs_pb2.JOB_STATE_CANCELLED:
        err.print(f"! Cancelled. {kept}", style="yellow")
        raise typer.Exit(_INTERRUPTED)
    if job.state == jobs_pb2.JOB_STATE_FAILED:
        error = job.error
        raise FailedPrecondition(
            error.message, fix=error.fix, reason=error.reason, metadata=dict(error.metadata)
        )
    return job


def _followed(client: Client, job: jobs_pb2.Job, *, quiet: bool) -> jobs_pb2.Job:
    view = JobView()
    last = job
    while True:
        try:
            for last in client.watch_job(job.id):
                if not quiet:
                    view.update(last)
            return last
        except KeyboardInterrupt:
            client.cancel_job(job.id)
        finally:
            view.close()
