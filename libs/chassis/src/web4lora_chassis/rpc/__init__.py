"""gRPC as every service speaks it: one server, one channel, one table of errors, one form of jobs."""

from web4lora_chassis.rpc.artifact_messages import manifest_message, ref_message, ref_of
from web4lora_chassis.rpc.client import async_channel, channel
from web4lora_chassis.rpc.errors import error_of
from web4lora_chassis.rpc.jobs import Check, JobService, failure_of, job_process
from web4lora_chassis.rpc.json_data import from_json, to_json
from web4lora_chassis.rpc.server import Registration, serve
from web4lora_chassis.rpc.worker import Worker, serve_worker, service_process, worker_process

__all__ = [
    "Check",
    "JobService",
    "Registration",
    "Worker",
    "async_channel",
    "channel",
    "error_of",
    "failure_of",
    "from_json",
    "job_process",
    "manifest_message",
    "ref_message",
    "ref_of",
    "serve",
    "serve_worker",
    "service_process",
    "to_json",
    "worker_process",
]
