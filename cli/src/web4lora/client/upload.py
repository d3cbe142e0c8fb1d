"""Brings the files that a pipeline names into the artifact store: its dataset and its test suite."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath

import yaml
from web4lora_chassis.artifacts import ArtifactRef, ArtifactStore
from web4lora_chassis.dataset import Problem, Row, check_rows, leaks, problems_error
from web4lora_chassis.dataset_split import held_out_rows
from web4lora_chassis.errors import InvalidInput, NotFound
from web4lora_chassis.pipeline.dataset import DatasetSettings

from web4lora.home import short
from web4lora.schema import shorten
from web4lora.yaml_file import compose, is_there

ALLOW_DUPLICATES = "Take these rows out of one of the two, or set dataset.allow_duplicates to true."
_FILE_KEYS = ("prompts", "rules", "json_schema")
_NAME_TAGS = ("tag:yaml.org,2002:str", "tag:yaml.org,2002:null")


def store_dataset(
    store: ArtifactStore,
    name: str,
    train_files: Iterable[Path],
    eval_files: Iterable[Path],
    settings: DatasetSettings = DatasetSettings(),  # noqa: B008 - it is frozen
) -> ArtifactRef:
    """Check chat data and store it as an artifact of kind dataset.

    Args:
        store: Where to.
        name: The artifact's name.
        train_files: JSON Lines files to train on.
        eval_files: Held-out files.
        settings: How much of the first is to be held out, and whether a question may be on both sides.

    Raises:
        InvalidInput: Rows are wrong, a held-out question is trained on, two files have one name, nothing is
            to be trained on, or so much can't be held out.
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
    train, held_out = _checked_rows(files, allow_duplicates=settings.allow_duplicates)
    if not settings.eval_share or held_out:
        return store.put("dataset", name, files, created_by="client", link=False)
    chosen = held_out_rows(train, settings.eval_share)
    sides = {
        "train": [row for place, row in enumerate(train) if place not in chosen],
        "eval": [train[place] for place in sorted(chosen)],
    }
    with tempfile.TemporaryDirectory() as folder:
        split = dict(_split(files, sides, Path(folder)))
        return store.put("dataset", name, split, created_by="client", link=False)


def _split(
    files: Mapping[str, Path], sides: Mapping[str, Sequence[Row]], folder: Path
) -> Iterator[tuple[str, Path]]:
    """Yield a file for each side and file that has rows there; a row keeps its line, the others are blank."""
    for number, (place, path) in enumerate(files.items()):
        for side, rows in sides.items():
            lines = {row.line for row in rows if row.file == str(short(path))}
            if not lines:
                continue
            target = folder / f"{side}-{number}.jsonl"
            with path.open("rb") as whole, target.open("wb") as part:
                for line, text in enumerate(whole, start=1):
                    part.write(text if line in lines else b"\n")
            yield f"{side}/{PurePosixPath(place).name}", target


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
                f"{short(suite_file)}: {shorten(text)} lies outside of the suite's folder.",
                fix="Put the prompts beside the suite.",
            )
        path = suite_file.parent / text
        if not is_there(path.is_file):
            raise NotFound(f"{short(suite_file)}: there is no file {shorten(text)}.", fix="Correct the path.")
        files[str(PurePosixPath(text))] = path
    return store.put("suite", name, files, created_by="client", link=False)


def named_files(suite_file: Path) -> list[str]:
    """Return the files that a suite names, as it names them: the prompts, rules and schemas of its cores.

    Raises:
        InvalidInput: The file is not YAML.
        NotFound: It can't be read.
    """
    name = short(suite_file)
    root = compose(suite_file, "a suite", "examples/web4/suite.yaml")
    names: list[str] = []
    for cores in _values(root, ("cores",)):
        for core in _values(cores):
            for value in _values(core, _FILE_KEYS):
                for item in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                    if item.tag not in _NAME_TAGS:
                        line = item.start_mark.line + 1
                        raise InvalidInput(
                            f"{name}:{line}: here a file's name is needed.", fix="Correct the suite."
                        )
                    names.append(str(item.value))
    return list(dict.fromkeys(text for text in names if text))


def _values(node: yaml.Node, keys: Collection[str] = ()) -> Iterator[yaml.Node]:
    """Yield a mapping's values, those of some keys where keys are given; nothing of what is no mapping."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if not keys or key.value in keys:
                yield value


def row_problems(paths: Iterable[Path]) -> list[Problem]:
    """Return what is wrong with the rows of a dataset's files.

    Raises:
        NotFound: A file can't be read.
    """
    ids: dict[str, str] = {}
    items = itertools.chain.from_iterable(check_rows(path, str(short(path)), ids) for path in paths)
    return [item for item in items if isinstance(item, Problem)]


def _checked_rows(files: Mapping[str, Path], *, allow_duplicates: bool) -> tuple[list[Row], list[Row]]:
    """Return the rows to train on and the held-out ones; bad data stops here and not minutes later."""
    ids: dict[str, str] = {}
    sides: dict[str, list[Row]] = {"train": [], "eval": []}
    problems: list[Problem] = []
    for place, path in files.items():
        for item in check_rows(path, str(short(path)), ids):
            if isinstance(item, Row):
                sides[PurePosixPath(place).parts[0]].append(item)
            else:
                problems.append(item)
    if problems:
        raise problems_error(problems, "Nothing was started.")
    if not sides["train"]:
        raise InvalidInput("There is no row to train on.", fix="Give train_files with at least one row.")
    if not allow_duplicates and (found := list(leaks(sides["train"], sides["eval"]))):
        raise problems_error(found, "Nothing was started.", ALLOW_DUPLICATES)
    return sides["train"], sides["eval"]
