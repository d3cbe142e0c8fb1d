"""Sweeps: lists of values in a pipeline file become pipelines, and their runs one table and one plot."""

from __future__ import annotations

from pathlib import Path

import pytest
from web4.lora.v1 import gateway_pb2
from web4lora.commands.sweeps import draw
from web4lora.pipeline_file import PipelineFile, changed_pipeline, read_pipeline, read_sweep
from web4lora.views.sweep import best_of, comparison
from web4lora_chassis.errors import FailedPrecondition, InvalidInput

GOOD = """\
name: web4-demo
dataset:
  train_files: [train.jsonl]
base:
  model: smollm2-135m-instruct
train:
  epochs: 2
"""
SWEEP = GOOD + "sweep:\n  train.lora.rank: [8, 16]\n  train.learning_rate: [1e-4, 2e-4, 4e-4]\n"


@pytest.fixture(autouse=True)
def _in_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.jsonl").touch()


def sweep(text: str, *overrides: str) -> list[PipelineFile]:
    Path("demo.yaml").write_text(text, "utf-8")
    return read_sweep(Path("demo.yaml"), overrides)


def problems(text: str) -> list[str]:
    with pytest.raises(InvalidInput) as caught:
        sweep(text)
    return caught.value.message.splitlines()


def test_each_combination_is_a_pipeline_that_promotes_nothing() -> None:
    files = sweep(SWEEP)
    seen = [(file.pipeline.train.lora.rank, file.pipeline.train.learning_rate) for file in files]
    assert seen == [(8, 1e-4), (8, 2e-4), (8, 4e-4), (16, 1e-4), (16, 2e-4), (16, 4e-4)]
    assert files[1].sweep_values == {"train.lora.rank": "8", "train.learning_rate": "2e-4"}
    assert {file.pipeline.deploy.promote for file in files} == {"never"}
    assert {file.pipeline.train.epochs for file in files} == {2.0}
    promoting = sweep(SWEEP + "deploy: {promote: always}\n")
    assert {file.pipeline.deploy.promote for file in promoting} == {"always"}


def test_what_is_set_on_the_command_wins_over_the_sweep() -> None:
    files = sweep(SWEEP, "train.lora.rank=4")
    assert [file.pipeline.train.lora.rank for file in files] == [4, 4, 4]
    assert sweep(SWEEP, "train.lora.rank=4", "train.learning_rate=1e-3") == []


def test_a_file_without_a_sweep_is_one_pipeline_and_lists_can_be_swept() -> None:
    assert sweep(GOOD) == []
    files = sweep(GOOD + "sweep: {train.lora.target_modules: [[q_proj], [q_proj, v_proj]]}\n")
    assert [list(file.pipeline.train.lora.target_modules) for file in files] == [
        ["q_proj"],
        ["q_proj", "v_proj"],
    ]
    assert files[1].sweep_values == {"train.lora.target_modules": "[q_proj, v_proj]"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("sweep: [1]\n", "demo.yaml:8: sweep needs keys with lists"),
        ("sweep: {train.epochs: 3}\n", "demo.yaml:8: sweep: train.epochs needs a list of values."),
        ("sweep: {train.epochs: []}\n", "demo.yaml:8: sweep: train.epochs needs a list of values."),
        ("sweep:\n  train.epoch: [1, 2]\n", "demo.yaml:9: sweep train.epoch=1: "),
        ("sweep:\n  train.epochs: [many]\n", "demo.yaml:9: sweep train.epochs=many: "),
        ("sweep:\n  train.lora.rank: [8, 0]\n", "demo.yaml:9: sweep train.lora.rank=0: "),
        (f"sweep:\n  train.seed: {list(range(101))}\n", "demo.yaml:8: sweep has 101 combinations; 100 runs"),
    ],
)
def test_a_wrong_sweep_is_named_by_its_line(text: str, said: str) -> None:
    (found,) = problems(GOOD + text)
    assert found.startswith(said), found


def test_a_runs_pipeline_is_changed_by_settings() -> None:
    old = read_pipeline(Path(_written(GOOD))).pipeline
    new = changed_pipeline(old, ["train.epochs=3", "train.lora.rank=4"])
    assert (new.train.epochs, new.train.lora.rank, new.name) == (3.0, 4, "web4-demo")
    assert old.train.epochs == 2.0
    with pytest.raises(InvalidInput, match=r"--set train\.epoch=3: .*\n--set nothing: write key=value"):
        changed_pipeline(old, ["train.epoch=3", "nothing"])


def _written(text: str) -> str:
    Path("demo.yaml").write_text(text, "utf-8")
    return "demo.yaml"


def run(number: int, rank: int, held_out: float | None = None) -> gateway_pb2.Run:
    made = gateway_pb2.Run(
        id=f"run_2026-11-26_{number}", state="RUN_STATE_RUNNING", sweep_values={"train.lora.rank": str(rank)}
    )
    if held_out is not None:
        result = made.stages.add(name="STAGE_NAME_TRAIN").train_result
        result.final_loss, result.held_out_loss, result.seconds = 0.2, held_out, 90.0
        tests = made.stages.add(name="STAGE_NAME_VERIFY").verify_result
        tests.scores.add(name="tool_call.valid", deployed_percent=95.0)
        made.state = gateway_pb2.RUN_STATE_SUCCEEDED
    return made


def test_the_table_has_a_row_a_run_and_marks_the_least_loss() -> None:
    runs = [run(1, 8, 0.5), run(2, 16, 0.4), run(3, 32)]
    columns, rows = comparison(runs)
    assert columns == [
        "run", "state", "train.lora.rank", "loss", "held-out", "training", "tool_call.valid", "tests"
    ]  # fmt: skip
    assert rows[0][:7] == ["run_2026-11-26_1", "succeeded", "8", "0.20", "0.50", "1 min 30 s", "95 %"]
    assert rows[1][0] == "run_2026-11-26_2 ★"
    assert rows[2] == ["run_2026-11-26_3", "running", "32", "", "", "", "", ""]
    best = best_of(runs)
    assert best is not None
    assert best.id == "run_2026-11-26_2"


def test_the_plot_is_a_picture_and_what_can_not_be_drawn_is_told(tmp_path: Path) -> None:
    runs = [run(1, 8, 0.5), run(2, 16, 0.4), run(3, 32)]
    draw(runs, tmp_path / "sweep.png")
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(InvalidInput, match=r"sweep\.odd"):
        draw(runs, tmp_path / "sweep.odd")
    with pytest.raises(FailedPrecondition, match="can't be written"):
        draw(runs, tmp_path / "nowhere" / "sweep.png")
    with pytest.raises(FailedPrecondition, match="No run of this sweep was trained yet"):
        draw([run(3, 32)], tmp_path / "sweep.png")
