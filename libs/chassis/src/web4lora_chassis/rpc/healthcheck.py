"""Asks a service how it is, for a container: `python -m web4lora_chassis.rpc.healthcheck ADDRESS`.

Exit code 0: it serves. 1: it does not, or it can't be reached; one line says which.
"""

from __future__ import annotations

import sys
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from web4lora_chassis.rpc.client import channel
from web4lora_chassis.settings import Settings, load

_TIMEOUT_SECONDS = 4.0


def check(address: str, settings: Settings, service: str = "") -> str:
    """Return what the health service says: "SERVING", "NOT_SERVING", or why it could not be asked.

    Args:
        address: Host and port.
        settings: TLS files and token.
        service: Full name of one service of the server; the server as a whole when empty.
    """
    with channel(address, settings) as opened:
        stub: Any = health_pb2_grpc.HealthStub(opened)
        try:
            answer = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=_TIMEOUT_SECONDS)
        except grpc.RpcError as error:
            return f"{error.code().name}: {error.details()}"
    return health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)


def main() -> int:
    """Run the command; return its exit code."""
    if len(sys.argv) != 2:
        print("usage: python -m web4lora_chassis.rpc.healthcheck ADDRESS", file=sys.stderr)  # noqa: T201
        return 2
    answer = check(sys.argv[1], load(Settings))
    print(f"{sys.argv[1]}: {answer}")  # noqa: T201
    return 0 if answer == "SERVING" else 1


if __name__ == "__main__":
    sys.exit(main())
