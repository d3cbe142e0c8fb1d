from __future__ import annotations

import json
from pathlib import Path

import pytest
from web4lora.upload import named_files, store_dataset, store_suite
from web4lora_chassis.artifacts import ArtifactStore, open_store
from web4lora_chassis.errors import InvalidInput, NotFound
from web4lora_chassis.settings import Settings

ROW = json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]})


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return open_store(Settings(home=tmp_path / "home"))


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, "utf-8")
    return path


def test_a_dataset_keeps_its_parts_and_the_users_files_stay_theirs(
    tmp_path: Path, store: ArtifactStore
) -> None:
    train, held_out = write(tmp_path / "a.jsonl", ROW), write(tmp_path / "b.json", ROW)
    ref = store_dataset(store, "demo", [train], [held_out])
    assert [entry.path for entry in store.manifest(ref).files] == ["eval/b.json.jsonl", "train/a.jsonl"]
    assert train.stat().st_nlink == 1
    train.write_text("changed", "utf-8")
    got = tmp_path / "got"
    store.get(ref, got)
    assert (got / "train" / "a.jsonl").read_text("utf-8") == ROW


def test_bad_rows_stop_before_anything_is_stored(tmp_path: Path, store: ArtifactStore) -> None:
    bad = write(tmp_path / "a.jsonl", ROW + "\n{}\n")
    with pytest.raises(InvalidInput, match=r'a\.jsonl:2: "messages" is missing'):
        store_dataset(store, "demo", [bad], [])
    assert store.find() == []


def test_nothing_to_train_on_and_equal_names_are_refused(tmp_path: Path, store: ArtifactStore) -> None:
    empty, row = write(tmp_path / "a.jsonl", "\n"), write(tmp_path / "b.jsonl", ROW)
    with pytest.raises(InvalidInput, match="no row to train on"):
        store_dataset(store, "demo", [empty], [row])
    with pytest.raises(InvalidInput, match="have the same name"):
        store_dataset(store, "demo", [row, write(tmp_path / "deep" / "b.jsonl", ROW)], [])


def test_a_suite_brings_the_files_that_it_names(tmp_path: Path, store: ArtifactStore) -> None:
    suite = write(
        tmp_path / "my.yaml",
        "cores:\n  tool: {prompts: [a.jsonl, deep/b.jsonl]}\n  style: {prompts: a.jsonl, rules: r.yaml}\n",
    )
    assert named_files(suite) == ["a.jsonl", "deep/b.jsonl", "r.yaml"]
    with pytest.raises(NotFound, match=r"there is no file a\.jsonl"):
        store_suite(store, "demo", suite)
    for name in ("a.jsonl", "deep/b.jsonl", "r.yaml"):
        write(tmp_path / name, "x")
    ref = store_suite(store, "demo", suite)
    paths = [entry.path for entry in store.manifest(ref).files]
    assert paths == ["a.jsonl", "deep/b.jsonl", "r.yaml", "suite.yaml"]


@pytest.mark.parametrize("name", ["../a.jsonl", "/etc/passwd"])
def test_a_suite_does_not_leave_its_folder(tmp_path: Path, store: ArtifactStore, name: str) -> None:
    suite = write(tmp_path / "my.yaml", f"cores: {{tool: {{prompts: {name}}}}}")
    with pytest.raises(InvalidInput, match="outside of the suite's folder"):
        store_suite(store, "demo", suite)


@pytest.mark.parametrize(
    "text", ["a: [", "cores: {tool: {prompts: [3]}}", "cores: {tool: {prompts: {a: b}}}"]
)
def test_a_broken_suite_is_refused(tmp_path: Path, store: ArtifactStore, text: str) -> None:
    with pytest.raises(InvalidInput, match=r"my\.yaml"):
        store_suite(store, "demo", write(tmp_path / "my.yaml", text))
