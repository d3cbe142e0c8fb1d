"""gRPC as every service speaks it: one server, one channel, one table of errors, one form of jobs."""

from web4lora_chassis.rpc.client import async_channel, channel
from web4lora_chassis.rpc.errors import error_of
from web4lora_chassis.rpc.jobs import JobApi, failure_of
from web4lora_chassis.rpc.messages import manifest_message, ref_message, ref_of
from web4lora_chassis.rpc.server import Registration, serve

__all__ = [
    "JobApi",
    "Registration",
    "async_channel",
    "channel",
    "error_of",
    "failure_of",
    "manifest_message",
    "ref_message",
    "ref_of",
    "serve",
]
