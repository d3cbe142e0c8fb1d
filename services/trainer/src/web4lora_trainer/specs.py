"""The trainer's specs, checked before a job is accepted and read again by its worker. No torch here."""

from __future__ import annotations

from google.protobuf.message import Message
from web4.lora.v1 import trainer_pb2
from web4lora_chassis.artifacts import ArtifactRef
from web4lora_chassis.errors import InvalidInput
from web4lora_chassis.rpc import ref_of
from web4lora_chassis.rpc.jobs import to_json

from web4lora_trainer.train_settings import TrainSettings


def check(kind: str, spec: Message) -> None:
    """Refuse a spec that could never be done.

    Raises:
        InvalidInput: Names the field.
    """
    if isinstance(spec, trainer_pb2.PrepareSpec):
        if not spec.base.model.strip():
            raise InvalidInput(
                "prepare.base.model is empty.", fix="Name a base model.", metadata={"field": "base.model"}
            )
        reference(spec.dataset, "dataset")
        settings_of(spec.train)
    elif isinstance(spec, trainer_pb2.TrainSpec):
        dataset = reference(spec.dataset, "dataset")
        reference(spec.base, "base_model")
        ArtifactRef("adapter", spec.name, dataset.digest)  # refuses a name that an artifact can't have
        settings_of(spec.train)
    else:
        raise InvalidInput(f"The trainer does no {kind!r} jobs.", fix="Set prepare or train.")


def reference(message: Message, kind: str) -> ArtifactRef:
    """Return the artifact that a spec names.

    Raises:
        InvalidInput: It names none, or one of another kind.
    """
    ref = ref_of(message)  # type: ignore[arg-type]
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
    return TrainSettings.from_json(to_json(message))
