"""Feeds one of our parsers with changed files, guided by the lines they reach; needs atheris.

`python -m tests.fuzz.fuzz PARSER SECONDS`; without arguments it names the parsers. It begins with the cases
of `tests/corpus` and stops at the first finding, whose file it names: make that a case there.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

PLACE = Path(tempfile.gettempdir()) / "web4lora-fuzz"
_SEED_BYTES = 1 << 12
_MODULES = ["web4lora", "web4lora_chassis", "web4lora_deployer", "web4lora_packager", "yaml", "jinja2"]

Parse = Callable[[bytes], object]


def in_file(read: Callable[[Path], object], name: str) -> Parse:
    """Make a function that reads a file one that reads bytes."""
    path = Path(tempfile.mkdtemp(prefix="web4lora-fuzz-")) / name

    def parse(data: bytes) -> None:
        path.write_bytes(data)
        read(path)

    return parse


def gguf() -> Parse:
    from web4lora_chassis.model_files.gguf import read_gguf
    from web4lora_deployer.serving.whole_model import require_model

    def read(path: Path) -> None:
        header = read_gguf(path)
        header.cache_bytes(1 << 20)
        _ = header.bits_per_weight if header.parameters else 0, header.odd_rows, header.end_ids
        require_model(path, header)

    return in_file(read, "model.gguf")


def safetensors() -> Parse:
    from web4lora_chassis.model_files.safetensors import read_shard

    return in_file(read_shard, "model.safetensors")


def adapter() -> Parse:
    from web4lora_chassis.model_files.model_folder import read_json
    from web4lora_packager.adapter import _config

    def read(path: Path) -> None:
        config = _config(read_json(path), path)
        config.scale("model.layers.0.self_attn.q_proj", config.rank_of("model.layers.0.mlp.up_proj"))

    return in_file(read, "adapter_config.json")


def template() -> Parse:
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from web4lora_chassis.model_files.rendering import compiled

    # Parsed only: compiling carries out what is constant, and 9 ** 9 ** 9 needs the renderer's own bounds.
    patch.object(ImmutableSandboxedEnvironment, "from_string", ImmutableSandboxedEnvironment.parse).start()

    def parse(data: bytes) -> None:
        # What the renderer's process puts into words.
        with suppress(TemplateError, ValueError, SyntaxError, MemoryError, RecursionError):
            compiled(data.decode("utf-8", "replace"))

    return parse


def go_template() -> Parse:
    from web4lora_chassis.errors import InvalidInput
    from web4lora_chassis.model_files.gguf import GgufHeader
    from web4lora_deployer import templates

    class Renderer:
        """Puts the input's pieces between messages, as a template would, and refuses some of them."""

        def __init__(self, data: bytes) -> None:
            self._pieces = data.decode("utf-8", "surrogateescape").split("\n")

        def render(self, messages: Iterable[Any], **_: Any) -> str:
            texts = list(messages)
            if self._pieces[0][:1] == str(len(texts)):
                raise InvalidInput("no")
            return "".join(
                f"{self._pieces[i % len(self._pieces)]}{message['content']}"
                for i, message in enumerate(texts)
            )

        def default_system(self, *_: Any) -> str:
            return self._pieces[-1]

    def parse(data: bytes) -> None:
        with patch.object(templates, "chat_template", lambda _: Renderer(data)):
            found = templates.go_template(GgufHeader({}))
        assert found is None or found.count("{{") == found.count("}}") or b"{{" in data or b"}}" in data

    return parse


def dataset() -> Parse:
    from web4lora_chassis.dataset import check_rows, problem_lines
    from web4lora_chassis.dataset_row import Problem

    def read(path: Path) -> None:
        found = [item for item in check_rows(path, "rows.jsonl") if isinstance(item, Problem)]
        check_lines("\n".join(problem_lines(found)))

    return in_file(read, "rows.jsonl")


def suite() -> Parse:
    from web4lora_deployer.suite import load_suite

    from tests.corpus.suite import whole

    folder = Path(tempfile.mkdtemp(prefix="web4lora-fuzz-"))
    whole(folder)

    def parse(data: bytes) -> None:
        (folder / "suite.yaml").write_bytes(data)
        load_suite(folder)

    return parse


def prompts() -> Parse:
    from web4lora_deployer.suite import load_suite
    from web4lora_deployer.testing.check_suite import scores_of

    from tests.corpus.suite import whole

    folder = Path(tempfile.mkdtemp(prefix="web4lora-fuzz-"))
    whole(folder)

    def parse(data: bytes) -> None:
        (folder / "rows.jsonl").write_bytes(data)
        scores_of(load_suite(folder))

    return parse


def pipeline() -> Parse:
    from web4lora.pipeline_file import read_pipeline

    return in_file(read_pipeline, "demo.yaml")


def manifest() -> Parse:
    from web4lora_chassis.artifacts import Manifest
    from web4lora_chassis.artifacts.folder import FolderBackend
    from web4lora_chassis.artifacts.store import ArtifactStore

    root = Path(tempfile.mkdtemp(prefix="web4lora-fuzz-"))
    store = ArtifactStore(FolderBackend(root))

    def parse(data: bytes) -> None:
        (root / "manifest.json").write_bytes(data)
        found = store._read("manifest.json")
        assert Manifest.from_json(found.to_json()).digest == found.ref.digest

    return parse


def trained() -> Parse:
    from web4lora_deployer.prompts.training_record import read_record, trained_system

    return in_file(lambda path: trained_system(read_record(path)), "trained_conversations.json")


def stream() -> Parse:
    import httpx2
    from web4lora_deployer.suite.stream import Bounds, Garbled, read_answer, read_error

    def parse(data: bytes) -> None:
        for read in (read_answer, read_error):
            response = httpx2.Response(200, stream=httpx2.ByteStream(data))
            try:
                found = read(response, time.perf_counter(), Bounds(16, 5.0))
            except (Garbled, AttributeError, TypeError, ValueError) as error:  # as `suite.chat` takes them
                check_lines(str(error))
            else:
                json.dumps(getattr(found, "text", found), ensure_ascii=False).encode()

    return parse


PARSERS: dict[str, tuple[Callable[[], Parse], str, str]] = {
    "gguf": (gguf, "gguf", "model.gguf"),
    "safetensors": (safetensors, "safetensors", "model.safetensors"),
    "adapter": (adapter, "adapter", "adapter_config.json"),
    "template": (template, "template", "chat_template.jinja"),
    "go_template": (go_template, "", ""),
    "dataset": (dataset, "dataset", "rows.jsonl"),
    "suite": (suite, "suite", "suite.yaml"),
    "prompts": (prompts, "suite", "rows.jsonl"),
    "pipeline": (pipeline, "pipeline", "demo.yaml"),
    "manifest": (manifest, "manifest", "manifest.json"),
    "trained": (trained, "trained", "trained_conversations.json"),
    "stream": (stream, "", ""),
}
"""Each parser, the corpus that it begins with, and the file there."""
SEEDS: dict[str, list[bytes]] = {
    "stream": [
        b'data: {"choices": [{"delta": {"content": "a"}}]}\n\ndata: {"choices": [{"finish_reason": "stop", '
        b'"delta": {}}], "usage": {"completion_tokens": 1}, "timings": {"predicted_per_second": 1.5}}\n\n'
        b"data: [DONE]\n",
        b'data: {"error": {"message": "no"}}\n',
    ],
    "go_template": [b"<|user|>\n</s>\n<|assistant|>", b"<s>[INST] \n [/INST] \n </s>\n\n"],
}


def check_lines(text: str) -> None:
    """Fail when a message could not be printed or sent."""
    assert all(line.isprintable() or not line.isascii() for line in text.split("\n")), ascii(text)[:300]
    text.encode()


def seeds(name: str, folder: Path) -> None:
    """Write what fuzzing begins with: the whole file and the corpus's small cases."""
    import importlib

    _, kind_name, file = PARSERS[name]
    found = list(SEEDS.get(name, []))
    if kind_name:
        kind = importlib.import_module(f"tests.corpus.{kind_name}").KIND
        whole = Path(tempfile.mkdtemp(prefix="web4lora-fuzz-"))
        kind.whole(whole)
        for case in (None, *kind.cases):
            copy = Path(tempfile.mkdtemp(prefix="web4lora-fuzz-")) / "copy"
            shutil.copytree(whole, copy, symlinks=True)
            if case is not None:
                case.damage(copy)
            for path in copy.rglob(file):
                if path.is_file() and path.stat().st_size <= _SEED_BYTES:
                    found.append(path.read_bytes())
            shutil.rmtree(copy.parent)
    folder.mkdir(parents=True, exist_ok=True)
    for number, data in enumerate(found):
        (folder / f"seed-{number}").write_bytes(data)


def main(name: str, seconds: str) -> None:
    """Fuzz one parser."""
    import atheris

    place = PLACE / name
    if not place.is_dir():  # apart, so that what it imports is not imported before it is instrumented
        subprocess.run(
            [sys.executable, "-c", f"import tests.fuzz.fuzz as f; f.seeds({name!r}, f.PLACE / {name!r})"],
            check=True,
        )
    with atheris.instrument_imports(include=_MODULES):
        from web4lora_chassis.errors import Internal, Web4Error

        parse = PARSERS[name][0]()

    def one(data: bytes) -> None:
        try:
            parse(data)
        except Internal:
            raise
        except Web4Error as error:
            check_lines(error.message)

    options = [
        f"-max_total_time={seconds}", "-max_len=4096", "-timeout=20", "-rss_limit_mb=2048",
        f"-artifact_prefix={PLACE}/finding-{name}-", "-print_final_stats=1",
    ]  # fmt: skip
    atheris.Setup([sys.argv[0], *options, str(place)], one)
    atheris.Fuzz()


if __name__ == "__main__":
    if len(sys.argv) == 3:
        main(*sys.argv[1:])
    else:
        sys.stdout.write(" ".join(PARSERS) + "\n")
