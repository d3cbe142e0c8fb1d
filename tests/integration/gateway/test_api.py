"""The API as clients use it: runs found by what they are, pipelines checked alone, and the examples."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from web4.lora.v1 import gateway_pb2

from tests.servers.fixtures import program

ROOT = Path(__file__).parents[3]
EXAMPLES = ROOT / "examples" / "api"
ROW = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
PIPELINE = "name: demo\ndataset: {train_files: [train.jsonl]}\nbase: {model: smollm2-135m-instruct}\n"


@pytest.fixture
def desk(stack):
    """A working folder with a pipeline, beside a started stack; returns what runs a program in it."""
    (stack.root / "train.jsonl").write_text(json.dumps(ROW) + "\n")
    (stack.root / "demo.yaml").write_text(PIPELINE)
    stack.start()
    stack.env |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "NO_PROXY": "*"}

    def run(*words: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            words, cwd=stack.root, env=stack.env, capture_output=True, text=True, timeout=110
        )

    return run


def found(stack, **fields: object) -> list[str]:
    return [run.id for run in stack.api.ListRuns(gateway_pb2.ListRunsRequest(**fields)).runs]


def test_runs_are_found_and_checked_without_being_made(stack) -> None:
    stack.start()
    request = gateway_pb2.CreateRunRequest(
        pipeline=stack.pipeline(), labels={"team": "a"}, validate_only=True
    )
    checked = stack.api.CreateRun(request).run
    assert checked.id == ""
    assert checked.pipeline.train.lora.rank == 16, "every default is filled in"
    assert found(stack) == []

    stack.hold("prepare")
    first = stack.create(labels={"team": "a"})
    second = stack.create(stack.pipeline(seed=3), labels={"team": "b"})
    assert first.labels == {"team": "a"}
    assert found(stack, labels={"team": "a"}) == [first.id]
    assert found(stack, created_after=second.create_time) == [second.id]
    stack.api.CancelRun(gateway_pb2.CancelRunRequest(id=first.id))
    stack.finish(first.id)
    assert found(stack, states=[gateway_pb2.RUN_STATE_CANCELLED]) == [first.id]
    again = stack.api.RetryRun(gateway_pb2.RetryRunRequest(id=first.id, request_id="again")).run
    assert again.labels == {"team": "a"}
    assert found(stack, labels={"team": "a"}) == [again.id, first.id]


def test_the_python_example_runs(stack, desk) -> None:
    done = desk(sys.executable, EXAMPLES / "runs.py", "demo.yaml")
    assert done.returncode == 0, done.stderr
    [run] = found(stack)
    assert f"{run} ended: {gateway_pb2.RUN_STATE_SUCCEEDED}" in done.stdout
    assert f"found {run} of demo" in done.stdout
    (stack.root / "demo.yaml").write_text(PIPELINE.replace("demo", "No Name"))
    wrong = desk(sys.executable, EXAMPLES / "runs.py", "demo.yaml")
    assert wrong.returncode == 1
    assert "demo.yaml:1" in wrong.stderr
    assert found(stack) == [run]


def test_the_shell_example_runs(stack, desk) -> None:
    done = desk("bash", EXAMPLES / "runs.sh", "demo.yaml")
    assert done.returncode == 0, done.stderr
    [run] = found(stack)
    assert "demo.yaml can be run." in done.stdout
    assert f"ran {run}" in done.stdout
    assert "STAGE_NAME_PROMOTE STAGE_STATE_SUCCEEDED" in done.stdout
    table = desk("web4lora", "runs", "list", "--state", "succeeded", "--label", "team=a").stdout
    assert run in table
    none = desk("web4lora", "runs", "list", "--label", "team=b")
    assert (none.returncode, "There are no such runs." in none.stdout) == (0, True)


def test_the_grpcurl_example_runs(stack, desk) -> None:
    grpcurl = program("grpcurl")
    stack.env["PATH"] = f"{grpcurl.parent}:{stack.env['PATH']}"
    stack.finish(stack.create(labels={"team": "a"}).id)
    (stack.root / "token").write_text("secret\n")
    stack.env["TOKEN_FILE"] = str(stack.root / "token")
    done = desk("bash", EXAMPLES / "runs.grpcurl.sh", stack.addresses["gateway"])
    assert done.returncode == 0, done.stderr
    assert "web4.lora.v1.ArtifactService" in done.stdout
    assert done.stdout.count('"state": "RUN_STATE_SUCCEEDED"') == 2, "listed, and watched to its end"
    assert "Code: InvalidArgument" in done.stderr


def test_every_example_is_run_here_and_told() -> None:
    here, told = Path(__file__).read_text("utf-8"), (EXAMPLES / "README.md").read_text("utf-8")
    for name in {file.name for file in EXAMPLES.iterdir()} - {"README.md"}:
        assert f'EXAMPLES / "{name}"' in here
        assert f"`{name}`" in told
