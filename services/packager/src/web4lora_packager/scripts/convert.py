"""Runs llama.cpp's converter with what a request adds to it: `SCRIPT REQUEST.json CONVERTER ARG...`.

- Tokens that end generation. llama.cpp knows ends of turns by their texts; at one that it does not know
  answers go on. GGUF's keys for the end of a turn and of a message say it outright, and the converter writes
  them for few models.
- An adapter's changes, merged in float32 into the tensors that the converter reads: see `stream`.
- The SHA-256 of each tensor's data as it is written: what a later run may take over is decided by them.

What came of it is written beside the request, as outcome.json. Run by `web4lora_llamacpp.run_converter`,
never imported.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import runpy
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any


def main() -> None:
    """Run the converter in this process."""
    request_path, converter = Path(sys.argv[1]), Path(sys.argv[2])
    request = json.loads(request_path.read_text(encoding="utf-8"))
    sys.argv = sys.argv[2:]
    # llama.cpp's own gguf, before anything imports the installed one.
    sys.path[0] = str(converter.parent)
    sys.path.insert(1, str(converter.parent / "gguf-py"))
    gguf = importlib.import_module("gguf")
    from web4lora_chassis.errors import Web4Error

    from web4lora_packager.child import error_data
    from web4lora_packager.stream import TooLarge, stream_of

    outcome: dict[str, Any] = {}
    try:
        stream = stream_of(request)
        if stream:
            _merge(stream)
        if request["stops"]:
            _write_stops(gguf, request["stops"])
        outcome["tensors"] = _hash_tensors(gguf)
        runpy.run_path(str(converter), run_name="__main__")
        if stream:
            outcome["merged"] = asdict(stream.merged())
    except TooLarge:
        outcome = {"too_large": True}
    except Web4Error as error:
        outcome = error_data(error)
    request_path.with_name("outcome.json").write_text(json.dumps(outcome), encoding="utf-8")


def _merge(stream: Any) -> None:
    """Let the converter read merged tensors; it opens each file of weights by this one class."""
    local = importlib.import_module("gguf.utility").SafetensorsLocal
    opened = local.__init__

    def merged(self: Any, filename: Any) -> None:
        opened(self, filename)
        self.tensors = stream.sources(Path(filename).name, self.tensors)

    local.__init__ = merged


def _write_stops(gguf: Any, stops: list[int]) -> None:
    """Add the keys when the file is written."""
    write = gguf.GGUFWriter.write_header_to_file

    def with_stops(writer: Any, *arguments: Any, **options: Any) -> Any:
        values = writer.kv_data[0]
        token_keys = gguf.Keys.Tokenizer
        free = [key for key in (token_keys.EOT_ID, token_keys.EOM_ID) if key not in values]
        known = {values[key].value for key in (token_keys.EOS_ID, token_keys.EOT_ID) if key in values}
        missing = [stop for stop in stops if stop not in known]
        if len(missing) > len(free):
            raise RuntimeError(f"a GGUF has no key left to say that the tokens {missing} end generation")
        for key, stop in zip(free, missing, strict=False):
            writer.add_uint32(key, stop)
        return write(writer, *arguments, **options)

    gguf.GGUFWriter.write_header_to_file = with_stops


def _hash_tensors(gguf: Any) -> dict[str, str]:
    """Note each tensor's digest when it is written; one that is written in chunks has none."""
    digests: dict[str, str] = {}
    write = gguf.GGUFWriter.write_tensors_to_file

    class Hashed:
        def __init__(self, name: str, tensor: Any) -> None:
            self._name, self._tensor, self.nbytes = name, tensor, tensor.nbytes

        def tofile(self, file: Any) -> None:
            data = gguf.LazyNumpyTensor.to_eager(self._tensor)
            if hasattr(data, "reshape"):
                digests[self._name] = hashlib.sha256(data.reshape(-1).view("uint8").data).hexdigest()
            data.tofile(file)

    def hashing(writer: Any, *arguments: Any, **options: Any) -> Any:
        for tensors in writer.tensors:
            for name, info in tensors.items():
                info.tensor = Hashed(name, info.tensor)
        return write(writer, *arguments, **options)

    gguf.GGUFWriter.write_tensors_to_file = hashing
    return digests


if __name__ == "__main__":
    main()
