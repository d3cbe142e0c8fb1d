"""Which adapter a training may go on from."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import pytest
from web4lora_chassis.artifacts import ArtifactRef, ArtifactStore
from web4lora_chassis.artifacts.folder import FolderBackend
from web4lora_chassis.artifacts.manifest import Manifest
from web4lora_chassis.earlier_adapter import adapter_of, require_base, start_problems
from web4lora_chassis.errors import InvalidInput, NotFound
from web4lora_chassis.pipeline.train import LoraSettings, TrainSettings

BASE = ArtifactRef("base_model", "tiny", "b" * 64)
LORA = LoraSettings(rank=4, target_modules=("v_proj", "q_proj"), rank_pattern={"q_proj": 2})


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(FolderBackend(tmp_path / "store"))


def put(store: ArtifactStore, tmp_path: Path, settings: TrainSettings) -> Manifest:
    weights = tmp_path / "adapter_model.safetensors"
    weights.write_bytes(b"weights")
    ref = store.put(
        "adapter", "demo", {weights.name: weights}, inputs=[BASE], parameters=asdict(settings), created_by="t"
    )
    return store.manifest(ref)


def test_an_adapter_is_found_by_its_digest_and_by_its_beginning(store: ArtifactStore, tmp_path: Path) -> None:
    made = put(store, tmp_path, TrainSettings(lora=LORA))
    assert adapter_of(store, made.digest).ref == adapter_of(store, made.digest[:12]).ref == made.ref
    with pytest.raises(NotFound, match=r"^train\.from: there is no adapter with the digest 0000") as caught:
        adapter_of(store, "0" * 64)
    assert caught.value.metadata["field"] == "train.from"


@pytest.mark.parametrize(
    ("same", "field"),
    [
        (LORA, ""),
        (replace(LORA, dropout=0.1), ""),
        (replace(LORA, alpha=8.0), ""),  # the default of rank 4
        (replace(LORA, target_modules=("q_proj", "v_proj")), ""),
        (replace(LORA, rank=8, alpha=8.0), "rank"),
        (replace(LORA, alpha=9.0), "alpha"),
        (replace(LORA, target_modules=("q_proj",)), "target_modules"),
        (replace(LORA, last_layers=2), "last_layers"),
        (replace(LORA, use_rslora=True), "use_rslora"),
        (replace(LORA, rank_pattern={}), "rank_pattern"),
        (replace(LORA, alpha_pattern={"q_proj": 3.0}), "alpha_pattern"),
    ],
)
def test_another_shape_is_a_line_and_the_same_none(
    store: ArtifactStore, tmp_path: Path, same: LoraSettings, field: str
) -> None:
    made = put(store, tmp_path, TrainSettings(lora=LORA))
    found = list(start_problems(TrainSettings(lora=same), made))
    assert [problem.field for problem in found] == ([f"train.lora.{field}"] if field else [])
    assert all(str(made.ref) in problem.text and "\n" not in problem.text for problem in found)


def test_an_adapter_that_says_nothing_of_its_shape_is_refused(store: ArtifactStore, tmp_path: Path) -> None:
    made = put(store, tmp_path, TrainSettings(lora=LORA))
    [problem] = start_problems(TrainSettings(lora=LORA), replace(made, parameters={}))
    assert problem.field == "train.from"


def test_another_base_is_refused(store: ArtifactStore, tmp_path: Path) -> None:
    made = put(store, tmp_path, TrainSettings(lora=LORA))
    require_base(made, BASE)
    with pytest.raises(InvalidInput, match="was trained on base_model/tiny@bbbbbbbbbbbb, not on base_model/"):
        require_base(made, replace(BASE, digest="c" * 64))
