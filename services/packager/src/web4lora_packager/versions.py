"""Versions of the packager and of the libraries that shape what it makes; nothing is imported for it."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from web4lora_llamacpp import SDIST

_LIBRARIES = ("gguf", "numpy", "ml-dtypes", "peft", "safetensors", "torch", "transformers")


def packager_version() -> str:
    """Return this distribution's version."""
    return version("web4lora-packager")


def tool_versions() -> dict[str, str]:
    """Return the versions of the libraries, and of the distribution that llama.cpp's source comes from."""
    found = {SDIST.name: SDIST.version}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
