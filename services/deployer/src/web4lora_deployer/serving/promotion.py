"""Point a name at a candidate, or back at the one that served before, and let go of what is superseded.

The order of the steps is what makes a crash harmless: the candidate is loaded and has answered, then the
runtime's own name moves, then our record of the name, and only then anything is unloaded or deleted. So the
name always has the old or the new model behind it, and doing it again, or `settle` at the service's start,
finishes what was left. One name is changed by one caller at a time, in whatever process.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import time
from collections.abc import Iterator
from dataclasses import replace

from web4lora_chassis.errors import FailedPrecondition, NotFound, Unavailable, Web4Error
from web4lora_chassis.jobs import Progress

from web4lora_deployer.records.deployments import Deployment, Deployments, Name
from web4lora_deployer.runtimes import open_runtime
from web4lora_deployer.runtimes.base import Deployed, Runtime, State
from web4lora_deployer.runtimes.llama_server import LlamaServerRuntime
from web4lora_deployer.runtimes.ownership import left_over
from web4lora_deployer.serving.first_answer import first_answer
from web4lora_deployer.settings import DeployerSettings

log = logging.getLogger(__name__)

_PAUSES_SECONDS = (1.0, 3.0)  # time enough to find a server dead


def promote(deployment_id: str, settings: DeployerSettings) -> Deployment:
    """Point a deployment's name at it, once it has answered; safe to repeat.

    Args:
        deployment_id: The deployment.
        settings: Where the runtimes and the records are.

    Returns:
        The deployment.

    Raises:
        NotFound: No such deployment.
        FailedPrecondition: It does not answer.
        ResourceExhausted: Memory does not suffice to load it.
        Unavailable: Its runtime is out of reach.
    """
    deployments = Deployments(settings.deployer_home)
    name = deployments.get(deployment_id).name
    with deployments.locked(name):
        record = _load(deployments.get(deployment_id), deployments, settings)
        open_runtime(record.target, settings).promote(record)
        _settle(deployments.promote(record), deployments, settings)
    return deployments.get(deployment_id)


def roll_back(name: str, settings: DeployerSettings, *, from_id: str = "", why: str = "") -> Deployment:
    """Point a name back at the candidate that served under it before, once that one has answered.

    Args:
        name: The name people call.
        settings: Where the runtimes and the records are.
        from_id: The candidate to go back from; when the name stands for another one already, nothing but
            what an interrupted call left is done. Empty: whatever the name stands for.
        why: Said of the deployment that serves from then on; empty when people asked for it.

    Returns:
        What serves under the name now.

    Raises:
        NotFound: Nothing was promoted to the name.
        FailedPrecondition: There is no earlier candidate, or it does not answer.
        ResourceExhausted: Memory does not suffice to load it.
        Unavailable: Its runtime is out of reach.
    """
    deployments = Deployments(settings.deployer_home)
    _name(name, deployments)
    with deployments.locked(name):
        now = _name(name, deployments)
        if not from_id or now.current == from_id:
            known = {record.id: record for record in deployments.list()}
            earlier = [known[each] for each in now.previous if each in known]
            if not earlier:
                raise FailedPrecondition(
                    f"{name} stands for {now.current}, and no earlier candidate of it is kept.",
                    fix="`web4lora deployments list` shows what there is; `web4lora deployments promote ID` "
                    "takes any of it.",
                    reason="NO_EARLIER_CANDIDATE",
                    metadata={"name": name},
                )
            record = _load(earlier[0], deployments, settings)
            open_runtime(record.target, settings).promote(record)
            now = deployments.go_back(record, f"rolled back from {now.current}{f': {why}' if why else ''}")
        _settle(now, deployments, settings)
    return deployments.get(now.current)


def delete(deployment_id: str, settings: DeployerSettings) -> None:
    """Take a deployment out, and its name too when that stands for it. What is gone already is no error.

    Raises:
        Unavailable: Its runtime is out of reach.
    """
    deployments = Deployments(settings.deployer_home)
    try:
        name = deployments.get(deployment_id).name
    except NotFound:
        return
    with deployments.locked(name):
        try:
            record = deployments.get(deployment_id)
        except NotFound:  # somebody else was faster
            return
        for target in (record.target, *record.leaving):
            there = replace(record, target=target)
            if deployments.promoted(record):
                open_runtime(target, settings).withdraw(there)
            open_runtime(target, settings).delete(there)
        deployments.remove(record)


def settle(settings: DeployerSettings) -> None:
    """Finish what a crash left of any promotion or rollback. What can't be done now is logged."""
    deployments = Deployments(settings.deployer_home)
    for found in deployments.names():
        with deployments.locked(found.name):
            name = deployments.name(found.name)
            if name is None:  # deleted meanwhile
                continue
            try:
                record = deployments.get(name.current)
                open_runtime(record.target, settings).promote(record)
                _settle(name, deployments, settings)
            except Web4Error as error:  # its health says so to whoever asks
                log.warning("%s: %s", name.name, error)


@contextlib.contextmanager
def set_aside(deployment_id: str, settings: DeployerSettings) -> Iterator[None]:
    """Free the memory of a candidate while other models are measured; afterwards it is loaded and answers.

    What serves under its name is left alone. A crash leaves it stopped: `reload` loads it.

    Raises:
        NotFound: No such deployment.
        FailedPrecondition: It does not answer afterwards.
        ResourceExhausted: Memory does not suffice to load it again.
        Unavailable: Its runtime is out of reach.
    """
    deployments = Deployments(settings.deployer_home)
    record = deployments.get(deployment_id)
    with deployments.locked(record.name):
        if not deployments.promoted(record):
            runtime = open_runtime(record.target, settings)
            try:
                if isinstance(runtime, LlamaServerRuntime):
                    runtime.stop(record)
                else:
                    runtime.unload(record)
            except Web4Error as error:  # the other model may still fit beside it
                log.warning("%s keeps its memory: %s", record.id, error.message)
    try:
        yield
    finally:
        reload(deployment_id, settings)


def reload(deployment_id: str, settings: DeployerSettings) -> Deployment:
    """Load a deployment that was set aside, and see that it answers; one that is loaded is only asked."""
    deployments = Deployments(settings.deployer_home)
    with deployments.locked(deployments.get(deployment_id).name):
        return _load(deployments.get(deployment_id), deployments, settings)


def make_room(wanted: Deployment, deployments: Deployments, settings: DeployerSettings) -> None:
    """Delete old candidates that were never promoted, before one more comes beside what serves.

    What killed attempts left of the name goes too: a candidate that never answered, models without a record.
    """
    with deployments.locked(wanted.name):
        name = deployments.name(wanted.name)
        known = {wanted.id, *((name.current, *name.previous) if name else ())}
        records = [record for record in deployments.list() if record.name == wanted.name]
        idle = [record for record in records if record.id not in known]
        tried = [record for record in idle if record.endpoint]
        for record in idle:
            if record not in tried[: settings.keep_deployments - 1]:
                try:
                    _delete(record, deployments, settings)
                except Web4Error as error:  # its runtime may be another one, and away: it goes next time
                    log.warning("retiring %s: %s", record.id, error)
        runtime = open_runtime(wanted.target, settings)
        for model in left_over(settings, wanted.target, wanted.name, {record.id for record in records}):
            runtime.delete(replace(wanted, id=model))


def _leave_others(record: Deployment, deployments: Deployments, settings: DeployerSettings) -> Deployment:
    for target in record.leaving:
        there = replace(record, target=target)
        runtime = open_runtime(target, settings)
        try:
            if deployments.promoted(record):
                runtime.withdraw(there)
            runtime.delete(there)
        except Web4Error as error:  # it serves elsewhere now
            log.warning("taking %s out of %s: %s", record.id, target, error)
            continue
        record = replace(record, leaving=tuple(other for other in record.leaving if other != target))
        deployments.save(record)
    return record


def _name(name: str, deployments: Deployments) -> Name:
    found = deployments.name(name)
    if found is None:
        raise NotFound(
            f"Nothing serves under the name {name!r}.",
            fix="`web4lora deployments list` shows what is deployed, under which names.",
            metadata={"name": name},
        )
    return found


def _load(record: Deployment, deployments: Deployments, settings: DeployerSettings) -> Deployment:
    """See that a deployment is loaded and answers; what is loaded for that and does not answer is let go."""
    runtime = open_runtime(record.target, settings)
    wanted = replace(record, loaded=True)
    if not record.loaded:  # its status may be from before it was unloaded
        wanted = replace(wanted, generation=secrets.token_hex(8))
    try:
        deployed = _answering(wanted, runtime, deployments)
    except BaseException:
        if not record.loaded:
            deployments.save(record)
        raise
    wanted = replace(
        wanted, endpoint=deployed.endpoint, model=deployed.model, runtime_version=deployed.version
    )
    deployments.save(wanted)
    return wanted


def _answering(wanted: Deployment, runtime: Runtime, deployments: Deployments) -> Deployed:
    """See that it answers; what goes down while it is asked is waited for, and asked again."""
    for pause_seconds in _PAUSES_SECONDS:
        try:
            return _answers(wanted, runtime, deployments)
        except Unavailable as error:
            log.warning("%s: %s; asked again in %g s", wanted.id, error.message, pause_seconds)
            time.sleep(pause_seconds)
    return _answers(wanted, runtime, deployments)


def _answers(wanted: Deployment, runtime: Runtime, deployments: Deployments) -> Deployed:
    health = runtime.health(wanted)
    # What has not answered yet has not passed the template gate either: it is deployed to the end first.
    if wanted.endpoint and health.state is State.SERVING and health.deployed is not None:
        runtime.restore(wanted)
        deployed = health.deployed
    else:
        deployed = runtime.deploy(wanted, deployments.path(wanted), _say)
    first_answer(deployed)
    return deployed


def _settle(name: Name, deployments: Deployments, settings: DeployerSettings) -> None:
    """Let go of what a name no longer needs: its place in other runtimes, memory, old candidates.

    What can't be done now is logged, and done at the next promotion or start: the name's model serves.
    """
    current = _leave_others(deployments.get(name.current), deployments, settings)
    kept = name.previous[: settings.keep_deployments - 1]
    for record in deployments.list():
        if record.name != name.name or record.id == current.id:
            continue
        try:
            if record.target != current.target:
                open_runtime(record.target, settings).withdraw(record)
            if record.id in (*kept, *name.rolled_back):
                _unload(record, deployments, settings)
            elif record.id in name.previous or record.created_at < current.created_at:
                _delete(record, deployments, settings)
        except Web4Error as error:
            log.warning("retiring %s: %s", record.id, error)


def _unload(record: Deployment, deployments: Deployments, settings: DeployerSettings) -> None:
    """Keep a deployment without its memory."""
    if record.loaded:
        record = replace(record, loaded=False)
        deployments.save(record)
        open_runtime(record.target, settings).unload(record)


def _delete(record: Deployment, deployments: Deployments, settings: DeployerSettings) -> None:
    """Take a deployment out that its name does not stand for."""
    for target in (record.target, *record.leaving):
        open_runtime(target, settings).delete(replace(record, target=target))
    deployments.remove(record)


def _say(progress: Progress) -> None:
    log.info("%s %s", progress.phase, progress.message)
