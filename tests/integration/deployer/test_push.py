"""Pushing to the real OCI registry: nothing twice, logins, broken connections; Model Runner pulls it back."""

from __future__ import annotations

import base64
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import parse_qs, urlsplit

import httpx2
import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from web4.lora.v1 import deployer_pb2, jobs_pb2
from web4lora_chassis.artifacts import hash_file
from web4lora_chassis.errors import DataLoss, Unauthenticated, Unavailable
from web4lora_chassis.jobs import Progress
from web4lora_deployer.records.deployments import Deployments
from web4lora_deployer.registry import Credentials, Registry, parse_reference
from web4lora_deployer.registry.oci import GGUF_TYPE, Blob
from web4lora_deployer.registry.push import PushRequest, push
from web4lora_deployer.settings import DeployerSettings

from tests.integration.deployer.deployer_stack import Stack, deployed
from tests.servers.fixtures import MakeProxy, Proxy
from tests.servers.registries import (
    PASSWORD,
    USER,
    RegistryServer,
    private_registry,
    registry,
    registry_server,
)
from tests.servers.runtimes import model_runner
from tests.servers.stores import noise
from tests.unit.deployer.sample_records import record

__all__ = ["model_runner", "private_registry", "registry"]
pytestmark = pytest.mark.timeout(300)

SIZE_BYTES = 40 << 20
LOGIN = Credentials(USER, PASSWORD)


def ignore(_: object) -> None:
    """Take progress that nobody watches."""


@pytest.fixture
def blob(tmp_path: Path, request: pytest.FixtureRequest) -> Blob:
    """A blob of three chunks that no registry has."""
    file = noise(tmp_path / "blob", SIZE_BYTES, seed=hash(request.node.name) % 1000)
    return Blob(GGUF_TYPE, hash_file(file), SIZE_BYTES, file)


@pytest.fixture
def proxy(registry: RegistryServer, toxiproxy: MakeProxy) -> Proxy:
    """A proxy in front of the registry."""
    return toxiproxy(registry.host.replace("localhost", "127.0.0.1"))


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give up early on a registry that stays away."""
    monkeypatch.setattr("web4lora_deployer.registry.patience._PAUSES_SECONDS", (0.05, 0.05))


def open_registry(host: str, folder: Path, credentials: Credentials | None = None) -> Registry:
    place = parse_reference(f"{host}/web4/demo")
    return Registry(place, credentials or Credentials(), folder / "unfinished")


def test_what_is_there_is_not_sent_again(blob: Blob, proxy: Proxy, tmp_path: Path) -> None:
    told: list[int] = []
    with open_registry(proxy.address, tmp_path) as client:
        client.put_blob(blob, told.append)
        assert client.sent_bytes == sum(told) == SIZE_BYTES
    sent = proxy.received_bytes()
    told.clear()
    with open_registry(proxy.address, tmp_path) as client:
        client.put_blob(blob, told.append)
        assert client.sent_bytes == 0
        assert sum(told) == SIZE_BYTES
    assert proxy.received_bytes() - sent < 10_000
    assert not list((tmp_path / "unfinished").iterdir())


def test_a_connection_that_breaks_again_and_again_still_finishes(
    blob: Blob, proxy: Proxy, tmp_path: Path
) -> None:
    proxy.cut_after(20 << 20, "upstream")
    with open_registry(proxy.address, tmp_path) as client:
        client.put_blob(blob, ignore)
        assert client.has_blob(blob)
        assert client.sent_bytes < SIZE_BYTES + (8 << 20)  # what was under way when it broke, and no more


def test_a_push_that_was_cut_off_goes_on_where_it_ended(
    blob: Blob, proxy: Proxy, tmp_path: Path, impatient: None
) -> None:
    told: list[int] = []

    def advance(count: int) -> None:
        told.append(count)
        if sum(told) > 25 << 20:
            proxy.cut()

    with (
        open_registry(proxy.address, tmp_path) as client,
        pytest.raises(Unavailable, match="what has arrived is not sent again"),
    ):
        client.put_blob(blob, advance)
    proxy.heal()
    with open_registry(proxy.address, tmp_path) as client:
        client.put_blob(blob, ignore)
        assert client.has_blob(blob)
        assert client.sent_bytes < SIZE_BYTES - (15 << 20)


def test_an_upload_that_the_registry_forgot_starts_anew(
    blob: Blob, proxy: Proxy, registry: RegistryServer, tmp_path: Path, impatient: None
) -> None:
    def cut(_: int) -> None:
        proxy.cut()

    with open_registry(proxy.address, tmp_path) as client, pytest.raises(Unavailable):
        client.put_blob(blob, cut)
    proxy.heal()
    shutil.rmtree(registry.root / "docker/registry/v2/repositories/web4/demo/_uploads")
    with open_registry(proxy.address, tmp_path) as client:
        client.put_blob(blob, ignore)
        assert client.has_blob(blob)


def test_other_bytes_than_the_digest_says_are_refused(
    blob: Blob, registry: RegistryServer, tmp_path: Path
) -> None:
    with open_registry(registry.host, tmp_path) as client, pytest.raises(DataLoss, match="other bytes"):
        client.put_blob(replace(blob, sha256="1" * 64), ignore)
    with open_registry(registry.host, tmp_path) as client:
        assert not client.has_blob(replace(blob, sha256="1" * 64))


def test_a_registry_that_takes_no_chunks_gets_the_blob_in_one_piece(
    blob: Blob, registry: RegistryServer, tmp_path: Path
) -> None:
    """As a gateway in front of the real registry does that refuses PATCH."""

    def no_patch(method: str, _: httpx2.Headers) -> httpx2.Response | None:
        return httpx2.Response(httpx2.codes.METHOD_NOT_ALLOWED) if method == "PATCH" else None

    with serving(gateway(registry.host, no_patch)) as host, open_registry(host, tmp_path) as client:
        client.put_blob(blob, ignore)
        assert client.has_blob(blob)


def test_a_registry_that_says_when_to_come_back_is_asked_again_then(
    blob: Blob, registry: RegistryServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []
    monkeypatch.setattr("web4lora_deployer.registry.patience.time.sleep", slept.append)
    left = dict.fromkeys(("HEAD", "POST", "PATCH", "PUT"), 7)

    def busy(method: str, _: httpx2.Headers) -> httpx2.Response | None:
        left[method] = left.get(method, 0) - 1
        return httpx2.Response(429, headers={"Retry-After": "30"}) if left[method] >= 0 else None

    with serving(gateway(registry.host, busy)) as host, open_registry(host, tmp_path) as client:
        client.put_blob(blob, ignore)
        assert client.has_blob(blob)
    assert slept == [30.0] * 28


def test_a_private_registry_wants_the_right_login(
    blob: Blob, private_registry: RegistryServer, tmp_path: Path
) -> None:
    host = private_registry.host
    for wrong in (Credentials(), Credentials(USER, "guess")):
        with (
            open_registry(host, tmp_path, wrong) as client,
            pytest.raises(Unauthenticated, match="does not let us push") as caught,
        ):
            client.put_blob(blob, ignore)
        assert f"docker login {host}" in caught.value.fix
        assert "guess" not in str(caught.value)
    with open_registry(host, tmp_path, LOGIN) as client:
        client.put_blob(blob, ignore)
        assert client.has_blob(blob)


def test_a_login_server_s_token_opens_the_registry_and_is_fetched_anew_when_it_ends(
    blob: Blob, tmp_path: Path
) -> None:
    tokens = TokenServer()
    with serving(tokens.handler) as realm:
        folder = tmp_path / "registry"
        folder.mkdir()
        (folder / "jwks.json").write_text(json.dumps({"keys": [tokens.key]}))
        token = {
            "realm": f"http://{realm}/token", "service": "demo", "issuer": "test",
            "jwks": str(folder / "jwks.json"), "signingalgorithms": ["ES256"],
        }  # fmt: skip
        with registry_server(folder, {"token": token}) as server:
            with open_registry(server.host, tmp_path, LOGIN) as client:
                tokens.seconds = -3600  # over already when it arrives
                with pytest.raises(Unauthenticated):
                    client.put_blob(blob, ignore)
                tokens.seconds = 60
                client.put_blob(blob, ignore)
                assert client.has_blob(blob)
            with open_registry(server.host, tmp_path, Credentials(identity_token="refresh")) as client:
                assert client.has_blob(blob)
            with open_registry(server.host, tmp_path) as client, pytest.raises(Unauthenticated):
                client.has_blob(blob)
    assert set(tokens.scopes) == {"repository:web4/demo:pull,push"}


@pytest.mark.parametrize("refuses", ["writing with a token to read", "all without a challenge"])
def test_a_registry_that_answers_403_in_place_of_a_challenge_still_takes_the_blob(
    blob: Blob, tmp_path: Path, refuses: str
) -> None:
    tokens = TokenServer()

    def forbids(method: str, headers: httpx2.Headers, answer: httpx2.Response) -> bool:
        if answer.status_code != httpx2.codes.UNAUTHORIZED or method == "GET":  # at its door it says how
            return False
        return refuses.startswith("all") or "Authorization" in headers

    with serving(tokens.handler) as realm:
        folder = tmp_path / "registry"
        folder.mkdir()
        (folder / "jwks.json").write_text(json.dumps({"keys": [tokens.key]}))
        token = {
            "realm": f"http://{realm}/token", "service": "demo", "issuer": "test",
            "jwks": str(folder / "jwks.json"), "signingalgorithms": ["ES256"],
        }  # fmt: skip
        with (
            registry_server(folder, {"token": token}) as server,
            serving(gateway(server.host, forbids=forbids)) as host,
        ):
            with open_registry(host, tmp_path, LOGIN) as client:
                client.put_blob(blob, ignore)
                assert client.has_blob(blob)
            with open_registry(host, tmp_path) as client, pytest.raises(Unauthenticated):
                client.has_blob(blob)


def test_model_runner_pulls_what_was_pushed_with_the_same_digest(
    settings: DeployerSettings, registry: RegistryServer, model_runner: str, gguf: Path
) -> None:
    save_record(settings, gguf)
    request = PushRequest("demo", f"{registry.host}/web4/demo:v1")
    phases: list[Progress] = []
    first = push(request, settings, phases.append)
    assert first.sent_bytes == first.size_bytes == phases[-1].done == phases[-1].total
    assert registry.digest("web4/demo", "v1") == first.digest
    second = push(request, settings, ignore)
    assert (second.digest, second.sent_bytes) == (first.digest, 0)

    answer = httpx2.post(f"{model_runner}/models/create", json={"from": first.reference}, timeout=120)
    assert "success" in answer.text
    pulled = httpx2.get(f"{model_runner}/models/{first.reference}").json()
    assert pulled["id"] == first.digest
    assert pulled["config"]["context_size"] == 512
    httpx2.delete(f"{model_runner}/models/{pulled['id']}", params={"force": "true"}).raise_for_status()


def test_without_a_tag_the_deployment_s_own_is_taken(
    settings: DeployerSettings, registry: RegistryServer, tmp_path: Path, gguf: Path
) -> None:
    sha256 = save_record(settings, gguf)
    outcome = push(PushRequest("demo", f"{registry.host}/web4/untagged"), settings, ignore)
    assert outcome.reference == f"{registry.host}/web4/untagged:v{sha256[:8]}"


def test_a_push_job_uses_the_login_that_is_handed_over_and_writes_it_nowhere(
    stack: Stack, private_registry: RegistryServer, gguf: Path
) -> None:
    deployed(stack.deploy(stack.put(gguf)))
    spec = deployer_pb2.PushSpec(
        deployment="demo", reference=f"{private_registry.host}/web4/demo:v1", secret="registry"
    )
    secret = json.dumps({"username": USER, "password": PASSWORD})
    request = jobs_pb2.CreateJobRequest(
        request_id="push", spec=jobs_pb2.JobSpec(push=spec), secrets={"registry": secret}
    )
    job = stack.finish(stack.jobs.CreateJob(request).job.id)
    assert job.state == jobs_pb2.JOB_STATE_SUCCEEDED, job.error
    assert private_registry.digest("web4/demo", "v1") == job.result.push.digest
    home = stack.settings.deployer_home
    for file in (path for path in home.rglob("*") if path.is_file() and path.suffix != ".gguf"):
        assert PASSWORD.encode() not in file.read_bytes(), file


def save_record(settings: DeployerSettings, gguf: Path) -> str:
    """Make a deployment of a file, as far as pushing it goes; return the file's digest."""
    sha256 = hash_file(gguf)
    deployment = record(
        "a", id=f"demo:v{sha256[:8]}", sha256=sha256, size_bytes=gguf.stat().st_size,
        file="x/model.gguf", context_tokens=512,
    )  # fmt: skip
    deployments = Deployments(settings.deployer_home)
    deployments.save(deployment)
    place = deployments.path(deployment)
    place.parent.mkdir(parents=True)
    place.symlink_to(gguf)
    return sha256


def gateway(
    host: str,
    instead: Callable[[str, httpx2.Headers], httpx2.Response | None] = lambda *_: None,
    forbids: Callable[[str, httpx2.Headers, httpx2.Response], bool] = lambda *_: False,
) -> type[BaseHTTPRequestHandler]:
    """Return what stands in front of a real registry.

    Args:
        host: The registry.
        instead: Returns what to answer to a method in the registry's place; None passes it on.
        forbids: Says whether the registry's answer becomes a 403 without a word.
    """

    class Gateway(BaseHTTPRequestHandler):
        def _pass_on(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            asked = httpx2.Headers(self.headers.items())
            answer = instead(self.command, asked)
            if answer is None:
                headers = {
                    name: asked[name]
                    for name in ("Host", "Authorization", "Content-Range", "Content-Type")
                    if name in asked
                }
                answer = httpx2.request(
                    self.command, f"http://{host}{self.path}", content=body, headers=headers
                )
                if forbids(self.command, asked, answer):
                    answer = httpx2.Response(httpx2.codes.FORBIDDEN)
            self.send_response(answer.status_code)
            for name, value in answer.headers.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(answer.content)

        do_GET = do_HEAD = do_POST = do_PATCH = do_PUT = _pass_on

        def log_message(self, *_: object) -> None:
            pass

    return Gateway


class serving:
    """Serve a handler on a free port for the time of a block; gives host and port."""

    def __init__(self, handler: Callable[..., BaseHTTPRequestHandler]) -> None:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)

    def __enter__(self) -> str:
        Thread(target=self._server.serve_forever, daemon=True).start()
        return f"127.0.0.1:{self._server.server_port}"

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


class TokenServer:
    """A login server: gives tokens that the real registry checks by its key.

    Attributes:
        key: Its public key, as a JSON Web Key.
        seconds: How long a token is good for.
        scopes: What was asked for.
    """

    def __init__(self) -> None:
        self._private = ec.generate_private_key(ec.SECP256R1())
        numbers = self._private.public_key().public_numbers()
        point = {
            name: _b64(value.to_bytes(32, "big")) for name, value in (("x", numbers.x), ("y", numbers.y))
        }
        self.key = {"kty": "EC", "crv": "P-256", "kid": "test", "use": "sig", "alg": "ES256", **point}
        self.seconds = 60
        self.scopes: list[str] = []

    def token(self, scope: str) -> str:
        """Return a token for a scope."""
        kind, name, actions = scope.split(":")
        now = int(time.time())
        claims = {
            "iss": "test", "aud": "demo", "sub": USER, "exp": now + self.seconds, "nbf": now - 7200,
            "iat": now - 7200, "jti": "1",
            "access": [{"type": kind, "name": name, "actions": actions.split(",")}],
        }  # fmt: skip
        head = {"typ": "JWT", "alg": "ES256", "kid": "test"}
        text = ".".join(_b64(json.dumps(part).encode()) for part in (head, claims))
        numbers = decode_dss_signature(self._private.sign(text.encode(), ec.ECDSA(hashes.SHA256())))
        return f"{text}.{_b64(b''.join(number.to_bytes(32, 'big') for number in numbers))}"

    @property
    def handler(self) -> type[BaseHTTPRequestHandler]:
        """What answers its calls."""
        tokens = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                basic = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
                self._give(self.headers.get("Authorization") == f"Basic {basic}", urlsplit(self.path).query)

            def do_POST(self) -> None:
                form = self.rfile.read(int(self.headers["Content-Length"])).decode()
                self._give(parse_qs(form).get("refresh_token") == ["refresh"], form)

            def _give(self, known: bool, query: str) -> None:
                wanted = parse_qs(query)
                assert wanted["service"] == ["demo"]
                tokens.scopes += wanted["scope"]
                self.send_response(httpx2.codes.OK if known else httpx2.codes.UNAUTHORIZED)
                self.end_headers()
                if known:
                    self.wfile.write(json.dumps({"token": tokens.token(wanted["scope"][0])}).encode())

            def log_message(self, *_: object) -> None:
                pass

        return Handler


def _b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()
