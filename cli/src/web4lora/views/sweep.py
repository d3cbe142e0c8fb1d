"""The runs of a sweep side by side: a table, and a plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from web4.lora.v1 import gateway_pb2, trainer_pb2

from web4lora.views import human
from web4lora.views.stages import run_state
from web4lora.views.table import Cell
from web4lora.views.verdict import TESTS, state_of, verify_result

_BEST = "★"


def keys_of(runs: Sequence[gateway_pb2.Run]) -> list[str]:
    """Return the keys that a sweep gives values to, in the order of their names."""
    return sorted({key for run in runs for key in run.sweep_values})


def trained(run: gateway_pb2.Run) -> trainer_pb2.TrainResult | None:
    """Return what training made in a run, or None before it has."""
    return next(
        (stage.train_result for stage in run.stages if stage.WhichOneof("result") == "train_result"), None
    )


def loss_of(run: gateway_pb2.Run) -> float | None:
    """Return the loss that runs are compared by: the held-out one, or the final one without held-out data."""
    result = trained(run)
    if result is None:
        return None
    return result.held_out_loss if result.HasField("held_out_loss") else result.final_loss


def best_of(runs: Sequence[gateway_pb2.Run]) -> gateway_pb2.Run | None:
    """Return the run with the least loss, or None before any was trained.

    Held-out losses come before final ones, which are of data that was trained on.
    """
    done = [run for run in runs if loss_of(run) is not None]
    held_out = [run for run in done if (made := trained(run)) is not None and made.HasField("held_out_loss")]
    return min(held_out or done, key=lambda run: loss_of(run) or 0.0, default=None)


def comparison(runs: Sequence[gateway_pb2.Run]) -> tuple[list[str], list[list[Cell]]]:
    """Return the columns and rows of the table that compares a sweep's runs."""
    keys = keys_of(runs)
    scores = _scores_in_all(runs)
    best = best_of(runs)
    rows: list[list[Cell]] = []
    for run in runs:
        result, tests = trained(run), verify_result(run)
        row: list[Cell] = [f"{run.id} {_BEST}" if run is best else run.id, run_state(run)]
        row += [run.sweep_values.get(key, "") for key in keys]
        row.append(human.loss(result.final_loss) if result else "")
        row.append(human.loss(result.held_out_loss) if result and result.HasField("held_out_loss") else "")
        row.append(human.duration(result.seconds) if result else "")
        found = {score.name: score.deployed_percent for score in tests.scores} if tests else {}
        row += [f"{found[name]:.0f} %" if name in found else "" for name in scores]
        row.append("" if tests is None else TESTS[state_of(tests)])
        rows.append(row)
    return ["run", "state", *keys, "loss", "held-out", "training", *scores, "tests"], rows


def _scores_in_all(runs: Sequence[gateway_pb2.Run]) -> list[str]:
    """Return the names of the scores that all tested runs have, in the suite's order."""
    tested = [tests for run in runs if (tests := verify_result(run)) is not None and tests.scores]
    if not tested:
        return []
    return [
        score.name
        for score in tested[0].scores
        if all(score.name in {other.name for other in tests.scores} for tests in tested)
    ]


def plot(runs: Sequence[gateway_pb2.Run], path: Path) -> None:
    """Draw the loss of each run that was trained, one bar a run, the least one in colour.

    Args:
        runs: The runs of a sweep.
        path: The picture to write; its ending tells the format.

    Raises:
        OSError: It can't be written.
        ValueError: The format is not known.
    """
    from matplotlib.figure import Figure

    done = [run for run in runs if loss_of(run) is not None]
    best, keys = best_of(done), keys_of(runs)
    names = [
        ", ".join(f"{key.rpartition('.')[2]} {run.sweep_values.get(key, '')}" for key in keys) for run in done
    ]
    losses = [loss_of(run) or 0.0 for run in done]
    figure = Figure(figsize=(8.0, 1.2 + 0.4 * len(done)), layout="constrained")
    axes = figure.subplots()
    colours = ["#1a7f5a" if run is best else "#b0b8bf" for run in done]
    bars = axes.barh([name or run.id for name, run in zip(names, done, strict=True)], losses, color=colours)
    axes.bar_label(bars, [human.loss(loss) for loss in losses], padding=3)
    axes.invert_yaxis()
    held_out = any((made := trained(run)) is not None and made.HasField("held_out_loss") for run in done)
    axes.set_xlabel("held-out loss" if held_out else "final training loss")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
