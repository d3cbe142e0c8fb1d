"""Going on from an adapter: what an earlier one must be, so that its weights mean the same in the new one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict

from web4lora_chassis.artifacts import ArtifactRef, ArtifactStore
from web4lora_chassis.artifacts.manifest import Manifest
from web4lora_chassis.errors import InvalidInput, NotFound
from web4lora_chassis.pipeline.rules import Problem
from web4lora_chassis.pipeline.train import LoraSettings, TrainSettings

FIELD = "train.from"
_MAY_DIFFER = ("dropout",)
"""It is of the training, not of the adapter's weights."""


def adapter_of(store: ArtifactStore, digest: str) -> Manifest:
    """Return the adapter with a digest, or the one whose digest begins so.

    Raises:
        NotFound: There is none.
        InvalidInput: Several digests begin so.
    """
    found = {manifest.digest: manifest for manifest in store.find("adapter", digest=digest)}
    if not found:
        raise NotFound(
            f"{FIELD}: there is no adapter with the digest {digest} in the store.",
            fix="`web4lora artifacts list` shows what is there; or name a run.",
            metadata={"field": FIELD},
        )
    if len(found) > 1:
        raise InvalidInput(
            f"{FIELD}: {digest} begins the digests of {len(found)} adapters.",
            fix="Write more of it.",
            metadata={"field": FIELD},
        )
    return next(iter(found.values()))


def start_problems(settings: TrainSettings, adapter: Manifest) -> Iterator[Problem]:
    """Yield in what an adapter's shape differs from the one that is to go on from it.

    Args:
        settings: The training to come.
        adapter: The earlier adapter, as this trainer stored it.
    """
    try:
        made: dict[str, object] = json.loads(adapter.parameters["lora"])
    except (KeyError, ValueError):
        yield Problem(FIELD, f"{adapter.ref} does not say how it was trained.", "Name another one.")
        return
    known = asdict(LoraSettings()) | made
    wanted = json.loads(json.dumps(asdict(settings.lora)))
    for each in (known, wanted):
        each["alpha"] = 2.0 * each["rank"] if each["alpha"] is None else each["alpha"]
        each["target_modules"] = sorted(each["target_modules"])
    for name, value in wanted.items():
        before = known[name]
        if name not in _MAY_DIFFER and value != before:
            yield Problem(
                f"train.lora.{name}",
                f"{_shown(value)} is not {_shown(before)}, with which {adapter.ref} was trained, the adapter "
                f"that {FIELD} names.",
                f"Set it to {_shown(before)}, or leave {FIELD} out.",
                between=True,
            )


def require_base(adapter: Manifest, base: ArtifactRef) -> None:
    """Refuse an adapter of another base model.

    Raises:
        InvalidInput: It was not trained on this very base.
    """
    if base.digest not in {ref.digest for ref in adapter.inputs}:
        other = next((str(ref) for ref in adapter.inputs if ref.kind == "base_model"), "another base")
        raise InvalidInput(
            f"{FIELD}: {adapter.ref} was trained on {other}, not on {base}.",
            fix="Name an adapter of this very base model, or train from new weights.",
            metadata={"field": FIELD},
        )


def _shown(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
