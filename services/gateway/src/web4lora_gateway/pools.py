"""Threads for what blocks, a few for each kind of work: a slow store holds up no look at the database."""

from __future__ import annotations

import asyncio
import contextvars
import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class Pool:
    """A bounded number of threads; further work waits in order.

    Args:
        name: Of its threads.
        threads: How many.
    """

    def __init__(self, name: str, threads: int) -> None:
        self._executor = ThreadPoolExecutor(threads, name)

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Return what a function that blocks comes to."""
        work = functools.partial(contextvars.copy_context().run, function, *args, **kwargs)
        return await asyncio.get_running_loop().run_in_executor(self._executor, work)


DATABASE = Pool("database", 8)
STORE = Pool("store", 4)
"""Looks at the artifact store: listings, manifests."""
BYTES = Pool("bytes", 4)
"""What moves and hashes artifacts' bytes, which may take minutes."""
