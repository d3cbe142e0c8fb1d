"""The server and its clients over a real socket: errors, token, health, reflection, streams, TLS, jobs."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import ipaddress
import os
import signal
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from web4.lora.v1 import artifacts_pb2, jobs_pb2, trainer_pb2, trainer_pb2_grpc
from web4lora_chassis import errors
from web4lora_chassis.artifacts import ArtifactRef
from web4lora_chassis.jobs import JobRunner
from web4lora_chassis.rpc import (
    JobApi,
    Registration,
    async_channel,
    channel,
    error_of,
    failure_of,
    ref_message,
    ref_of,
    serve,
)
from web4lora_chassis.settings import Settings

HERE = Path(__file__).parent
NAME = "web4.lora.v1.TrainerService"
ERRORS = [value for value in vars(errors).values() if isinstance(value, type)
          and issubclass(value, errors.Web4Error) and value is not errors.Web4Error]  # fmt: skip


class NoAnswer(errors.InvalidInput):
    """A service's own subclass: it must reach the client as what it is a kind of."""


class Servicer(trainer_pb2_grpc.TrainerServiceServicer):
    """Raises what the tests ask for; its jobs are real."""

    def __init__(self, runner: JobRunner | None = None) -> None:
        self.raises: Exception | None = None
        self.jobs = JobApi(runner, trainer_pb2.TrainerJob, self.check) if runner else None

    @staticmethod
    def check(kind: str, spec: Any) -> None:
        if kind == "prepare" and not spec.HasField("dataset"):
            raise errors.InvalidInput("prepare.dataset is missing.", metadata={"field": "prepare.dataset"})

    async def GetTrainerInfo(self, request: Any, context: Any) -> trainer_pb2.GetTrainerInfoResponse:
        if self.raises:
            raise self.raises
        return trainer_pb2.GetTrainerInfoResponse(version="1")

    async def CreateTrainerJob(self, request: Any, context: Any) -> trainer_pb2.CreateTrainerJobResponse:
        assert self.jobs
        return trainer_pb2.CreateTrainerJobResponse(job=await self.jobs.create(request))

    async def ListTrainerJobs(self, request: Any, context: Any) -> trainer_pb2.ListTrainerJobsResponse:
        assert self.jobs
        jobs, token = self.jobs.list(request)
        return trainer_pb2.ListTrainerJobsResponse(jobs=jobs, next_page_token=token)

    async def WatchTrainerJob(
        self, request: Any, context: Any
    ) -> AsyncIterator[trainer_pb2.WatchTrainerJobResponse]:
        if self.jobs:
            async for job in self.jobs.watch(request.id):
                yield trainer_pb2.WatchTrainerJobResponse(job=job)
            return
        for number in range(3):
            yield trainer_pb2.WatchTrainerJobResponse(
                job=trainer_pb2.TrainerJob(job=jobs_pb2.Job(id=request.id, revision=number))
            )
        if self.raises:
            raise self.raises


@contextlib.asynccontextmanager
async def served(
    servicer: Servicer, settings: Settings | None = None, host: str = "127.0.0.1"
) -> AsyncIterator[int]:
    """Serve on a free port until the block ends."""
    port: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    stop = asyncio.Event()

    async def ready(number: int) -> None:
        port.set_result(number)

    registration = Registration(NAME, trainer_pb2_grpc.add_TrainerServiceServicer_to_server, servicer)
    task = asyncio.create_task(
        serve(f"{host}:0", [registration], settings or Settings(), ready=ready, stop=stop)
    )
    await asyncio.wait([task, port], return_when=asyncio.FIRST_COMPLETED)
    if task.done():
        await task
    try:
        yield port.result()
    finally:
        stop.set()
        await task


async def info(port: int, settings: Settings | None = None, host: str = "127.0.0.1") -> str:
    async with async_channel(f"{host}:{port}", settings or Settings()) as connection:
        stub = trainer_pb2_grpc.TrainerServiceStub(connection)
        answer = await stub.GetTrainerInfo(trainer_pb2.GetTrainerInfoRequest(), timeout=20)
        return str(answer.version)


async def failed(port: int, settings: Settings | None = None, host: str = "127.0.0.1") -> errors.Web4Error:
    with pytest.raises(grpc.RpcError) as caught:
        await info(port, settings, host)
    return error_of(caught.value, "the trainer")


@pytest.mark.parametrize("kind", ERRORS, ids=lambda kind: kind.__name__)
def test_every_error_arrives_as_the_same_class(kind: type[errors.Web4Error]) -> None:
    sent = kind("data.jsonl:3: “é”\nsecond line % 100%", fix="Do this, é.", metadata={"line": 3, "é": "ü"})

    async def main() -> list[errors.Web4Error]:
        servicer = Servicer()
        servicer.raises = sent
        async with served(servicer) as port:
            unary = await failed(port)

            def blocking() -> list[errors.Web4Error]:
                seen = []
                with channel(f"127.0.0.1:{port}", Settings()) as connection:
                    stub = trainer_pb2_grpc.TrainerServiceStub(connection)
                    with pytest.raises(grpc.RpcError) as caught:
                        stub.GetTrainerInfo(trainer_pb2.GetTrainerInfoRequest())
                    seen.append(error_of(caught.value))
                    watch = stub.WatchTrainerJob(trainer_pb2.WatchTrainerJobRequest(id="x"))
                    assert [next(watch).job.job.revision for _ in range(3)] == [0, 1, 2]
                    with pytest.raises(grpc.RpcError) as caught:
                        next(watch)
                    seen.append(error_of(caught.value))
                return seen

            return [unary, *await asyncio.to_thread(blocking)]

    for got in asyncio.run(main()):
        assert type(got) is kind
        assert got.message == sent.message
        assert got.fix == sent.fix
        assert got.reason == sent.reason
        assert got.metadata == sent.metadata


@pytest.mark.parametrize(
    ("raised", "kind", "text"),
    [
        (NoAnswer("no answer"), errors.InvalidInput, "no answer"),
        (errors.Web4Error("bare"), errors.Internal, "bare"),
        (KeyError("rank"), errors.Internal, "KeyError: 'rank'"),
        (errors.InvalidInput("x" * 100_000), errors.InvalidInput, "shortened"),
        (errors.InvalidInput(" blank around \n"), errors.InvalidInput, "blank around"),
        (errors.InvalidInput(""), errors.InvalidInput, ""),
    ],
)
def test_odd_errors_arrive_too(raised: Exception, kind: type[errors.Web4Error], text: str) -> None:
    async def main() -> errors.Web4Error:
        servicer = Servicer()
        servicer.raises = raised
        async with served(servicer) as port:
            return await failed(port)

    got = asyncio.run(main())
    assert type(got) is kind
    assert text in got.message


def test_an_absent_service_is_unavailable_and_says_who() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        got = asyncio.run(failed(free.getsockname()[1]))
    assert type(got) is errors.Unavailable
    assert "the trainer is out of reach" in got.message
    assert "web4lora status" in got.fix


def test_token_is_asked_for_and_health_is_open() -> None:
    async def main() -> None:
        right = Settings(token="right")  # type: ignore[arg-type]
        async with served(Servicer(), right) as port:
            assert await info(port, right) == "1"
            for wrong in (Settings(), Settings(token="wrong")):  # type: ignore[arg-type]
                assert type(await failed(port, wrong)) is errors.Unauthenticated
            async with async_channel(f"127.0.0.1:{port}", Settings()) as connection:
                health = health_pb2_grpc.HealthStub(connection)
                answer = await health.Check(health_pb2.HealthCheckRequest(service=NAME))
                assert answer.status == health_pb2.HealthCheckResponse.SERVING
                stub = trainer_pb2_grpc.TrainerServiceStub(connection)
                watch = stub.WatchTrainerJob(trainer_pb2.WatchTrainerJobRequest(id="x"))
                with pytest.raises(grpc.RpcError) as caught:
                    await watch.read()
                assert type(error_of(caught.value)) is errors.Unauthenticated
            async with async_channel(f"127.0.0.1:{port}", right) as connection:
                stub = trainer_pb2_grpc.TrainerServiceStub(connection)
                watch = stub.WatchTrainerJob(trainer_pb2.WatchTrainerJobRequest(id="x"))
                assert [answer.job.job.revision async for answer in watch] == [0, 1, 2]

            def blocking() -> int:
                with channel(f"127.0.0.1:{port}", right) as connection:
                    stub = trainer_pb2_grpc.TrainerServiceStub(connection)
                    assert stub.GetTrainerInfo(trainer_pb2.GetTrainerInfoRequest()).version == "1"
                    return len(list(stub.WatchTrainerJob(trainer_pb2.WatchTrainerJobRequest(id="x"))))

            assert await asyncio.to_thread(blocking) == 3

    asyncio.run(main())


@pytest.mark.parametrize("host", ["0.0.0.0", "[::]", "192.0.2.1", "example.invalid"])  # noqa: S104
def test_beyond_the_loopback_a_token_is_needed(host: str) -> None:
    with pytest.raises(errors.FailedPrecondition, match="no token") as caught:
        asyncio.run(serve(f"{host}:0", [], Settings()))
    assert caught.value.reason == "TOKEN_REQUIRED"


def test_beyond_the_loopback_with_a_token() -> None:
    async def main() -> str:
        settings = Settings(token="right")  # type: ignore[arg-type]
        async with served(Servicer(), settings, host="0.0.0.0") as port:  # noqa: S104
            return await info(port, settings)

    assert asyncio.run(main()) == "1"


def test_a_port_that_is_taken_is_named() -> None:
    async def main() -> None:
        async with served(Servicer()) as port:
            with pytest.raises(errors.FailedPrecondition, match=f"127.0.0.1:{port}") as caught:
                await serve(f"127.0.0.1:{port}", [], Settings())
            assert caught.value.reason == "ADDRESS_IN_USE"

    asyncio.run(main())


def test_health_watch_and_reflection() -> None:
    async def main() -> None:
        async with served(Servicer()) as port, async_channel(f"127.0.0.1:{port}", Settings()) as connection:
            health = health_pb2_grpc.HealthStub(connection)
            watch = health.Watch(health_pb2.HealthCheckRequest(service=NAME))
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
            watch.cancel()
            reflection = reflection_pb2_grpc.ServerReflectionStub(connection)

            async def questions() -> AsyncIterator[reflection_pb2.ServerReflectionRequest]:
                yield reflection_pb2.ServerReflectionRequest(list_services="")
                yield reflection_pb2.ServerReflectionRequest(file_containing_symbol=NAME)

            answers = [answer async for answer in reflection.ServerReflectionInfo(questions())]
            names = {service.name for service in answers[0].list_services_response.service}
            assert {NAME, "grpc.health.v1.Health"} <= names
            assert b"CreateTrainerJob" in answers[1].file_descriptor_response.file_descriptor_proto[0]

    asyncio.run(main())


def test_sigterm_ends_the_server() -> None:
    async def main() -> None:
        async def ready(_: int) -> None:
            os.kill(os.getpid(), signal.SIGTERM)

        await serve("127.0.0.1:0", [], Settings(), ready=ready)

    asyncio.run(main())


@dataclass(frozen=True)
class Certificates:
    """A test CA and what it signed."""

    authority: Path
    server: Path
    server_key: Path
    client: Path
    client_key: Path
    stranger: Path
    stranger_key: Path


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    folder = tmp_path_factory.mktemp("certificates")
    now = datetime.datetime.now(datetime.UTC)

    def make(name: str, issuer: tuple[x509.Name, Any] | None) -> tuple[Path, Path, tuple[x509.Name, Any]]:
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        issuer_name, issuer_key = issuer or (subject, key)
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(issuer_name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
            .add_extension(
                x509.SubjectAlternativeName(
                    [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
                ),
                critical=False,
            )
        )
        certificate = builder.sign(issuer_key, hashes.SHA256())
        paths = folder / f"{name}.pem", folder / f"{name}.key"
        paths[0].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        paths[1].write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
        return *paths, (subject, key)

    authority, _, signer = make("authority", None)
    server, server_key, _ = make("server", signer)
    client, client_key, _ = make("client", signer)
    _, _, other_signer = make("other", None)
    stranger, stranger_key, _ = make("stranger", other_signer)
    return Certificates(authority, server, server_key, client, client_key, stranger, stranger_key)


def tls(certificates: Certificates, **more: Any) -> Settings:
    return Settings(tls_authority_file=certificates.authority, **more)


def test_tls(certificates: Certificates) -> None:
    async def main() -> None:
        server = tls(certificates, tls_certificate_file=certificates.server,
                     tls_key_file=certificates.server_key)  # fmt: skip
        async with served(Servicer(), server) as port:
            assert await info(port, tls(certificates)) == "1"
            assert await info(port, tls(certificates), host="localhost") == "1"
            assert type(await failed(port)) is errors.Unavailable  # plain text
            wrong = Settings(tls_authority_file=certificates.stranger)
            assert type(await failed(port, wrong)) is errors.Unavailable

    asyncio.run(main())


def test_mutual_tls(certificates: Certificates) -> None:
    async def main() -> None:
        server = tls(certificates, tls_certificate_file=certificates.server,
                     tls_key_file=certificates.server_key, tls_client_required=True)  # fmt: skip
        async with served(Servicer(), server) as port:
            known = tls(certificates, tls_certificate_file=certificates.client,
                        tls_key_file=certificates.client_key)  # fmt: skip
            stranger = tls(certificates, tls_certificate_file=certificates.stranger,
                           tls_key_file=certificates.stranger_key)  # fmt: skip
            assert await info(port, known) == "1"
            assert type(await failed(port, tls(certificates))) is errors.Unavailable
            assert type(await failed(port, stranger)) is errors.Unavailable

    asyncio.run(main())


@pytest.mark.parametrize("missing", ["tls_certificate_file", "tls_key_file", "tls_authority_file", "both"])
def test_tls_by_halves_never_falls_back_to_plain_text(certificates: Certificates, missing: str) -> None:
    values: dict[str, Any] = {
        "tls_certificate_file": certificates.server,
        "tls_key_file": certificates.server_key,
        "tls_authority_file": certificates.authority,
    }
    for name in ("tls_certificate_file", "tls_key_file") if missing == "both" else (missing,):
        values.pop(name)
    with pytest.raises(errors.FailedPrecondition, match="halves"):
        asyncio.run(serve("127.0.0.1:0", [], Settings(**values, tls_client_required=True)))


def test_jobs_over_rpc(tmp_path: Path) -> None:
    dataset = ArtifactRef("dataset", "web4", "a" * 64, 5_000_000_000)

    async def main() -> None:
        runner = JobRunner(tmp_path, "rpc_child", env={"PYTHONPATH": str(HERE)})
        await runner.start()
        async with served(Servicer(runner)) as port, async_channel(
            f"127.0.0.1:{port}", Settings()
        ) as connection:  # fmt: skip
            stub = trainer_pb2_grpc.TrainerServiceStub(connection)
            spec = trainer_pb2.PrepareSpec(dataset=ref_message(dataset))
            created = await stub.CreateTrainerJob(
                trainer_pb2.CreateTrainerJobRequest(request_id="a", prepare=spec)
            )
            again = await stub.CreateTrainerJob(
                trainer_pb2.CreateTrainerJobRequest(request_id="a", prepare=spec)
            )
            assert again.job.job.id == created.job.job.id
            answers = stub.WatchTrainerJob(trainer_pb2.WatchTrainerJobRequest(id=created.job.job.id))
            job = [answer.job async for answer in answers][-1]
            assert job.job.state == jobs_pb2.JOB_STATE_SUCCEEDED
            assert job.job.progress.figures["rows_per_second"] == 2.5
            assert ref_of(job.prepare.dataset) == ref_of(job.prepare_result.base) == dataset
            assert job.prepare_result.dataset.train_rows == 5_000_000_000
            assert job.job.end_time.ToMilliseconds() >= job.job.create_time.ToMilliseconds() > 0

            failing = await stub.CreateTrainerJob(
                trainer_pb2.CreateTrainerJobRequest(request_id="b", train=trainer_pb2.TrainSpec(name="x"))
            )
            answers = stub.WatchTrainerJob(trainer_pb2.WatchTrainerJobRequest(id=failing.job.job.id))
            job = [answer.job async for answer in answers][-1]
            assert job.job.state == jobs_pb2.JOB_STATE_FAILED
            failure = failure_of(job.job.error)
            assert (failure.reason, failure.fix) == ("OUT_OF_MEMORY", "Use a smaller base.")
            assert failure.metadata == {"needed_bytes": str(21 << 30)}

            page = await stub.ListTrainerJobs(trainer_pb2.ListTrainerJobsRequest(page_size=1))
            assert [job.job.id for job in page.jobs] == [failing.job.job.id]
            rest = await stub.ListTrainerJobs(
                trainer_pb2.ListTrainerJobsRequest(page_size=1, page_token=page.next_page_token)
            )
            assert [job.job.id for job in rest.jobs] == [created.job.job.id]
            assert rest.next_page_token == ""

            for request, text in [
                (trainer_pb2.CreateTrainerJobRequest(request_id="c"), "exactly one spec"),
                (
                    trainer_pb2.CreateTrainerJobRequest(request_id="c", prepare=trainer_pb2.PrepareSpec()),
                    "prepare.dataset",
                ),
                (trainer_pb2.CreateTrainerJobRequest(prepare=spec), "request_id"),
            ]:
                with pytest.raises(grpc.RpcError) as caught:
                    await stub.CreateTrainerJob(request)
                error = error_of(caught.value)
                assert type(error) is errors.InvalidInput
                assert text in error.message
            for page_request in (
                trainer_pb2.ListTrainerJobsRequest(page_size=-1),
                trainer_pb2.ListTrainerJobsRequest(page_token="nobody"),
            ):
                with pytest.raises(grpc.RpcError) as caught:
                    await stub.ListTrainerJobs(page_request)
                assert type(error_of(caught.value)) is errors.InvalidInput
        await runner.stop()

    asyncio.run(main())


def test_references_from_strangers_are_checked() -> None:
    with pytest.raises(errors.InvalidInput):
        ref_of(artifacts_pb2.ArtifactRef(name="x", digest="a" * 64))
    with pytest.raises(errors.InvalidInput):
        ref_of(artifacts_pb2.ArtifactRef(kind=99, name="x", digest="a" * 64))  # type: ignore[arg-type]
