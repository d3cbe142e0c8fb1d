"""How long a look at a run takes while many list the artifacts: `python benchmarks/artifact_listing.py`.

Starts a gateway of its own in a folder of its own, fills its store with small artifacts, and asks for a run
over and over, alone and beside many listings at once. Beside: the same of another checkout, with --python.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import grpc
from web4.lora.v1 import artifacts_pb2, artifacts_pb2_grpc, gateway_pb2, gateway_pb2_grpc
from web4lora_chassis.artifacts import open_store
from web4lora_chassis.rpc import channel
from web4lora_chassis.settings import Settings


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _fill(home: Path, count: int) -> None:
    store = open_store(Settings(home=home))
    source = home / "source"
    for number in range(count):
        source.mkdir(parents=True, exist_ok=True)
        (source / "file").write_text(str(number))
        files = {f"part-{part}": source / "file" for part in range(5)}
        store.put("report", f"name-{number % 50}", files, link=False)


def _looks(api: gateway_pb2_grpc.GatewayServiceStub, seconds: float) -> list[float]:
    """Return how long looks at a run that is not there take, one after the other, in milliseconds."""
    took = []
    end = time.monotonic() + seconds
    while time.monotonic() < end or len(took) < 3:
        begun = time.monotonic()
        try:
            api.GetRun(gateway_pb2.GetRunRequest(id="run_2026-01-01_1"), timeout=120)
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.NOT_FOUND:
                raise
        took.append((time.monotonic() - begun) * 1000)
        time.sleep(0.01)
    return took


def _told(name: str, took: list[float]) -> None:
    took.sort()
    p99 = took[int(len(took) * 0.99)]
    print(f"{name:<34} median {statistics.median(took):8.1f} ms   p99 {p99:8.1f}   longest {took[-1]:8.1f}")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--artifacts", type=int, default=2000)
    parser.add_argument("--calls", type=int, default=40)
    parser.add_argument("--python", default=sys.executable, help="the interpreter whose gateway is measured")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        _fill(home, options.artifacts)
        address = f"127.0.0.1:{_free_port()}"
        env = {**os.environ, "WEB4LORA_HOME": str(home), "WEB4LORA_GATEWAY_ADDRESS": address}
        with (home / "log").open("wb") as log:
            gateway = subprocess.Popen([options.python, "-m", "web4lora_gateway"], env=env, stderr=log)
        try:
            with channel(address, Settings(home=home)) as line:
                grpc.channel_ready_future(line).result(60)
                api = gateway_pb2_grpc.GatewayServiceStub(line)
                artifacts = artifacts_pb2_grpc.ArtifactServiceStub(line)
                _told("GetRun alone", _looks(api, 2))
                first: list[float] = []

                def listing() -> None:
                    begun = time.monotonic()
                    artifacts.ListArtifacts(artifacts_pb2.ListArtifactsRequest(page_size=100), timeout=300)
                    first.append((time.monotonic() - begun) * 1000)

                for name in ("listings, the first time", "listings, once more"):
                    first.clear()
                    threads = [threading.Thread(target=listing) for _ in range(options.calls)]
                    for thread in threads:
                        thread.start()
                    looks: list[float] = []
                    while any(thread.is_alive() for thread in threads):
                        looks += _looks(api, 0)
                    for thread in threads:
                        thread.join()
                    _told(f"GetRun beside {options.calls} {name}", looks)
                    _told(f"  each of the {options.calls}", first)
        finally:
            gateway.terminate()
            gateway.wait()


if __name__ == "__main__":
    main()
