"""Which addresses an evaluation may ask: else whoever may start one could ask any server that we reach."""

from __future__ import annotations

from urllib.parse import urlsplit

from web4lora_chassis.errors import InvalidInput
from web4lora_chassis.settings import is_loopback

from web4lora_deployer.runtimes.docker_model_runner import USUAL_ADDRESSES
from web4lora_deployer.settings import DeployerSettings

_PORTS = {"http": 80, "https": 443}


def require_allowed(url: str, settings: DeployerSettings, field: str) -> None:
    """Refuse an endpoint that is neither on this machine, nor a runtime of ours, nor allowed by the settings.

    Args:
        url: Address of an OpenAI-compatible API.
        settings: Names the runtimes and the hosts that are allowed.
        field: Where the address stands in the request.

    Raises:
        InvalidInput: It is another.
    """
    host, port = _host_and_port(url)
    runtimes = {
        _host_and_port(each) for each in (settings.ollama, settings.docker_model_runner, *USUAL_ADDRESSES)
    }
    allowed = {each.strip().lower() for each in settings.evaluate_hosts.split(",")}
    known = (host, port) in runtimes or not {host, f"{host}:{port}"}.isdisjoint(allowed)
    if host and (is_loopback(host) or known):
        return
    raise InvalidInput(
        f"{field}.endpoint: the deployer may not send requests to {host or url}.",
        fix=f"Allow it where the deployer runs: WEB4LORA_EVALUATE_HOSTS={host}:{port}",
        reason="ENDPOINT_NOT_ALLOWED",
        metadata={"field": field},
    )


def _host_and_port(url: str) -> tuple[str, int]:
    try:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        return (parts.hostname or "").lower(), parts.port or _PORTS.get(parts.scheme, 0)
    except ValueError:  # brackets or a port of the wrong form
        return "", 0
