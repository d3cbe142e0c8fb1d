"""Base models from the Hugging Face hub: at a commit, by exact file names, never a file with code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from web4lora_chassis.errors import NotFound, Unavailable
from web4lora_chassis.model_files.model_folder import (
    INDEX_NAME,
    SINGLE_NAME,
    is_model_file,
    is_weights,
    refuse_remote_code,
)

from web4lora_trainer.broken_base import broken, of_the_base

if TYPE_CHECKING:
    from huggingface_hub import HfApi


def fetch(name: str, revision: str, place: Path) -> tuple[Path, str, str]:
    """Fetch a model at a commit; files that are in the cache already are not fetched again.

    Args:
        name: Its hub id.
        revision: A branch, a tag or a commit.
        place: The cache's folder for the hub.

    Returns:
        Its folder, the commit, and its licence as the hub names it.

    Raises:
        NotFound: The hub has no such model or revision, or it needs a login.
        InvalidInput: It has no weights as safetensors.
        Unavailable: The hub is out of reach, and nothing was fetched before.
    """
    from httpx2 import HTTPError
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError
    from huggingface_hub.errors import RevisionNotFoundError as NoRevision

    hub = HfApi()
    try:
        info = hub.model_info(name, revision=revision)
        commit, licence = info.sha or revision, (info.card_data.license if info.card_data else "") or ""
        names = [entry.rfilename for entry in info.siblings or ()]
        return _download(hub, name, commit, names, place), commit, str(licence)
    except (RepositoryNotFoundError, NoRevision, HFValidationError) as error:
        raise NotFound(
            f"The hub has no model {name} at {revision}, or it needs a login.",
            fix="Check the id and revision; for a gated model accept its terms and set HF_TOKEN.",
            metadata={"field": "base.model"},
        ) from error
    except (HfHubHTTPError, HTTPError, OSError, ValueError) as error:
        folder = _fetched_before(name, revision, place, error)
        return folder, folder.name, ""


def _download(hub: HfApi, name: str, commit: str, names: list[str], place: Path) -> Path:
    """Fetch the files that make up the model, one by one: a pattern would let others through."""

    def file(path: str) -> Path:
        return Path(hub.hf_hub_download(name, path, revision=commit, cache_dir=place))

    shards = [SINGLE_NAME]
    if INDEX_NAME in names:
        try:
            weight_map = json.loads(file(INDEX_NAME).read_text(encoding="utf-8"))["weight_map"]
            shards = sorted({str(shard) for shard in weight_map.values()})
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise broken(f"The {INDEX_NAME} of {name} can't be read: {error!r}.") from error
    lacking = "config.json" if "config.json" not in names else "weights as safetensors"
    if lacking == "config.json" or not set(shards) & set(names):
        raise broken(
            f"{name} on the hub has no {lacking}.",
            "Choose a repository with config.json and safetensors; a GGUF is named by its file here.",
            "NO_SAFETENSORS",
        )
    weights = sorted(path for path in names if path in shards and is_weights(path))
    folders = [file(path).parent for path in sorted(names) if is_model_file(path)]
    with of_the_base():
        refuse_remote_code(folders[0])  # before gigabytes are fetched
    for path in weights:
        file(path)
    return folders[0]


def _fetched_before(name: str, revision: str, place: Path, cause: Exception) -> Path:
    """Return what an earlier run fetched, now that the hub is out of reach."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, cache_dir=place, local_files_only=True))
    except (OSError, ValueError) as error:
        raise Unavailable(
            f"The hub is out of reach and {name} at {revision} was never fetched: {cause}",
            fix="Connect to the network, or use a local folder or a GGUF file as the base model.",
            reason="HUB_UNREACHABLE",
        ) from error
