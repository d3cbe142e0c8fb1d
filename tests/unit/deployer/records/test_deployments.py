import json
from pathlib import Path
from typing import Any

import pytest
from web4lora_chassis.errors import DataLoss, NotFound
from web4lora_deployer.records.deployments import Adapter, Deployments, Parameters

from tests.unit.deployer.sample_records import record


@pytest.fixture
def deployments(tmp_path: Path) -> Deployments:
    return Deployments(tmp_path)


def test_a_record_comes_back_as_it_was(deployments: Deployments) -> None:
    saved = record("a", loaded=False, endpoint="http://127.0.0.1:1/v1")
    deployments.save(saved)
    assert deployments.get(saved.id) == saved
    assert deployments.list() == [saved]


def test_the_newest_comes_first(deployments: Deployments) -> None:
    for digit, created_at in (("a", 1.0), ("b", 3.0), ("c", 2.0)):
        deployments.save(record(digit, created_at=created_at))
    assert [item.id[-1] for item in deployments.list()] == ["b", "c", "a"]


def test_a_name_stands_for_what_was_promoted_not_for_the_newest(deployments: Deployments) -> None:
    old, new = record("a", created_at=1.0), record("b", created_at=2.0)
    for item in (old, new):
        deployments.save(item)
    deployments.save(record("c", endpoint="", created_at=3.0))  # a killed attempt: it may not be the model
    assert deployments.find("demo") == new  # nothing was promoted yet
    deployments.promote(old)
    assert deployments.find("demo") == old


def test_a_name_remembers_who_served_before_newest_first(deployments: Deployments) -> None:
    for digit in "abc":
        deployments.save(record(digit))
        deployments.promote(record(digit))
    name = deployments.promote(record("a"))
    assert (name.current[-1], [item[-1] for item in name.previous]) == ("a", ["c", "b"])
    assert deployments.promote(record("a")) == name  # again changes nothing


def test_what_is_removed_leaves_its_name_and_its_file(deployments: Deployments) -> None:
    kept = record("b", file=record("a").file)
    for item in (record("a"), kept):
        deployments.save(item)
        deployments.promote(item)
    file = deployments.path(kept)
    file.parent.mkdir()
    file.write_bytes(b"GGUF")
    deployments.remove(record("a"))
    name = deployments.name("demo")
    assert name is not None
    assert name.previous == ()
    assert file.exists()  # the other one serves it
    deployments.remove(kept)
    assert deployments.name("demo") is None
    assert not file.parent.exists()
    deployments.remove(kept)  # again is no error


def test_an_adapter_s_file_stays_as_long_as_somebody_serves_it(deployments: Deployments) -> None:
    adapter = Adapter("tool", record("e").gguf, "eeee/adapter.gguf", "e" * 64, 10)
    one, other = record("a", adapters=(adapter,)), record("b", adapters=(adapter,))
    for item in (one, other):
        deployments.save(item)
    file = deployments.models / adapter.file
    file.parent.mkdir()
    file.write_bytes(b"GGUF")
    deployments.remove(one)
    assert file.exists()
    deployments.remove(other)
    assert not file.parent.exists()


@pytest.mark.parametrize("name", ["demo", "demo:vaaaaaaaa", "../../etc/passwd", "..:vaaaaaaaa", ""])
def test_what_is_not_there_is_not_found(deployments: Deployments, name: str) -> None:
    with pytest.raises(NotFound):
        deployments.find(name)


def test_going_back_leaves_no_way_to_what_failed_and_says_why(deployments: Deployments) -> None:
    for digit in "abc":
        deployments.save(record(digit))
        deployments.promote(record(digit))
    name = deployments.go_back(record("b"), "it crashed")
    assert (name.current[-1], name.previous[0][-1], name.rolled_back[0][-1]) == ("b", "a", "c")
    assert deployments.name("demo") == name
    assert name.note == "it crashed"
    assert deployments.promote(record("d")).rolled_back == ()  # what failed is kept until then alone
    deployments.go_back(record("b"), "")
    name = deployments.promote(record("c"))
    assert ([item[-1] for item in name.previous], name.rolled_back, name.note) == (["b", "a"], (), "")
    with pytest.raises(NotFound):
        deployments.go_back(record("e"), "")


def test_a_name_written_before_there_were_notes_is_read(deployments: Deployments, tmp_path: Path) -> None:
    deployments.promote(record("a"))
    (tmp_path / "names" / "demo.json").write_text('{"name": "demo", "current": "x", "previous": ["y"]}')
    (name,) = deployments.names()
    assert (name.current, name.previous, name.rolled_back, name.note) == ("x", ("y",), (), "")


def test_a_record_written_before_it_could_move_is_read(deployments: Deployments, tmp_path: Path) -> None:
    deployments.save(record("a"))
    (place,) = (tmp_path / "deployments").glob("*.json")
    data = json.loads(place.read_text())
    del data["leaving"], data["adapters"], data["records"], data["trained_system"]
    place.write_text(json.dumps(data))
    assert deployments.get("demo:vaaaaaaaa") == record("a")


@pytest.mark.parametrize(
    "fields",
    [
        {"context_tokens": 1024}, {"parallel": 1}, {"target": "ollama"}, {"sha256": "b" * 64},
        {"parameters": Parameters(stop=("<|im_end|>",), license="MIT")},
        {"parameters": Parameters(stop=("<|im_end|>",), license="Apache-2.0", system="Be brief.")},
        {"parameters": Parameters(stop=("<|im_end|>",), license="Apache-2.0", temperature=0.5)},
        {"parameters": Parameters(stop=("###",), license="Apache-2.0")},
    ],
)  # fmt: skip
def test_whatever_changes_how_a_model_answers_makes_it_another_deployment(fields: dict[str, Any]) -> None:
    assert record("a", **fields).identity != record("a").identity


@pytest.mark.parametrize(
    "fields",
    [
        {"generation": "g2"}, {"loaded": False}, {"file": "other/name.gguf"}, {"created_at": 1.0},
        {"parameters": Parameters(stop=("<|im_end|>",), license="Apache-2.0", context_tokens=8192)},
        {"parameters": Parameters(stop=("<|im_end|>",), license="Apache-2.0", temperature=0)},
    ],
)  # fmt: skip
def test_whatever_does_not_leaves_it_the_same(fields: dict[str, Any]) -> None:
    assert record("a", **fields).identity == record("a").identity


@pytest.mark.parametrize(
    "content",
    ["", "{", "7", "[]", "{}", "[" * 100_000, '{"name": "a", "current": 7, "previous": []}', "\x00"],
)
def test_a_damaged_record_ends_in_words_and_hides_no_other(
    deployments: Deployments, tmp_path: Path, content: str
) -> None:
    good = record("a", adapters=(Adapter("x", record("b").gguf, "b/x.gguf", "b" * 64, 1),))
    deployments.save(good)
    deployments.promote(good)
    for place in ("names/bad.json", "deployments/bad@v22222222.json", "scales/demo@vaaaaaaaa.json"):
        (tmp_path / place).write_text(content)
    with pytest.raises(DataLoss, match=r"names/bad\.json can't be read"):
        deployments.name("bad")
    assert [name.name for name in deployments.names()] == ["demo"]
    assert deployments.list() == [good]
    assert deployments.scales(good) == {"x": 1.0}
