"""The command `web4lora`, and the same for programs.

Example:
    with Client() as client:
        run = client.run("examples/web4/demo.yaml")
        for snapshot in client.watch(run.id):
            print(snapshot.state)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from web4lora.client import Client
    from web4lora.pipeline_file import PipelineFile, read_pipeline

__all__ = ["Client", "PipelineFile", "read_pipeline"]


def __getattr__(name: str) -> Any:
    """Load what is asked for, so that the command starts at once."""
    if name == "Client":
        from web4lora.client import Client

        return Client
    if name in ("PipelineFile", "read_pipeline"):
        from web4lora import pipeline_file

        return getattr(pipeline_file, name)
    raise AttributeError(f"module 'web4lora' has no attribute {name!r}")
