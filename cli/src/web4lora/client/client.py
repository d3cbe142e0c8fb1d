"""The client itself: its parts as one."""

from __future__ import annotations

from web4lora.client.access import Access
from web4lora.client.artifacts import Artifacts
from web4lora.client.deployments import Deployments
from web4lora.client.jobs import Jobs
from web4lora.client.runs import Runs
from web4lora.client.trainers import Trainers


class Client(
    Deployments, Runs, Artifacts, Jobs, Access, Trainers
):  # each part before those that it builds on
    """Speaks to a gateway. Every method blocks; each raises a subclass of `Web4Error` when it fails.

    Args:
        settings: Which gateway and which store; read from the environment when absent.

    Example:
        >>> with Client() as client:
        ...     run = client.run("examples/web4/demo.yaml")
        ...     for snapshot in client.watch(run.id):
        ...         print(snapshot.state)
    """
