"""Where the record of a model's training is found, and what it says of the system message."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from web4lora_chassis.artifacts import ArtifactRef, ArtifactStore, open_store
from web4lora_chassis.errors import FailedPrecondition, InvalidInput
from web4lora_chassis.model_files.trained_conversations import TrainedConversations
from web4lora_chassis.settings import Settings, load
from web4lora_deployer.prompts.training_record import find_record, model_file, read_record, trained_system

from tests.unit.chassis.model_files.test_trained_conversations import ASK, RECORD, ROW, changed, write


@pytest.mark.parametrize("record", [{**RECORD, "conversations": []}, changed(lambda c: c.update(turns=[]))])
def test_a_record_of_nothing_is_no_record(tmp_path: Path, record: object) -> None:
    with pytest.raises(FailedPrecondition, match="no trained answer"):
        read_record(write(tmp_path, record))


@pytest.mark.parametrize(
    ("systems", "wanted"), [(["A", "B", "B"], "B"), (["", "", "A"], ""), (["", "A"], "A"), ([], "")]
)
def test_the_most_frequent_system_message_is_the_trained_one(systems: list[str], wanted: str) -> None:
    said = [({"role": "system", "content": each}, ASK) if each else (ASK,) for each in systems]
    record = TrainedConversations(tuple(replace(ROW, messages=messages) for messages in said))
    assert trained_system(record) == wanted


@pytest.mark.parametrize("told", ["Be brief.", ""])
def test_what_training_counted_itself_wins(told: str) -> None:
    row = replace(ROW, messages=({"role": "system", "content": "A"}, ASK))
    assert trained_system(TrainedConversations((row,), system=told)) == told


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return open_store(load(Settings, store=(tmp_path / "store").as_uri()))


def put(store: ArtifactStore, folder: Path, kind: str, *files: str, inputs: object = ()) -> ArtifactRef:
    paths = {name: folder / name for name in files}
    for path in paths.values():
        path.write_text(kind + path.name)
    return store.put(kind, "demo", paths, inputs=list(inputs), link=False)  # type: ignore[call-overload]


NAME = "trained_conversations.json"


def test_the_nearest_record_is_found(store: ArtifactStore, tmp_path: Path) -> None:
    adapter = put(store, tmp_path, "adapter", "adapter_config.json", NAME)
    merged = put(store, tmp_path, "merged_model", "config.json", inputs=[adapter])
    first = put(store, tmp_path, "gguf", "16.gguf", inputs=[merged])
    second = put(store, tmp_path, "gguf", "4.gguf", inputs=[first])
    beside = put(store, tmp_path, "gguf", "8.gguf", NAME, inputs=[first])
    assert find_record(second, store) == find_record(first, store) == adapter
    assert find_record(beside, store) == beside
    assert model_file(store.manifest(beside)).path == "8.gguf"


def test_a_model_that_was_trained_here_must_have_one(store: ArtifactStore, tmp_path: Path) -> None:
    adapter = put(store, tmp_path, "adapter", "adapter_config.json")
    merged = put(store, tmp_path, "merged_model", "config.json", inputs=[adapter])
    model = put(store, tmp_path, "gguf", "4.gguf", inputs=[merged])
    for gone in (None, adapter, merged):
        if gone is not None:
            store.delete(gone)
        with pytest.raises(FailedPrecondition, match="was trained here") as caught:
            find_record(model, store)
        assert caught.value.reason == "TRAINING_RECORD_MISSING"


def test_a_model_from_elsewhere_has_none(store: ArtifactStore, tmp_path: Path) -> None:
    base = put(store, tmp_path, "base_model", "config.json")
    assert find_record(put(store, tmp_path, "gguf", "4.gguf"), store) is None
    assert find_record(put(store, tmp_path, "gguf", "16.gguf", inputs=[base]), store) is None


@pytest.mark.parametrize("files", [[NAME], ["a.gguf", "b.gguf"], ["a.gguf", "b.gguf", NAME]])
def test_an_artifact_without_one_model_is_refused(
    store: ArtifactStore, tmp_path: Path, files: list[str]
) -> None:
    with pytest.raises(InvalidInput, match="exactly one GGUF"):
        model_file(store.manifest(put(store, tmp_path, "gguf", *files)))
