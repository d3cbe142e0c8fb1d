"""Who may call what, over a real socket: principals, scopes, workers' own tokens, limits, the audit log."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor_pool
from google.protobuf.message_factory import GetMessageClass
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from web4.lora.v1 import jobs_pb2, jobs_pb2_grpc, trainer_pb2, trainer_pb2_grpc
from web4lora_chassis import errors
from web4lora_chassis.audit import AuditEntry, AuditLog
from web4lora_chassis.principals import Principals, Scope
from web4lora_chassis.rpc import Registration, async_channel, error_of, serve
from web4lora_chassis.rpc.auth import ON_BEHALF_OF, _resource, caller, require_owner, scopes
from web4lora_chassis.settings import Settings

TRAINER = "web4.lora.v1.TrainerService"
JOBS = "web4.lora.v1.JobService"
PACKAGE = "web4.lora.v1"


class Servicer(trainer_pb2_grpc.TrainerServiceServicer, jobs_pb2_grpc.JobServiceServicer):
    """Tells who called: as a version, as a job's id."""

    async def GetTrainerInfo(self, request: Any, context: Any) -> trainer_pb2.GetTrainerInfoResponse:
        return trainer_pb2.GetTrainerInfoResponse(version=caller().name)

    async def CreateJob(self, request: Any, context: Any) -> jobs_pb2.CreateJobResponse:
        return jobs_pb2.CreateJobResponse(job=jobs_pb2.Job(id="job-1", owner=caller().name))

    async def CancelJob(self, request: Any, context: Any) -> jobs_pb2.CancelJobResponse:
        require_owner("alice", request.id)
        return jobs_pb2.CancelJobResponse(job=jobs_pb2.Job(id=request.id))

    async def ListJobs(self, request: Any, context: Any) -> jobs_pb2.ListJobsResponse:
        await asyncio.sleep(3600)
        return jobs_pb2.ListJobsResponse()

    async def WatchJob(self, request: Any, context: Any) -> AsyncIterator[jobs_pb2.WatchJobResponse]:
        for number in range(100_000):
            yield jobs_pb2.WatchJobResponse(job=jobs_pb2.Job(id=request.id, revision=number))
            await asyncio.sleep(0.01)


class Caller:
    """One who calls with a token."""

    def __init__(self, connection: grpc.aio.Channel) -> None:
        self.trainer = trainer_pb2_grpc.TrainerServiceStub(connection)
        self.jobs = jobs_pb2_grpc.JobServiceStub(connection)

    async def name(self, **how: Any) -> str:
        answer = await self.trainer.GetTrainerInfo(trainer_pb2.GetTrainerInfoRequest(), timeout=20, **how)
        return str(answer.version)

    async def create(self, **how: Any) -> jobs_pb2.Job:
        request = jobs_pb2.CreateJobRequest(request_id="key")
        return (await self.jobs.CreateJob(request, timeout=20, **how)).job

    async def cancel(self) -> str:
        return str((await self.jobs.CancelJob(jobs_pb2.CancelJobRequest(id="job-1"), timeout=20)).job.id)

    def watch(self) -> Any:
        return self.jobs.WatchJob(jobs_pb2.WatchJobRequest(id="job-1"), timeout=60)


class Served:
    """A server, and callers of it."""

    def __init__(self, port: int, stack: contextlib.AsyncExitStack) -> None:
        self.port = port
        self._stack = stack

    async def caller(self, token: str = "") -> Caller:
        connection = async_channel(f"127.0.0.1:{self.port}", Settings(home=Path("/nowhere")), token)
        return Caller(await self._stack.enter_async_context(connection))


@contextlib.asynccontextmanager
async def served(name: str = "gateway", **settings: Any) -> AsyncIterator[Served]:
    servicer, stop = Servicer(), asyncio.Event()
    port: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def ready(number: int) -> None:
        port.set_result(number)

    registrations = [
        Registration(TRAINER, trainer_pb2_grpc.add_TrainerServiceServicer_to_server, servicer),
        Registration(JOBS, jobs_pb2_grpc.add_JobServiceServicer_to_server, servicer),
    ]
    made = Settings(**{"token": "whole", **settings})
    task = asyncio.create_task(serve("127.0.0.1:0", registrations, made, name=name, ready=ready, stop=stop))
    try:
        async with contextlib.AsyncExitStack() as stack:
            yield Served(await port, stack)
    finally:
        stop.set()
        await task


async def refused(call: Any) -> errors.Web4Error:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return error_of(caught.value)


def log(home: Path, service: str = "gateway") -> list[AuditEntry]:
    """Return the log of a service, oldest first; it must be whole."""
    audit = AuditLog(home / "audit", service)
    assert audit.verify().problems == ()
    return list(audit.entries())[::-1]


def test_every_call_of_the_contract_says_its_scope() -> None:
    from web4.lora.v1 import access_pb2, artifacts_pb2, deployer_pb2, gateway_pb2, packager_pb2

    files = (access_pb2, artifacts_pb2, deployer_pb2, gateway_pb2, jobs_pb2, packager_pb2, trainer_pb2)
    names = [name for file in files for name in file.DESCRIPTOR.services_by_name]
    assert len(names) >= 6
    known = scopes(f"{PACKAGE}.{name}" for name in names)
    for name in names:
        service = descriptor_pool.Default().FindServiceByName(f"{PACKAGE}.{name}")
        for method in service.methods:
            assert f"/{service.full_name}/{method.name}" in known, f"{method.full_name} has no scope"


def test_the_log_finds_what_any_message_is_about() -> None:
    from web4.lora.v1 import access_pb2, artifacts_pb2, deployer_pb2, gateway_pb2, packager_pb2

    files = (access_pb2, artifacts_pb2, deployer_pb2, gateway_pb2, jobs_pb2, packager_pb2, trainer_pb2)
    for file in files:
        for service in file.DESCRIPTOR.services_by_name.values():
            for method in service.methods:
                for kind in (method.input_type, method.output_type):
                    assert _resource(GetMessageClass(kind)()) == ""
    named = access_pb2.CreatePrincipalResponse(principal=access_pb2.Principal(name="alice"))
    assert _resource(named) == "alice"
    assert _resource(gateway_pb2.CancelRunRequest(id="latest")) == "latest"
    assert _resource(gateway_pb2.CancelRunResponse(run=gateway_pb2.Run(id="run_1"))) == "run_1"
    assert _resource(None) == ""


def test_a_scope_allows_what_it_covers_and_no_more(home: Path) -> None:
    people = Principals(home)
    tokens = {scope: people.add(f"{scope.name.lower()}er", scope)[1] for scope in Scope}

    async def main() -> None:
        async with served() as server:
            reader = await server.caller(tokens[Scope.READ])
            runner = await server.caller(tokens[Scope.RUN])
            admin = await server.caller(tokens[Scope.ADMIN])
            whole = await server.caller("whole")
            assert [await each.name() for each in (reader, runner, admin, whole)] == [
                "reader", "runer", "adminer", "admin",
            ]  # fmt: skip
            error = await refused(reader.create())
            assert type(error) is errors.PermissionDenied
            assert error.reason == "SCOPE_TOO_SMALL"
            assert "needs the scope run; reader has read" in error.message
            assert (await runner.create()).owner == "runer"
            error = await refused(runner.cancel())  # alice's
            assert (type(error), error.reason) == (errors.PermissionDenied, "NOT_OWNER")
            assert await admin.cancel() == await whole.cancel() == "job-1"

    asyncio.run(main())
    called = [
        (entry.principal, entry.call.rpartition("/")[2], entry.result, entry.resource) for entry in log(home)
    ]
    assert called == [
        ("reader", "CreateJob", "SCOPE_TOO_SMALL", ""),
        ("runer", "CreateJob", "OK", "job-1"),
        ("runer", "CancelJob", "NOT_OWNER", "job-1"),
        ("adminer", "CancelJob", "OK", "job-1"),
        ("admin", "CancelJob", "OK", "job-1"),
    ]
    entry = log(home)[1]
    assert entry.request_id == "key"
    assert entry.peer.startswith("ipv4:127.0.0.1:")
    assert time.time() - 60 < entry.time <= time.time()


def test_a_token_ends_while_the_server_goes_on(home: Path) -> None:
    people = Principals(home)
    _, token = people.add("alice", Scope.READ)
    _, short = people.add("bob", Scope.READ, time.time() + 1)

    async def main() -> None:
        async with served() as server:
            alice, bob = await server.caller(token), await server.caller(short)
            assert await alice.name() == "alice"
            watch = alice.watch()
            assert (await watch.read()).job.revision == 0
            people.revoke("alice")
            error = await refused(alice.name())
            assert (type(error), error.reason) == (errors.Unauthenticated, "TOKEN_REVOKED")

            async def to_the_end() -> None:
                async for _ in watch:
                    pass

            assert (await refused(to_the_end())).reason == "TOKEN_REVOKED"
            await asyncio.sleep(1)
            assert (await refused(bob.name())).reason == "TOKEN_EXPIRED"
            assert (await refused((await server.caller(token[:-1])).name())).reason == "TOKEN_UNKNOWN"
            assert type(await refused((await server.caller()).name())) is errors.Unauthenticated

    asyncio.run(main())
    assert [entry.result for entry in log(home)] == [
        "TOKEN_REVOKED", "TOKEN_EXPIRED", "TOKEN_UNKNOWN", "UNAUTHENTICATED",
    ]  # fmt: skip
    assert {entry.principal for entry in log(home)} == {""}


def test_without_a_token_all_is_open_until_there_are_principals(home: Path) -> None:
    async def main() -> None:
        async with served(token="") as server:
            anyone = await server.caller()
            assert await anyone.name() == "local"
            _, token = Principals(home).add("alice", Scope.READ)
            assert type(await refused(anyone.name())) is errors.Unauthenticated
            assert await (await server.caller(token)).name() == "alice"

    asyncio.run(main())


def test_a_damaged_file_of_principals_shuts_out_all_but_the_stacks_own_token(home: Path) -> None:
    _, token = Principals(home).add("alice", Scope.ADMIN)
    (home / "principals.json").write_text("{")

    async def main() -> None:
        async with served() as server:
            assert (await refused((await server.caller(token)).name())).reason == "PRINCIPALS_UNREADABLE"
            assert await (await server.caller("whole")).name() == "admin"
        async with served(token="") as server:
            assert (await refused((await server.caller()).name())).reason == "PRINCIPALS_UNREADABLE"

    asyncio.run(main())


def test_a_worker_takes_its_own_token_and_no_other_ones(home: Path) -> None:
    """What one worker is told opens neither another nor the gateway."""
    own = {"trainer_token": "of-trainer", "packager_token": "of-packager"}

    async def main() -> None:
        async with served("trainer", token="", **own) as trainer:
            assert await (await trainer.caller("of-trainer")).name() == "gateway"
            assert (await (await trainer.caller("of-trainer")).create()).owner == "gateway"
            for other in ("of-packager", "whole", ""):
                assert type(await refused((await trainer.caller(other)).create())) is errors.Unauthenticated
        async with served("gateway", **own) as gateway:
            for other in own.values():
                assert type(await refused((await gateway.caller(other)).name())) is errors.Unauthenticated
        async with served("trainer") as trainer:  # one token for all, as ever
            assert await (await trainer.caller("whole")).name() == "admin"

    asyncio.run(main())


def test_at_a_worker_people_see_and_only_administrators_act(home: Path) -> None:
    people = Principals(home)
    _, runs = people.add("alice", Scope.RUN)
    _, administers = people.add("root", Scope.ADMIN)

    async def main() -> None:
        async with served("trainer") as trainer:
            alice, root = await trainer.caller(runs), await trainer.caller(administers)
            assert await alice.name() == "alice"
            assert (await refused(alice.create())).reason == "SCOPE_TOO_SMALL"
            assert (await root.create()).id == "job-1"

    asyncio.run(main())


def test_the_gateway_says_for_whom_it_calls_and_nobody_else_may(home: Path) -> None:
    _, token = Principals(home).add("bob", Scope.RUN)
    behalf = {"metadata": ((ON_BEHALF_OF, "alice"),)}

    async def main() -> None:
        async with served("trainer", trainer_token="own") as trainer:
            assert (await (await trainer.caller("own")).create(**behalf)).owner == "alice"
            assert await (await trainer.caller(token)).name(**behalf) == "bob"
        async with served("gateway") as gateway:
            assert (await (await gateway.caller("whole")).create(**behalf)).owner == "admin"

    asyncio.run(main())
    entry = log(home, "trainer")[0]
    assert (entry.principal, entry.on_behalf_of) == ("gateway", "alice")


def test_too_many_calls_are_told_when_to_come_again(home: Path) -> None:
    _, token = Principals(home).add("alice", Scope.READ)

    async def main() -> None:
        async with served(calls_per_second=0.5, calls_at_once=3) as server:
            alice, whole = await server.caller(token), await server.caller("whole")
            for _ in range(3):
                await alice.name()
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await alice.name()
            status = rpc_status.from_call(caught.value)
            retry = error_details_pb2.RetryInfo()
            assert any(detail.Unpack(retry) for detail in status.details)
            assert 0 < retry.retry_delay.ToMilliseconds() <= 2000
            error = error_of(caught.value)
            assert (type(error), error.reason) == (errors.ResourceExhausted, "RATE_LIMIT")
            assert await whole.name() == "admin"  # alice's calls are not another's
        async with served("trainer", calls_per_second=0.5, calls_at_once=1) as trainer:
            whole = await trainer.caller("whole")
            for _ in range(5):  # the gateway's: everybody's runs come through it
                await whole.name()

    asyncio.run(main())


def test_watches_of_a_principal_are_bounded(home: Path) -> None:
    async def main() -> None:
        async with served(streams_at_once=2) as server:
            whole = await server.caller("whole")
            watches = [whole.watch() for _ in range(2)]
            for watch in watches:
                await watch.read()
            assert (await refused(whole.watch().read())).reason == "TOO_MANY_STREAMS"
            watches[0].cancel()
            for _ in range(200):
                again = whole.watch()
                try:
                    assert (await again.read()).job.revision == 0
                    break
                except grpc.aio.AioRpcError:  # the server has not seen the cancel yet
                    await asyncio.sleep(0.02)
            else:
                pytest.fail("a watch that was cancelled still counts")

    asyncio.run(main())


def test_a_call_without_a_deadline_gets_one(home: Path) -> None:
    async def main() -> None:
        async with served(call_seconds=0.2) as server:
            jobs = (await server.caller("whole")).jobs
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await jobs.ListJobs(jobs_pb2.ListJobsRequest())
            assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            assert "0.2 s" in (caught.value.details() or "")
            watch = jobs.WatchJob(jobs_pb2.WatchJobRequest(id="x"))
            for _ in range(40):  # longer than a call may take
                await watch.read()
            watch.cancel()

    asyncio.run(main())


def test_refusals_of_nobody_do_not_flood_the_log(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("web4lora_chassis.rpc.auth._REFUSALS_AT_ONCE", 2)
    monkeypatch.setattr("web4lora_chassis.rpc.auth._REFUSALS_PER_SECOND", 0.001)

    async def main() -> None:
        async with served() as server:
            nobody = await server.caller()
            for _ in range(7):
                await refused(nobody.create())
            await (await server.caller("whole")).create()

    asyncio.run(main())
    assert [(entry.result, entry.skipped) for entry in log(home)] == [
        ("UNAUTHENTICATED", 0), ("UNAUTHENTICATED", 0), ("OK", 5),
    ]  # fmt: skip


def test_a_log_that_cannot_be_written_stops_no_call_and_is_told(
    home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (home / "audit").write_text("a file where the folder should be")

    async def main() -> None:
        async with served() as server:
            assert (await (await server.caller("whole")).create()).id == "job-1"

    asyncio.run(main())
    assert "the audit log can't be written" in caplog.text
    assert "CreateJob" in caplog.text
