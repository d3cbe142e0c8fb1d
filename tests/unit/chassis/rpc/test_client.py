"""What a channel repeats by itself, and what it must not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import pytest
from web4.lora.v1 import deployments_pb2, deployments_pb2_grpc, gateway_pb2, gateway_pb2_grpc
from web4lora_chassis.rpc import channel
from web4lora_chassis.settings import Settings

GATEWAY = gateway_pb2_grpc.GatewayServiceStub
DEPLOYMENTS = deployments_pb2_grpc.DeploymentServiceStub


class Away(grpc.GenericRpcHandler):
    """Counts calls and answers each with UNAVAILABLE."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any]:
        def refuse(_: bytes, context: grpc.ServicerContext) -> bytes:
            self.calls[details.method.rpartition("/")[2]] += 1
            context.abort(grpc.StatusCode.UNAVAILABLE, "away")
            return b""

        return grpc.unary_unary_rpc_method_handler(refuse)


@pytest.fixture
def away() -> Iterator[tuple[Away, str]]:
    handler = Away()
    server = grpc.server(futures.ThreadPoolExecutor(2), handlers=[handler])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield handler, f"127.0.0.1:{port}"
    server.stop(None)


@pytest.mark.parametrize(
    ("stub", "method", "request_message", "times"),
    [
        (GATEWAY, "GetRun", gateway_pb2.GetRunRequest(), 4),
        (GATEWAY, "RetryRun", gateway_pb2.RetryRunRequest(), 1),
        (DEPLOYMENTS, "RollbackDeployment", deployments_pb2.RollbackDeploymentRequest(), 1),
        (DEPLOYMENTS, "PromoteDeployment", deployments_pb2.PromoteDeploymentRequest(), 4),
    ],
)
def test_only_what_is_safe_to_repeat_is_repeated(
    away: tuple[Away, str], tmp_path: Path, stub: Any, method: str, request_message: Any, times: int
) -> None:
    handler, address = away
    with channel(address, Settings(home=tmp_path)) as line, pytest.raises(grpc.RpcError) as caught:
        getattr(stub(line), method)(request_message)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert handler.calls == {method: times}
