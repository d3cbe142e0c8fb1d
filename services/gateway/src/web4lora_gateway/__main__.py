"""`python -m web4lora_gateway` serves."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import sys
from collections.abc import Iterator

from dbos import DBOS
from web4.lora.v1 import artifacts_pb2_grpc, gateway_pb2_grpc
from web4lora_chassis.artifacts import open_store
from web4lora_chassis.errors import FailedPrecondition, Web4Error
from web4lora_chassis.rpc import Registration, serve
from web4lora_chassis.settings import load

from web4lora_gateway.cancellations import Cancellations
from web4lora_gateway.catalogue import ArtifactService
from web4lora_gateway.database import open_database
from web4lora_gateway.engine import open_engine
from web4lora_gateway.requests import Requests
from web4lora_gateway.results import StageResults
from web4lora_gateway.runs import RunBook
from web4lora_gateway.service import GatewayService
from web4lora_gateway.settings import GatewaySettings
from web4lora_gateway.workers import Workers
from web4lora_gateway.workflow import RunWorkflow


async def run(settings: GatewaySettings) -> None:
    """Serve until told to stop. Runs at work are left as they are: they go on at the next start."""
    store = open_store(settings)
    database = open_database(settings.database_url)
    workers = Workers(settings)
    book = RunBook(database)
    cancellations = Cancellations(database, workers)
    workflow = RunWorkflow(book, StageResults(database), store, workers, cancellations, settings)
    open_engine(settings.database_url)
    start = workflow.register()
    at_work = await book.start()
    DBOS.launch()
    await workflow.resume(at_work, start)
    delivery = asyncio.create_task(cancellations.deliver())
    requests = Requests(book, store, settings, start)
    try:
        await serve(
            settings.gateway_address,
            [
                Registration(
                    "web4.lora.v1.GatewayService",
                    gateway_pb2_grpc.add_GatewayServiceServicer_to_server,
                    GatewayService(book, requests, workers, store.url),
                ),
                Registration(
                    "web4.lora.v1.ArtifactService",
                    artifacts_pb2_grpc.add_ArtifactServiceServicer_to_server,
                    ArtifactService(store),
                ),
            ],
            settings,
        )
    finally:
        logging.getLogger("dbos").setLevel(logging.ERROR)  # it warns of every run left at work, at length
        delivery.cancel()
        await asyncio.gather(delivery, return_exceptions=True)


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


def main() -> int:
    """Run the service; return its exit code."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        settings = load(GatewaySettings)
        with _alone(settings):
            try:
                asyncio.run(run(settings))
            finally:
                DBOS.destroy()
    except Web4Error as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
