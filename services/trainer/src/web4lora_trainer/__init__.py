"""The trainer: validates chat data, resolves a base model, and trains a LoRA adapter on it.

The training core (`base_model`, `device`, `answers`, `encoding`, `batching`, `sft`, `train`, `export`)
knows nothing of gRPC: it takes frozen settings, folders and a callback. `service` and `worker` put it behind
the contract: the service never imports torch, the worker runs in a child process of its own for each job.
"""

__version__ = "0.1.0"
