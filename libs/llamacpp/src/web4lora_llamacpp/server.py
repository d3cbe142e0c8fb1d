"""llama-server for one GGUF file: start, wait until it answers, stop."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

from web4lora_chassis import process
from web4lora_chassis.errors import (
    FailedPrecondition,
    Internal,
    NotFound,
    OutOfMemory,
    Unavailable,
    Web4Error,
)

from web4lora_llamacpp import guard
from web4lora_llamacpp.converter import environment
from web4lora_llamacpp.tools import LlamaCpp

_LISTENING = re.compile(rb"listening on (http://\S+)")
_STAMP = re.compile(r"^[\d.]+ [A-Z] ")
_MEMORY = ("failed to allocate", "unable to allocate", "bad_alloc", "out of memory", "cannot allocate memory")
_MODEL = (
    "failed to apply lora adapter",
    "failed to load model",
    "error loading model",
    "invalid magic",
    "model loading error",
)
_POLL_SECONDS = 0.05
_SET_SECONDS = 5.0
_STOP_GRACE_SECONDS = 5.0


class LlamaServer:
    """A llama-server process. It ends with ours, however ours ends.

    Args:
        llama: The tools.
        gguf: The model file. Its own chat template is used.
        host: Address to listen on.
        port: Port to listen on; 0 takes a free one.
        context_tokens: Context of each request at work, in tokens; at most the model's own counts.
        parallel: Requests at work at once; each has its whole context, so memory grows with it.
        log_file: Where its output goes; appended to.
        alias: Name of the model in the API.
        adapters: LoRA adapters to load beside the model, each with the scale it is applied with at first; see
            `set_adapters`.
        options: Further options, which win over ours.
        env: Variables for it that are not set otherwise.
    """

    def __init__(
        self,
        llama: LlamaCpp,
        gguf: Path,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        context_tokens: int,
        parallel: int,
        log_file: Path,
        alias: str = "",
        adapters: Sequence[tuple[Path, float]] = (),
        options: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
    ) -> None:
        self._llama = llama
        self._gguf = gguf
        self._host = host
        self._port = port
        self._context_tokens = context_tokens
        self._parallel = parallel
        self._log_file = log_file
        self._alias = alias
        self._adapters = tuple(adapters)
        self._options = tuple(options)
        self._env = dict(env or {})
        self._log_start = 0
        self._base = ""
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        """Start it; `wait_ready` waits until it answers."""
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop it."""
        self.stop()

    def start(self) -> None:
        """Start the process and return at once.

        Raises:
            NotFound: There is no such GGUF file.
            FailedPrecondition: The program can't be run, or can't take an adapter's path.
        """
        adapters = [file for file, _ in self._adapters]
        for file in (self._gguf, *adapters):
            if not file.is_file():
                raise NotFound(f"There is no GGUF file {file}.")
        for file in adapters:
            if ":" in str(file):
                raise FailedPrecondition(
                    f"llama-server can't load an adapter from {file}: its path has a colon.",
                    fix="Set WEB4LORA_HOME to a folder without one.",
                )
        if not self._llama.server.is_file():
            raise FailedPrecondition(
                f"There is no {self._llama.server}.", fix="Build llama.cpp: python -m web4lora_llamacpp build"
            )
        self._log_file.parent.mkdir(parents=True, exist_ok=True)
        with self._log_file.open("ab") as log:
            self._log_start = log.tell()
            self._base = ""
            self._process = process.start(
                self._command(),
                env=self._env | environment(self._log_file.parent),
                stdin=subprocess.PIPE,
                stdout=log,
            )

    def wait_ready(self, timeout_seconds: float) -> None:
        """Wait until the model is loaded and requests are answered.

        Args:
            timeout_seconds: How long to wait; the server is stopped when that is over.

        Raises:
            FailedPrecondition: The port is in use, or the file is no model that it can load.
            OutOfMemory: Memory ran out while loading.
            Internal: It died for another reason; the message ends with its log's last lines.
            Unavailable: It was not ready in time.
        """
        assert self._process is not None, "start() comes first"
        end = time.monotonic() + timeout_seconds
        while time.monotonic() < end:
            if self._process.poll() is not None:
                raise self._death()
            if self._healthy():
                return
            time.sleep(_POLL_SECONDS)
        self.stop()
        raise Unavailable(
            f"llama-server did not load {self._gguf.name} within {timeout_seconds:.0f} s.",
            fix=f"Its log: {self._log_file}",
            reason="LOAD_TIMEOUT",
        )

    def set_adapters(self, scales: Sequence[float]) -> None:
        """Apply the adapters with other scales from the next request on; answers at work end as they began.

        Args:
            scales: One for each adapter, in their order.

        Raises:
            Unavailable: The server did not take them in time.
        """
        body = json.dumps([{"id": number, "scale": scale} for number, scale in enumerate(scales)])
        connection = self._connection(_SET_SECONDS)
        try:
            connection.request("POST", "/lora-adapters", body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            problem = "" if answer.status == 200 else answer.read().decode("utf-8", errors="replace")[:300]
        except (OSError, http.client.HTTPException) as error:
            problem = str(error) or type(error).__name__
        finally:
            connection.close()
        if problem:
            raise Unavailable(
                f"llama-server did not take the scales of its adapters: {problem}",
                fix=f"Its log: {self._log_file}",
                reason="ADAPTERS_NOT_SET",
            )

    @property
    def endpoint(self) -> str:
        """Base address of the OpenAI-compatible API, `http://HOST:PORT/v1`; known once it is ready."""
        assert self._base, "wait_ready() comes first"
        return f"{self._base}/v1"

    @property
    def pid(self) -> int:
        """Process id of llama-server itself."""
        assert self._process is not None, "start() comes first"
        return self._process.pid

    @property
    def alive(self) -> bool:
        """True while the process runs."""
        return self._process is not None and self._process.poll() is None

    @property
    def ending(self) -> str:
        """How it ended by itself, in words that go on after its name."""
        code = self._process.poll() if self._process is not None else None
        if not code:
            return "ended by itself"
        return process.ending(code)

    def failure(self) -> Web4Error | None:
        """Return the error of a server that has crashed since it was ready; None while it runs."""
        try:
            code = self._process.wait(_STOP_GRACE_SECONDS) if self._process is not None else 0
        except subprocess.TimeoutExpired:
            return None
        return process.failure("llama-server", code) if code else None

    def stop(self) -> None:
        """Ask it to end, then kill it. Does nothing when it has ended or was never started."""
        if self._process is None:
            return
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_STOP_GRACE_SECONDS)
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self._release()

    def _command(self) -> list[str | Path]:
        command: list[str | Path] = [
            sys.executable, "-I", "-S", guard.__file__, self._llama.server,
            "--model", self._gguf,
            "--host", self._host,
            "--port", str(self._port),
            # --ctx-size is the total over all slots as long as they don't share one cache.
            "--ctx-size", str(self._context_tokens * self._parallel),
            "--parallel", str(self._parallel),
            "--no-kv-unified",
            "--jinja",
            "--no-ui",
            "--cors-origins", "localhost",  # else any web page may ask it
            "--offline",
            "--metrics",
            # Else it keeps up to 8 GiB of former prompts: more than the model, and in no memory figure.
            "--cache-ram", "0",
        ]  # fmt: skip
        alias = ["--alias", self._alias] if self._alias else []
        return [*command, *alias, *self._adapter_options(), *self._options]

    def _adapter_options(self) -> list[str]:
        if not self._adapters:
            return []
        rows = [f"{file}:{scale!r}".replace('"', '""') for file, scale in self._adapters]
        # Scaled from the first moment on: --lora applies each in full until it is told otherwise, also with
        # --lora-init-without-apply. And what one adapter read must not be gone on from by another: a slot's
        # cache outlives POST /lora-adapters, so answers would come of both.
        return ["--lora-scaled", ",".join(f'"{row}"' for row in rows), "--no-cache-prompt"]

    def _connection(self, seconds: float) -> http.client.HTTPConnection:
        parts = urlsplit(self._base)
        return http.client.HTTPConnection(parts.hostname or self._host, parts.port, timeout=seconds)

    def _healthy(self) -> bool:
        """Return True once the log names the address and that answers."""
        if not self._base:
            match = _LISTENING.search(self._log())
            if not match:
                return False
            # Who listens on every address is asked at the loopback, under the same port.
            self._base = match[1].decode().replace("//0.0.0.0:", "//127.0.0.1:")
        connection = self._connection(5.0)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except OSError:
            return False
        finally:
            connection.close()

    def _log(self) -> bytes:
        with self._log_file.open("rb") as log:
            log.seek(self._log_start)
            return log.read()

    def _release(self) -> None:
        """Close the pipe that tells the guard that we live."""
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()

    def _death(self) -> Web4Error:
        """Say why the process ended before it was ready."""
        assert self._process is not None
        self._release()
        code = self._process.returncode
        text = self._log().decode("utf-8", errors="replace")
        lines = [_STAMP.sub("", line) for line in text.strip().splitlines()]
        low = text.lower()
        name = self._gguf.name
        log = f"Its log: {self._log_file}"
        if "couldn't bind" in low:
            return FailedPrecondition(
                f"Port {self._port} on {self._host} is in use.",
                fix="Choose another port, or 0 for a free one.",
                reason="ADDRESS_IN_USE",
            )
        if code == -signal.SIGKILL or any(sign in low for sign in _MEMORY):
            return OutOfMemory(
                f"Memory ran out while llama-server loaded {name}: it {process.ending(code)}.",
                fix="Use a smaller quantization, context_tokens or parallel, or close other programs.",
            )
        if any(sign in low for sign in _MODEL):
            why = next((line for line in lines if any(sign in line.lower() for sign in _MODEL)), "")
            return FailedPrecondition(
                f"llama-server can't load {name}: {why}", fix=log, reason="MODEL_NOT_LOADABLE"
            )
        tail = "\n  ".join(lines[-8:])
        if code == 0:
            return Internal(
                f"llama-server ended by itself while loading {name}:\n  {tail}",
                fix=log,
                reason="LLAMA_SERVER_DIED",
            )
        return process.failure(
            f"llama-server, loading {name},",
            code,
            f":\n  {tail}",
            fix=f"`web4lora doctor` says how llama.cpp does on this machine. {log}",
            reason="LLAMA_SERVER_DIED",
        )
