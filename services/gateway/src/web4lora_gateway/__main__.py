"""`python -m web4lora_gateway` serves."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import sys
from collections.abc import Iterator

from dbos import DBOS
from web4.lora.v1 import (
    access_pb2_grpc,
    artifacts_pb2_grpc,
    deployments_pb2_grpc,
    gateway_pb2_grpc,
    jobs_pb2_grpc,
)
from web4lora_chassis.artifacts import open_store
from web4lora_chassis.artifacts.index import ManifestIndex
from web4lora_chassis.errors import FailedPrecondition
from web4lora_chassis.principals import Principals
from web4lora_chassis.rpc import Registration, serve, service_process

from web4lora_gateway.access import AccessService
from web4lora_gateway.cancellations import Cancellations
from web4lora_gateway.catalogue import ArtifactService
from web4lora_gateway.collection import Collector
from web4lora_gateway.crew import Crew
from web4lora_gateway.database import open_database
from web4lora_gateway.deletion import RunDeleter
from web4lora_gateway.engine import open_engine
from web4lora_gateway.gateways import Gateways, gateway_id
from web4lora_gateway.needs import NeedsFinder
from web4lora_gateway.people import People
from web4lora_gateway.places import PlaceBook
from web4lora_gateway.reconciler import Reconciler
from web4lora_gateway.records import RunRecord
from web4lora_gateway.retention import Retention
from web4lora_gateway.run_creation import RunCreator
from web4lora_gateway.runs import RunBook
from web4lora_gateway.scheduler import Scheduler
from web4lora_gateway.service import DeployerDeployments, DeployerJobs, GatewayService
from web4lora_gateway.settings import GatewaySettings
from web4lora_gateway.stage_results import StageResults
from web4lora_gateway.telemetry import runs_shown
from web4lora_gateway.workers import Workers
from web4lora_gateway.workflow import RunWorkflow


async def run(settings: GatewaySettings) -> None:
    """Serve until told to stop. Runs at work are left as they are: they go on at the next start."""
    store = open_store(settings)
    own = gateway_id(settings.state_dir)
    database = open_database(settings.database_url)
    gateways = Gateways(database, own)
    workers = Workers(settings)
    book = RunBook(database, own)
    cancellations = Cancellations(database, workers)
    results = StageResults(database)
    principals = Principals(settings.home)
    people = People(database, principals)
    crew = Crew(database, workers)

    async def ended(run_id: str) -> bool:
        run = await book.find(run_id)
        return isinstance(run, RunRecord) and run.state.terminal

    scheduler = Scheduler(
        PlaceBook(database), crew, workers, cancellations, settings.trainer_grace_seconds, ended
    )
    workflow = RunWorkflow(book, results, store, workers, scheduler, settings)
    open_engine(settings.database_url, own)
    start = workflow.register()
    await gateways.beat()
    await people.join()
    DBOS.launch()
    reconciler = Reconciler(book, gateways, start, workflow.at_work, workflow.give_up)
    deleter = RunDeleter(database, book, store, settings, workflow.at_work)
    creator = RunCreator(book, store, workers, settings, start, deleter.deleted)
    index = ManifestIndex(store)
    needs = NeedsFinder(database, results.holds, workers, settings)
    collector = Collector(database, store, index, needs, settings)
    retention = Retention(book, deleter, collector, settings)
    background = [
        asyncio.create_task(work)
        for work in (
            gateways.beat_for_ever(book.all_wait),
            book.keep_up(),
            people.keep_up(),
            reconciler.reconcile_for_ever(),
            cancellations.deliver(),
            retention.apply_for_ever(),
            crew.beat_for_ever(),
            scheduler.schedule_for_ever(),
        )
    ]
    try:
        with runs_shown(database):
            await serve(
                settings.gateway_address,
                [
                    Registration(
                        "web4.lora.v1.GatewayService",
                        gateway_pb2_grpc.add_GatewayServiceServicer_to_server,
                        GatewayService(book, creator, workers, store.url, deleter, retention, scheduler),
                    ),
                    Registration(
                        "web4.lora.v1.ArtifactService",
                        artifacts_pb2_grpc.add_ArtifactServiceServicer_to_server,
                        ArtifactService(store, settings, index, collector),
                    ),
                    Registration(
                        "web4.lora.v1.JobService",
                        jobs_pb2_grpc.add_JobServiceServicer_to_server,
                        DeployerJobs(workers.deployer),
                    ),
                    Registration(
                        "web4.lora.v1.DeploymentService",
                        deployments_pb2_grpc.add_DeploymentServiceServicer_to_server,
                        DeployerDeployments(workers.deployer),
                    ),
                    Registration(
                        "web4.lora.v1.AccessService",
                        access_pb2_grpc.add_AccessServiceServicer_to_server,
                        AccessService(principals, settings.home),
                    ),
                ],
                settings,
                name="gateway",
            )
    finally:
        logging.getLogger("dbos").setLevel(logging.ERROR)  # it warns of every run left at work, at length
        for task in background:
            task.cancel()
        await asyncio.gather(*background, return_exceptions=True)
        await gateways.leave()


@contextlib.contextmanager
def _alone(settings: GatewaySettings) -> Iterator[None]:
    """Hold the lock of the state folder: a second gateway would run the first one's runs once more."""
    settings.state_dir.mkdir(parents=True, exist_ok=True)
    with (settings.state_dir / "lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise FailedPrecondition(
                f"Another gateway works with {settings.state_dir}.",
                fix="`web4lora status` shows it; else choose another WEB4LORA_HOME.",
            ) from error
        yield


def serve_alone(settings: GatewaySettings) -> None:
    """Serve with the state folder to ourselves."""
    with _alone(settings):
        try:
            asyncio.run(run(settings))
        finally:
            DBOS.destroy()


if __name__ == "__main__":
    sys.exit(service_process("gateway", GatewaySettings, serve_alone))
