"""LoRA adapters in PEFT's form, as the packager merges them."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from tests.corpus import safetensors
from tests.corpus.case import Case, Change, Kind, having, holds, no_json

CONFIG, FILE = "adapter_config.json", "adapter_model.safetensors"
MODULE = "model.layers.0.self_attn.q_proj"
DOWN, UP = f"base_model.model.{MODULE}.lora_A.weight", f"base_model.model.{MODULE}.lora_B.weight"
PLAIN = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "bias": "none"}


def whole(folder: Path) -> None:
    base = folder / "base"
    base.mkdir()
    ones = np.ones((6, 8), ml_dtypes.bfloat16)
    save_file({f"{MODULE}.weight": ones}, base / "model.safetensors", metadata={"format": "pt"})
    (base / "config.json").write_text("{}")
    having(CONFIG, **PLAIN)(folder)
    save_file(
        {DOWN: np.ones((2, 8), np.float32), UP: np.ones((6, 2), np.float32)},
        folder / FILE, metadata={"format": "pt"},
    )  # fmt: skip


def packager(folder: Path, made: Path) -> None:
    from web4lora_chassis.model_files.model_folder import read_model_folder
    from web4lora_packager.adapter import Adapter
    from web4lora_packager.layout import Layout
    from web4lora_packager.merge import merge

    Adapter(folder).plan()
    names = {name: name for name in read_model_folder(folder / "base").tensors}
    with tempfile.TemporaryDirectory(dir=made) as work:  # as a job's, which goes with the job
        merge(folder / "base", folder, Path(work) / "merged", Layout(names, {}, frozenset()), lambda _: None)


def tensors(**changes: Any) -> Change:
    """Change tensors by the end of their names; None takes one out."""
    return arrays(
        lambda found: found.update(
            {name: changes[part] for part, name in (("down", DOWN), ("up", UP)) if part in changes}
        )
    )


def arrays(change: Any) -> Change:
    def apply(folder: Path) -> None:
        found: dict[str, NDArray[Any]] = load_file(folder / FILE)
        change(found)
        save_file(found, folder / FILE, metadata={"format": "pt"})

    return apply


def value(number: float, dtype: Any = np.float32) -> NDArray[Any]:
    data = np.ones((6, 2), dtype)
    data[3, 1] = number
    return data


CONFIGS: dict[str, dict[str, Any]] = {
    "rank 0": {"r": 0},
    "rank below 0": {"r": -2},
    "rank of another number": {"r": 7},
    "rank a text": {"r": "two"},
    "rank a text of a number": {"r": "2"},
    "rank a half": {"r": 2.5},
    "rank true": {"r": True},
    "rank a list": {"r": [2]},
    "rank null": {"r": None},
    "rank infinite": {"r": float("inf")},
    "rank of 4,000 digits": {"r": 10**4000},
    "alpha no number": {"lora_alpha": float("nan")},
    "alpha infinite": {"lora_alpha": float("inf")},
    "alpha a text": {"lora_alpha": "x"},
    "alpha a list": {"lora_alpha": [4]},
    "alpha null": {"lora_alpha": None},
    "alpha 0": {"lora_alpha": 0},
    "alpha of 4,000 digits": {"lora_alpha": 10**4000},
    "alpha 1e308": {"lora_alpha": 1e308},
    "rank pattern a list": {"rank_pattern": [1]},
    "rank pattern a text": {"rank_pattern": "x"},
    "rank pattern no expression": {"rank_pattern": {"(": 2}},
    "rank pattern without end": {"rank_pattern": {r"(\w+\.?)+x": 2}},
    "rank pattern infinite": {"rank_pattern": {"q_proj": float("inf")}},
    "alpha pattern no number": {"alpha_pattern": {"q_proj": float("nan")}},
    "alpha pattern no expression": {"alpha_pattern": {"[": 2}},
    "alpha pattern without end": {"alpha_pattern": {"(.*.*.*.*.*.*.*.*)*x": 2}},
    "alpha pattern of many ways": {"alpha_pattern": {"(.|.)" * 36 + "x": 2}},
    "alpha pattern of backslashes": {"alpha_pattern": {r"\\*" * 60 + "x": 2}},
    "alpha pattern that looks back": {"alpha_pattern": {r"(.)\1*x": 2}},
    "alpha pattern of a million letters": {"alpha_pattern": {"x" * 1_000_000: 2}},
    "stabilized a text": {"use_rslora": "false"},
    "modules to save a text": {"modules_to_save": "lm_head"},
    "modules to save numbers": {"modules_to_save": [7]},
    "modules to save of no name": {"modules_to_save": [""]},
    "modules to save an object": {"modules_to_save": {"lm_head": 1}},
    "bias trained": {"bias": "all"},
    "bias of many lines": {"bias": "a\nb" * 999},
    "bias a list": {"bias": ["none"]},
    "no kind": {"peft_type": None},
    "another kind": {"peft_type": "LOHA"},
    "kind a list": {"peft_type": ["LORA"]},
    "kind of half a character": {"peft_type": "\ud800"},
    "DoRA": {"use_dora": True},
    "initial weights a list": {"init_lora_weights": [True]},
    "initial weights of the base": {"init_lora_weights": "pissa"},
    "a key of a million letters": {"x" * 1_000_000: 1},
    "a key of many lines": {"a\nb": 1},
    "a value nested deep": {"new": [[[[[[[[1]]]]]]]]},
}
WEIGHTS: dict[str, Change] = {
    "no number": tensors(up=value(float("nan"))),
    "infinite": tensors(up=value(float("-inf"))),
    "no number in 16 bit": tensors(up=value(float("nan"), np.float16)),
    "beyond the base's type": tensors(up=value(3e38)),
    "zeros": tensors(up=np.zeros((6, 2), np.float32)),
    "integers": tensors(up=np.ones((6, 2), np.int32)),
    "64 bit": tensors(up=np.ones((6, 2), np.float64)),
    "another rank on one side": tensors(up=np.ones((6, 3), np.float32)),
    "another rank than said": tensors(up=np.ones((6, 3), np.float32), down=np.ones((3, 8), np.float32)),
    "rank 0": tensors(up=np.ones((6, 0), np.float32), down=np.ones((0, 8), np.float32)),
    "too wide": tensors(down=np.ones((2, 9), np.float32)),
    "too high": tensors(up=np.ones((7, 2), np.float32)),
    "one dimension": tensors(up=np.ones(12, np.float32)),
    "three dimensions": tensors(up=np.ones((6, 2, 1), np.float32)),
    "no dimension": tensors(up=np.ones((), np.float32)),
    "no A": arrays(lambda found: found.pop(DOWN)),
    "no B": arrays(lambda found: found.pop(UP)),
    "nothing": arrays(lambda found: found.clear()),
    "another prefix": arrays(lambda found: found.update({UP.removeprefix("base_model."): found.pop(UP)})),
    "a module that the base lacks": arrays(
        lambda found: found.update({name.replace("q_proj", "z_proj"): found.pop(name) for name in (UP, DOWN)})
    ),
    "a magnitude": arrays(
        lambda found: found.update({UP.replace("lora_B", "lora_magnitude_vector"): found[UP].copy()})
    ),
    "a name of many lines": arrays(lambda found: found.update({"a\nb\x1b[31m": found[UP].copy()})),
    "a name of a million letters": arrays(lambda found: found.update({"x" * 1_000_000: found[UP].copy()})),
}

KIND = Kind(
    name="adapter",
    whole=whole,
    readers={"packager": packager},
    cases=(
        *no_json(CONFIG, "adapter_config"),
        Case("no configuration", lambda folder: (folder / CONFIG).unlink()),
        Case("no weights", lambda folder: (folder / FILE).unlink()),
        *(Case(f"configuration: {name}", having(CONFIG, **values)) for name, values in CONFIGS.items()),
        *(Case(f"weights: {name}", change) for name, change in WEIGHTS.items()),
        *(Case(f"file: {name}", holds(FILE, data)) for name, data in safetensors.BROKEN.items()),
    ),
    names=r"adapter_config\.json|adapter_model\.safetensors",
)
