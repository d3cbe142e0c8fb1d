"""SmolLM2 and adapters on it, as GGUFs and as checkpoints, made by the packager's own steps."""

from __future__ import annotations

from pathlib import Path

from web4lora_chassis.settings import Settings, load
from web4lora_llamacpp import LlamaCpp
from web4lora_packager.convert import convert, convert_adapter
from web4lora_packager.layout import read_layout
from web4lora_packager.merge import merge
from web4lora_trainer.base_model import resolve

from tests import tiny_llama

MODULES = ("q_proj", "k_proj", "v_proj", "o_proj")


def smollm2_checkpoint() -> Path:
    """Return the folder of SmolLM2's checkpoint, made in the cache unless it is there."""
    return resolve("smollm2-135m-instruct", "", load(Settings).cache, print).decoder.folder


def write_adapter(folder: Path, seed: int, base: Path | None = None) -> Path:
    """Write an adapter on SmolLM2, or on another base, as PEFT does, its weights random but for the seed."""
    return tiny_llama.write_adapter(
        folder, base or smollm2_checkpoint(), modules=MODULES, seed=seed, size=0.05
    )


def adapter_gguf(llama: LlamaCpp, folder: Path, seed: int, base: Path | None = None) -> Path:
    """Write an adapter and return its GGUF."""
    base = base or smollm2_checkpoint()
    adapter = write_adapter(folder / "adapter", seed, base)
    target = folder / "adapter.gguf"
    convert_adapter(llama, adapter, base, target, log=folder / "log", report=lambda _: None)
    return target


def base_gguf(llama: LlamaCpp, folder: Path) -> Path:
    """Return SmolLM2 as a 16-bit GGUF."""
    target = folder / "base.gguf"
    convert(
        llama, smollm2_checkpoint(), target,
        gguf_type="F16", name="base", log=folder / "log", report=lambda _: None,
    )  # fmt: skip
    return target


def merged_gguf(llama: LlamaCpp, folder: Path) -> Path:
    """Merge the adapter in a folder into SmolLM2, as a run does, and return the 16-bit GGUF."""
    base = smollm2_checkpoint()
    merge(
        base,
        folder / "adapter",
        folder / "merged",
        read_layout(base, folder / "adapter", folder),
        lambda _: None,
    )
    target = folder / "merged.gguf"
    convert(
        llama, folder / "merged", target,
        gguf_type="F16", name="merged", log=folder / "log", report=lambda _: None,
    )  # fmt: skip
    return target
