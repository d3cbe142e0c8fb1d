from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import httpx2
import pytest
from web4lora_chassis.errors import Unavailable
from web4lora_deployer.registry import patience
from web4lora_deployer.registry.patience import Patience, busy


def saying(retry_after: str) -> Unavailable:
    return busy("example.com", httpx2.Response(429, headers={"Retry-After": retry_after}), "slow down")


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    found: list[float] = []
    monkeypatch.setattr(patience.time, "sleep", found.append)
    return found


def test_as_long_is_waited_as_the_registry_asks_for_and_as_often(slept: list[float]) -> None:
    at_one_step = Patience()
    for _ in range(20):
        at_one_step.wait(saying("30"))
    assert slept == [30.0] * 20


def test_a_date_is_waited_for_too(slept: list[float]) -> None:
    Patience().wait(saying(format_datetime(datetime.now(UTC) + timedelta(seconds=60), usegmt=True)))
    assert 50 < slept[0] <= 60


@pytest.mark.parametrize("asked", ["86400", "901"])
def test_an_end_that_is_far_off_is_said_at_once(slept: list[float], asked: str) -> None:
    with pytest.raises(Unavailable) as caught:
        Patience().wait(saying(asked))
    assert f"Try again in {asked} s" in caught.value.fix
    assert not slept


@pytest.mark.parametrize("word", ["", "0", "soon", "-5", "Wed, 21 Oct 2015 07:28:00 GMT", "\u0663"])
def test_without_a_time_it_is_tried_a_few_times(slept: list[float], word: str) -> None:
    answer = httpx2.Response(503, headers=[(b"Retry-After", word.encode())])
    at_one_step = Patience()
    for _ in range(4):
        at_one_step.wait(busy("example.com", answer, ""))
    with pytest.raises(Unavailable):
        at_one_step.wait(busy("example.com", answer, ""))
    assert slept == [0.5, 1.0, 2.0, 4.0]
