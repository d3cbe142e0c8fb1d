"""What a training begins with: its weights, or those of an earlier adapter, and how fast each learns."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from web4lora_chassis.dataset import Dataset
from web4lora_chassis.errors import InvalidInput
from web4lora_chassis.pipeline.train import LoraSettings, TrainSettings
from web4lora_trainer.assemble import assemble
from web4lora_trainer.base_model import load_tokenizer
from web4lora_trainer.decoder import read_decoder
from web4lora_trainer.device import Device
from web4lora_trainer.encoding import encode_rows
from web4lora_trainer.ladder import rungs
from web4lora_trainer.loss_report import read_losses
from web4lora_trainer.plan import make_plan
from web4lora_trainer.sft import AnswerTrainer
from web4lora_trainer.train import Base, train

from tests.unit.trainer.test_train import SETTINGS, rows, silent


def assembled(
    base: Path,
    folder: Path,
    settings: TrainSettings = SETTINGS,
    start: Path | None = None,
    dtype: str = "fp32",
) -> AnswerTrainer:
    decoder, device = read_decoder(base), Device("cpu", "cpu", dtype, 1)
    encoded = encode_rows(rows(18), load_tokenizer(base), 512)
    plan = make_plan("key", settings, decoder, encoded, replace(encoded, rows=()), device)
    rung = rungs(plan, may_checkpoint=False)[0]
    return assemble(plan, rung, settings, decoder, encoded.rows, (), folder, start=start)


def weights(trainer: AnswerTrainer) -> dict[str, torch.Tensor]:
    return get_peft_model_state_dict(trainer.peft_model)


def test_in_16_bit_no_adapted_layer_s_input_goes_to_fp32_and_back(tiny_base: Path, tmp_path: Path) -> None:
    """It costs a tenth of the time on a CPU that multiplies bf16, and changes no bit of a gradient."""
    trainer = assembled(tiny_base, tmp_path, dtype="bf16")
    layers = [layer for layer in trainer.peft_model.modules() if isinstance(layer, LoraLayer)]
    inputs: list[torch.dtype] = []
    for layer in layers:
        torch.nn.init.normal_(layer.lora_B["default"].weight)
        layer.lora_A["default"].register_forward_pre_hook(lambda _, given: inputs.append(given[0].dtype))
    batch = next(iter(trainer.get_train_dataloader()))

    def gradients() -> dict[str, torch.Tensor]:
        trainer.peft_model.zero_grad()
        trainer.compute_loss(trainer.peft_model, batch).backward()
        return {n: p.grad.clone() for n, p in trainer.peft_model.named_parameters() if p.grad is not None}

    ours = gradients()
    assert inputs == [torch.bfloat16] * len(layers)
    for layer in layers:
        layer.cast_input_dtype_enabled = True
    pefts = gradients()
    assert ours.keys() == pefts.keys()
    assert all(torch.equal(ours[name], gradient) for name, gradient in pefts.items())


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_padding_changes_neither_loss_nor_gradient(tiny_base: Path, tmp_path: Path, attention: str) -> None:
    """No mask is passed on: rows of several lengths in a batch are to give what each gives alone."""
    trainer = assembled(tiny_base, tmp_path)
    trainer.peft_model.set_attn_implementation(attention)
    for layer in trainer.peft_model.modules():
        if isinstance(layer, LoraLayer):
            torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
    data: Any = trainer.train_dataset
    chosen = sorted(data, key=lambda row: len(row["input_ids"]))[:: len(data) // 3]
    assert len({len(row["input_ids"]) for row in chosen}) > 1

    def run(batches: list[list[Any]]) -> tuple[float, dict[str, torch.Tensor]]:
        trainer.peft_model.zero_grad()
        total = 0.0
        for batch in batches:
            loss = trainer.compute_loss(
                trainer.peft_model, trainer.data_collator(batch), num_items_in_batch=100
            )
            loss.backward()
            total += loss.item()
        named = trainer.peft_model.named_parameters()
        return total, {name: p.grad.clone() for name, p in named if p.grad is not None}

    loss, gradients = run([chosen])
    alone, expected = run([[row] for row in chosen])
    assert loss == pytest.approx(alone, rel=1e-5)
    for name, gradient in expected.items():
        assert (gradients[name] - gradient).norm() < 1e-4 * gradient.norm(), name


def test_a_training_from_an_adapter_begins_with_its_weights(tiny_base: Path, tmp_path: Path) -> None:
    data, base = Dataset(rows(18), (), ()), Base(tiny_base, "org/tiny")
    train(SETTINGS, data, base, tmp_path / "first", silent)
    earlier = tmp_path / "first" / "output"
    before = load_file(earlier / "adapter_model.safetensors")
    fresh = weights(assembled(tiny_base, tmp_path / "a"))
    assert before.keys() == fresh.keys()
    assert all(not torch.equal(fresh[name], tensor) for name, tensor in before.items() if "lora_B" in name)
    found = weights(assembled(tiny_base, tmp_path / "b", start=earlier))
    assert all(torch.equal(found[name], tensor) for name, tensor in before.items())

    again = replace(SETTINGS, start_from="a" * 64)
    train(again, data, base, tmp_path / "second", silent, start=earlier)
    first, second = (
        read_losses(tmp_path / name / "output" / "logs" / "loss.csv") for name in ("first", "second")
    )
    assert second[0].loss < first[0].loss
    after = load_file(tmp_path / "second" / "output" / "adapter_model.safetensors")
    assert any(not torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("case", ["rank", "lacking", "more"])
def test_an_adapter_of_another_shape_is_refused(tiny_base: Path, tmp_path: Path, case: str) -> None:
    found = {name: tensor.contiguous() for name, tensor in weights(assembled(tiny_base, tmp_path)).items()}
    name = min(found)
    if case == "lacking":
        del found[name]
    elif case == "more":
        found["other"] = found[name].clone()
    save_file(found, tmp_path / "adapter_model.safetensors")
    rank = 8 if case == "rank" else 4
    with pytest.raises(InvalidInput, match=r"^train\.from: \d+ tensors of that adapter are others"):
        assembled(tiny_base, tmp_path, replace(SETTINGS, lora=LoraSettings(rank=rank)), tmp_path)


def test_every_schedule_and_optimizer_is_one_of_transformers(tiny_base: Path, tmp_path: Path) -> None:
    """What is left out needs figures of its own, a held-out loss, or a library that may be missing."""
    from transformers.trainer_utils import SchedulerType
    from transformers.training_args import OptimizerNames
    from web4lora_chassis.pipeline.train import OPTIMIZERS, REPORTS, SCHEDULES

    assert {kind.value for kind in SchedulerType} - set(SCHEDULES) == {
        "reduce_lr_on_plateau", "cosine_with_min_lr", "cosine_warmup_with_min_lr", "warmup_stable_decay",
        "greedy",
    }  # fmt: skip
    assert set(SCHEDULES) <= {kind.value for kind in SchedulerType}
    assert set(OPTIMIZERS) <= {kind.value for kind in OptimizerNames}
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    assert set(REPORTS) <= INTEGRATION_TO_CALLBACK.keys()
    names: dict[str, str] = {}
    for optim in OPTIMIZERS:
        trainer = assembled(tiny_base, tmp_path / optim, replace(SETTINGS, optim=optim))
        names[optim] = type(trainer.create_optimizer()).__name__
    assert names == {
        "adamw_torch": "AdamW", "adamw_torch_fused": "AdamW", "adafactor": "Adafactor", "sgd": "SGD",
        "adagrad": "Adagrad", "rmsprop": "RMSprop",
    }  # fmt: skip


def test_lora_plus_teaches_the_matrices_b_faster(tiny_base: Path, tmp_path: Path) -> None:
    """One step of SGD is the gradient times the rate: B, which starts at zero, then is the ratio times B."""
    found = {}
    for ratio in (1.0, 4.0):
        settings = replace(
            SETTINGS, optim="sgd", loraplus_lr_ratio=ratio, max_steps=1, max_grad_norm=1e6, warmup_ratio=0.0
        )
        trainer = assembled(tiny_base, tmp_path / str(ratio), settings)
        before = {name: tensor.clone() for name, tensor in weights(trainer).items()}
        trainer.train()
        found[ratio] = {name: tensor - before[name] for name, tensor in weights(trainer).items()}
    changed = 0
    for name, plain in found[1.0].items():
        if "lora_B" in name:
            torch.testing.assert_close(found[4.0][name], 4 * plain)
            changed += bool(plain.abs().max() > 0)
        else:
            torch.testing.assert_close(found[4.0][name], plain)
    assert changed


def test_neftune_adds_noise_to_training_alone(tiny_base: Path, tmp_path: Path) -> None:
    def step(alpha: float) -> Any:
        settings = replace(SETTINGS, neftune_noise_alpha=alpha, max_steps=1, warmup_ratio=0.0)
        folder = tmp_path / str(alpha)
        train(settings, Dataset(rows(18), (), ()), Base(tiny_base, "org/tiny"), folder, silent)
        loss = read_losses(folder / "loss.csv")[0].loss
        config = json.loads((folder / "output" / "adapter_config.json").read_text())
        return loss, load_file(folder / "output" / "adapter_model.safetensors"), config

    quiet, noisy = step(0.0), step(50.0)
    assert quiet[0] != noisy[0]
    assert any(not torch.equal(quiet[1][name], noisy[1][name]) for name in quiet[1])
    assert quiet[2] == noisy[2], "nothing of it is left in the adapter"
    trainer = assembled(tiny_base, tmp_path, replace(SETTINGS, neftune_noise_alpha=50.0))
    assert trainer.args.neftune_noise_alpha == 50.0
    ids = torch.arange(5, 13).unsqueeze(0)
    trainer.peft_model.eval()
    with torch.no_grad():
        first = trainer.peft_model(input_ids=ids).logits
        assert torch.equal(first, trainer.peft_model(input_ids=ids).logits)
