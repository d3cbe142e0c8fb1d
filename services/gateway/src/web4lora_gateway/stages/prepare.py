"""Prepare: the data checked, the base model in the store, memory, disk and time estimated."""

from __future__ import annotations

import re

from web4.lora.v1 import trainer_pb2
from web4lora_chassis.rpc import ref_message

from web4lora_gateway.stages.base import Inputs, Ref, Stage

_ALIAS = re.compile(r"[a-z0-9][a-z0-9.-]*")
_COMMIT = re.compile(r"[0-9a-f]{40}")


def _spec(inputs: Inputs) -> trainer_pb2.PrepareSpec:
    pipeline = inputs.pipeline
    return trainer_pb2.PrepareSpec(
        dataset=ref_message(pipeline.dataset),
        base=trainer_pb2.BaseModelSpec(model=pipeline.base, revision=pipeline.base_revision),
        train=pipeline.train,
    )


def names_content(inputs: Inputs) -> bool:
    """Tell whether the base model's name can only ever mean the same bytes.

    A built-in alias is pinned by hash and a commit never changes; a branch moves on, and a folder or a file
    may hold something else by now, so those are looked at again in every run.
    """
    model = inputs.pipeline.base
    alias = bool(_ALIAS.fullmatch(model)) and not model.endswith(".gguf")
    return alias or bool(_COMMIT.fullmatch(inputs.pipeline.base_revision))


def _artifacts(result: trainer_pb2.PrepareResult) -> tuple[Ref, ...]:
    return (result.base,)


STAGE = Stage(
    name="prepare",
    worker="trainer",
    spec=_spec,
    result=trainer_pb2.PrepareResult,
    reusable=names_content,
    artifacts=_artifacts,
)
