"""The source of llama.cpp: pinned, fetched with pip from the user's package index, checked by its hash.

The sdist of `llama-cpp-python` carries llama.cpp whole, converter included; nothing else of it is kept.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import sys
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, cast

from web4lora_chassis import process
from web4lora_chassis.artifacts import hash_file
from web4lora_chassis.environment import environment
from web4lora_chassis.errors import DataLoss, FailedPrecondition, Internal, Unavailable
from web4lora_chassis.jobs import Progress

Report = Callable[[Progress], None]
"""Takes progress; cheap to call often."""

SDIST_VARIABLE = "WEB4LORA_LLAMA_CPP_SDIST"
"""Names an sdist that is on disk already: the file, or a folder that holds it."""
SOURCE_VARIABLE = "WEB4LORA_LLAMA_CPP_SOURCE"
"""Names the source that WEB4LORA_LLAMA_CPP's binaries were built from; the cache's own when unset."""


@dataclass(frozen=True)
class Sdist:
    """A pinned source distribution and the llama.cpp in it.

    Attributes:
        name: The distribution.
        version: Its version.
        sha256: Of the archive, 64 lower-case hex digits.
        commit: The commit of llama.cpp that it carries, shortened as llama.cpp does.
    """

    name: str
    version: str
    sha256: str
    commit: str

    @property
    def file_name(self) -> str:
        """The archive's name on the index."""
        return f"{self.name.replace('-', '_')}-{self.version}.tar.gz"


SDIST = Sdist(
    name="llama-cpp-python",
    version="0.3.36",
    sha256="832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e",
    commit="0c1e570",
)

# Two thirds of the source are test vocabularies and documents that neither build nor converter reads.
_LEFT_OUT = {".git", "app", "benches", "docs", "examples", "media", "models", "tests"}
_CONVERTER = "convert_hf_to_gguf.py"
_DOWNLOAD_TIMEOUT_SECONDS = 3600.0


def source_folder(root: Path) -> Path:
    """Return where the source lies below llama.cpp's folder in the cache."""
    return root / f"source-{SDIST.sha256[:12]}"


def find_source(root: Path, report: Report) -> Path:
    """Return the source that WEB4LORA_LLAMA_CPP_SOURCE names, else that in the cache; see `ensure_source`.

    Raises:
        FailedPrecondition: There is no converter in the folder that the variable names.
    """
    given = os.environ.get(SOURCE_VARIABLE)
    if not given:
        root.mkdir(parents=True, exist_ok=True)
        return ensure_source(root, report)
    if not (Path(given) / _CONVERTER).is_file():
        raise FailedPrecondition(
            f"{SOURCE_VARIABLE}: {given} has no {_CONVERTER}.",
            fix=f"Name llama.cpp's source, or unset {SOURCE_VARIABLE}.",
        )
    return Path(given)


def ensure_source(root: Path, report: Report) -> Path:
    """Return the folder of llama.cpp's source, fetched and unpacked when it is not there yet.

    Safe to call from several processes: one fetches, the others wait.

    Args:
        root: llama.cpp's folder in the cache.
        report: Takes progress.

    Raises:
        DataLoss: The archive is not the pinned one.
        Unavailable: It could not be downloaded.
    """
    target = source_folder(root)
    if (target / _CONVERTER).is_file():
        return target
    with (
        (root / "source.lock").open("w") as lock,
        tempfile.TemporaryDirectory(prefix="source-", dir=root) as folder,
    ):
        fcntl.flock(lock, fcntl.LOCK_EX)  # the kernel frees it when we die
        if (target / _CONVERTER).is_file():  # another process was faster
            return target
        archive = _given() or _download(Path(folder), report)
        actual = hash_file(archive)
        if actual != SDIST.sha256:
            raise DataLoss(
                f"{archive} is not {SDIST.name} {SDIST.version}: its sha256 is {actual[:12]}…, "
                f"expected {SDIST.sha256[:12]}….",
                fix="Remove it, and try again.",
            )
        report(Progress(phase="source", message="unpacking llama.cpp's source"))
        part = Path(folder) / "llama.cpp"
        _unpack(archive, part)
        if target.exists():  # without its converter: the rest of an unpacking that was cut off
            shutil.rmtree(target)
        part.replace(target)
    return target


def _given() -> Path | None:
    """Return the archive that the user has on disk, if any."""
    value = os.environ.get(SDIST_VARIABLE)
    if not value:
        return None
    path = Path(value).expanduser()
    path = path / SDIST.file_name if path.is_dir() else path
    if not path.is_file():
        raise FailedPrecondition(
            f"{SDIST_VARIABLE}: there is no {path}.",
            fix=f"Name {SDIST.file_name} or its folder, or unset {SDIST_VARIABLE} to download it.",
        )
    return path


def _download(folder: Path, report: Report) -> Path:
    """Fetch the archive with pip, which knows the user's index, mirrors, proxies and wheel folders."""
    report(Progress(phase="source", message=f"downloading {SDIST.name} {SDIST.version} (77 MB)"))
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{SDIST.name}=={SDIST.version} --hash=sha256:{SDIST.sha256}\n", encoding="utf-8")
    command: list[str | Path] = [
        sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input",
        "--no-deps", f"--no-binary={SDIST.name}", "--require-hashes",
        "--requirement", requirements, "--dest", folder,
    ]  # fmt: skip
    # A constraints file would have to hold hashes too.
    env = environment("PIP_*")
    env.pop("PIP_CONSTRAINT", None)
    try:
        process.run(command, env=env, timeout_seconds=_DOWNLOAD_TIMEOUT_SECONDS)
    except Internal as error:
        raise Unavailable(
            f"{SDIST.file_name} could not be downloaded. {error.message}",
            fix=f"Check pip's index settings, or put the file somewhere and name it in {SDIST_VARIABLE}.",
            reason="SOURCE_UNAVAILABLE",
        ) from error
    return folder / SDIST.file_name


def _unpack(archive: Path, target: Path) -> None:
    """Extract llama.cpp, and nothing that would land outside the target."""
    prefix = PurePosixPath(SDIST.file_name.removesuffix(".tar.gz"), "vendor", "llama.cpp")
    with tarfile.open(archive, "r:gz") as tar:
        for member in tar:
            path = PurePosixPath(member.name)
            if not path.is_relative_to(prefix) or path == prefix:
                continue
            path = path.relative_to(prefix)
            if path.parts[0] in _LEFT_OUT:
                continue
            if ".." in path.parts or not member.isfile():  # by hand: Python before 3.11.4 has no safe extract
                continue
            place = target / path
            place.parent.mkdir(parents=True, exist_ok=True)
            with place.open("wb") as file:
                shutil.copyfileobj(cast(IO[bytes], tar.extractfile(member)), file)
            place.chmod(0o755 if member.mode & 0o100 else 0o644)
    if not (target / _CONVERTER).is_file():
        raise DataLoss(f"{archive} holds no llama.cpp.")
