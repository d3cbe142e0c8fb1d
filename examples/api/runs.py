"""Runs from Python: check a pipeline, run it, follow it, find it again.

python examples/api/runs.py PIPELINE.yaml
"""

import sys

from web4lora import Client
from web4lora_chassis.errors import InvalidInput

pipeline = sys.argv[1]
with Client() as client:
    try:
        client.run(pipeline, validate_only=True)  # starts nothing
    except InvalidInput as error:
        sys.exit(f"{error.message}\n{error.fix}")

    run = client.run(pipeline, labels={"team": "a"})
    for snapshot in client.watch(run.id):  # over restarts of the gateway
        for stage in snapshot.stages:
            if stage.progress.message:
                print(f"{run.id}: {stage.progress.phase} {stage.progress.message}")
    print(f"{run.id} ended: {client.get_run(run.id).state}")

    for run in client.list_runs(states=["succeeded"], labels={"team": "a"}):
        print(f"found {run.id} of {run.pipeline.name}")
