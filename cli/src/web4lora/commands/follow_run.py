"""Follows a run to its end, asks on Ctrl-C, and says how it ended."""

from __future__ import annotations

import select
import shlex
import sys
from pathlib import Path

import typer
from web4.lora.v1 import gateway_pb2
from web4lora_chassis import process

from web4lora.client import Client, ended
from web4lora.home import command_name, load_settings, short
from web4lora.pipeline_file import PipelineFile
from web4lora.store_console import run_folders
from web4lora.views import console
from web4lora.views.console import line
from web4lora.views.run_progress import follower
from web4lora.views.stages import failure_lines, run_state, stage_name
from web4lora.views.verdict import missed, show_scores, verify_result

_LABEL_WIDTH = 18
_INTERRUPTED = 130
_CTRL_C_SECONDS = 0.2


def follow(client: Client, run_id: str, file: PipelineFile | None = None) -> gateway_pb2.Run | None:
    """Show a run until it has ended.

    Args:
        client: Watches it.
        run_id: The run.
        file: The pipeline file that it was started from: errors then name the line of the key they speak of.

    Returns:
        The run, or None when the user detached: it goes on.

    Raises:
        typer.Exit: Interrupted where nobody can be asked; the run goes on.
    """
    view = follower()
    last: gateway_pb2.Run | None = None
    while last is None or not ended(last):
        try:
            for last in client.watch(run_id):
                if file is not None:
                    locate(last, file)
                view.update(last)
        except KeyboardInterrupt:
            view.close()
            if not sys.stdin.isatty() or not console.out.is_terminal:
                _say_detached(run_id)
                raise typer.Exit(_INTERRUPTED) from None
            choice = _ask()
            if choice == "d":
                _say_detached(run_id)
                return None
            if choice == "c":
                client.cancel(run_id)
        finally:
            view.close()
    return last


def locate(run: gateway_pb2.Run, file: PipelineFile) -> None:
    """Put the place in the pipeline file in front of errors that speak of one of its keys."""
    for error in (run.error, *(stage.error for stage in run.stages)):
        if key := error.metadata.get("field"):
            error.message = f"{file.place(key)}: {error.message}"


def announce(run: gateway_pb2.Run) -> None:
    """Print which run it is."""
    start = getattr(run.pipeline.train, "from")
    earlier = f", going on from adapter {start[:12]}" if start else ""
    line(f"{run.id} · {run.pipeline.name} from {run.pipeline.base.model}{earlier}", style="bold")
    line()


def conclude(run: gateway_pb2.Run) -> None:
    """Print the scores, where things lie and what to try next; or why it failed and what to do."""
    show_scores(run)
    line()
    command = command_name()
    if run.state == gateway_pb2.RUN_STATE_SUCCEEDED:
        if deployed_name(run):
            step("Ask it yourself", f"{command} chat {deployed_name(run)}{question(run)}")
    elif run.state == gateway_pb2.RUN_STATE_FAILED:
        failed = [stage_name(stage) for stage in run.stages if stage.state == gateway_pb2.STAGE_STATE_FAILED]
        if not failed:
            for text in failure_lines(run.error):
                line(f"  {text}", style="red")
        console.err.print(
            f"{console.BAD} {run.id} failed{f' in {failed[0]}' if failed else ''}.", style="red"
        )
        if not _would_crash_again(run):
            step("Then try again", f"{command} runs retry {run.id}")
    else:
        line(f"  {run.id} was cancelled.")
        step("Take it up again", f"{command} runs retry {run.id}")
    show_files(run)


def _would_crash_again(run: gateway_pb2.Run) -> bool:
    """Say whether a run failed by a program that crashes on this machine: the same again changes nothing."""
    reasons = {run.error.reason, *(stage.error.reason for stage in run.stages)}
    return process.CRASHED in reasons


def show_files(run: gateway_pb2.Run) -> None:
    """Print where a run's files lie."""
    if run.output_dir:
        folder = short(Path(run.output_dir))
        step("All files", f"{folder}/     log: {folder}/logs/run.log")
    for number, (kind, url) in enumerate(run_folders(run, load_settings())):
        step("In the console" if number == 0 else "", f"{kind:<12} {url}")


def step(label: str, text: str) -> None:
    """Print a labelled line of what to do or where to look."""
    line(f"  {label:<{_LABEL_WIDTH}} {text}")


def exit_code(run: gateway_pb2.Run, *, strict: bool) -> int:
    """Return 0 for a run that succeeded; with `strict` it must have missed no limit either."""
    if run.state != gateway_pb2.RUN_STATE_SUCCEEDED:
        return 1
    tests = verify_result(run)
    return 1 if strict and tests is not None and missed(tests) else 0


def deployed_name(run: gateway_pb2.Run) -> str:
    """Return the name under which a run's model answers, its own id when it was not promoted.

    Empty when it was not deployed.
    """
    found = ""
    for stage in run.stages:
        kind = stage.WhichOneof("result")
        if kind == "deploy_result":
            found = stage.deploy_result.deployment.name
        if kind == "promote_result" and stage.promote_result.serving.id != stage.promote_result.candidate:
            found = stage.promote_result.candidate
    return found


def question(run: gateway_pb2.Run) -> str:
    """Return a question to ask the run's model as arguments of `chat`: one that was trained for, if known."""
    tests = verify_result(run)
    for sample in tests.samples if tests else ():
        if sample.prompt and "\n" not in sample.prompt:
            return f" {shlex.quote(sample.prompt)}"
    return ""


def say_started(run: gateway_pb2.Run) -> None:
    """Print how to follow and end a run that goes on by itself."""
    line(f"{run.id} is {run_state(run)} and goes on by itself.")
    _hints(run.id)


def _say_detached(run_id: str) -> None:
    line(f"{run_id} goes on by itself.")
    _hints(run_id)


def _hints(run_id: str) -> None:
    step("Watch it", f"{command_name()} runs watch {run_id}")
    step("End it", f"{command_name()} runs cancel {run_id}")


def _ask() -> str:
    """Ask what to do; a second Ctrl-C or the end of input detaches."""
    try:  # from the question on: who reads it may answer before the print has returned
        console.line()
        console.out.print(
            "The run goes on without this command.  d: detach · c: cancel the run · Enter: go on ▸ ", end=""
        )
        # `input` would miss a Ctrl-C that comes just before it reads, until the next key.
        while not select.select([sys.stdin], [], [], _CTRL_C_SECONDS)[0]:
            pass
        answer = sys.stdin.readline()
    except KeyboardInterrupt:
        answer = ""
    if not answer:
        line()
        return "d"
    return answer.strip().lower()[:1]
