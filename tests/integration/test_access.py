"""Every call of every service, found by reflection, from outside, with tokens that must not open it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from google.protobuf.descriptor_pool import DescriptorPool
from google.rpc import error_details_pb2
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from grpc_status import rpc_status
from web4.lora.v1 import scopes_pb2
from web4lora_chassis.audit import AuditLog
from web4lora_chassis.principals import Principals, Scope
from web4lora_chassis.rpc import channel
from web4lora_chassis.rpc.healthcheck import check
from web4lora_chassis.settings import WORKERS, Settings, make_native_tokens

SERVICES = ("gateway", *WORKERS)
OPEN = "/grpc.health.v1.Health/Check"
REFUSED = (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED)


class Stack:
    """The four services as processes, with their tokens made as `web4lora up` makes them."""

    def __init__(self, root: Path) -> None:
        self.home = root / "home"
        self.addresses = {name: f"127.0.0.1:{_free_port()}" for name in SERVICES}
        self.settings = Settings(home=self.home)
        self.home.mkdir(mode=0o700)
        make_native_tokens(self.settings)
        self.people = Principals(self.home)
        self.tokens = {scope: self.people.add(f"may-{scope.name.lower()}", scope)[1] for scope in Scope}
        self.tokens_of_nobody = {
            "none": "",
            "wrong": "x" * 43,
            "wrong-principal": f"{self.tokens[Scope.ADMIN][:-4]}AAAA",
            "expired": self.people.add("expired", Scope.ADMIN, time.time() + 0.2)[1],
            "revoked": self.people.add("revoked", Scope.ADMIN)[1],
        }
        self.people.revoke("revoked")
        env = {key: value for key, value in os.environ.items() if not key.startswith("WEB4LORA_")} | {
            "WEB4LORA_HOME": str(self.home),
            "WEB4LORA_CACHE": str(root / "cache"),
            **{f"WEB4LORA_{name.upper()}_ADDRESS": address for name, address in self.addresses.items()},
        }
        self._logs = {name: root / f"{name}.log" for name in SERVICES}
        self._processes = []
        for name in SERVICES:
            with self._logs[name].open("wb") as log:
                command = [sys.executable, "-m", f"web4lora_{name}"]
                self._processes.append(subprocess.Popen(command, env=env, stdout=log, stderr=log, cwd=root))

    def wait(self) -> None:
        deadline = time.monotonic() + 90
        for name, address in self.addresses.items():
            while check(address, self.settings) != "SERVING":
                assert time.monotonic() < deadline, self._logs[name].read_text()
                time.sleep(0.1)

    def stop(self) -> None:
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.wait(timeout=30)

    def methods(self, name: str) -> dict[str, Scope | None]:
        """Return what a service says it serves, and the scope that it says each call needs."""
        found: dict[str, Scope | None] = {}
        with channel(self.addresses[name], self.settings) as connection:
            database = ProtoReflectionDescriptorDatabase(connection)
            pool = DescriptorPool(database)
            for service in database.get_services():
                for method in pool.FindServiceByName(service).methods:
                    options = scopes_pb2.DESCRIPTOR.extensions_by_name["scope"]
                    number = _option(method.GetOptions().SerializeToString(), options.number)
                    found[f"/{service}/{method.name}"] = Scope(number) if number else None
        return found

    def call(self, name: str, method: str, token: str) -> tuple[grpc.StatusCode, str]:
        """Make a call with an empty message; return its code and the reason of its error."""
        metadata = (("authorization", f"Bearer {token}"),) if token else ()
        with grpc.insecure_channel(self.addresses[name]) as connection:
            answers = connection.stream_stream(method)(iter([b""]), metadata=metadata, timeout=30)
            try:
                next(answers, None)
            except grpc.RpcError as error:
                return error.code(), _reason(error)
            answers.cancel()
            return grpc.StatusCode.OK, ""


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _option(data: bytes, number: int) -> int:
    """Return an option that the pool of reflection does not know: it is read with our own message."""
    from google.protobuf.descriptor_pb2 import MethodOptions

    options = MethodOptions.FromString(data)
    return int(options.Extensions[scopes_pb2.scope])


def _reason(error: grpc.RpcError) -> str:
    status = rpc_status.from_call(error)
    info = error_details_pb2.ErrorInfo()
    for detail in status.details if status else ():
        if detail.Unpack(info):
            return info.reason
    return ""


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    made = Stack(tmp_path_factory.mktemp("access"))
    try:
        made.wait()
        yield made
    finally:
        made.stop()


@pytest.mark.parametrize("name", SERVICES)
def test_every_call_is_refused_to_whom_it_is_not_for(stack: Stack, name: str) -> None:
    methods = stack.methods(name)
    ours = {method: scope for method, scope in methods.items() if method.startswith("/web4.lora.v1.")}
    assert len(ours) >= 6
    assert all(ours.values()), f"calls without a scope: {[each for each, scope in ours.items() if not scope]}"
    wrong = []
    for method, said in methods.items():
        needed = said or Scope.READ  # gRPC's own: health and reflection
        if name in WORKERS and needed is Scope.RUN:
            needed = Scope.ADMIN
        for kind, token in stack.tokens_of_nobody.items():
            code, reason = stack.call(name, method, token)
            if method == OPEN:
                assert code is grpc.StatusCode.OK
            elif code is not grpc.StatusCode.UNAUTHENTICATED:
                wrong.append(f"{method}, {kind}: {code.name} {reason}")
        for scope, token in stack.tokens.items():
            code, reason = stack.call(name, method, token)
            refused = (code, reason) == (grpc.StatusCode.PERMISSION_DENIED, "SCOPE_TOO_SMALL")
            if refused is not (scope < needed and method != OPEN):
                wrong.append(f"{method}, {scope.name}: {code.name} {reason}")
        if stack.call(name, method, stack.settings.shared_token)[0] in REFUSED:
            wrong.append(f"{method} refuses the stack's own token")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("name", SERVICES)
def test_a_workers_token_opens_that_worker_alone(stack: Stack, name: str) -> None:
    for worker in WORKERS:
        token = stack.settings.worker_token(worker)
        for method in stack.methods(name):
            code, _ = stack.call(name, method, token)
            assert (code not in REFUSED) is (worker == name or method == OPEN), (
                f"{method}, {worker}'s: {code}"
            )


def test_what_was_refused_changed_nothing_and_is_in_the_log(stack: Stack) -> None:
    for name in SERVICES:
        log = AuditLog(stack.home / "audit", name)
        assert log.verify().problems == ()
        entries = list(log.entries())
        refusals = {entry.result for entry in entries}
        assert {
            "UNAUTHENTICATED",
            "TOKEN_UNKNOWN",
            "TOKEN_EXPIRED",
            "TOKEN_REVOKED",
            "SCOPE_TOO_SMALL",
        } <= refusals
        assert not [entry for entry in entries if entry.result == "OK" and not entry.principal]
        text = "".join(path.read_text() for path in (stack.home / "audit").glob(f"{name}*"))
        for token in (
            *stack.tokens.values(),
            stack.settings.shared_token,
            stack.settings.worker_token("trainer"),
        ):
            assert token not in text
    assert {each.name for each in stack.people.all()} == {
        "may-read", "may-run", "may-admin", "expired", "revoked",
    }  # fmt: skip
    for worker in WORKERS:
        assert not list((stack.home / worker / "jobs").glob("*/job.json"))
    people = json.loads((stack.home / "principals.json").read_text())["principals"]
    assert len(people) == 5
