"""A service that runs one job and then waits; the tests kill it: `python -m job_service ROOT PIDS`."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

from web4lora_chassis.jobs import JobRunner


async def main(root: Path, pids: str) -> None:
    runner = JobRunner(root, "job_child", env={"PYTHONPATH": os.environ["PYTHONPATH"]})
    await runner.start()
    await runner.create("hang", "the one", {"pids": pids, "release": f"{pids}.release"})
    await asyncio.sleep(600)


asyncio.run(main(Path(sys.argv[1]), sys.argv[2]))
