"""The output folder of a training run: the adapter in PEFT's form, its tokenizer, state and losses."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from web4lora_chassis.errors import DataLoss
from web4lora_chassis.model_files.model_folder import TOKENIZER_FILES
from web4lora_chassis.model_files.trained_conversations import (
    MAX_CONVERSATIONS,
    Conversation,
    TrainedConversations,
)

from web4lora_trainer.encoding import Encoded

if TYPE_CHECKING:
    import torch
    from peft import PeftModel

_SHORT_TOKENS = 512


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
        base_folder: The base's folder; its tokenizer files are copied byte for byte.
        target: The output folder.
        write_bin: Also write the pickled state dict, which loads with `weights_only=True`.

    Raises:
        DataLoss: A weight is not finite.
    """
    import torch

    tensors = _write_adapter(model, base_source, base_revision, target)
    if write_bin:
        torch.save(dict(tensors), target / "adapter_model.bin")
    for name in TOKENIZER_FILES:
        if (base_folder / name).is_file():
            shutil.copyfile(base_folder / name, target / name)


def export_last(model: PeftModel, base_source: str, base_revision: str, target: Path, step: int) -> None:
    """Write the adapter of the last step into `checkpoint-STEP`, for a training whose best step is another.

    Args:
        model: The model as the training left it.
        base_source: See `export_adapter`.
        base_revision: See `export_adapter`.
        target: The output folder.
        step: The last one.

    Raises:
        DataLoss: A weight is not finite.
    """
    _write_adapter(model, base_source, base_revision, target / f"checkpoint-{step}")


def _write_adapter(
    model: PeftModel, base_source: str, base_revision: str, target: Path
) -> dict[str, torch.Tensor]:
    """Write adapter_model.safetensors and adapter_config.json; return the tensors."""
    import torch
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    target.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: tensor.detach().to("cpu", torch.float32).contiguous()
        for name, tensor in get_peft_model_state_dict(model, save_embedding_layers=False).items()
    }
    if broken := [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]:
        raise DataLoss(
            f"{len(broken)} of the adapter's {len(tensors)} tensors hold numbers that are not finite, for "
            f"example {broken[0]}; it is not exported.",
            fix="Train again with a lower learning_rate, or with dtype bf16 or fp32.",
            reason="ADAPTER_NOT_FINITE",
        )
    save_file(tensors, target / "adapter_model.safetensors", metadata={"format": "pt"})
    config = model.peft_config["default"].to_dict()
    config.update(base_model_name_or_path=base_source, revision=base_revision or None, inference_mode=True)
    text = json.dumps(config, indent=2, sort_keys=True, default=_plain)
    (target / "adapter_config.json").write_text(text + "\n", encoding="utf-8")
    return tensors


def export_state(state: Mapping[str, Any], target: Path) -> None:
    """Write transformers' trainer state, without this machine's paths.

    Args:
        state: The contents of its trainer_state.json.
        target: The output folder.
    """
    plain = _finite({**state, "best_model_checkpoint": None})
    text = json.dumps(plain, indent=2, sort_keys=True, allow_nan=False)
    (target / "trainer_state.json").write_text(text + "\n", encoding="utf-8")


def export_conversations(rows: Sequence[Encoded], target: Path, rendered_at: datetime | None = None) -> None:
    """Write trained_conversations.json: a few conversations, with the ids and labels they were trained on.

    What is served is held against it, token by token; `system` is the system message that most conversations
    of the data have, empty where most have none, and what the model is served with when nobody gives it one.
    `rendered_at` is there where the chat template writes the date.

    Args:
        rows: The rows that were trained on.
        target: The output folder.
        rendered_at: The time that the chat template wrote, if it writes any.
    """
    conversations = tuple(
        Conversation(
            file=f"train/{row.row.file}" if row.row else "",
            line=row.row.line if row.row else 0,
            messages=tuple(message.to_json() for message in row.messages),
            input_ids=row.input_ids,
            labels=row.labels,
            turns=row.turns,
            tools=row.row.tools if row.row else (),
        )
        for row in _choose(rows)
    )
    TrainedConversations(conversations, _system(rows), rendered_at).write(target)


def _system(rows: Sequence[Encoded]) -> str:
    """Return the most frequent system message; on a tie the model knows one."""
    first = {row.row.place: row.row.messages[0] for row in rows if row.row}
    counts = Counter(message.content if message.role == "system" else "" for message in first.values())
    return max(counts, key=lambda text: (counts[text], bool(text)), default="")


def _choose(rows: Sequence[Encoded]) -> list[Encoded]:
    """Return the shortest of each kind in turn.

    A kind has one question or more, a system message or none, tools or none, and ends in a call or in words.
    """
    kinds: dict[tuple[bool, bool, bool, bool], list[Encoded]] = {}
    for row in sorted((row for row in rows if row.turns), key=len):
        questions = sum(message.role == "user" for message in row.messages)
        tools = bool(row.row and row.row.tools)
        calls = bool(row.messages[-1].tool_calls)
        kinds.setdefault((questions > 1, row.messages[0].role == "system", tools, calls), []).append(row)
    for kind, found in kinds.items():  # one long row has to do where a kind has no short ones
        kinds[kind] = [row for row in found if len(row) <= _SHORT_TOKENS] or found[:1]
    in_turn = itertools.chain.from_iterable(itertools.zip_longest(*kinds.values()))
    return [row for row in in_turn if row is not None][:MAX_CONVERSATIONS]


def _finite(value: Any) -> Any:
    """Put null where a number is not finite: JSON has no word for it."""
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _plain(value: Any) -> Any:
    """Turn PEFT's sets and enumerations into JSON."""
    if isinstance(value, set | frozenset):
        return sorted(value)
    return str(getattr(value, "value", value))
