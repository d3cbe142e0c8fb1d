"""The gateway: runs pipelines as durable workflows and is the one service that clients call.

`service` answers the calls; `requests` turns a call into a run; `runs` keeps the runs; `workflow` carries one
run through its stages, `stages` holds what is special to each; `workers` and `follow` speak to the trainer,
the packager and the deployer; `folder` and `run_json` write what people read.
"""

from importlib.metadata import version

__version__ = version("web4lora-gateway")
