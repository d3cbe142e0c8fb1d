"""Steps: done once, done again when their files are not what they were."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from web4lora_packager.steps import Steps


class _Maker:
    """Writes a folder with a file, and counts how often."""

    def __init__(self, target: Path) -> None:
        self.target = target
        self.calls = 0

    def __call__(self) -> Mapping[str, Any]:
        assert not self.target.exists()  # a broken attempt's rest is gone
        self.calls += 1
        self.target.mkdir()
        (self.target / "file").write_text("right")
        return {"number": self.calls}


def test_a_finished_step_is_not_done_again(tmp_path: Path) -> None:
    make = _Maker(tmp_path / "out")
    first = Steps(tmp_path).do("a", make.target, make)
    second = Steps(tmp_path).do("a", make.target, make)
    assert make.calls == 1
    assert first == second
    assert list(first.files) == ["out/file"]
    assert second.data == {"number": 1}


@pytest.mark.parametrize("damage", ["changed", "missing", "added"])
def test_a_step_whose_files_changed_is_done_again(tmp_path: Path, damage: str) -> None:
    make = _Maker(tmp_path / "out")
    Steps(tmp_path).do("a", make.target, make)
    if damage == "changed":
        (make.target / "file").write_text("wrong")
    elif damage == "missing":
        (make.target / "file").unlink()
    else:
        (make.target / "more").write_text("")
    assert Steps(tmp_path).do("a", make.target, make).data == {"number": 2}
    assert (make.target / "file").read_text() == "right"


def test_an_interrupted_step_is_done_again(tmp_path: Path) -> None:
    make = _Maker(tmp_path / "out")

    def interrupted() -> Mapping[str, Any]:
        make()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Steps(tmp_path).do("a", make.target, interrupted)
    assert Steps(tmp_path).do("a", make.target, make).data == {"number": 2}


def test_steps_do_not_mix(tmp_path: Path) -> None:
    one, other = _Maker(tmp_path / "one"), _Maker(tmp_path / "other")
    steps = Steps(tmp_path)
    steps.do("one", one.target, one)
    steps.do("other", other.target, other)
    assert (one.calls, other.calls) == (1, 1)
