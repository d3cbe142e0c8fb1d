"""What is deployed, on disk: one file a candidate, one a name. Whoever crashes leaves the old or the new.

`deployments/<id>.json` is what is wanted; the deploy job writes it, and the supervisor in the service makes
it so where the runtime is llama-server. `scales/<id>.json` is how strongly its adapters are wanted, in a file
of its own because the service sets that while a job may write the other. `names/<name>.json` says which
candidate serves under a name, and which did before; `names/<name>.lock` is held by who changes that, in
whatever process.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

from web4lora_chassis.artifacts import ArtifactRef
from web4lora_chassis.errors import DataLoss, NotFound, Web4Error, shown
from web4lora_chassis.jobs.record import write_json

from web4lora_deployer.records.names import file_name, is_deployment_id, is_name

log = logging.getLogger(__name__)

_BROKEN = (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError)
"""What reading a record that was changed from outside can end in."""


@dataclass(frozen=True)
class Parameters:
    """How a model wants to be used; the packager's modelfile.json.

    Attributes:
        stop: Texts that end an answer, besides the model's own end token.
        system: The base model's default system message; empty when it has none.
        temperature: Sampling temperature for requests that name none.
        license: The model's licence; may be empty.
        context_tokens: The packager's advice; 0 when it gives none.
    """

    stop: tuple[str, ...] = ()
    system: str = ""
    temperature: float = 0.0
    license: str = ""
    context_tokens: int = 0


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter that llama-server loads beside its model.

    Attributes:
        name: What people call it.
        gguf: The artifact.
        file: The GGUF, relative to the folder of models.
        sha256: Of the file, 64 lower-case hex digits.
        size_bytes: Of the file.
    """

    name: str
    gguf: ArtifactRef
    file: str
    sha256: str
    size_bytes: int


@dataclass(frozen=True)
class Deployment:
    """A model in a runtime, as it is wanted.

    Attributes:
        id: `name:v<digest8>`, of its `identity`; one made by an earlier version is of the file alone.
        name: What people call it.
        target: The runtime.
        gguf: The artifact.
        file: The GGUF, relative to the folder of models.
        sha256: Of the file, 64 lower-case hex digits.
        size_bytes: Of the file.
        parameters: How the model wants to be used.
        context_tokens: Context length of one request.
        parallel: Requests answered at once, where the runtime lets us choose.
        generation: Changes when it has to be started anew; tells an old status from a new one.
        loaded: False for one that is kept for a rollback and takes no memory meanwhile.
        endpoint: Where it answered when it was deployed; empty until its prompts were found to be
            training's and it gave a first answer.
        model: Its name in requests.
        runtime_version: Version of the runtime it was brought into.
        created_at: Seconds since 1970.
        leaving: Runtimes that it was in before, and that still have to let go of it: an earlier version
            moved a deployment from one to another.
        adapters: Adapters on it, in the order they were given in; see `Deployments.scales`.
        records: Records of its training, relative to the folder of models; none for one from elsewhere.
        trained_system: The system message it was trained with most often; empty when there is none.
    """

    id: str
    name: str
    target: str
    gguf: ArtifactRef
    file: str
    sha256: str
    size_bytes: int
    parameters: Parameters
    context_tokens: int
    parallel: int
    generation: str
    loaded: bool = True
    endpoint: str = ""
    model: str = ""
    runtime_version: str = ""
    created_at: float = 0.0
    leaving: tuple[str, ...] = ()
    adapters: tuple[Adapter, ...] = ()
    records: tuple[str, ...] = ()
    trained_system: str = ""

    @property
    def identity(self) -> dict[str, object]:
        """All that makes it what it is: a deployment with anything else in it is another one."""
        parameters = asdict(self.parameters)
        del parameters["context_tokens"]  # advice; what came of it stands below
        return {
            "file": self.sha256,
            "adapters": [[adapter.name, adapter.sha256] for adapter in self.adapters],
            "target": self.target,
            "context_tokens": self.context_tokens,
            "parallel": self.parallel,
            **parameters,
            "temperature": float(self.parameters.temperature),
        }

    @property
    def files(self) -> tuple[str, ...]:
        """All files it serves, and its records, relative to the folder of models."""
        return (self.file, *(adapter.file for adapter in self.adapters), *self.records)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """Read it back from JSON data."""
        parameters = dict(data["parameters"])
        parameters["stop"] = tuple(parameters["stop"])
        return cls(
            **{
                **data,
                "gguf": ArtifactRef.from_json(data["gguf"]),
                "parameters": Parameters(**parameters),
                "leaving": tuple(data.get("leaving", ())),
                "records": tuple(data.get("records", ())),
                "adapters": tuple(
                    Adapter(**{**adapter, "gguf": ArtifactRef.from_json(adapter["gguf"])})
                    for adapter in data.get("adapters", ())
                ),
            }
        )


@dataclass(frozen=True)
class Name:
    """A name people call.

    Attributes:
        name: The name.
        current: The candidate that serves under it.
        previous: Those that served before, newest first: the way back.
        rolled_back: Those that were rolled back from: no way back, and kept until the next promotion.
        note: How the current one came to serve, where people should know; else empty.
    """

    name: str
    current: str
    previous: tuple[str, ...] = ()
    rolled_back: tuple[str, ...] = ()
    note: str = ""

    @classmethod
    def from_json(cls, data: Any) -> Self:
        """Read it back from JSON data."""
        previous, rolled_back = tuple(data["previous"]), tuple(data.get("rolled_back", ()))
        texts = [data["name"], data["current"], data.get("note", ""), *previous, *rolled_back]
        if not all(isinstance(text, str) for text in texts):
            raise ValueError("it holds what is no text")
        return cls(data["name"], data["current"], previous, rolled_back, data.get("note", ""))

    def without(self, deployment_id: str) -> Name:
        """Return the name with a candidate forgotten that does not serve under it."""
        previous, rolled_back = (
            tuple(other for other in ids if other != deployment_id)
            for ids in (self.previous, self.rolled_back)
        )
        return replace(self, previous=previous, rolled_back=rolled_back)


class Deployments:
    """The records below the deployer's folder.

    Args:
        root: The deployer's folder.
    """

    def __init__(self, root: Path) -> None:
        self._records = root / "deployments"
        self._names = root / "names"
        self._scales = root / "scales"
        self.models = root / "models"
        for folder in (self._records, self._names, self._scales, self.models):
            folder.mkdir(parents=True, exist_ok=True)

    def list(self) -> list[Deployment]:
        """Return all deployments, newest first."""
        return sorted(self._load(), key=lambda record: (record.created_at, record.id), reverse=True)

    def get(self, deployment_id: str) -> Deployment:
        """Return a deployment by its id.

        Raises:
            NotFound: No such deployment.
        """
        if is_deployment_id(deployment_id):
            record = _read(self._records / file_name(deployment_id))
            if record is not None:
                return record
        raise NotFound(
            f"There is no deployment {deployment_id!r}.",
            fix="`web4lora deployments list` shows them.",
            metadata={"deployment": deployment_id},
        )

    def find(self, id_or_name: str) -> Deployment:
        """Return a deployment by its id, or the one that a name stands for: promoted, else the newest tried.

        Raises:
            NotFound: No such deployment.
        """
        name = self.name(id_or_name)
        if name is not None:
            return self.get(name.current)
        for record in self.list():
            if record.name == id_or_name and record.endpoint:  # what a killed attempt left is no model yet
                return record
        return self.get(id_or_name)

    def save(self, record: Deployment) -> None:
        """Write a deployment, new or changed."""
        write_json(self._records / file_name(record.id), asdict(record))

    def remove(self, record: Deployment) -> None:
        """Forget a deployment, its place under its name, and its files when no other one serves them.

        Its record goes last: until then a crash leaves what doing it again finds.
        """
        name = self.name(record.name)
        if name is not None and name.current == record.id:
            (self._names / f"{record.name}.json").unlink(missing_ok=True)
        elif name is not None and name.without(record.id) != name:
            self._save_name(name.without(record.id))
        for file in record.files:
            self.drop_file(file, but=record.id)
        self.forget_scales(record)
        (self._records / file_name(record.id)).unlink(missing_ok=True)

    def drop_file(self, file: str, *, but: str = "") -> None:
        """Remove a GGUF that no deployment serves.

        Args:
            file: Relative to the folder of models.
            but: Id of a deployment that does not count.
        """
        if any(file in other.files for other in self._load() if other.id != but):
            return
        model = self.models / file
        model.unlink(missing_ok=True)
        if model.parent.is_dir() and not any(model.parent.iterdir()):
            model.parent.rmdir()

    def scales(self, record: Deployment) -> dict[str, float]:
        """Return how strongly each of a deployment's adapters is wanted, by name and in their order.

        As long as nothing was set, the first one is at 1 and the others are at 0.
        """
        default = {adapter.name: float(number == 0) for number, adapter in enumerate(record.adapters)}
        try:
            wanted = json.loads((self._scales / file_name(record.id)).read_text(encoding="utf-8"))
            return {name: float(wanted.get(name, scale)) for name, scale in default.items()}
        except FileNotFoundError:
            return default
        except _BROKEN as error:
            log.error("the adapters' scales of %s can't be read and are as at first: %r", record.id, error)
            return default

    def save_scales(self, record: Deployment, scales: Mapping[str, float]) -> None:
        """Write how strongly a deployment's adapters are wanted from now on."""
        write_json(self._scales / file_name(record.id), dict(scales))

    def forget_scales(self, record: Deployment) -> None:
        """Take the adapters' scales back to what they are at first."""
        (self._scales / file_name(record.id)).unlink(missing_ok=True)

    def name(self, name: str) -> Name | None:
        """Return what a name stands for, or None when nothing was promoted to it.

        Raises:
            DataLoss: Its record can't be read.
        """
        if not is_name(name):
            return None
        path = self._names / f"{name}.json"
        try:
            return Name.from_json(json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except _BROKEN as error:
            raise DataLoss(
                f"{path} can't be read: {shown(str(error))}.",
                fix="Move the file away, then promote a deployment to the name again.",
            ) from error

    def names(self) -> tuple[Name, ...]:
        """Return all names to which something was promoted; one that can't be read hides no other."""
        found = []
        for path in sorted(self._names.glob("*.json")):
            try:
                found.append(self.name(path.stem))
            except DataLoss as error:
                log.error("%s", error)
        return tuple(name for name in found if name is not None)

    def promoted(self, record: Deployment) -> bool:
        """Say whether a deployment's name stands for it."""
        name = self.name(record.name)
        return name is not None and name.current == record.id

    def promote(self, record: Deployment) -> Name:
        """Let a name stand for a deployment from now on; the one before is remembered."""
        before = self.name(record.name)
        if before is not None and before.current == record.id:
            return before
        if before is None:
            name = Name(record.name, record.id)
        else:
            name = Name(record.name, record.id, (before.current, *before.without(record.id).previous))
        self._save_name(name)
        return name

    def go_back(self, record: Deployment, note: str) -> Name:
        """Let a name stand for one of those before again. Those that served after it are no way back."""
        before = self.name(record.name)
        if before is None or record.id not in before.previous:
            raise NotFound(f"{record.id} did not serve under {record.name} before.")
        place = before.previous.index(record.id)
        left = (before.current, *before.previous[:place])
        rolled_back = tuple(dict.fromkeys((*left, *before.rolled_back)))
        name = Name(record.name, record.id, before.previous[place + 1 :], rolled_back, note)
        self._save_name(name)
        return name

    @contextlib.contextmanager
    def locked(self, name: str) -> Iterator[None]:
        """Change what serves under a name, and what is kept of it, alone among threads and processes."""
        with (self._names / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # closing it lets go, and so does a kill
            yield

    def path(self, record: Deployment) -> Path:
        """Return where a deployment's GGUF lies."""
        return self.models / record.file

    def _save_name(self, name: Name) -> None:
        write_json(self._names / f"{name.name}.json", asdict(name))

    def _load(self) -> Iterator[Deployment]:
        for path in sorted(self._records.glob("*.json")):
            record = _read(path)
            if record is not None:
                yield record


def _read(path: Path) -> Deployment | None:
    """Read a record; None when it is not there, or can't be read, which must not hide the others."""
    try:
        return Deployment.from_json(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (*_BROKEN, Web4Error) as error:
        log.error("%s can't be read and is left out: %r", path, error)
        return None
