"""Looks at the models that names stand for, and rolls a name back when its model fails for good.

Only a model that fails while its runtime is there is rolled back: a llama-server that ends again and again, a
model that Ollama or Docker Model Runner has lost or can't load. A runtime that is out of reach is waited for.
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass

from web4lora_chassis.errors import FailedPrecondition, NotFound, Web4Error

from web4lora_deployer.records.deployments import Deployment, Deployments, Name
from web4lora_deployer.runtimes import open_runtime
from web4lora_deployer.runtimes.base import State
from web4lora_deployer.serving.first_answer import first_answer
from web4lora_deployer.serving.promotion import roll_back
from web4lora_deployer.settings import DeployerSettings

log = logging.getLogger(__name__)

_LOOKS = 2  # in a row: somebody may be deploying it again this very moment
_FIRST_PAUSE_SECONDS = 30.0
_LONGEST_PAUSE_SECONDS = 3600.0


@dataclass
class _Watched:
    """What is known of the model that a name stands for.

    Attributes:
        current: The deployment.
        generation: Of its record.
        answered: It was asked and answered since the deployer started and since its runtime came back.
        failures: Looks in a row that found it broken.
        not_before: Time of the next rollback, after one that did not succeed.
        pause_seconds: How long to wait after the next one that does not.
    """

    current: str
    generation: str
    answered: bool = False
    failures: int = 0
    not_before: float = 0.0
    pause_seconds: float = _FIRST_PAUSE_SECONDS


class Guard:
    """Watches over the names until it is stopped.

    Args:
        settings: Where the records and the runtimes are, and how often to look.
    """

    def __init__(self, settings: DeployerSettings) -> None:
        self._settings = settings
        self._deployments = Deployments(settings.deployer_home)
        self._watched: dict[str, _Watched] = {}
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="guard", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End after the look at work; a rollback at work is finished at the next start if it takes long."""
        self._stopping.set()
        self._thread.join(timeout=5.0)

    def _run(self) -> None:
        while not self._stopping.wait(self._settings.guard_interval_seconds):
            try:
                self.check_all()
            except Exception:  # one that can't be looked at must not end the watch over the others
                log.exception("defect while looking at the promoted models")

    def check_all(self) -> None:
        """Look once at every name that has a way back."""
        for name in self._deployments.names():
            if self._stopping.is_set():
                return
            if name.previous:
                try:
                    self._check(name, self._deployments.get(name.current))
                except NotFound:  # deleted this very moment
                    continue

    def _check(self, name: Name, record: Deployment) -> None:
        watched = self._watched.get(name.name)
        if watched is None or (watched.current, watched.generation) != (record.id, record.generation):
            watched = self._watched[name.name] = _Watched(record.id, record.generation)
        why = self._failure(record, watched)
        if not why:
            watched.failures = 0
            return
        watched.failures += 1
        if watched.failures < _LOOKS or time.monotonic() < watched.not_before:
            return
        try:
            serving = roll_back(name.name, self._settings, from_id=record.id, why=why)
        except Web4Error as error:
            watched.not_before = time.monotonic() + watched.pause_seconds
            watched.pause_seconds = min(2 * watched.pause_seconds, _LONGEST_PAUSE_SECONDS)
            log.error(
                "%s: %s fails (%s) and can't be rolled back: %s", name.name, record.id, why, error.message
            )
            return
        log.warning("%s: rolled back by itself from %s to %s: %s", name.name, record.id, serving.id, why)

    def _failure(self, record: Deployment, watched: _Watched) -> str:
        """Return why a model is broken; nothing when it serves, starts, or its runtime is out of reach."""
        health = open_runtime(record.target, self._settings).health(record)
        if health.broken:
            return health.detail
        if health.state is not State.SERVING or health.deployed is None:
            watched.answered = False  # once it is back, it has to show that it can still be loaded
            return ""
        if watched.answered:
            return ""
        try:
            first_answer(health.deployed)
        except FailedPrecondition as error:
            return error.message
        except Web4Error:  # it went away, is busy or short of memory: no fault of the model
            return ""
        watched.answered = True
        return ""
