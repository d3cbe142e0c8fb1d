"""The output folder of a training run: the adapter in PEFT's form, its tokenizer, state and losses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from web4lora_trainer.checkpoint import TOKENIZER_FILES

if TYPE_CHECKING:
    from peft import PeftModel


def export_adapter(
    model: PeftModel,
    base_source: str,
    base_revision: str,
    base_folder: Path,
    target: Path,
    *,
    write_bin: bool,
) -> None:
    """Write adapter_config.json, adapter_model.safetensors, adapter_model.bin and the base's tokenizer files.

    Args:
        model: The trained model.
        base_source: What the base model is, free of paths of this machine.
        base_revision: Its hub commit or file hash; may be empty.
        base_folder: The base's checkpoint; its tokenizer files are copied byte for byte.
        target: The output folder.
        write_bin: Also write the pickled state dict, which loads with `weights_only=True`.
    """
    import torch
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    target.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: tensor.detach().to("cpu", torch.float32).contiguous()
        for name, tensor in get_peft_model_state_dict(model, save_embedding_layers=False).items()
    }
    save_file(tensors, target / "adapter_model.safetensors", metadata={"format": "pt"})
    if write_bin:
        torch.save(dict(tensors), target / "adapter_model.bin")
    config = model.peft_config["default"].to_dict()
    config.update(base_model_name_or_path=base_source, revision=base_revision or None, inference_mode=True)
    text = json.dumps(config, indent=2, sort_keys=True, default=_plain)
    (target / "adapter_config.json").write_text(text + "\n", encoding="utf-8")
    for name in TOKENIZER_FILES:
        if (base_folder / name).is_file():
            shutil.copyfile(base_folder / name, target / name)


def export_state(state: Mapping[str, Any], target: Path) -> None:
    """Write transformers' trainer state, without this machine's paths.

    Args:
        state: The contents of its trainer_state.json.
        target: The output folder.
    """
    plain = {**state, "best_model_checkpoint": None}
    text = json.dumps(plain, indent=2, sort_keys=True)
    (target / "trainer_state.json").write_text(text + "\n", encoding="utf-8")


def _plain(value: Any) -> Any:
    """Turn PEFT's sets and enumerations into JSON."""
    if isinstance(value, set | frozenset):
        return sorted(value)
    return str(getattr(value, "value", value))
