from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from minio.error import S3Error
from web4lora_chassis.artifacts.s3_client import _s3_error
from web4lora_chassis.errors import Unavailable


def test_a_clock_that_is_wrong_after_sleep_is_waited_for_like_a_store_that_is_away() -> None:
    response: Any = SimpleNamespace(status=403)
    answer = S3Error(response, "RequestTimeTooSkewed", "too large a difference", "/x", "1", "1")
    error = _s3_error(answer, "s3://store/bucket", "x")
    assert isinstance(error, Unavailable)
    assert "clocks" in error.message
