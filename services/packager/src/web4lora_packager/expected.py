"""What Transformers and PEFT say of trained answers: see `next_tokens`. Imports torch, in a child process.

All is computed in float32, and the base's weights stay in their files: each module has its own in float32
while it is at work, and no longer; of an embedding the rows that are asked for, of a head some at a time.
"""

from __future__ import annotations

import inspect
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from web4lora_packager import skeleton
from web4lora_packager.next_tokens import TOP_TOKENS, Answer, kept_answers
from web4lora_packager.proof import Model
from web4lora_packager.trained import read_kept

_SLICE_WEIGHTS = 64 << 20
_Kept = dict[str, torch.nn.Parameter]


def expect(base: Path, adapter: Path) -> dict[str, Any]:
    """Return how likely base and adapter make each next token of the answers that training kept.

    Args:
        base: The base model's folder.
        adapter: The adapter's folder.

    Returns:
        `likely`: for each answer and each of its tokens, the likeliest ones and their logarithms; or
        `left_out`: why this model can't be asked this way.

    Raises:
        InvalidInput: Transformers knows no such model, or a file is broken.
    """
    answers = kept_answers(read_kept(adapter))
    if not answers:
        return {"likely": []}
    torch.manual_seed(0)
    try:
        model = _model(base, adapter)
        return {"likely": [_likely(model, answer) for answer in answers]}
    # What an architecture or too little memory makes of it: told, and the gate does not count as passed.
    except (RuntimeError, TypeError, ValueError, KeyError, AttributeError, NotImplementedError) as error:
        return {"left_out": f"{type(error).__name__}: {error}"}


def _model(base: Path, adapter: Path) -> Any:
    """Return base and adapter, the base's weights mapped from their files."""
    model, files = skeleton.build(base, with_buffers=True), Model(base)
    for name, _ in list(model.named_parameters(remove_duplicate=False)):
        tensor = files.tensor_of(name)
        if tensor is None:
            raise KeyError(f"the files have no {name}")
        module, _, own = name.rpartition(".")
        weight = torch.nn.Parameter(files.files.whole(tensor), requires_grad=False)
        model.get_submodule(module)._parameters[own] = weight
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fan_in_fan_out corrected, and the like
        adapted = PeftModel.from_pretrained(model, str(adapter)).eval()
    for module in adapted.modules():
        if isinstance(module, torch.nn.Embedding):
            module.padding_idx = None  # of training alone, and maybe none of the rows that are taken
            module.register_forward_pre_hook(_take_rows)
            module.register_forward_hook(_narrow)
        elif type(module) is torch.nn.Linear and module.weight.numel() > _SLICE_WEIGHTS:
            module.forward = partial(_in_slices, module)  # type: ignore[method-assign]
        elif any(weight is not None for weight in module._parameters.values()):
            module.register_forward_pre_hook(_widen)
            module.register_forward_hook(_narrow)
    return adapted


def _take_rows(module: torch.nn.Module, asked: Any) -> Any:
    weight: Any = module.weight
    module._web4lora_kept = {"weight": weight}  # type: ignore[assignment]
    rows, places = asked[0].unique(return_inverse=True)
    module._parameters["weight"] = torch.nn.Parameter(weight[rows].float(), requires_grad=False)
    return (places, *asked[1:])


def _in_slices(module: torch.nn.Linear, inputs: torch.Tensor) -> torch.Tensor:
    rows = max(1, _SLICE_WEIGHTS // module.in_features)
    starts = range(0, module.out_features, rows)
    parts = [torch.nn.functional.linear(inputs, module.weight[at : at + rows].float()) for at in starts]
    outputs = torch.cat(parts, -1)
    return outputs if module.bias is None else outputs + module.bias.float()


def _widen(module: torch.nn.Module, _: Any) -> None:
    kept: _Kept = {name: weight for name, weight in module._parameters.items() if weight is not None}
    module._web4lora_kept = kept  # type: ignore[assignment]
    for name, weight in kept.items():
        if weight.dtype != torch.float32:
            module._parameters[name] = torch.nn.Parameter(weight.float(), requires_grad=False)


def _narrow(module: torch.nn.Module, *_: Any) -> None:
    kept: Any = module._web4lora_kept
    module._parameters.update(kept)


def _likely(model: Any, answer: Answer) -> list[list[tuple[int, float]]]:
    # The token at a place is told by the one before it.
    wanted = torch.arange(answer.start - 1, len(answer.tokens) - 1)
    options: dict[str, Any] = {"use_cache": False}
    narrow = "logits_to_keep" in inspect.signature(model.get_base_model().forward).parameters
    if narrow:
        options["logits_to_keep"] = wanted
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([answer.tokens]), **options).logits[0].float()
        found = (logits if narrow else logits[wanted]).log_softmax(-1).topk(TOP_TOKENS)
    return [
        list(zip(ids, logs, strict=True))
        for ids, logs in zip(found.indices.tolist(), found.values.tolist(), strict=True)
    ]
