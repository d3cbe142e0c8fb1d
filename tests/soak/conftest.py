"""The gateway's stack of stand-in workers."""

from tests.integration.gateway.conftest import stack

__all__ = ["stack"]
