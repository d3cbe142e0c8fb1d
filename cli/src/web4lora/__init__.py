"""The command `web4lora`, and the same for programs.

Example:
    with Client() as client:
        run = client.run("examples/web4/demo.yaml")
        for snapshot in client.watch(run.id):
            print(snapshot.state)
"""

from web4lora.client import Client
from web4lora.pipeline_file import PipelineFile, read_pipeline

__all__ = ["Client", "PipelineFile", "read_pipeline"]
