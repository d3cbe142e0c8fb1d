"""Which stack the command speaks to: its settings, and the folder that holds its state."""

from __future__ import annotations

import sys
from pathlib import Path
from shutil import which

from web4lora_chassis.settings import Settings, load

HOME_NAME = ".web4lora"


def load_settings() -> Settings:
    """Read the settings from the environment.

    Where `WEB4LORA_HOME` is not set, the nearest folder `.web4lora` here or above is the stack's home, so
    that a checkout with a stack of its own is found from anywhere inside it; else it is `~/.web4lora`.

    Raises:
        InvalidInput: A variable has the wrong form.
    """
    settings = load(Settings)
    if "home" not in settings.model_fields_set and (home := _nearest_home(Path.cwd())):
        return load(Settings, home=home)
    return settings


def command_name() -> str:
    """Return what people type to call this command: its name when it is on the path, else its place."""
    program = Path(sys.argv[0])
    found = which("web4lora")
    if program.name != "web4lora" or (found and Path(found).resolve() == program.resolve()):
        return "web4lora"
    return str(short(program))


def short(path: Path) -> Path:
    """Return a path relative to the working folder where it lies below it."""
    try:
        return path.absolute().relative_to(Path.cwd())
    except ValueError:
        return path


def _nearest_home(folder: Path) -> Path | None:
    for place in (folder, *folder.parents):
        if (place / HOME_NAME).is_dir():
            return place / HOME_NAME
    return None
