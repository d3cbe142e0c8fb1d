"""Prepare: the data checked, the base model in the store, memory, disk and time estimated.

What later stages would refuse for the model's or the data's sake is refused here, before anything is trained.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from web4.lora.v1 import packager_pb2, trainer_pb2
from web4lora_chassis.pipeline.package import context_problems
from web4lora_chassis.pipeline.rules import Problem, error_of
from web4lora_chassis.rpc import ref_message

from web4lora_gateway.stages.base import Inputs, JobStage, Ref

_ALIAS = re.compile(r"[a-z0-9][a-z0-9.-]*")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_MATRIX_CHUNK_TOKENS = 512
_LEAST_MATRIX_CHUNKS = 2
"""llama-imatrix reads no text that is shorter."""


class Prepare(JobStage[trainer_pb2.PrepareSpec, trainer_pb2.PrepareResult]):
    """A prepare job."""

    name = "prepare"
    worker = "trainer"
    lane = "prepare"
    made = trainer_pb2.PrepareResult
    revision = 2  # the base is checked against itself and against llama.cpp

    def spec(self, inputs: Inputs) -> trainer_pb2.PrepareSpec:
        """Check dataset and base for the training to come."""
        pipeline = inputs.pipeline
        return trainer_pb2.PrepareSpec(
            dataset=ref_message(pipeline.dataset),
            base=trainer_pb2.BaseModelSpec(model=pipeline.base, revision=pipeline.base_revision),
            train=pipeline.train,
            context_tokens=_contexts(inputs),
        )

    def identity(self, inputs: Inputs, spec: trainer_pb2.PrepareSpec) -> Mapping[str, Any]:
        """Leave out what can only refuse: the result is the same, and `accept` looks at one taken over."""
        data = super().identity(inputs, spec)
        return {key: value for key, value in data.items() if key != "context_tokens"}

    def reusable(self, inputs: Inputs) -> bool:
        """Tell whether the base model's name can only ever mean the same bytes.

        A built-in alias is pinned by hash and a commit never changes; a branch moves on, and a folder or a
        file may hold something else by now, so those are looked at again in every run.
        """
        model = inputs.pipeline.base
        alias = bool(_ALIAS.fullmatch(model)) and not model.endswith(".gguf")
        return alias or bool(_COMMIT.fullmatch(inputs.pipeline.base_revision))

    def artifacts(self, result: trainer_pb2.PrepareResult) -> tuple[Ref, ...]:
        """Return the base model."""
        return (result.base,)

    def accept(self, inputs: Inputs, result: trainer_pb2.PrepareResult) -> None:
        """Refuse settings that ask for more than the base model or the data has.

        Raises:
            InvalidInput: Names each field.
        """
        problems = list(context_problems(_contexts(inputs), result.context_tokens))
        if inputs.pipeline.package.importance_matrix:
            problems += _matrix_problems(inputs.pipeline.package, result.dataset)
        if problems:
            raise error_of(problems)


def _contexts(inputs: Inputs) -> dict[str, int]:
    """Return the contexts that are asked for, by their settings."""
    settings_of: dict[str, Any] = {"package": inputs.pipeline.package, "deploy": inputs.pipeline.deploy}
    return {
        f"{name}.context_tokens": settings.context_tokens
        for name, settings in settings_of.items()
        if settings.HasField("context_tokens")
    }


def _matrix_problems(
    package: packager_pb2.PackageSettings, data: trainer_pb2.DatasetReport
) -> Iterator[Problem]:
    if data.rows_too_long:
        return  # the calibration text has those rows too; how many tokens was not counted
    if data.tokens < _LEAST_MATRIX_CHUNKS * _MATRIX_CHUNK_TOKENS:
        yield Problem(
            "package.importance_matrix",
            f"the training data has {data.tokens} tokens; an importance matrix needs "
            f"{_LEAST_MATRIX_CHUNKS * _MATRIX_CHUNK_TOKENS:,} at least.",
            "Add training rows, or leave importance_matrix out.",
        )
        return
    chunks = package.importance_matrix_chunks  # 0 when left out: as many as there are
    if chunks * _MATRIX_CHUNK_TOKENS > data.tokens:
        yield Problem(
            "package.importance_matrix_chunks",
            f"{chunks} chunks of {_MATRIX_CHUNK_TOKENS} tokens are more than the {data.tokens:,} tokens of "
            "the training data.",
            f"Set it to {data.tokens // _MATRIX_CHUNK_TOKENS} at most, or leave it out.",
        )
