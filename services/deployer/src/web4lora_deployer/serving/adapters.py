"""LoRA adapters on one base: whether they fit it, and how strongly each is applied."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from pathlib import Path

from web4lora_chassis.errors import InvalidInput
from web4lora_chassis.model_files.gguf import GgufHeader, read_gguf

from web4lora_deployer.records.deployments import Deployment, Deployments
from web4lora_deployer.runtimes.llama_server import LlamaServerRuntime
from web4lora_deployer.settings import DeployerSettings

_STRONGEST = 2.0
_PARTS = ("lora_a", "lora_b")
_SETTING = threading.Lock()  # the service alone sets scales, a few at once perhaps


def require_adapter(name: str, path: Path, base: GgufHeader) -> None:
    """Refuse an adapter that is none, or that was made for another base.

    llama-server refuses most of this too, but only once it has loaded the base, and in its log alone.

    Args:
        name: What people call it.
        path: The adapter's GGUF.
        base: The base's metadata.

    Raises:
        InvalidInput: It does not fit; the message says why.
    """
    header = read_gguf(path)
    size = path.stat().st_size
    if header.kind != "adapter" or header.values.get("adapter.type") != "lora":
        raise InvalidInput(
            f"The adapter {name} is no LoRA adapter: its GGUF holds a {header.kind}.",
            fix="`package.adapter_gguf: true` in a pipeline file makes adapter.gguf of what a run trains.",
            reason="NOT_AN_ADAPTER",
            metadata={"field": "adapters"},
        )
    if size < header.end_bytes:
        raise InvalidInput(
            f"The adapter {name} is cut off: its GGUF has {size:,} of {header.end_bytes:,} bytes.",
            fix="Copy or download it again.",
            reason="NOT_AN_ADAPTER",
            metadata={"field": "adapters"},
        )
    if why := _misfit(header, base):
        raise InvalidInput(
            f"The adapter {name} does not fit this base: {why}.",
            fix="Deploy it on the base it was trained on.",
            reason="BASE_MISMATCH",
            metadata={"field": "adapters"},
        )


def _misfit(adapter: GgufHeader, base: GgufHeader) -> str:
    """Return why an adapter can't be applied to a base in full; nothing when it can."""
    if adapter.architecture != base.architecture:
        return f"it was made for the architecture {adapter.architecture}, this is {base.architecture}"
    pairs: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in adapter.shapes.items():
        target, _, part = name.rpartition(".")
        if part not in _PARTS:
            return f"it also changes {name}, which llama-server would leave as it is"
        pairs.setdefault(target, {})[part] = shape
    for target, pair in pairs.items():
        if target not in base.shapes:
            return f"it changes {target}, which the base does not have"
        if set(pair) != set(_PARTS):
            return f"it has but half of a change of {target}"
        a, b = pair["lora_a"], pair["lora_b"]
        made_for = (b[1], a[1]) if target == "token_embd.weight" else (a[0], b[1])
        if made_for != base.shapes[target][:2]:
            sizes = [" x ".join(str(number) for number in shape) for shape in (made_for, base.shapes[target])]
            return f"it was made for a {target} of {sizes[0]}, the base has {sizes[1]}"
    return ""


def set_scales(id_or_name: str, scales: Mapping[str, float], settings: DeployerSettings) -> Deployment:
    """Set how strongly a deployment's adapters are applied, and wait until llama-server does so.

    The scales are kept first: a server that is not serving just now, or starts again, begins with them.

    Args:
        id_or_name: The deployment's id, or a name for the one that it stands for.
        scales: By the adapter's name; one that is not named keeps its own.
        settings: Where the records are.

    Returns:
        The deployment.

    Raises:
        NotFound: No such deployment.
        InvalidInput: It has no such adapter, or a scale is out of bounds.
        Unavailable: llama-server does not take them in time.
    """
    deployments = Deployments(settings.deployer_home)
    record = deployments.find(id_or_name)
    _check(record, scales)
    with _SETTING:
        wanted = {**deployments.scales(record), **scales}
        deployments.save_scales(record, wanted)
    LlamaServerRuntime(settings).await_scales(record)
    return record


def _check(record: Deployment, scales: Mapping[str, float]) -> None:
    known = [adapter.name for adapter in record.adapters]
    unknown = [name for name in scales if name not in known]
    if unknown and not known:
        raise InvalidInput(
            f"{record.id} has no adapters.",
            fix="`web4lora deploy BASE.gguf --name NAME --adapter NAME=ADAPTER.gguf` deploys some.",
            metadata={"field": "scales"},
        )
    if unknown:
        raise InvalidInput(
            f"{record.id} has no adapter {unknown[0]!r}.",
            fix=f"It has {', '.join(known)}.",
            metadata={"field": "scales"},
        )
    for name, scale in scales.items():
        if not (math.isfinite(scale) and 0 <= scale <= _STRONGEST):
            raise InvalidInput(
                f"The scale of {name} is {scale:g}; it needs 0 to {_STRONGEST:g}.",
                fix="0 is not at all, 1 as it was trained.",
                metadata={"field": "scales"},
            )
