"""Starts what the settings ask for, in a service and in the children that do its jobs."""

from __future__ import annotations

import os

from web4lora_chassis import __version__
from web4lora_chassis.settings import Settings
from web4lora_chassis.telemetry import logs, metrics, traces

_SERVICE_VARIABLE = "WEB4LORA_SERVICE"
"""Tells the children of a service whose they are."""


def start(service: str, settings: Settings) -> None:
    """Log, trace and show metrics from now on, as the settings say.

    Args:
        service: gateway, trainer, packager or deployer.
        settings: Say what is wanted.

    Raises:
        FailedPrecondition: What is wanted can't be had: a library is missing, or an address is taken.
    """
    os.environ[_SERVICE_VARIABLE] = service
    _start(service, settings)
    if settings.metrics_address:
        metrics.serve(service, settings)


def start_child(settings: Settings) -> None:
    """Log and trace in the process of one job. What it counts goes to its service, which shows it."""
    _start(os.environ.get(_SERVICE_VARIABLE, "worker"), settings)


def _start(service: str, settings: Settings) -> None:
    logs.set_up(service, settings.log_format)
    if settings.traces_endpoint:
        traces.start(service, __version__, settings.traces_endpoint)
