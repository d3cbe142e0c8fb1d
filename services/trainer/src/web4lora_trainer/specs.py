"""The trainer's specs, checked before a job is accepted and read again by its worker. No torch here."""

from __future__ import annotations

import re

from web4.lora.v1 import artifacts_pb2, trainer_pb2
from web4lora_chassis.artifacts import ArtifactRef
from web4lora_chassis.earlier_adapter import FIELD
from web4lora_chassis.errors import InvalidInput
from web4lora_chassis.pipeline.train import TrainSettings
from web4lora_chassis.rpc import Check, ref_of
from web4lora_chassis.rpc.callers import require_open_base
from web4lora_chassis.rpc.jobs import Context
from web4lora_chassis.settings import Settings


def checks(settings: Settings) -> dict[str, Check]:
    """Return what refuses a spec, by kind of job.

    Args:
        settings: Which folders callers on other machines may name.
    """

    def prepare(spec: trainer_pb2.PrepareSpec, context: Context) -> None:
        require_open_base(spec.base.model, settings, context)
        check_prepare(spec)

    return {"prepare": prepare, "train": lambda spec, _: check_train(spec)}


def check_prepare(spec: trainer_pb2.PrepareSpec) -> None:
    """Refuse a spec that could never be done.

    Raises:
        InvalidInput: Names the field.
    """
    if not spec.base.model.strip():
        raise InvalidInput(
            "prepare.base.model is empty.", fix="Name a base model.", metadata={"field": "base.model"}
        )
    checked_ref(spec.dataset, "dataset")
    _check_start(settings_of(spec.train))


def _check_start(settings: TrainSettings) -> None:
    """Refuse to go on from a run: the gateway knows runs, a trainer knows artifacts."""
    if settings.start_from is not None and not re.fullmatch("[0-9a-f]+", settings.start_from):
        raise InvalidInput(
            f"{FIELD}: {settings.start_from} is a run, and a trainer knows no runs.",
            fix="Name the adapter's digest, or ask the gateway.",
            metadata={"field": FIELD},
        )


def check_train(spec: trainer_pb2.TrainSpec) -> None:
    """Refuse a spec that could never be done; see `check_prepare`."""
    dataset = checked_ref(spec.dataset, "dataset")
    checked_ref(spec.base, "base_model")
    ArtifactRef("adapter", spec.name, dataset.digest)  # refuses a name that an artifact can't have
    _check_start(settings_of(spec.train))


def checked_ref(message: artifacts_pb2.ArtifactRef, kind: str) -> ArtifactRef:
    """Return the artifact that a spec names.

    Raises:
        InvalidInput: It names none, or one of another kind.
    """
    ref = ref_of(message)
    if ref.kind != kind:
        raise InvalidInput(
            f"{ref} is of kind {ref.kind}, not {kind}.",
            fix=f"Name an artifact of kind {kind}.",
            metadata={"field": kind},
        )
    return ref


def settings_of(message: trainer_pb2.TrainSettings) -> TrainSettings:
    """Return checked settings, defaults filled in.

    Raises:
        InvalidInput: A value is out of bounds.
    """
    return TrainSettings.checked(message, "train")
