"""Reports of a training to TensorBoard, trackio, MLflow or W&B: Transformers' own, where those are installed.

Whatever of them is asked for writes on this machine, unless the operator's environment says otherwise.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

from web4lora_chassis.errors import FailedPrecondition

_PACKAGES = {
    "tensorboard": ("tensorboard", "tensorboardX"), "trackio": ("trackio",), "mlflow": ("mlflow",),
    "wandb": ("wandb",),
}  # fmt: skip
_LOCAL = ("file:", "sqlite:")
_SENT = (
    "each step's loss, learning rate and speed, the settings, paths of this machine, and the base's config"
)


def require_reports(names: Iterable[str]) -> None:
    """Refuse to report to what is not installed.

    Raises:
        FailedPrecondition: Names the first package that is lacking.
    """
    for name in names:
        if not any(find_spec(package) for package in _PACKAGES[name]):
            raise FailedPrecondition(
                f"train.report_to: {name} is not installed where the trainer runs.",
                fix=f"Install it there (`pip install {_PACKAGES[name][0]}`), or leave {name} out.",
                metadata={"field": "train.report_to"},
            )


def leaving(names: Iterable[str]) -> list[str]:
    """Return a line for each of them that the environment makes send data to another machine."""
    uri, space, mode = (
        os.environ.get(name, "") for name in ("MLFLOW_TRACKING_URI", "TRACKIO_SPACE_ID", "WANDB_MODE")
    )
    elsewhere = {
        "mlflow": f"MLFLOW_TRACKING_URI is {uri}" if "://" in uri and not uri.startswith(_LOCAL) else "",
        "trackio": f"TRACKIO_SPACE_ID is {space}" if space else "",
        "wandb": f"WANDB_MODE is {mode}" if mode in ("online", "shared") else "",
    }
    return [
        f"{name} sends {_SENT} to another machine: {elsewhere[name]} in the trainer's environment"
        for name in names
        if elsewhere.get(name)
    ]


def report_here(folder: Path, run: str) -> None:
    """Have all of them write below a folder, each where the environment names no place of its own.

    Args:
        folder: Of all trainings' reports.
        run: Names this training's own folder, where it needs one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in (
        ("TENSORBOARD_LOGGING_DIR", str(folder / "tensorboard" / run)),
        ("TRACKIO_DIR", str(folder / "trackio")),
        ("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}"),
        ("WANDB_DIR", str(folder)),
        ("WANDB_MODE", "offline"),
    ):
        os.environ.setdefault(name, value)
