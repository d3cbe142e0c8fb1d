from __future__ import annotations

import pytest
from web4lora_gateway.keys import stage_key


def test_order_does_not_matter_and_everything_else_does():
    key = stage_key("train", {"a": 1, "b": {"c": [1, 2], "d": "ü"}})
    assert key == stage_key("train", {"b": {"d": "ü", "c": [1, 2]}, "a": 1})
    assert len(key) == 64
    for stage, inputs in (
        ("package", {"a": 1, "b": {"c": [1, 2], "d": "ü"}}),
        ("train", {"a": 2, "b": {"c": [1, 2], "d": "ü"}}),
        ("train", {"a": 1, "b": {"c": [2, 1], "d": "ü"}}),
        ("train", {"a": "1", "b": {"c": [1, 2], "d": "ü"}}),
    ):
        assert stage_key(stage, inputs) != key


def test_the_key_is_the_same_in_every_release():
    assert stage_key("train", {"a": 1}).startswith("a6c7263ad8d8")


def test_numbers_that_json_has_not_are_refused():
    with pytest.raises(ValueError, match="JSON"):
        stage_key("train", {"a": float("nan")})
