from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFWriter
from web4lora_chassis.artifacts import ArtifactRef
from web4lora_chassis.errors import InvalidInput, NotFound
from web4lora_chassis.model_files.gguf import read_gguf
from web4lora_chassis.settings import load
from web4lora_deployer.records.deployments import Adapter, Deployment, Deployments
from web4lora_deployer.records.names import deployment_id_of
from web4lora_deployer.serving.adapters import require_adapter, set_scales
from web4lora_deployer.settings import DeployerSettings

from tests.unit.deployer.sample_records import record

Q, EMBEDDING = "blk.0.attn_q.weight", "token_embd.weight"
FITS = {f"{Q}.lora_a": (4, 32), f"{Q}.lora_b": (64, 4)}  # rows and columns, as numpy has them


def write(path: Path, architecture: str, tensors: dict[str, tuple[int, ...]], **keys: str) -> Path:
    writer = GGUFWriter(path, architecture)
    for key, value in keys.items():
        writer.add_string(key.replace("_", "."), value)
    for name, shape in tensors.items():
        writer.add_tensor(name, np.zeros(shape, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def check(folder: Path, tensors: dict[str, tuple[int, ...]], architecture: str = "llama") -> None:
    base = write(folder / "base.gguf", "llama", {Q: (64, 32), EMBEDDING: (100, 32)})
    kind = {"general_type": "adapter", "adapter_type": "lora"}
    adapter = write(folder / "adapter.gguf", architecture, tensors, **kind)
    require_adapter("tool", adapter, read_gguf(base))


@pytest.mark.parametrize(
    "tensors",
    [FITS, {f"{EMBEDDING}.lora_a": (100, 4), f"{EMBEDDING}.lora_b": (32, 4)}],
)
def test_an_adapter_that_fits_its_base_is_taken(tmp_path: Path, tensors: dict[str, tuple[int, ...]]) -> None:
    check(tmp_path, tensors)


@pytest.mark.parametrize(
    ("architecture", "tensors", "why"),
    [
        ("qwen2", FITS, "made for the architecture qwen2, this is llama"),
        ("llama", {"blk.9.attn_q.weight.lora_a": (4, 32)}, "blk.9.attn_q.weight, which the base does not"),
        ("llama", {f"{Q}.lora_a": (4, 32)}, f"but half of a change of {Q}"),
        (
            "llama",
            {f"{Q}.lora_a": (4, 16), f"{Q}.lora_b": (64, 4)},
            f"a {Q} of 16 x 64, the base has 32 x 64",
        ),
        ("llama", {**FITS, "blk.0.attn_norm.weight": (32,)}, "also changes blk.0.attn_norm.weight"),
    ],
)
def test_an_adapter_of_another_base_is_refused(
    tmp_path: Path, architecture: str, tensors: dict[str, tuple[int, ...]], why: str
) -> None:
    with pytest.raises(InvalidInput, match=why) as caught:
        check(tmp_path, tensors, architecture)
    assert caught.value.message.startswith("The adapter tool does not fit this base: ")


def test_what_is_no_adapter_is_refused(tmp_path: Path) -> None:
    base = write(tmp_path / "base.gguf", "llama", {Q: (64, 32)})
    with pytest.raises(InvalidInput, match="is no LoRA adapter: its GGUF holds a model"):
        require_adapter("tool", base, read_gguf(base))
    cut = write(tmp_path / "cut.gguf", "llama", FITS, general_type="adapter", adapter_type="lora")
    cut.write_bytes(cut.read_bytes()[:-64])
    with pytest.raises(InvalidInput, match="is cut off"):
        require_adapter("tool", cut, read_gguf(base))


def test_a_deployment_is_another_with_another_base_or_adapter() -> None:
    def identity(file: str, *adapters: tuple[str, str]) -> str:
        ref = ArtifactRef("gguf", "a", "e" * 64)
        made = tuple(Adapter(name, ref, f"{name}.gguf", digit * 64, 10) for name, digit in adapters)
        return deployment_id_of("demo", record(file, adapters=made).identity)

    ids = [
        identity("a"), identity("a", ("tool", "b")), identity("b", ("tool", "b")),
        identity("a", ("tool", "a")), identity("a", ("style", "b")),
        identity("a", ("tool", "b"), ("style", "b")), identity("a", ("style", "b"), ("tool", "b")),
    ]  # fmt: skip
    assert len(set(ids)) == 7
    assert ids[1] == identity("a", ("tool", "b"))


@pytest.fixture
def settings(tmp_path: Path) -> DeployerSettings:
    return load(DeployerSettings, home=tmp_path)


def saved(settings: DeployerSettings, *names: str) -> Deployment:
    ref = ArtifactRef("gguf", "a", "e" * 64)
    adapters = tuple(Adapter(name, ref, f"{name}/adapter.gguf", "e" * 64, 10) for name in names)
    made = record("a", adapters=adapters)
    Deployments(settings.deployer_home).save(made)
    return made


def test_the_first_adapter_is_applied_until_something_else_is_set(settings: DeployerSettings) -> None:
    made, deployments = saved(settings, "tool", "style"), Deployments(settings.deployer_home)
    assert deployments.get(made.id) == made
    assert deployments.scales(made) == {"tool": 1, "style": 0}
    for _ in range(2):
        assert set_scales("demo", {"style": 0.5}, settings) == made
        assert deployments.scales(made) == {"tool": 1, "style": 0.5}
    set_scales(made.id, {"tool": 0}, settings)
    assert deployments.scales(made) == {"tool": 0, "style": 0.5}
    deployments.remove(made)
    assert deployments.scales(made) == {"tool": 1, "style": 0}


@pytest.mark.parametrize(
    ("scales", "why", "fix"),
    [
        ({"tol": 1.0}, "demo:vaaaaaaaa has no adapter 'tol'.", "It has tool, style."),
        ({"tool": 2.5}, "The scale of tool is 2.5; it needs 0 to 2.", "0 is not at all"),
        ({"tool": -1.0}, "needs 0 to 2", ""),
        ({"tool": float("nan")}, "needs 0 to 2", ""),
    ],
)
def test_scales_out_of_bounds_change_nothing(
    settings: DeployerSettings, scales: dict[str, float], why: str, fix: str
) -> None:
    made = saved(settings, "tool", "style")
    with pytest.raises(InvalidInput) as caught:
        set_scales("demo", {"style": 1.0, **scales}, settings)
    assert why in caught.value.message
    assert fix in caught.value.fix
    assert Deployments(settings.deployer_home).scales(made) == {"tool": 1, "style": 0}


def test_a_deployment_without_adapters_says_so(settings: DeployerSettings) -> None:
    saved(settings)
    with pytest.raises(InvalidInput, match="has no adapters"):
        set_scales("demo", {"tool": 1.0}, settings)
    with pytest.raises(NotFound):
        set_scales("other", {"tool": 1.0}, settings)
