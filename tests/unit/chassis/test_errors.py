"""What of an error people and programs see."""

from __future__ import annotations

import errno
import tempfile
from pathlib import Path

import pytest
from web4lora_chassis.errors import InvalidInput, disk_error, no_room, shown


def test_what_came_from_outside_can_be_printed_and_sent() -> None:
    error = InvalidInput("x\x1b[2J\ud800\x00\r y\nz", fix="\x07", metadata={"path": "\udfff\t"})
    assert error.message == "x\\x1b[2J\\ud800\\x00\\r y\nz"
    assert error.fix == "\\x07"
    assert error.metadata == {"path": "\\udfff\\t"}
    assert str(error).encode().isascii()


def test_what_people_write_stays() -> None:
    text = "Größe 中文 🙂 a b „…“"
    assert InvalidInput(text).message == text


def test_a_value_is_shown_in_a_few_signs_of_one_line() -> None:
    assert shown("a\nb") == r"'a\nb'"
    assert shown("x" * 99) == f"'{'x' * 78}…"
    assert shown([1, None]) == "[1, None]"
    assert shown(10**5000) == "<int>"


def test_data_nested_too_deeply_to_be_written_has_a_name() -> None:
    nested: list[object] = []
    for _ in range(100_000):
        nested = [nested]
    assert shown(nested) == "<list>"


def test_no_folder_for_what_is_temporary_means_that_the_disk_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`tempfile` calls it FileNotFoundError: nothing that was looked for is missing."""

    def full(*_: object, **__: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile._os, "open", full)
    with pytest.raises(FileNotFoundError) as caught:
        tempfile.gettempdir()
    assert no_room(caught.value)
    assert disk_error(caught.value, tmp_path).reason == "DISK_FULL"
    assert not no_room(FileNotFoundError(errno.ENOENT, "No such file or directory", "x"))
