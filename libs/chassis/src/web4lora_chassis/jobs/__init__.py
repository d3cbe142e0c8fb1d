"""The job resource: work in a child process of its own, with its state on disk.

`JobRunner` lives in the service: it accepts jobs, starts one child for each, watches, cancels and, after a
restart, goes on. `worker_main` lives in the child: it calls the handler for the job's kind and passes
progress, result or error on. `JobRecord` is what both know of a job.
"""

from web4lora_chassis.jobs.child import JobContext, worker_main
from web4lora_chassis.jobs.record import JobFailure, JobRecord, JobState, Progress
from web4lora_chassis.jobs.runner import JobRunner

__all__ = ["JobContext", "JobFailure", "JobRecord", "JobRunner", "JobState", "Progress", "worker_main"]
