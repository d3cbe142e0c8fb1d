"""Trainers: which there are, and what each is allowed."""

from __future__ import annotations

from web4.lora.v1 import gateway_pb2
from web4lora_chassis.errors import InvalidInput

from web4lora.client.calls import Calls

MODES = tuple(name.removeprefix("TRAINER_MODE_").lower() for name in gateway_pb2.TrainerMode.keys()[1:])


class Trainers(Calls):
    """The client's methods for trainers."""

    def trainers(self) -> list[gateway_pb2.TrainerStatus]:
        """Return the trainers, in the order in which runs are given to them."""
        return list(self._call(self._gateway.ListTrainers, gateway_pb2.ListTrainersRequest()).trainers)

    def set_trainer_mode(self, name: str, mode: str) -> gateway_pb2.TrainerStatus:
        """Set what a trainer is allowed, until it is set again.

        Args:
            name: Its name or its address.
            mode: "active", "paused" or "draining"; see the contract's TrainerMode.

        Raises:
            NotFound: There is no such trainer.
            InvalidInput: There is no such mode.
        """
        if mode not in MODES:
            raise InvalidInput(
                f"{mode!r} is not a mode of a trainer.", fix=f"The modes are {', '.join(MODES)}."
            )
        value = gateway_pb2.TrainerMode.Value(f"TRAINER_MODE_{mode.upper()}")
        request = gateway_pb2.SetTrainerModeRequest(name=name, mode=value)
        return self._call(self._gateway.SetTrainerMode, request).trainer
