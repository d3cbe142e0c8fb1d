"""What is seen of a service from outside: logs, metrics, traces. All are off unless a setting asks for them.

`work` says what a piece of code works for, a run, a job; `logs` puts that into every line, `traces` makes
spans of it, `rpc.telemetry` carries it from service to service, and a job's record to its child process.
"""

from web4lora_chassis.telemetry.start import start, start_child
from web4lora_chassis.telemetry.work import belongs_to, origin

__all__ = ["belongs_to", "origin", "start", "start_child"]
