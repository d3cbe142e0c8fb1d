"""A workflow whose steps change: runs that an older version began go the old way, new ones the new way."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PROGRAM = """
import asyncio, os, sys
from dbos import DBOS, SetWorkflowID
from web4lora_gateway.engine import open_engine

async def step(name):
    async def work():
        return name
    return await DBOS.run_step_async({"name": name}, work)

@DBOS.workflow(name="run_pipeline", max_recovery_attempts=None)
async def run_pipeline(run_id):
    steps = [await step("begin")]
    if BODY:
        steps.append(await step("inserted"))
    steps.append(await step("end"))
    if KILLED:
        os._exit(9)
    return steps

async def main():
    open_engine("sqlite:///" + sys.argv[1], "gateway-1")
    DBOS.launch()
    for name in sys.argv[2:]:
        with SetWorkflowID(name):
            await DBOS.start_workflow_async(run_pipeline, name)
        print(name, *await (await DBOS.retrieve_workflow_async(name)).get_result())
    DBOS.destroy()

asyncio.run(main())
"""


def run(body: str, killed: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    code = PROGRAM.replace("BODY", body).replace("KILLED", killed)
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def test_a_run_of_an_older_version_goes_on_in_the_old_way(tmp_path: Path) -> None:
    database = tmp_path / "engine.sqlite"
    assert run("False", "True", database, "before").returncode == 9
    done = run('await DBOS.patch_async("inserted")', "False", database, "before", "after")
    assert done.stdout.splitlines() == ["before begin end", "after begin inserted end"], done.stderr
