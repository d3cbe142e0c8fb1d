from __future__ import annotations

import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from web4lora.views import human


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (105_450_000, "105 MB"),
        (9_960_000, "10 MB"),
        (999_999_999, "1.0 GB"),
        (1_900_000_000, "1.9 GB"),
        (26_000_000_000, "26 GB"),
        (2_500_000_000_000, "2.5 TB"),
    ],
)
def test_sizes_are_decimal(size_bytes: int, text: str) -> None:
    assert human.size(size_bytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 s"),
        (0.42, "0.4 s"),
        (0.97, "1 s"),
        (59.4, "59 s"),
        (59.6, "1 min"),
        (221, "3 min 41 s"),
        (3599.7, "1 h"),
        (7500, "2 h 5 min"),
    ],
)
def test_durations_are_in_words(seconds: float, text: str) -> None:
    assert human.duration(seconds) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(1, "5 s"), (43, "45 s"), (58, "1 min"), (240, "4 min"), (7700, "2 h 10 min")]
)
def test_estimates_have_no_false_precision(seconds: float, text: str) -> None:
    assert human.about(seconds) == text


def test_numbers() -> None:
    assert human.number(0.3123) == "0.312"
    assert human.number(602.4) == "602"
    assert human.number(107_648) == "107,648"
    assert human.loss(0.3) == "0.30"
    assert human.loss(0.0042) == "0.0042"
    assert human.count(1, "row") == "1 row"
    assert human.count(840, "row") == "840 rows"


def test_signed_numbers_have_a_real_minus_sign_and_no_negative_zero() -> None:
    assert human.signed(-2.14) == "−2.1"
    assert human.signed(-0.04) == "0.0"
    assert human.signed(3) == "3.0"


def test_time_spans_between_stamps() -> None:
    assert human.elapsed(Timestamp(), Timestamp()) == 0
    assert human.elapsed(Timestamp(seconds=10), Timestamp(seconds=12)) == 2
    assert human.moment(Timestamp()) == ""
