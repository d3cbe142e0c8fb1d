from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from web4lora_chassis.artifacts import ArtifactStore, open_store
from web4lora_chassis.errors import ResourceExhausted
from web4lora_chassis.settings import Settings
from web4lora_deployer.testing import measure
from web4lora_deployer.testing.measure import Bench, last_report


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return open_store(Settings(home=tmp_path / "home", store=(tmp_path / "store").as_uri()))


def put(store: ArtifactStore, folder: Path, deployment: str, file: str = "eval.json") -> None:
    (folder / file).write_text(json.dumps({"of": deployment}))
    store.put("report", "demo", {file: folder / file}, parameters={"deployment": deployment}, link=False)


def test_the_last_deployed_version_is_compared_with_not_the_last_candidate(
    store: ArtifactStore, tmp_path: Path
) -> None:
    def last(*prefer: str) -> Any:
        return last_report(store, "demo", tmp_path / "work", prefer)

    assert last("demo:v1") is None
    put(store, tmp_path, "demo:v1")
    put(store, tmp_path, "demo:v2")
    put(store, tmp_path, "demo:v3-that-failed")
    put(store, tmp_path, "demo:v4", file="loss.csv")  # no report of a test
    assert last("demo:v2", "demo:v1") == {"of": "demo:v2"}
    assert last("demo:v0", "demo:v1") == {"of": "demo:v1"}, "the one before, when that was never tested"
    assert last() == {"of": "demo:v3-that-failed"}
    assert last("demo:v0") == {"of": "demo:v3-that-failed"}, "better than nothing, and it is named"


def test_a_candidate_that_does_not_come_back_behind_llama_bench_is_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It is no reason to go on without llama-bench: there is no room for what is to be tested."""

    @contextlib.contextmanager
    def aside(*_: Any) -> Iterator[None]:
        yield
        raise ResourceExhausted("no room to load it again")

    monkeypatch.setattr(measure.promotion, "set_aside", aside)
    monkeypatch.setattr(measure, "require_memory", lambda *_: None)
    monkeypatch.setattr(measure, "measure_limit", lambda *_: None)
    monkeypatch.setattr(measure.web4lora_llamacpp, "ensure_built", lambda *_: None)
    wanted: Any = SimpleNamespace(llama_bench=True)
    settings: Any = SimpleNamespace(cache=tmp_path)
    nothing: Any = SimpleNamespace(result=None)
    bench = Bench(wanted, settings, nothing, tmp_path, lambda _: None)
    with pytest.raises(ResourceExhausted, match="load it again"):
        bench.limit(tmp_path / "model.gguf", nothing, "demo:v1")
