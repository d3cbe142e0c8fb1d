from __future__ import annotations

import json
from pathlib import Path

import pytest
from web4lora.client.upload import named_files, store_dataset, store_suite
from web4lora_chassis.artifacts import ArtifactStore, open_store
from web4lora_chassis.errors import InvalidInput, NotFound
from web4lora_chassis.pipeline.dataset import DatasetSettings
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
    train, held_out = write(tmp_path / "a.jsonl", ROW), write(tmp_path / "b.json", ROW.replace('"a"', '"c"'))
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
    with pytest.raises(InvalidInput, match="there is no row in it, it has blank lines only"):
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


def chat_row(question: str) -> str:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": "yes"}]
    return json.dumps({"messages": turns}) + "\n"


def test_a_held_out_question_that_is_trained_on_is_an_error_unless_allowed(
    store: ArtifactStore, tmp_path: Path
) -> None:
    train, held_out = (
        write(tmp_path / "t.jsonl", chat_row("one")),
        write(tmp_path / "e.jsonl", chat_row(" one ")),
    )
    with pytest.raises(
        InvalidInput, match=r"e\.jsonl:1: held out, but the same user text is trained on"
    ) as raised:
        store_dataset(store, "demo", [train], [held_out])
    assert raised.value.fix.endswith("or set dataset.allow_duplicates to true.")
    ref = store_dataset(store, "demo", [train], [held_out], DatasetSettings(allow_duplicates=True))
    assert [entry.path for entry in store.manifest(ref).files] == ["eval/e.jsonl", "train/t.jsonl"]


def test_a_share_is_held_out_with_each_row_on_its_own_line(store: ArtifactStore, tmp_path: Path) -> None:
    lines = [chat_row(f"{number} {'abcdefghij'[number] * 20}") for number in range(10)]
    path = write(tmp_path / "t.jsonl", "".join(lines))
    ref = store_dataset(store, "demo", [path], [], DatasetSettings(eval_share=0.2))
    folder = tmp_path / "got"
    store.get(ref, folder)
    parts = [(folder / side / "t.jsonl").read_text().splitlines(keepends=True) for side in ("train", "eval")]
    assert [sum(line.strip() != "" for line in part) for part in parts] == [8, 2]
    assert [{one, other} for one, other in zip(*parts, strict=True)] == [{line, "\n"} for line in lines]
