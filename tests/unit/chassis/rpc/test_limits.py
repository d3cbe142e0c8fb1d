from __future__ import annotations

import pytest
from web4lora_chassis.errors import ResourceExhausted
from web4lora_chassis.rpc.errors import RETRY_AFTER
from web4lora_chassis.rpc.limits import Bucket, Limits


def test_a_bucket_gives_its_size_at_once_and_its_rate_after() -> None:
    now = [0.0]
    bucket = Bucket(2, 3, clock=lambda: now[0])
    assert [bucket.take() for _ in range(4)] == [0, 0, 0, 0.5]
    now[0] = 0.5
    assert [bucket.take() for _ in range(2)] == [0, 0.5]
    now[0] = 100
    assert [bucket.take() for _ in range(4)] == [0, 0, 0, 0.5]


def test_one_principals_calls_are_not_anothers() -> None:
    limits = Limits(0.01, 2, 1)
    limits.take("alice")
    limits.take("alice")
    with pytest.raises(ResourceExhausted, match="alice") as caught:
        limits.take("alice")
    assert 0 < float(caught.value.metadata[RETRY_AFTER]) <= 100
    limits.take("bob")


def test_a_watch_that_ended_makes_room() -> None:
    limits = Limits(1, 1, 2)
    with limits.stream("alice"), limits.stream("bob"):
        with limits.stream("alice"), pytest.raises(ResourceExhausted, match="2 watches"):
            limits.stream("alice").__enter__()
        with limits.stream("alice"):
            pass
