"""Every shape of an adapter that can be asked for is trained, exported, and merged as PEFT merges it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from web4lora_chassis.dataset import Dataset
from web4lora_chassis.pipeline.train import LoraSettings
from web4lora_packager.layout import Layout
from web4lora_packager.merge import merge
from web4lora_packager.skeleton import describe
from web4lora_trainer.decoder import read_decoder
from web4lora_trainer.preflight import adapter_parameters
from web4lora_trainer.train import Base, train

from tests.unit.trainer.test_train import SETTINGS, rows, silent

LINEAR = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
SHAPES: dict[str, tuple[LoraSettings, dict[str, Any]]] = {
    "all linear": (LoraSettings(4, target_modules=("all-linear",)), {"target_modules": LINEAR}),
    "all linear, the last layer": (
        LoraSettings(4, target_modules=("all-linear",), last_layers=1),
        {"target_modules": LINEAR, "layers_to_transform": [1]},
    ),
    "rank stabilized": (LoraSettings(4, use_rslora=True), {"use_rslora": True}),
    "DoRA": (LoraSettings(4, use_dora=True), {"use_dora": True}),
    "patterns": (
        LoraSettings(4, rank_pattern={"v_proj": 2}, alpha_pattern={"layers.1.self_attn.q_proj": 24.0}),
        {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"layers.1.self_attn.q_proj": 24.0}},
    ),
}


@pytest.mark.parametrize(("lora", "config"), SHAPES.values(), ids=SHAPES)
def test_an_adapter_of_each_shape_is_merged_as_peft_merges_it(
    tiny_base: Path, tmp_path: Path, lora: LoraSettings, config: dict[str, Any]
) -> None:
    settings = replace(SETTINGS, lora=lora, max_steps=2)
    outcome = train(settings, Dataset(rows(9), (), ()), Base(tiny_base, "org/tiny"), tmp_path, silent)
    assert outcome.trained_parameters == adapter_parameters(read_decoder(tiny_base), settings)
    adapter = tmp_path / "output"
    written = json.loads((adapter / "adapter_config.json").read_text())
    assert {key: written[key] for key in config} == config

    merge(tiny_base, adapter, tmp_path / "merged", Layout.from_json(describe(tiny_base)), lambda _: None)
    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    theirs = PeftModel.from_pretrained(model, adapter).merge_and_unload().state_dict()
    base = {name: tensor.float() for name, tensor in load_file(tiny_base / "model.safetensors").items()}
    changed = set()
    for path in (tmp_path / "merged").glob("*.safetensors"):
        for name, tensor in load_file(path).items():
            torch.testing.assert_close(tensor.float(), theirs[name].to(tensor.dtype).float())
            if not torch.equal(theirs[name], base[name]):
                changed.add(name.removesuffix(".weight"))
    assert changed == set(read_decoder(tiny_base).adapted(lora))
