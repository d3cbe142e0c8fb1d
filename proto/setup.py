"""Generates the typed stubs, web4.lora.v1, from the .proto files while the distribution is built."""

from __future__ import annotations

from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).resolve().parent


class BuildStubs(build_py):
    """Compiles web4/lora/v1/*.proto into the build folder."""

    def run(self) -> None:
        """Generate messages, services and their type stubs."""
        import grpc_tools
        from grpc_tools import protoc

        super().run()
        target = Path(self.build_lib)
        target.mkdir(parents=True, exist_ok=True)
        protos = sorted(str(path.relative_to(HERE)) for path in HERE.glob("web4/lora/v1/*.proto"))
        includes = [f"-I{HERE}", f"-I{Path(grpc_tools.__file__).parent / '_proto'}"]
        outputs = [f"--{kind}_out={target}" for kind in ("python", "grpc_python", "mypy", "mypy_grpc")]
        if protoc.main(["protoc", *includes, *outputs, *protos]) != 0:
            raise SystemExit("protoc failed; its message is above")
        (target / "web4/lora/v1/py.typed").touch()


class WithModules(Distribution):
    """Makes setuptools run build_py although no package is listed."""

    def has_pure_modules(self) -> bool:
        """Return True: the stubs are pure modules that do not exist yet."""
        return True


setup(distclass=WithModules, cmdclass={"build_py": BuildStubs})
