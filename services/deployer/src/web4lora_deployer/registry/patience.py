"""How long a registry that is out of reach or busy is waited for, and how long it asks to be."""

from __future__ import annotations

import logging
import time
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

import httpx2
from web4lora_chassis.errors import Unavailable

log = logging.getLogger(__name__)

BUSY = (429, 502, 503, 504)
_PAUSES_SECONDS = (0.5, 1.0, 2.0, 4.0)
_LONGEST_SECONDS = 900.0  # of all the waiting that a registry asked for, at one step
_RETRY_AFTER = "retry_after_seconds"


class Patience:
    """The waits at one step: a few of our own, and those that the registry asked for up to a bound."""

    def __init__(self) -> None:
        self._pauses = iter(_PAUSES_SECONDS)
        self._left_seconds = _LONGEST_SECONDS

    def wait(self, error: Unavailable) -> None:
        """Wait until it is time to try again.

        Raises:
            Unavailable: It has been waited long enough: the error itself.
        """
        wanted = float(error.metadata.get(_RETRY_AFTER, 0))
        if wanted > 0:
            pause = wanted
            self._left_seconds -= wanted
            if self._left_seconds < 0:
                raise error
        else:
            pause = next(self._pauses, 0)
            if not pause:
                raise error
        log.info("again in %g s: %s", pause, error.message)
        time.sleep(pause)


def busy(who: str, answer: httpx2.Response, said: str) -> Unavailable:
    """Return the error for a registry, or its login server, that wants us to come back later."""
    seconds = _retry_after(answer.headers.get("Retry-After", ""))
    later = f"in {seconds:.0f} s" if seconds else "later"
    return Unavailable(
        f"{who} is busy: {said}",
        fix=f"Try again {later}; what has arrived is not sent again.",
        reason="REGISTRY_BUSY",
        metadata={_RETRY_AFTER: seconds} if seconds else None,
    )


def _retry_after(value: str) -> float:
    """Return how long the header Retry-After asks to wait: seconds, or until a date; 0 when it doesn't."""
    if value.strip().isascii() and value.strip().isdigit():
        return float(value)
    try:
        moment = parsedate_to_datetime(value)
    except ValueError:
        return 0.0
    moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return max(0.0, (moment - datetime.now(UTC)).total_seconds())
