"""Whose a model is, in a runtime that people use for their own models too.

We overwrite and delete by name, and a name may be somebody else's. So each name that we give to a model there
is noted, with the digest it stands for, before it is given; what has the name with another digest, or without
a note, is not ours. A runtime can't be told "only if it still is": who takes the name between our look and
our step, some milliseconds later, is not seen.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from web4lora_chassis.errors import FailedPrecondition, Web4Error
from web4lora_chassis.jobs.record import write_json

from web4lora_deployer.records.deployments import Deployments
from web4lora_deployer.records.names import file_name, is_deployment_id
from web4lora_deployer.settings import DeployerSettings

log = logging.getLogger(__name__)

_ANY = "any"  # of a working name, whose digest is known only once the model is made
_WORKING = "-new"


class Ownership:
    """What is ours in one runtime.

    Args:
        settings: Where the notes are.
        target: The runtime's.
        what: Its name in messages.
        remedy: How people remove a model there, with `{}` in place of its name.
        digest: Returns the digest that a name stands for there; empty when nothing has the name.
    """

    def __init__(
        self,
        settings: DeployerSettings,
        target: str,
        what: str,
        remedy: str,
        digest: Callable[[str], str],
    ) -> None:
        self._home = settings.deployer_home
        self._notes = _notes(settings, target)
        self._target = target
        self._what = what
        self._remedy = remedy
        self._digest = digest

    def require_ours(self, model: str) -> str:
        """Return the digest of a model of ours; empty when nothing has its name.

        Raises:
            FailedPrecondition: Something has the name that is not ours.
        """
        digest = self._digest(model)
        if digest and not self._ours(model, digest):
            raise FailedPrecondition(
                f"{self._what} has a model {model} that Web4 LoRA Core did not make; it is left alone.",
                fix=f"Choose another name for yours, or remove that one: `{self._remedy.format(model)}`.",
                reason="NAME_TAKEN",
                metadata={"model": model, "target": self._target},
            )
        return digest

    def note(self, model: str, *digests: str) -> None:
        """Write down that a name is given by us, to what has one of these digests."""
        self._notes.mkdir(parents=True, exist_ok=True)
        write_json(self._notes / file_name(model), {"model": model, "digests": digests})

    def move(self, model: str, digest: str, move: Callable[[], None]) -> bool:
        """Let a name of ours, or a free one, stand for a digest; say whether it does so then.

        Args:
            model: The name.
            digest: What it is to stand for.
            move: Does it.

        Raises:
            FailedPrecondition: The name is somebody else's.
        """
        before = self.require_ours(model)
        if not digest:  # it went away meanwhile
            return False
        if before != digest:
            self.note(model, *(each for each in (before, digest) if each))
            move()
            if self._digest(model) != digest:
                return False
        self.note(model, digest)
        return True

    def release(self, model: str, delete: Callable[[str], None]) -> None:
        """Delete a model if it is ours. What is gone already is no error."""
        digest = self._digest(model)
        if digest and not self._ours(model, digest):
            log.warning("%s has a model %s that is not ours; it is left alone", self._what, model)
        elif digest:
            delete(model)
        (self._notes / file_name(model)).unlink(missing_ok=True)

    @contextlib.contextmanager
    def working(self, model: str, delete: Callable[[str], None]) -> Iterator[str]:
        """Give a name for the time in which a model is made and tried; the model has its own afterwards.

        Raises:
            FailedPrecondition: The name is somebody else's.
        """
        name = model + _WORKING
        self.require_ours(name)
        self.note(name, _ANY)
        try:
            yield name
        finally:
            try:
                self.release(name, delete)
            except Web4Error as error:  # noted: the next deployment removes it
                log.warning("removing %s: %s", name, error.message)

    def _ours(self, model: str, digest: str) -> bool:
        noted = _read(self._notes / file_name(model))
        if noted is not None:
            return digest in noted or _ANY in noted
        return self._before_notes(model, digest)

    def _before_notes(self, model: str, digest: str) -> bool:
        """Say whether an earlier version, which kept no notes, made a model: a record tells."""
        deployments = Deployments(self._home)
        name = model.partition(":")[0]
        ids = {
            record.id
            for record in deployments.list()
            if record.name == name and self._target in (record.target, *record.leaving) and record.endpoint
        }
        if is_deployment_id(model):
            return model in ids
        return deployments.name(name) is not None and digest in {self._digest(each) for each in ids}


def left_over(settings: DeployerSettings, target: str, name: str, kept: Collection[str]) -> list[str]:
    """Return the models that killed attempts left in a runtime.

    Args:
        settings: Where the notes are.
        target: The runtime's.
        name: Of whose candidates.
        kept: Ids of those that have a record.
    """
    places = _notes(settings, target).glob(f"{name}@v*.json")
    models = [path.name.removesuffix(".json").replace("@", ":") for path in sorted(places)]
    return [model for model in models if model not in kept and is_deployment_id(model.removesuffix(_WORKING))]


def _notes(settings: DeployerSettings, target: str) -> Path:
    return settings.deployer_home / "made" / target


def _read(path: Path) -> list[str] | None:
    """Return the digests noted for a name; None when there is no note."""
    try:
        digests: list[str] = json.loads(path.read_text(encoding="utf-8"))["digests"]
    except FileNotFoundError:
        return None
    except (ValueError, LookupError, TypeError):  # nothing that can't be read gives leave to delete
        log.exception("%s can't be read", path)
        return []
    return digests
