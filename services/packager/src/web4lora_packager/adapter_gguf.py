"""The adapter as a GGUF of its own, which llama-server applies to a base and switches without a restart.

Such a file has one alpha for all its tensors and scales each by alpha / rank. Where PEFT scales otherwise, B
takes the difference up. What can't be said so would be applied otherwise than it was trained, without a word,
so it is refused.
"""

from __future__ import annotations

import json
import shutil
from math import prod
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from web4lora_chassis.errors import DataLoss, FailedPrecondition
from web4lora_chassis.model_files.gguf import GgufHeader
from web4lora_chassis.model_files.model_folder import read_json

from web4lora_packager.adapter import ADAPTER_FILES, Adapter, LowRank
from web4lora_packager.check import read_made
from web4lora_packager.layout import Layout

ADAPTER_NAME = "adapter.gguf"


def require_convertible(adapter: Adapter, layout: Layout) -> None:
    """Refuse an adapter that a GGUF would not hold as it was trained.

    Args:
        adapter: The adapter.
        layout: How Transformers reads its base.

    Raises:
        FailedPrecondition: It has what a GGUF adapter can't say.
    """
    config = adapter.config
    beyond = {
        "use_dora": config.dora,
        "modules_to_save": bool(config.modules_to_save),
        "weights stored as (in, out)": not layout.transposed.isdisjoint(adapter.plan()),
    }
    found = [key for key, given in beyond.items() if given]
    if found:
        raise FailedPrecondition(
            f"An adapter with {', '.join(found)} can't be a GGUF of its own: that would apply it otherwise "
            "than it was trained.",
            fix="Set package.adapter_gguf: false; the merged model is exact.",
            reason="ADAPTER_NOT_CONVERTIBLE",
        )


def write_plain(folder: Path, target: Path) -> Path:
    """Write an adapter that does the same by one alpha over its rank alone, and return its folder.

    Args:
        folder: The adapter: rank-stabilized, or with other alphas for some modules.
        target: The folder to write; what is there is removed first.
    """
    adapter = Adapter(folder)
    factors = {
        change.up: np.float32(change.scale * change.rank / adapter.config.alpha)
        for change in adapter.plan().values()
        if isinstance(change, LowRank)
    }
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    tensors = {name: adapter.read(name) * factors.get(name, np.float32(1)) for name in adapter.shapes}
    save_file(tensors, target / ADAPTER_FILES[1])
    config = read_json(folder / ADAPTER_FILES[0])
    plain = {**config, "use_rslora": False, "alpha_pattern": {}}
    (target / ADAPTER_FILES[0]).write_text(json.dumps(plain), encoding="utf-8")
    return target


def check_adapter(path: Path, adapter: Adapter) -> GgufHeader:
    """Compare an adapter's GGUF with the adapter.

    Args:
        path: The GGUF.
        adapter: What it was made from.

    Returns:
        The GGUF's header.

    Raises:
        DataLoss: They differ; the message says in what.
    """
    header = read_made(path)
    weights = sum(prod(shape) for shape in adapter.shapes.values())
    found = (header.kind, header.alpha, header.parameters)
    wanted = ("adapter", float(np.float32(adapter.config.alpha)), weights)
    if found != wanted:
        facts = "kind {}, alpha {}, {:,} weights"
        raise DataLoss(
            f"{path.name} failed its check: it has {facts.format(*found)}, the adapter "
            f"{facts.format(*wanted)}.",
            fix="Package again.",
            reason="GGUF_CHECK_FAILED",
        )
    return header
