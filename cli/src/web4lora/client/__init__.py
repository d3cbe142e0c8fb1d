"""The Python client: what the command does, for programs."""

from __future__ import annotations

from web4lora.client.client import Client
from web4lora.client.runs import PRIORITIES, STAGES, STATES, UNENDED, ended

__all__ = ["PRIORITIES", "STAGES", "STATES", "UNENDED", "Client", "ended"]
