"""The self-test: a tiny model is quantized, loaded and asked with the very binaries that are to be trusted.

A compiler that gets an instruction wrong, or a kernel or hypervisor that does not carry it, shows only then:
with a crash at the first product with a quantized weight, or with a wrong answer.
"""

from __future__ import annotations

import http.client
import json
import tempfile
from pathlib import Path
from urllib.parse import urlsplit

from web4lora_chassis import process
from web4lora_chassis.errors import FailedPrecondition, Unavailable, Web4Error

from web4lora_llamacpp.converter import environment
from web4lora_llamacpp.run_tool import run_tool, tail
from web4lora_llamacpp.server import LlamaServer
from web4lora_llamacpp.tiny_model import TYPES, write_tiny_model
from web4lora_llamacpp.tools import LlamaCpp
from web4lora_llamacpp.verdicts import Verdict

_LOAD_SECONDS = 300.0
_ANSWER_SECONDS = 120.0
# More than one token at once, for the kernels of prompts; then one after the other, for those of answers.
_PROMPT = range(300, 340)
_ANSWER = range(340, 348)


def self_test(llama: LlamaCpp, root: Path) -> Verdict:
    """Say whether a build works on this machine. Takes a second or two.

    Args:
        llama: The build.
        root: llama.cpp's folder in the cache, where its output is kept too.

    Raises:
        OutOfMemory: Memory ran out, which says nothing about the build.
        Unavailable: It did not answer in time, which says nothing either.
        FailedPrecondition: The binaries can't be run at all, or are none of llama.cpp's.
    """
    log = root / "self-test.log"
    log.write_bytes(b"")
    with tempfile.TemporaryDirectory(prefix="self-test-", dir=root) as name:
        try:
            model = _quantized(llama, Path(name), log)
            found = _answer(llama, model, log)
        except Web4Error as error:
            if error.reason != process.CRASHED:
                raise
            return Verdict(works=False, problem=f"crashed: {error.message.splitlines()[0].rstrip(':.')}")
    if found != list(_ANSWER):
        return Verdict(works=False, problem=f"computed wrong: {found} in place of {list(_ANSWER)}")
    return Verdict(works=True)


def _quantized(llama: LlamaCpp, folder: Path, log: Path) -> Path:
    source, target = folder / "tiny.gguf", folder / "tiny-quantized.gguf"
    write_tiny_model(source)
    types = [word for tensor, kind in TYPES.items() for word in ("--tensor-type", f"{tensor}={kind}")]
    command: list[str | Path] = [llama.quantize, *types, source, target, "Q4_K_M"]
    code = run_tool(command, log, lambda _: None, env=environment(log.parent))
    if code != 0 or not target.is_file():
        raise process.failure("llama-quantize", code, tail(log)) if code else _useless(llama, log)
    return target


def _answer(llama: LlamaCpp, model: Path, log: Path) -> list[object]:
    """Load the model and return the tokens that it goes on with."""
    with LlamaServer(llama, model, context_tokens=256, parallel=1, log_file=log) as server:
        server.wait_ready(_LOAD_SECONDS)
        place = urlsplit(server.endpoint)
        connection = http.client.HTTPConnection(place.hostname or "", place.port, timeout=_ANSWER_SECONDS)
        body = {
            "prompt": list(_PROMPT), "n_predict": len(_ANSWER),
            "temperature": 0, "ignore_eos": True, "return_tokens": True,
        }  # fmt: skip
        try:
            connection.request("POST", "/completion", json.dumps(body), {"Content-Type": "application/json"})
            answer = json.loads(connection.getresponse().read())
            return list(answer["tokens"])
        except (OSError, http.client.HTTPException) as error:
            raise server.failure() or Unavailable(
                f"llama-server did not answer in llama.cpp's self-test: {error or type(error).__name__}.",
                fix=f"Is this machine very busy? Its log: {log}",
            ) from error
        except (ValueError, KeyError, TypeError) as error:
            raise _useless(llama, log) from error
        finally:
            connection.close()


def _useless(llama: LlamaCpp, log: Path) -> FailedPrecondition:
    return FailedPrecondition(
        f"{llama.bin} holds no tools of llama.cpp that can be used: its self-test got no answer.",
        fix=f"Its log: {log}",
        reason="LLAMA_CPP_UNUSABLE",
    )
