"""Listings come page by page; what is followed outlives a gateway that is away for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from web4.lora.v1 import artifacts_pb2, gateway_pb2, jobs_pb2
from web4lora.client import UNENDED, Client
from web4lora_chassis.errors import NotFound, Unavailable, Web4Error
from web4lora_chassis.settings import Settings


def failure(code: grpc.StatusCode) -> grpc.RpcError:
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(), details="gone")


AWAY = failure(grpc.StatusCode.UNAVAILABLE)


class Stream:
    """A stream of answers; a failure among them ends it."""

    def __init__(self, answers: list[Any]) -> None:
        self.answers = answers
        self.cancelled = False

    def __iter__(self) -> Iterator[Any]:
        for answer in self.answers:
            if isinstance(answer, grpc.RpcError):
                raise answer
            yield answer

    def cancel(self) -> None:
        self.cancelled = True


class Gateway:
    """Plays the two calls that stream: each call gets the next script, the last one again and again."""

    def __init__(self, *scripts: list[Any]) -> None:
        self.scripts = list(scripts)
        self.ids: list[str] = []
        self.streams: list[Stream] = []

    def WatchRun(self, request: gateway_pb2.WatchRunRequest) -> Stream:
        return self._next(request)

    def WatchJob(self, request: jobs_pb2.WatchJobRequest) -> Stream:
        return self._next(request)

    def _next(self, request: Any) -> Stream:
        self.ids.append(request.id)
        self.streams.append(Stream(self.scripts.pop(0) if len(self.scripts) > 1 else self.scripts[0]))
        return self.streams[-1]


class Clock:
    """Time that only passes where it is waited for."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("web4lora.client.calls.time", clock)
    return clock


@pytest.fixture
def client(tmp_path: Path) -> Iterator[Client]:
    with Client(Settings(home=tmp_path, gateway_address="127.0.0.1:1")) as client:
        yield client


def run(revision: int, *, over: bool = False) -> gateway_pb2.WatchRunResponse:
    state = gateway_pb2.RUN_STATE_SUCCEEDED if over else gateway_pb2.RUN_STATE_RUNNING
    return gateway_pb2.WatchRunResponse(run=gateway_pb2.Run(id="one-1", revision=revision, state=state))


def job(revision: int, *, over: bool = False) -> jobs_pb2.WatchJobResponse:
    state = jobs_pb2.JOB_STATE_FAILED if over else jobs_pb2.JOB_STATE_RUNNING
    return jobs_pb2.WatchJobResponse(job=jobs_pb2.Job(id="one-1", revision=revision, state=state))


def watch_run(client: Client, gateway: Gateway, name: str) -> Iterator[Any]:
    client._gateway = gateway  # type: ignore[assignment]
    return client.watch(name)


def watch_job(client: Client, gateway: Gateway, name: str) -> Iterator[Any]:
    client._jobs = gateway  # type: ignore[assignment]
    return client.watch_job(name)


Answer = Callable[..., Any]
Watch = Callable[[Client, Gateway, str], Iterator[Any]]
both = pytest.mark.parametrize(("answer", "watch"), [(run, watch_run), (job, watch_job)], ids=["run", "job"])


@both
def test_following_goes_on_where_it_was_and_at_the_same_one(
    client: Client, clock: Clock, answer: Answer, watch: Watch
) -> None:
    # The second stream begins with a snapshot that was seen, and the third one's server ended it early.
    gateway = Gateway(
        [answer(0), answer(3), AWAY],
        [AWAY],
        [answer(3), answer(4)],
        [answer(4), answer(7, over=True), answer(8)],
    )
    revisions = [snapshot.revision for snapshot in watch(client, gateway, "latest")]
    assert revisions == [0, 3, 4, 7]
    assert gateway.ids == ["latest", "one-1", "one-1", "one-1"]
    assert all(stream.cancelled for stream in gateway.streams)


@both
def test_one_that_had_ended_is_shown_once(client: Client, clock: Clock, answer: Answer, watch: Watch) -> None:
    gateway = Gateway([answer(0, over=True)])
    assert [snapshot.revision for snapshot in watch(client, gateway, "one-1")] == [0]
    assert len(gateway.streams) == 1


@both
def test_a_gateway_that_comes_back_each_time_is_waited_for_anew(
    client: Client, clock: Clock, answer: Answer, watch: Watch
) -> None:
    away = [[AWAY]] * 50
    gateway = Gateway([answer(0), AWAY], *away, [answer(1), AWAY], *away, [answer(2, over=True)])
    assert [snapshot.revision for snapshot in watch(client, gateway, "one-1")] == [0, 1, 2]


@pytest.mark.parametrize(
    ("answer", "watch", "fix"),
    [
        (
            run,
            watch_run,
            "one-1 goes on when it is back: `web4lora up`, then `web4lora runs watch one-1`.",
        ),
        (job, watch_job, "one-1 goes on when it is back: `web4lora up`."),
    ],
    ids=["run", "job"],
)
def test_one_that_stays_away_is_given_up_after_a_minute(
    client: Client, clock: Clock, answer: Answer, watch: Watch, fix: str
) -> None:
    begin = clock.now
    snapshots = watch(client, Gateway([answer(0), AWAY], [AWAY]), "latest")
    assert next(snapshots).revision == 0
    with pytest.raises(Unavailable) as raised:
        next(snapshots)
    assert raised.value.message == "The gateway at 127.0.0.1:1 is out of reach. It has been away for 60 s."
    assert raised.value.fix == fix
    assert raised.value.reason == "GATEWAY_AWAY"
    assert 60 < clock.now - begin <= 62


@both
@pytest.mark.parametrize(
    ("first", "code", "kind"),
    [
        ([], grpc.StatusCode.UNAVAILABLE, Unavailable),
        ([], grpc.StatusCode.NOT_FOUND, NotFound),
        ([0], grpc.StatusCode.NOT_FOUND, NotFound),
    ],
    ids=["never there", "unknown", "gone while it is followed"],
)
def test_what_waiting_does_not_mend_is_raised_at_once(
    client: Client,
    clock: Clock,
    answer: Answer,
    watch: Watch,
    first: list[int],
    code: grpc.StatusCode,
    kind: type[Web4Error],
) -> None:
    gateway = Gateway([*map(answer, first), failure(code)], [answer(9, over=True)])
    snapshots = watch(client, gateway, "one-1")
    assert [next(snapshots).revision for _ in first] == first
    with pytest.raises(kind):
        next(snapshots)
    assert clock.now == Clock.now, "it waited"
    assert gateway.streams[0].cancelled


class Listing:
    """Plays a listing of pages; keeps what was asked."""

    def __init__(self, field: str, answer: Callable[..., Any], pages: list[list[Any]]) -> None:
        self.field, self.answer, self.pages = field, answer, pages
        self.requests: list[Any] = []

    def __call__(self, request: Any, timeout: float) -> Any:
        self.requests.append(type(request).FromString(request.SerializeToString()))
        number = int(request.page_token or 0)
        token = str(number + 1) if number + 1 < len(self.pages) else ""
        return self.answer(**{self.field: self.pages[number], "next_page_token": token})


def test_runs_are_fetched_page_by_page_as_they_are_needed(client: Client) -> None:
    pages = [[gateway_pb2.Run(id="3"), gateway_pb2.Run(id="2")], [], [gateway_pb2.Run(id="1")]]
    listing = Listing("runs", gateway_pb2.ListRunsResponse, pages)
    client._gateway = SimpleNamespace(ListRuns=listing)  # type: ignore[assignment]
    runs = client.list_runs()
    assert [next(runs).id, next(runs).id] == ["3", "2"]
    assert len(listing.requests) == 1
    assert [each.id for each in runs] == ["1"]  # an empty page is not the last one
    assert [request.page_token for request in listing.requests] == ["", "1", "2"]


def test_runs_that_have_not_ended_are_asked_for_by_their_states(client: Client) -> None:
    listing = Listing("runs", gateway_pb2.ListRunsResponse, [[], [gateway_pb2.Run(id="1")]])
    client._gateway = SimpleNamespace(ListRuns=listing)  # type: ignore[assignment]
    assert [run.id for run in client.list_runs(states=UNENDED)] == ["1"]
    names = {"RUN_STATE_QUEUED", "RUN_STATE_RUNNING", "RUN_STATE_CANCELLING"}
    asked = [{gateway_pb2.RunState.Name(state) for state in each.states} for each in listing.requests]
    assert asked == [names, names]


def test_every_page_of_artifacts_is_of_the_kind_and_name(client: Client) -> None:
    made = [
        artifacts_pb2.Artifact(ref=artifacts_pb2.ArtifactRef(name="demo", digest=digit)) for digit in "ab"
    ]
    listing = Listing("artifacts", artifacts_pb2.ListArtifactsResponse, [[each] for each in made])
    client._artifacts = SimpleNamespace(ListArtifacts=listing)  # type: ignore[assignment]
    assert [each.ref.digest for each in client.artifacts("gguf", "demo")] == ["a", "b"]
    asked = [(request.kind, request.name, request.page_size) for request in listing.requests]
    assert asked == [(artifacts_pb2.ARTIFACT_KIND_GGUF, "demo", 100)] * 2
