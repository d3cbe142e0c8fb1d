"""The server and its clients over a real socket: errors, token, health, reflection, streams, TLS, jobs."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import ipaddress
import os
import shutil
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
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from web4.lora.v1 import artifacts_pb2, jobs_pb2, jobs_pb2_grpc, packager_pb2, trainer_pb2, trainer_pb2_grpc
from web4lora_chassis import errors
from web4lora_chassis.artifacts import ArtifactRef
from web4lora_chassis.jobs import JobRunner
from web4lora_chassis.rpc import (
    JobService,
    Registration,
    async_channel,
    auth,
    channel,
    error_of,
    failure_of,
    ref_message,
    ref_of,
    serve,
)
from web4lora_chassis.settings import Settings, is_loopback

HERE = Path(__file__).parent
NAME = "web4.lora.v1.TrainerService"
JOBS = "web4.lora.v1.JobService"
ERRORS = [value for value in vars(errors).values() if isinstance(value, type)
          and issubclass(value, errors.Web4Error) and value is not errors.Web4Error]  # fmt: skip


class NoAnswer(errors.InvalidInput):
    """A service's own subclass: it must reach the client as what it is a kind of."""


class Servicer(trainer_pb2_grpc.TrainerServiceServicer, jobs_pb2_grpc.JobServiceServicer):
    """Raises what the tests ask for."""

    def __init__(self) -> None:
        self.raises: Exception | None = None

    async def GetTrainerInfo(self, request: Any, context: Any) -> trainer_pb2.GetTrainerInfoResponse:
        if self.raises:
            raise self.raises
        return trainer_pb2.GetTrainerInfoResponse(version="1")

    async def WatchJob(self, request: Any, context: Any) -> AsyncIterator[jobs_pb2.WatchJobResponse]:
        for number in range(3):
            yield jobs_pb2.WatchJobResponse(job=jobs_pb2.Job(id=request.id, revision=number))
        if self.raises:
            raise self.raises


@contextlib.asynccontextmanager
async def served(
    servicer: Servicer, settings: Settings | None = None, host: str = "127.0.0.1", name: str = "trainer"
) -> AsyncIterator[int]:
    """Serve a trainer on a free port until the block ends."""
    registrations = [
        Registration(NAME, trainer_pb2_grpc.add_TrainerServiceServicer_to_server, servicer),
        Registration(JOBS, jobs_pb2_grpc.add_JobServiceServicer_to_server, servicer),
    ]
    async with serving(registrations, settings or Settings(), host, name) as port:
        yield port


@contextlib.asynccontextmanager
async def serving(
    registrations: list[Registration], settings: Settings, host: str = "127.0.0.1", name: str = "trainer"
) -> AsyncIterator[int]:
    """Serve on a free port until the block ends."""
    port: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    stop = asyncio.Event()

    async def ready(number: int) -> None:
        port.set_result(number)

    task = asyncio.create_task(serve(f"{host}:0", registrations, settings, name=name, ready=ready, stop=stop))
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
                    jobs = jobs_pb2_grpc.JobServiceStub(connection)
                    watch = jobs.WatchJob(jobs_pb2.WatchJobRequest(id="x"))
                    assert [next(watch).job.revision for _ in range(3)] == [0, 1, 2]
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
        (KeyError("rank"), errors.Internal, "not foreseen (KeyError)"),
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
                jobs = jobs_pb2_grpc.JobServiceStub(connection)
                watch = jobs.WatchJob(jobs_pb2.WatchJobRequest(id="x"))
                with pytest.raises(grpc.RpcError) as caught:
                    await watch.read()
                assert type(error_of(caught.value)) is errors.Unauthenticated
            async with async_channel(f"127.0.0.1:{port}", right) as connection:
                jobs = jobs_pb2_grpc.JobServiceStub(connection)
                watch = jobs.WatchJob(jobs_pb2.WatchJobRequest(id="x"))
                assert [answer.job.revision async for answer in watch] == [0, 1, 2]

            def blocking() -> int:
                with channel(f"127.0.0.1:{port}", right) as connection:
                    stub = trainer_pb2_grpc.TrainerServiceStub(connection)
                    assert stub.GetTrainerInfo(trainer_pb2.GetTrainerInfoRequest()).version == "1"
                    jobs = jobs_pb2_grpc.JobServiceStub(connection)
                    return len(list(jobs.WatchJob(jobs_pb2.WatchJobRequest(id="x"))))

            assert await asyncio.to_thread(blocking) == 3

    asyncio.run(main())


@pytest.mark.parametrize("host", ["0.0.0.0", "[::]", "192.0.2.1", "example.invalid"])  # noqa: S104
def test_beyond_the_loopback_a_token_is_needed(host: str) -> None:
    with pytest.raises(errors.FailedPrecondition, match="no token") as caught:
        asyncio.run(serve(f"{host}:0", [], Settings(), name="gateway"))
    assert caught.value.reason == "TOKEN_REQUIRED"


@pytest.mark.parametrize("host", ["0.0.0.0", "[::]", "192.0.2.1", "example.invalid"])  # noqa: S104
def test_beyond_the_loopback_no_token_travels_in_the_clear(host: str) -> None:
    settings = Settings(token="right")  # type: ignore[arg-type]
    for refused in (
        lambda: asyncio.run(serve(f"{host}:0", [], settings, name="gateway")),
        lambda: channel(f"{host}:8461", settings),
        lambda: async_channel(f"{host}:8461", settings),
        lambda: channel(f"{host}:8461", Settings()),  # a registry login needs no token to be read
    ):
        with pytest.raises(errors.FailedPrecondition, match="could be read on the way") as caught:
            refused()
        assert caught.value.reason == "TLS_REQUIRED"
        assert "WEB4LORA_INSECURE=true" in caught.value.fix


@pytest.mark.parametrize(
    ("address", "here"),
    [
        ("127.0.0.1:1", True), ("127.9.9.9:1", True), ("[::1]:1", True), ("localhost:1", True), ("::1", True),
        ("127.0.0.1", True), ("0.0.0.0:1", False), ("[::]:1", False), ("localhost.example.org:1", False),
        ("10.0.0.1:1", False), ("packager:8463", False), ("", False), (":8461", False),
        ("dns:///localhost:1", False),
    ],
)  # fmt: skip
def test_what_the_loopback_is(address: str, here: bool) -> None:
    assert is_loopback(address) is here


def test_beyond_the_loopback_with_a_token_where_plain_text_is_allowed() -> None:
    async def main() -> str:
        settings = Settings(token="right", insecure=True)  # type: ignore[arg-type]
        async with served(Servicer(), settings, host="0.0.0.0") as port:  # noqa: S104
            return await info(port, settings)

    assert asyncio.run(main()) == "1"


def test_without_the_token_nothing_that_was_sent_is_read() -> None:
    read: list[int] = []

    def read_request(data: bytes) -> bytes:
        read.append(len(data))
        return data

    async def answer(request: bytes, context: Any) -> bytes:
        return b"ok"

    def add(_: object, server: grpc.aio.Server) -> None:
        handler = grpc.unary_unary_rpc_method_handler(answer, request_deserializer=read_request)
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(NAME, {"GetTrainerInfo": handler}),)
        )

    async def call(port: int, metadata: tuple[tuple[str, str], ...]) -> grpc.StatusCode:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as connection:
            try:
                await connection.unary_unary(f"/{NAME}/GetTrainerInfo")(
                    b"x" * (3 << 20), metadata=metadata, timeout=20
                )
            except grpc.aio.AioRpcError as error:
                return error.code()
        return grpc.StatusCode.OK

    async def main() -> None:
        settings = Settings(token="right")  # type: ignore[arg-type]
        async with serving([Registration(NAME, add, None)], settings) as port:
            refused = await asyncio.gather(*(call(port, ()) for _ in range(8)))
            assert set(refused) == {grpc.StatusCode.UNAUTHENTICATED}
            assert read == []
            assert await call(port, (("authorization", "Bearer right"),)) is grpc.StatusCode.OK
            assert read == [3 << 20]

    asyncio.run(main())


@pytest.mark.parametrize(
    "method",
    [
        "/x.Y/Nothing",
        "/grpc.health.v1.Health/Watch",
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
    ],
)
def test_without_the_token_no_other_method_tells_anything(method: str) -> None:
    async def main() -> None:
        async with (
            served(Servicer(), Settings(token="right")) as port,  # type: ignore[arg-type]
            grpc.aio.insecure_channel(f"127.0.0.1:{port}") as connection,
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                async for _ in connection.stream_stream(method)(iter([b""]), timeout=20):
                    pass
            assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED

    asyncio.run(main())


def test_a_call_without_a_token_and_without_a_message_is_refused() -> None:
    async def main() -> None:
        async with (
            served(Servicer(), Settings(token="right")) as port,  # type: ignore[arg-type]
            grpc.aio.insecure_channel(f"127.0.0.1:{port}") as connection,
        ):
            call = connection.stream_unary("/grpc.health.v1.Health/Check")(iter([]), timeout=20)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT

    asyncio.run(main())


async def until_refused(health: health_pb2_grpc.HealthStub) -> None:
    for _ in range(100):
        await health.Check(health_pb2.HealthCheckRequest(), timeout=20)
        await asyncio.sleep(0.02)  # the server has not seen the others yet


def test_calls_without_a_token_are_few_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A health check that never sends its message holds one of few places, and no other call's."""
    monkeypatch.setattr(auth, "_MAX_OPEN_CALLS", 3)

    async def main() -> None:
        right = Settings(token="right")  # type: ignore[arg-type]
        async with served(Servicer(), right) as port, contextlib.AsyncExitStack() as stack:
            held = [
                await stack.enter_async_context(grpc.aio.insecure_channel(f"127.0.0.1:{port}"))
                for _ in range(3)
            ]
            calls = [each.stream_unary("/grpc.health.v1.Health/Check")() for each in held]
            for call in calls:
                await call.wait_for_connection()
            async with async_channel(f"127.0.0.1:{port}", Settings()) as connection:
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await until_refused(health_pb2_grpc.HealthStub(connection))
                assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert await info(port, right) == "1"
            for call in calls:
                call.cancel()

    asyncio.run(main())


def test_a_message_too_large_to_be_meant_is_refused() -> None:
    async def main() -> None:
        async with served(Servicer()) as port, async_channel(f"127.0.0.1:{port}", Settings()) as connection:
            stub = jobs_pb2_grpc.JobServiceStub(connection)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.GetJob(jobs_pb2.GetJobRequest(id="x" * (9 << 20)), timeout=20)
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            get = stub.GetJob(jobs_pb2.GetJobRequest(id="x" * (5 << 20)), timeout=20)
            watch = stub.WatchJob(jobs_pb2.WatchJobRequest(id="x" * (5 << 20)), timeout=20).read()
            for call in (get, watch):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await call
                error = error_of(caught.value)
                assert isinstance(error, errors.InvalidInput)
                assert error.message == "id has 5242880 bytes; at most 4096 are taken."

    asyncio.run(main())


def test_what_nobody_foresaw_is_in_the_log_alone(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> errors.Web4Error:
        servicer = Servicer()
        servicer.raises = RuntimeError("SELECT secret FROM /home/me")
        async with served(servicer) as port:
            return await failed(port)

    got = asyncio.run(main())
    assert "SELECT" not in f"{got.message} {got.fix} {got.metadata}"
    assert got.metadata["reference"] in got.fix
    assert f"defect {got.metadata['reference']}" in caplog.text
    assert "SELECT secret" in caplog.text


def test_a_port_that_is_taken_is_named() -> None:
    async def main() -> None:
        async with served(Servicer()) as port:
            with pytest.raises(errors.FailedPrecondition, match=f"127.0.0.1:{port}") as caught:
                await serve(f"127.0.0.1:{port}", [], Settings(), name="gateway")
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
                yield reflection_pb2.ServerReflectionRequest(file_containing_symbol=JOBS)

            answers = [answer async for answer in reflection.ServerReflectionInfo(questions())]
            names = {service.name for service in answers[0].list_services_response.service}
            assert {NAME, JOBS, "grpc.health.v1.Health"} <= names
            assert b"CreateJob" in answers[1].file_descriptor_response.file_descriptor_proto[0]

    asyncio.run(main())


def test_a_client_of_reflection_shows_the_token() -> None:
    async def main() -> list[str]:
        right = Settings(token="right")  # type: ignore[arg-type]
        async with served(Servicer(), right) as port:

            def names() -> list[str]:
                with channel(f"127.0.0.1:{port}", right) as connection:
                    return list(ProtoReflectionDescriptorDatabase(connection).get_services())

            return await asyncio.to_thread(names)

    assert NAME in asyncio.run(main())


def test_sigterm_ends_the_server() -> None:
    async def main() -> None:
        async def ready(_: int) -> None:
            os.kill(os.getpid(), signal.SIGTERM)

        await serve("127.0.0.1:0", [], Settings(), name="gateway", ready=ready)

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
        asyncio.run(serve("127.0.0.1:0", [], Settings(**values, tls_client_required=True), name="gateway"))


def check_prepare(spec: trainer_pb2.PrepareSpec, _: Any) -> None:
    if not spec.HasField("dataset"):
        raise errors.InvalidInput("prepare.dataset is missing.", metadata={"field": "prepare.dataset"})


@contextlib.asynccontextmanager
async def working(root: Path) -> AsyncIterator[Any]:
    """Serve a trainer's jobs; yield the stub."""
    runner = JobRunner(root, "rpc_child", env={"PYTHONPATH": str(HERE)})
    await runner.start()
    service = JobService("trainer", runner, {"prepare": check_prepare, "train": lambda *_: None})
    registration = Registration(JOBS, jobs_pb2_grpc.add_JobServiceServicer_to_server, service)
    async with serving([registration], Settings()) as port, async_channel(
        f"127.0.0.1:{port}", Settings()
    ) as connection:  # fmt: skip
        yield jobs_pb2_grpc.JobServiceStub(connection)
    await runner.stop()


def creation(request_id: str, **spec: Any) -> jobs_pb2.CreateJobRequest:
    return jobs_pb2.CreateJobRequest(request_id=request_id, spec=jobs_pb2.JobSpec(**spec))


def test_jobs_over_rpc(tmp_path: Path) -> None:
    dataset = ArtifactRef("dataset", "web4", "a" * 64, 5_000_000_000)
    spec = trainer_pb2.PrepareSpec(dataset=ref_message(dataset))

    async def main() -> None:
        async with working(tmp_path) as stub:
            created = (await stub.CreateJob(creation("a", prepare=spec))).job
            assert (await stub.CreateJob(creation("a", prepare=spec))).job.id == created.id
            answers = stub.WatchJob(jobs_pb2.WatchJobRequest(id=created.id))
            job = [answer.job async for answer in answers][-1]
            assert job.state == jobs_pb2.JOB_STATE_SUCCEEDED
            assert job.progress.figures["rows_per_second"] == 2.5
            assert ref_of(job.spec.prepare.dataset) == ref_of(job.result.prepare.base) == dataset
            assert job.result.prepare.dataset.train_rows == 5_000_000_000
            assert job.end_time.ToMilliseconds() >= job.create_time.ToMilliseconds() > 0

            failing = (await stub.CreateJob(creation("b", train=trainer_pb2.TrainSpec(name="x")))).job
            answers = stub.WatchJob(jobs_pb2.WatchJobRequest(id=failing.id))
            job = [answer.job async for answer in answers][-1]
            assert job.state == jobs_pb2.JOB_STATE_FAILED
            assert not job.HasField("result")
            failure = failure_of(job.error)
            assert (failure.reason, failure.fix) == ("OUT_OF_MEMORY", "Use a smaller base.")
            assert failure.metadata == {"needed_bytes": str(21 << 30)}
            assert (await stub.GetJob(jobs_pb2.GetJobRequest(id=failing.id))).job == job
            assert (await stub.CancelJob(jobs_pb2.CancelJobRequest(id=failing.id))).job == job

            page = await stub.ListJobs(jobs_pb2.ListJobsRequest(page_size=1))
            assert [job.id for job in page.jobs] == [failing.id]
            rest = await stub.ListJobs(jobs_pb2.ListJobsRequest(page_size=1, page_token=page.next_page_token))
            assert [job.id for job in rest.jobs] == [created.id]
            assert rest.next_page_token == ""

    asyncio.run(main())


def test_jobs_that_the_version_before_wrote_are_read_and_go_on(tmp_path: Path) -> None:
    finished, running = sorted((HERE.parents[2] / "earlier_state").glob("train-*.json"))
    for path in (finished, running):
        (tmp_path / path.stem).mkdir()
        shutil.copy(path, tmp_path / path.stem / "job.json")

    async def main() -> None:
        async with working(tmp_path) as stub:
            job = (await stub.GetJob(jobs_pb2.GetJobRequest(id=finished.stem))).job
            assert job.state == jobs_pb2.JOB_STATE_SUCCEEDED
            assert job.spec.train.train.epochs == 1
            assert job.result.train.adapter.size_bytes == 473
            answers = stub.WatchJob(jobs_pb2.WatchJobRequest(id=running.stem))
            job = [answer.job async for answer in answers][-1]
            assert (job.attempt, job.error.reason) == (2, "OUT_OF_MEMORY"), "the child was started again"
            again = creation(job.request_id)
            again.spec.CopyFrom(job.spec)
            assert (await stub.CreateJob(again)).job.id == running.stem

    asyncio.run(main())


def test_jobs_that_can_not_be_are_refused(tmp_path: Path) -> None:
    spec = trainer_pb2.PrepareSpec(dataset=ref_message(ArtifactRef("dataset", "web4", "a" * 64)))
    package = packager_pb2.PackageSpec(name="x")

    async def main() -> None:
        async with working(tmp_path) as stub:
            for request, text, fix in [
                (jobs_pb2.CreateJobRequest(request_id="c"), "exactly one spec", ""),
                (creation("c", prepare=trainer_pb2.PrepareSpec()), "prepare.dataset", ""),
                (creation("", prepare=spec), "request_id", ""),
                (creation("c", package=package), "The trainer does no package jobs.", "Ask the packager."),
            ]:
                with pytest.raises(grpc.RpcError) as caught:
                    await stub.CreateJob(request)
                error = error_of(caught.value)
                assert type(error) is errors.InvalidInput
                assert text in error.message
                assert error.fix == fix
            for page_request in (
                jobs_pb2.ListJobsRequest(page_size=-1),
                jobs_pb2.ListJobsRequest(page_token="nobody"),
            ):
                with pytest.raises(grpc.RpcError) as caught:
                    await stub.ListJobs(page_request)
                assert type(error_of(caught.value)) is errors.InvalidInput
            for call in (
                stub.GetJob(jobs_pb2.GetJobRequest(id="x")), stub.CancelJob(jobs_pb2.CancelJobRequest(id="x"))
            ):  # fmt: skip
                with pytest.raises(grpc.RpcError) as caught:
                    await call
                assert type(error_of(caught.value)) is errors.NotFound

    asyncio.run(main())


def test_references_from_strangers_are_checked() -> None:
    with pytest.raises(errors.InvalidInput):
        ref_of(artifacts_pb2.ArtifactRef(name="x", digest="a" * 64))
    with pytest.raises(errors.InvalidInput):
        ref_of(artifacts_pb2.ArtifactRef(kind=99, name="x", digest="a" * 64))  # type: ignore[arg-type]


def test_a_certificate_that_is_renewed_is_shown_to_the_next_client(
    certificates: Certificates, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Written anew by halves, the last whole one is shown meanwhile."""
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    shutil.copy(certificates.server, certificate)
    shutil.copy(certificates.server_key, key)
    others = Settings(tls_authority_file=certificates.authority.with_name("other.pem"))

    async def main() -> None:
        server = Settings(tls_certificate_file=certificate, tls_key_file=key)
        async with served(Servicer(), server) as port:
            assert await info(port, tls(certificates)) == "1"
            assert type(await failed(port, others)) is errors.Unavailable
            shutil.copy(certificates.stranger, certificate)  # the key is still the other's
            assert await info(port, tls(certificates)) == "1"
            key.unlink()
            assert await info(port, tls(certificates)) == "1"
            assert "the last TLS certificate is kept" in caplog.text
            shutil.copy(certificates.stranger_key, key)
            assert await info(port, others) == "1"
            assert type(await failed(port, tls(certificates))) is errors.Unavailable

    asyncio.run(main())
