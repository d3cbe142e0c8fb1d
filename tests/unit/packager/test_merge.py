"""Merging: what is written, byte for byte, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from web4lora_chassis.errors import FailedPrecondition, InvalidInput, Web4Error
from web4lora_chassis.model_files.model_folder import INDEX_NAME, read_model_folder
from web4lora_packager.layout import Layout
from web4lora_packager.merge import Merged
from web4lora_packager.merge import merge as merge_with

BF16 = ml_dtypes.bfloat16
TARGET = "model.layers.0.self_attn.q_proj"


HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def _ignore(_: int) -> None:
    pass


def merge(
    base: Path, adapter: Path, target: Path, advance: Callable[[int], None], tied: bool = False
) -> Merged:
    """Merge into a base whose parameters have their tensors' names."""
    names = {name: name for name in read_model_folder(base).tensors}
    return merge_with(
        base, adapter, target, Layout(names, {HEAD: EMBEDDING} if tied else {}, frozenset()), advance
    )


def _base(folder: Path, tensors: dict[str, NDArray[Any]] | None = None, **config: Any) -> Path:
    random = np.random.default_rng(0)
    default = {
        "model.embed_tokens.weight": random.standard_normal((10, 8)).astype(BF16),
        f"{TARGET}.weight": random.standard_normal((6, 8)).astype(BF16),
        "model.layers.0.mlp.down_proj.weight": random.standard_normal((8, 4)).astype(BF16),
        "model.norm.weight": np.ones(8, np.float32),
        "model.counter": np.arange(3, dtype=np.int64),
    }
    folder.mkdir()
    save_file(
        default if tensors is None else tensors, folder / "model.safetensors", metadata={"format": "pt"}
    )
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    (folder / "tokenizer.json").write_text('{"added_tokens": [] }\n')
    return folder


def _adapter(folder: Path, tensors: dict[str, NDArray[Any]] | None = None, **changes: Any) -> Path:
    random = np.random.default_rng(1)
    default = {
        f"base_model.model.{TARGET}.lora_A.weight": random.standard_normal((2, 8)).astype(np.float32),
        f"base_model.model.{TARGET}.lora_B.weight": random.standard_normal((6, 2)).astype(np.float32),
    }
    folder.mkdir()
    save_file(default if tensors is None else tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "bias": "none", "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps({**config, **changes}))
    return folder


def _refused(tmp_path: Path, kind: type[Web4Error], **changes: Any) -> Web4Error:
    """Merge what must be refused, and check that no merged weights were left complete."""
    base = changes.pop("base", None) or _base(tmp_path / "base")
    adapter = changes.pop("adapter", None) or _adapter(tmp_path / "adapter", **changes)
    with pytest.raises(kind) as caught:
        merge(base, adapter, tmp_path / "merged", _ignore)
    return caught.value


def test_adds_the_product_in_float32_and_rounds_once(tmp_path: Path) -> None:
    base, adapter = _base(tmp_path / "base"), _adapter(tmp_path / "adapter")
    merged = merge(base, adapter, tmp_path / "merged", _ignore)
    before, lora = load_file(base / "model.safetensors"), load_file(adapter / "adapter_model.safetensors")
    down = lora[f"base_model.model.{TARGET}.lora_A.weight"]
    up = lora[f"base_model.model.{TARGET}.lora_B.weight"]
    old = before[f"{TARGET}.weight"].astype(np.float32)
    after = load_file(tmp_path / "merged" / "model.safetensors")
    np.testing.assert_array_equal(
        after[f"{TARGET}.weight"], (old + np.float32(2.0) * (up @ down)).astype(BF16)
    )
    assert (merged.adapter_tensors, merged.merged_tensors) == (2, 1)
    change = after[f"{TARGET}.weight"].astype(np.float64) - old
    assert merged.relative_effect == pytest.approx(np.linalg.norm(change) / np.linalg.norm(old))
    assert merged.max_abs_weight == max(
        np.abs(t.astype(np.float32)).max() for n, t in after.items() if "counter" not in n
    )


def test_copies_the_rest_byte_for_byte(tmp_path: Path) -> None:
    base, target = _base(tmp_path / "base"), tmp_path / "merged"
    merge(base, _adapter(tmp_path / "adapter"), target, _ignore)
    changed = read_model_folder(base).tensors[f"{TARGET}.weight"]
    old, new = (base / "model.safetensors").read_bytes(), (target / "model.safetensors").read_bytes()
    assert old[: changed.offset] == new[: changed.offset]
    assert old[changed.offset + changed.size_bytes :] == new[changed.offset + changed.size_bytes :]
    assert old != new
    for name in ("config.json", "tokenizer.json"):
        assert (base / name).read_bytes() == (target / name).read_bytes()


def test_sharded_checkpoints_keep_their_shards(tmp_path: Path) -> None:
    base = _base(tmp_path / "base")
    whole = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    names = sorted(whole)
    shards = {"model-00001-of-00002.safetensors": names[:2], "model-00002-of-00002.safetensors": names[2:]}
    for shard, held in shards.items():
        save_file({name: whole[name] for name in held}, base / shard)
    index = {"metadata": {}, "weight_map": {name: shard for shard, held in shards.items() for name in held}}
    (base / INDEX_NAME).write_text(json.dumps(index))
    (base / "consolidated.safetensors").write_bytes(b"not in the index")
    adapter, target, one = _adapter(tmp_path / "adapter"), tmp_path / "merged", tmp_path / "one"
    merge(base, adapter, target, _ignore)
    assert sorted(path.name for path in target.glob("*.safetensors")) == sorted(shards)
    assert (target / INDEX_NAME).read_bytes() == (base / INDEX_NAME).read_bytes()
    merge(_base(tmp_path / "unsharded"), adapter, one, _ignore)
    expected = load_file(one / "model.safetensors")
    found = {name: tensor for shard in shards for name, tensor in load_file(target / shard).items()}
    assert sorted(found) == sorted(expected)
    for name, tensor in expected.items():
        np.testing.assert_array_equal(found[name], tensor)


def test_progress_adds_up_to_all_bytes(tmp_path: Path) -> None:
    base, moved = _base(tmp_path / "base"), []
    merge(base, _adapter(tmp_path / "adapter"), tmp_path / "merged", moved.append)
    assert sum(moved) == read_model_folder(base).size_bytes


def test_a_tied_head_is_untied_when_it_is_trained_alone(tmp_path: Path) -> None:
    base = _base(tmp_path / "base", tie_word_embeddings=True)
    head = np.random.default_rng(2).standard_normal((10, 8)).astype(np.float32)
    lora = load_file(_adapter(tmp_path / "plain") / "adapter_model.safetensors")
    adapter = _adapter(
        tmp_path / "adapter", {**lora, "base_model.model.lm_head.weight": head}, modules_to_save=["lm_head"]
    )
    merge(base, adapter, tmp_path / "merged", _ignore, tied=True)
    after = load_file(tmp_path / "merged" / "model.safetensors")
    before = load_file(base / "model.safetensors")
    np.testing.assert_array_equal(after["lm_head.weight"], head.astype(BF16))
    np.testing.assert_array_equal(after["model.embed_tokens.weight"], before["model.embed_tokens.weight"])
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"] is False


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"use_dora": True}, "lora_magnitude_vector"),
        ({"bias": "all"}, "bias"),
        ({"lora_bias": True}, "lora_bias"),
        ({"peft_type": "LOHA"}, "peft_type"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"target_parameters": ["experts"]}, "target_parameters"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"something_new": {"x": 1}}, "something_new"),
    ],
)
def test_unknown_kinds_of_adapters_are_refused(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    error = _refused(tmp_path, FailedPrecondition, **changes)
    assert error.reason == "ADAPTER_UNSUPPORTED"
    assert named in error.message
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        (f"base_model.model.{TARGET}.lora_magnitude_vector", (6,)),
        ("base_model.model.model.norm.weight", (8,)),  # not in modules_to_save
        ("base_model.model.model.embed_tokens.lora_embedding_A", (2, 10)),
        (f"{TARGET}.lora_C.weight", (2, 2)),
        ("base_model.model.model.layers.0.mlp.down_proj.lora_A.weight", (2, 4)),  # without its lora_B
    ],
)
def test_every_adapter_tensor_must_be_used(tmp_path: Path, name: str, shape: tuple[int, ...]) -> None:
    lora = load_file(_adapter(tmp_path / "plain") / "adapter_model.safetensors")
    adapter = _adapter(tmp_path / "adapter", {**lora, name: np.ones(shape, np.float32)})
    error = _refused(tmp_path, FailedPrecondition, adapter=adapter)
    assert error.reason == "ADAPTER_UNSUPPORTED"
    assert not (tmp_path / "merged").exists()


def test_an_adapter_for_another_model_is_refused(tmp_path: Path) -> None:
    other = _base(tmp_path / "other", {f"{TARGET}.weight": np.ones((6, 7), BF16)})
    error = _refused(tmp_path, FailedPrecondition, base=other)
    assert error.reason == "ADAPTER_MISFIT"
    assert "(6, 7)" in error.message
    lacking = _base(tmp_path / "lacking", {"x.weight": np.ones((6, 8), BF16)})
    assert (
        TARGET in _refused(tmp_path, FailedPrecondition, base=lacking, adapter=tmp_path / "adapter").message
    )


def test_quantized_bases_are_refused(tmp_path: Path) -> None:
    base = _base(tmp_path / "base", {f"{TARGET}.weight": np.ones((6, 8), np.int8)})
    assert "I8" in _refused(tmp_path, FailedPrecondition, base=base).message


def test_a_rank_that_the_configuration_does_not_give_is_refused(tmp_path: Path) -> None:
    assert "rank 2" in _refused(tmp_path, FailedPrecondition, r=4).message


def test_an_adapter_without_effect_is_refused(tmp_path: Path) -> None:
    lora = load_file(_adapter(tmp_path / "plain") / "adapter_model.safetensors")
    name = f"base_model.model.{TARGET}.lora_B.weight"
    adapter = _adapter(tmp_path / "adapter", {**lora, name: np.zeros((6, 2), np.float32)})
    assert _refused(tmp_path, FailedPrecondition, adapter=adapter).reason == "ADAPTER_WITHOUT_EFFECT"


def test_numbers_that_are_none_are_refused(tmp_path: Path) -> None:
    lora = load_file(_adapter(tmp_path / "plain") / "adapter_model.safetensors")
    name = f"base_model.model.{TARGET}.lora_B.weight"
    adapter = _adapter(tmp_path / "adapter", {**lora, name: np.full((6, 2), np.nan, np.float32)})
    assert _refused(tmp_path, InvalidInput, adapter=adapter).reason == "ADAPTER_NOT_FINITE"


def test_an_overflow_of_float16_is_refused(tmp_path: Path) -> None:
    base = _base(tmp_path / "base", {f"{TARGET}.weight": np.full((6, 8), 60000, np.float16)})
    lora = load_file(_adapter(tmp_path / "plain") / "adapter_model.safetensors")
    adapter = _adapter(tmp_path / "adapter", {name: np.full_like(t, 100) for name, t in lora.items()})
    assert _refused(tmp_path, FailedPrecondition, base=base, adapter=adapter).reason == "MERGE_NOT_FINITE"


@pytest.mark.parametrize("broken", [b"", b"\xff" * 16, b"\x02\0\0\0\0\0\0\0{}x", b"\x04\0\0\0\0\0\0\0nope"])
def test_broken_weight_files_are_named(tmp_path: Path, broken: bytes) -> None:
    base = _base(tmp_path / "base")
    (base / "model.safetensors").write_bytes(broken)
    assert "model.safetensors" in _refused(tmp_path, InvalidInput, base=base).message


def test_an_index_can_not_leave_its_folder(tmp_path: Path) -> None:
    base = _base(tmp_path / "base")
    save_file({f"{TARGET}.weight": np.ones((6, 8), BF16)}, tmp_path / "outside.safetensors")
    index = {"weight_map": {f"{TARGET}.weight": "../outside.safetensors"}}
    (base / INDEX_NAME).write_text(json.dumps(index))
    assert "outside" in _refused(tmp_path, InvalidInput, base=base).message


@pytest.mark.parametrize("order", [1, -1])
def test_a_module_under_two_prefixes_is_refused(tmp_path: Path, order: int) -> None:
    lora = load_file(_adapter(tmp_path / "plain") / "adapter_model.safetensors")
    twice = {**lora, **{name.removeprefix("base_model.model."): 2 * t for name, t in lora.items()}}
    adapter = _adapter(tmp_path / "adapter", dict(list(twice.items())[::order]))
    error = _refused(tmp_path, FailedPrecondition, adapter=adapter)
    assert error.reason == "ADAPTER_UNSUPPORTED"
    assert f"{TARGET}.lora_A.weight does not begin with base_model.model." in error.message


def test_only_known_files_come_along(tmp_path: Path) -> None:
    base = _base(tmp_path / "base")
    for name in ("LICENSE", "NOTICE.txt", "generation_config.json"):
        (base / name).write_text("{}")
    for name in (
        "LICENSE_tok.py",
        "modeling.py",
        "LICENSE.pyc",
        "pytorch_model.bin",
        "consolidated.safetensors2",
    ):
        (base / name).write_text("{}")
    merge(base, _adapter(tmp_path / "adapter"), tmp_path / "merged", _ignore)
    assert sorted(path.name for path in (tmp_path / "merged").iterdir()) == [
        "LICENSE", "NOTICE.txt", "config.json", "generation_config.json", "model.safetensors",
        "tokenizer.json",
    ]  # fmt: skip


_BOUNDED = """
import resource, sys
from pathlib import Path
from web4lora_packager.layout import Layout
from web4lora_packager.merge import merge
base, adapter, target, limit = *map(Path, sys.argv[1:4]), int(sys.argv[4])
used = int(next(l for l in open("/proc/self/status") if l.startswith("VmData")).split()[1]) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (used + limit, used + limit))
names = {"lm_head.weight": "lm_head.weight", "model.embed_tokens.weight": "model.embed_tokens.weight"}
merge(base, adapter, target, Layout(names, {}, frozenset()), lambda _: None)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux counts memory so")
def test_a_head_trained_whole_is_merged_block_by_block(tmp_path: Path) -> None:
    shape = (64_000, 2048)  # 524 MB in 32 bit; a 7B's head is 4 to 8 times that, and takes the same
    head = np.ones(shape, BF16)
    base = _base(tmp_path / "base", {HEAD: head, EMBEDDING: np.ones((4, 8), BF16)})
    adapter = _adapter(
        tmp_path / "adapter",
        {f"base_model.model.{HEAD}": head.astype(np.float32) * 2},
        modules_to_save=["lm_head"],
    )
    del head
    limit = 300 << 20
    command = [sys.executable, "-c", _BOUNDED, base, adapter, tmp_path / "merged", str(limit)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    merged = read_model_folder(tmp_path / "merged").tensors[HEAD]
    with merged.path.open("rb") as file:
        file.seek(merged.offset + merged.size_bytes - 4096)
        assert (np.frombuffer(file.read(4096), BF16) == 2).all()


@pytest.mark.parametrize(
    ("changes", "scale"),
    [
        ({}, 2.0),
        ({"use_rslora": True}, 4 / np.sqrt(2)),
        ({"alpha_pattern": {"q_proj": 10}}, 5.0),
        ({"alpha_pattern": {"layers.1.self_attn.q_proj": 10}}, 2.0),
        ({"alpha_pattern": {"layers.0.self_attn.q_proj": 10}, "use_rslora": True}, 10 / np.sqrt(2)),
        ({"r": 64, "rank_pattern": {r"self_attn\..*": 2}}, 2.0),
        ({"loftq_config": {"loftq_bits": 4}}, 2.0),
    ],
)
def test_scale(tmp_path: Path, changes: dict[str, Any], scale: float) -> None:
    from web4lora_packager.adapter import Adapter, LowRank

    (change,) = Adapter(_adapter(tmp_path / "adapter", **changes)).plan().values()
    assert isinstance(change, LowRank)
    assert change.scale == pytest.approx(scale)
