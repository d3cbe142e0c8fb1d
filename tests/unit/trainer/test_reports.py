"""What a training tells TensorBoard and others, and that it stays on the machine."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
from web4lora_chassis.dataset import Dataset
from web4lora_chassis.errors import FailedPrecondition
from web4lora_chassis.pipeline.train import REPORTS
from web4lora_trainer import reports
from web4lora_trainer.reports import leaving, report_here, require_reports
from web4lora_trainer.train import Base, train

from tests.unit.trainer.test_train import SETTINGS, rows, silent

VARIABLES = (
    "TENSORBOARD_LOGGING_DIR", "TRACKIO_DIR", "TRACKIO_SPACE_ID", "MLFLOW_TRACKING_URI", "WANDB_DIR",
    "WANDB_MODE",
)  # fmt: skip


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.setenv(name, "")  # so that it is put back afterwards
        monkeypatch.delenv(name)


@pytest.mark.parametrize("name", REPORTS)
def test_what_is_not_installed_is_refused_in_a_line(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reports, "find_spec", lambda _: None)
    with pytest.raises(FailedPrecondition, match=rf"^train\.report_to: {name} is not installed") as caught:
        require_reports([name])
    assert caught.value.metadata["field"] == "train.report_to"
    assert f"pip install {name}" in caught.value.fix
    require_reports([])


def test_reports_stay_here_unless_the_environment_says_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report_here(tmp_path, "demo-1")
    assert os.environ["WANDB_MODE"] == "offline"
    assert all(str(tmp_path) in os.environ[name] for name in VARIABLES if name.endswith(("_DIR", "_URI")))
    assert leaving(REPORTS) == []
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://mlflow.example.org")
    monkeypatch.setenv("TRACKIO_SPACE_ID", "me/space")
    monkeypatch.setenv("WANDB_MODE", "online")
    report_here(tmp_path, "demo-1")
    assert os.environ["WANDB_MODE"] == "online"
    assert [line.partition(" ")[0] for line in leaving(REPORTS)] == ["trackio", "mlflow", "wandb"]
    assert leaving(["tensorboard"]) == []


def test_tensorboard_is_told_every_step(tiny_base: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    require_reports(["tensorboard"])
    report_here(tmp_path / "reports", "demo-1")
    settings = replace(SETTINGS, max_steps=3, report_to=("tensorboard",))
    train(settings, Dataset(rows(18), (), ()), Base(tiny_base, "org/tiny"), tmp_path, silent)
    told = EventAccumulator(str(tmp_path / "reports" / "tensorboard" / "demo-1"))
    told.Reload()
    assert [event.step for event in told.Scalars("train/loss")] == [1, 2, 3]
    plain = train(
        replace(settings, report_to=()), Dataset(rows(18), (), ()), Base(tiny_base, "org/tiny"),
        tmp_path / "plain", silent,
    )  # fmt: skip
    assert (
        plain.files["adapter_model.safetensors"].read_bytes()
        == (tmp_path / "output" / "adapter_model.safetensors").read_bytes()
    )
