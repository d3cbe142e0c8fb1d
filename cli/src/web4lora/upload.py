"""Brings the files that a pipeline names into the artifact store: its dataset and its test suite."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath

import yaml
from web4lora_chassis.artifacts import ArtifactRef, ArtifactStore
from web4lora_chassis.dataset import Problem, Row, check_rows, problems_error
from web4lora_chassis.errors import InvalidInput, NotFound

from web4lora.home import short

_SUITE_LIMIT_BYTES = 1 << 20
_FILE_KEYS = ("prompts", "rules", "json_schema")


def store_dataset(
    store: ArtifactStore, name: str, train_files: Iterable[Path], eval_files: Iterable[Path]
) -> ArtifactRef:
    """Check chat data and store it as an artifact of kind dataset.

    Args:
        store: Where to.
        name: The artifact's name.
        train_files: JSON Lines files to train on.
        eval_files: Held-out files.

    Raises:
        InvalidInput: Rows are wrong, two files have one name, or there is nothing to train on.
        NotFound: A file can't be read.
        Unavailable: The store is out of reach.
    """
    files: dict[str, Path] = {}
    for folder, paths in (("train", train_files), ("eval", eval_files)):
        for path in paths:
            place = f"{folder}/{path.name if path.suffix == '.jsonl' else path.name + '.jsonl'}"
            if place in files:
                raise InvalidInput(
                    f"{short(path)} and {short(files[place])} have the same name.", fix="Rename one of them."
                )
            files[place] = path
    _check_rows(files)
    return store.put("dataset", name, files, created_by="client", link=False)


def store_suite(store: ArtifactStore, name: str, suite_file: Path) -> ArtifactRef:
    """Store a test suite and the prompt and rule files it names as an artifact of kind suite.

    Args:
        store: Where to.
        name: The artifact's name.
        suite_file: The suite; the files it names are relative to its folder and lie in or below it.

    Raises:
        InvalidInput: The suite is not YAML, or names a file outside of its folder.
        NotFound: A file can't be read.
        Unavailable: The store is out of reach.
    """
    files = {"suite.yaml": suite_file}
    for text in named_files(suite_file):
        parts = PurePosixPath(text).parts
        if PurePosixPath(text).is_absolute() or ".." in parts:
            raise InvalidInput(
                f"{short(suite_file)}: {text} lies outside of the suite's folder.",
                fix="Put the prompts beside the suite.",
            )
        path = suite_file.parent / text
        if not path.is_file():
            raise NotFound(f"{short(suite_file)}: there is no file {text}.", fix="Correct the path.")
        files[str(PurePosixPath(text))] = path
    return store.put("suite", name, files, created_by="client", link=False)


def named_files(suite_file: Path) -> list[str]:
    """Return the files that a suite names, as it names them: the prompts, rules and schemas of its cores.

    Raises:
        InvalidInput: The file is not YAML.
        NotFound: It can't be read.
    """
    name = short(suite_file)
    try:
        with suite_file.open("rb") as file:
            data = yaml.safe_load(file.read(_SUITE_LIMIT_BYTES).decode("utf-8-sig"))
    except OSError as error:
        raise NotFound(f"{name} can't be read: {error.strerror}.", fix="Name a readable file.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InvalidInput(f"{name} is not YAML: {error}.", fix="Correct the suite.") from error
    cores = data.get("cores") if isinstance(data, dict) else None
    names: list[str] = []
    for core in cores.values() if isinstance(cores, dict) else ():
        for key in _FILE_KEYS:
            value = core.get(key) if isinstance(core, dict) else None
            names += [text for text in (value if isinstance(value, list) else [value]) if text]
    wrong = [text for text in names if not isinstance(text, str)]
    if wrong:
        raise InvalidInput(f"{name}: {wrong[0]!r} is not the name of a file.", fix="Correct the suite.")
    return list(dict.fromkeys(names))


def _check_rows(files: Mapping[str, Path]) -> None:
    """Read every row once, so that bad data stops here and not minutes later."""
    ids: dict[str, str] = {}
    problems: list[Problem] = []
    train_rows = 0
    for place, path in files.items():
        for item in check_rows(path, str(short(path)), ids):
            if isinstance(item, Problem):
                problems.append(item)
            elif isinstance(item, Row) and place.startswith("train/"):
                train_rows += 1
    if problems:
        raise problems_error(problems, "Nothing was started.")
    if not train_rows:
        raise InvalidInput("There is no row to train on.", fix="Give train_files with at least one row.")
