"""Who owns a run, and what the command says of people and calls: the real gateway over stand-in workers."""

from __future__ import annotations

import json
import os
import sys
import uuid
from dataclasses import dataclass

import grpc
import pytest
from web4.lora.v1 import deployer_pb2, gateway_pb2, gateway_pb2_grpc, jobs_pb2, jobs_pb2_grpc
from web4lora import Client
from web4lora.main import main
from web4lora_chassis.artifacts import open_store
from web4lora_chassis.audit import AuditLog
from web4lora_chassis.errors import PermissionDenied, Unauthenticated
from web4lora_chassis.principals import Principals, Scope
from web4lora_chassis.rpc import channel, error_of
from web4lora_chassis.settings import Settings

OWN = "the-stacks-own"


@dataclass(frozen=True)
class Person:
    """A principal's stubs."""

    runs: gateway_pb2_grpc.GatewayServiceStub
    jobs: jobs_pb2_grpc.JobServiceStub

    def cancel(self, run_id: str) -> gateway_pb2.Run:
        return self.runs.CancelRun(gateway_pb2.CancelRunRequest(id=run_id), timeout=20).run


@pytest.fixture
def person(stack):
    """Return what makes a person of a scope who may call the stack's gateway."""
    stack.env["WEB4LORA_TOKEN"] = OWN
    opened = []

    def make(name: str, scope: Scope) -> Person:
        stack.settings.home.mkdir(exist_ok=True)
        _, token = Principals(stack.settings.home).add(name, scope)
        settings = Settings(home=stack.root / "elsewhere", token=token)
        opened.append(channel(stack.addresses["gateway"], settings))
        return Person(
            gateway_pb2_grpc.GatewayServiceStub(opened[-1]), jobs_pb2_grpc.JobServiceStub(opened[-1])
        )

    yield make
    for each in opened:
        each.close()


def denied(call) -> PermissionDenied:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    error = error_of(caught.value)
    assert isinstance(error, PermissionDenied)
    return error


def test_a_run_is_its_creators_and_only_that_one_or_an_administrator_ends_it(stack, person) -> None:
    stack.start()
    alice, bob, root = (
        person("alice", Scope.RUN), person("bob", Scope.RUN), person("root", Scope.ADMIN),
    )  # fmt: skip
    stack.hold("train")

    def create(by: Person) -> gateway_pb2.Run:
        request = gateway_pb2.CreateRunRequest(request_id=uuid.uuid4().hex, pipeline=stack.pipeline())
        return by.runs.CreateRun(request, timeout=20).run

    first, second = create(alice), create(alice)
    assert first.owner == second.owner == "alice"
    assert bob.runs.GetRun(gateway_pb2.GetRunRequest(id=first.id)).run.owner == "alice"
    error = denied(lambda: bob.cancel(first.id))
    assert error.reason == "NOT_OWNER"
    assert "alice" in error.message
    keep = gateway_pb2.CancelRunRequest(id=first.id, keep=True)
    assert denied(lambda: bob.runs.CancelRun(keep, timeout=20)).reason == "NOT_OWNER"
    release = gateway_pb2.KeepRunRequest(id=first.id, release=True)
    assert denied(lambda: bob.runs.KeepRun(release, timeout=20)).reason == "NOT_OWNER"
    alice.runs.KeepRun(release, timeout=20)
    assert alice.cancel(first.id).state == gateway_pb2.RUN_STATE_CANCELLING
    stack.kill("gateway")
    stack.start("gateway")  # the owner outlives it
    assert denied(lambda: bob.cancel(second.id)).reason == "NOT_OWNER"
    root.cancel(second.id)
    assert list(alice.runs.WatchRun(gateway_pb2.WatchRunRequest(id=second.id), timeout=60))
    again = bob.runs.RetryRun(gateway_pb2.RetryRunRequest(id=second.id), timeout=20).run
    assert again.owner == "bob"  # one's own, of another's
    bob.cancel(again.id)


def test_a_job_is_its_creators_and_a_runs_is_nobodys(stack, person) -> None:
    stack.start()
    alice, bob = person("alice", Scope.RUN), person("bob", Scope.RUN)
    stack.hold("evaluate")
    stack.hold("deploy")
    spec = jobs_pb2.JobSpec(evaluate=deployer_pb2.EvaluateSpec())
    job = alice.jobs.CreateJob(jobs_pb2.CreateJobRequest(request_id="e", spec=spec), timeout=20).job
    assert job.owner == "alice"
    cancel = jobs_pb2.CancelJobRequest(id=job.id)
    assert denied(lambda: bob.jobs.CancelJob(cancel, timeout=20)).reason == "NOT_OWNER"
    assert alice.jobs.CancelJob(cancel, timeout=20).job.id == job.id
    assert stack.jobs("deployer")[0]["owner"] == "alice"

    request = gateway_pb2.CreateRunRequest(request_id="r", pipeline=stack.pipeline())
    run = alice.runs.CreateRun(request, timeout=20).run
    stack.wait(lambda: len(stack.jobs("deployer")) > 1, "the run's deploy job")
    deploy = jobs_pb2.CancelJobRequest(id=stack.jobs("deployer")[1]["id"])
    for each in (alice, bob):
        assert denied(lambda each=each: each.jobs.CancelJob(deploy, timeout=20)).reason == "NOT_OWNER"
    alice.cancel(run.id)


@pytest.fixture
def web4lora(stack, monkeypatch, capsys):
    """Return what runs the command and returns what it printed: its results, or why it failed."""
    for name in [name for name in os.environ if name.startswith("WEB4LORA_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WEB4LORA_HOME", str(stack.root / "elsewhere"))
    monkeypatch.setenv("WEB4LORA_GATEWAY_ADDRESS", stack.addresses["gateway"])

    def run(*words: str, token: str = OWN, code: int = 0) -> str:
        monkeypatch.setenv("WEB4LORA_TOKEN", token)
        monkeypatch.setattr(sys, "argv", ["web4lora", *words])
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capsys.readouterr()
        assert (ended.value.code or 0) == code, printed
        return printed.out if code == 0 else printed.err

    return run


def test_the_command_gives_takes_and_shows_access(stack, person, web4lora) -> None:
    stack.start("gateway", "deployer")
    assert "There are none" in web4lora("people", "list")
    alice = web4lora("people", "add", "alice", "--expires", "12h").strip()
    assert alice.startswith("w4_")
    told = json.loads(web4lora("people", "add", "ci", "--scope", "read", "--expires", "never", "--json"))
    assert told["principal"]["scope"] == "SCOPE_READ"
    assert "There are no runs" in web4lora("runs", "list", token=alice)
    refused = web4lora("people", "add", "bob", token=alice, code=1)
    assert "needs the scope admin; alice has run" in refused
    assert "--expires" in web4lora("people", "add", "bob", "--expires", "soon", code=2)
    assert "already" not in web4lora("people", "list")
    rotated = web4lora("people", "rotate", "alice").strip()
    assert "nobody's" in web4lora("runs", "list", token=alice, code=1)
    web4lora("runs", "list", token=rotated)
    web4lora("people", "revoke", "alice")
    assert "revoked" in web4lora("runs", "list", token=rotated, code=1)
    listed = web4lora("people", "list")
    assert [row.split()[0] for row in listed.splitlines()] == ["name", "alice", "ci"]
    assert "revoked" in listed
    assert "never expires" in listed

    entries = json.loads(web4lora("audit", "--json"))
    calls = [(each["principal"], each["call"].rpartition("/")[2], each["result"]) for each in entries]
    assert ("admin", "CreatePrincipal", "OK") in calls
    assert ("alice", "CreatePrincipal", "SCOPE_TOO_SMALL") in calls
    only = json.loads(web4lora("audit", "--person", "alice", "--call", "CreatePrincipal", "--json"))
    assert [each["result"] for each in only] == ["SCOPE_TOO_SMALL"]
    failed = json.loads(web4lora("audit", "--failed", "--limit", "1", "--json"))
    assert [each["result"] for each in failed] == ["TOKEN_REVOKED"]
    assert "CreatePrincipal" in web4lora("audit")
    assert "none changed, none removed" in web4lora("audit", "--verify")
    folder = stack.settings.home / "audit"
    assert "none changed" in web4lora("audit", "--verify", "--folder", str(folder))

    path = folder / "gateway.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:1], *lines[2:]]))
    for words in (("--verify",), ("--verify", "--folder", str(folder))):
        assert "line 2 is missing" in web4lora("audit", *words, code=1)
    for secret in (OWN, alice, rotated, told["token"]):
        assert secret not in path.read_text()
        assert secret not in stack.log


def test_a_client_without_a_key_reads_and_adds_by_the_gateways_word(stack, person, minio, bucket) -> None:
    """On MinIO; the key that it is issued deletes nothing."""
    store = f"s3+http://{minio.endpoint}/{bucket}"
    key = {"s3_access_key": minio.access_key, "s3_secret_key": minio.secret_key}
    stack.env |= {"WEB4LORA_STORE": store, **{f"WEB4LORA_{name.upper()}": word for name, word in key.items()}}
    stack.start("gateway", "deployer")
    people = Principals(stack.settings.home)
    tokens = {scope: people.add(f"may-{scope.name.lower()}", scope)[1] for scope in Scope}
    settings = {
        "home": stack.root / "elsewhere",
        "gateway_address": stack.addresses["gateway"],
        "store": store,
    }
    (stack.root / "a.txt").write_text("a")
    with (
        Client(Settings(token=tokens[Scope.RUN], **settings)) as runs,
        Client(Settings(token=tokens[Scope.READ], **settings)) as reads,
    ):
        ref = runs.store_to_write.put("dataset", "data", {"train/a.jsonl": stack.root / "a.txt"})
        reads.get_artifact(ref, stack.root / "got")
        assert (stack.root / "got" / "train" / "a.jsonl").read_text() == "a"
        with pytest.raises(PermissionDenied, match="needs the scope run"):
            reads.store_to_write.put("dataset", "data", {"train/b.jsonl": stack.root / "a.txt"})
        for opened in (runs.store_to_write, runs.store, reads.store):
            with pytest.raises(Unauthenticated, match="AccessDenied"):
                opened.delete(ref)
    assert [manifest.ref for manifest in open_store(Settings(store=store, **key)).find()] == [ref]
    entries = AuditLog(stack.settings.home / "audit", "gateway").entries()
    results = {(entry.principal, entry.call.rpartition("/")[2]): entry.result for entry in entries}
    assert results["may-run", "IssueWriteCredentials"] == "OK"
    assert results["may-read", "IssueWriteCredentials"] == "SCOPE_TOO_SMALL"
