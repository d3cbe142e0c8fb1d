"""Shows a run as it goes: live on a terminal, line by line elsewhere."""

from __future__ import annotations

import time
from typing import Protocol

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text
from web4.lora.v1 import gateway_pb2

from web4lora.views import human
from web4lora.views.console import BAD, NOTE, OK, STYLES, out
from web4lora.views.stages import (
    failure_lines,
    progress_text,
    queued_text,
    result_lines,
    seconds_of,
    stage_name,
)

_HEARTBEAT_SECONDS = 30.0
_BAR_WIDTH = 28
_NAME_WIDTH = 10
_WIDEST = 124
_ROOM = 3  # for the ^C that a terminal prints: on a full line it would break the line and the next drawing
_UNTOLD = gateway_pb2.PROMOTE_OUTCOME_UNSPECIFIED
_RUNNING = gateway_pb2.STAGE_STATE_RUNNING
_QUEUED = gateway_pb2.STAGE_STATE_QUEUED
_ENDED = (
    gateway_pb2.STAGE_STATE_SUCCEEDED,
    gateway_pb2.STAGE_STATE_REUSED,
    gateway_pb2.STAGE_STATE_FAILED,
    gateway_pb2.STAGE_STATE_CANCELLED,
)


class Follower(Protocol):
    """Shows a run's snapshots."""

    def update(self, run: gateway_pb2.Run) -> None:
        """Show the newest snapshot."""

    def close(self) -> None:
        """Stop showing; what was shown stays. A later update goes on."""


def follower() -> Follower:
    """Return what suits standard output: bars on a terminal, plain lines on a pipe."""
    return LiveFollower() if out.is_terminal else LineFollower()


class LiveFollower:
    """One line a finished stage, and a bar for the one at work."""

    def __init__(self) -> None:
        self._shown: set[int] = set()
        self._now: gateway_pb2.Run | None = None
        self._spinner = Spinner("dots", style="cyan")
        self._live = Live(get_renderable=self._render, console=out, transient=True, refresh_per_second=8)

    def update(self, run: gateway_pb2.Run) -> None:
        """Print the stages that ended since, above the live lines."""
        for stage in run.stages:
            if stage.state in _ENDED and stage.name not in self._shown:
                self._shown.add(stage.name)
                out.print(finished(stage))
        self._now = run
        if not self._live.is_started:
            self._live.start()

    def close(self) -> None:
        """Take the live lines away."""
        self._live.stop()

    def _render(self) -> RenderableType:
        if self._now is None:
            return Text("")
        running = [stage for stage in self._now.stages if stage.state in (_QUEUED, _RUNNING)]
        lines: list[RenderableType] = [self._running(stage) for stage in running]
        if not lines and self._now.state == gateway_pb2.RUN_STATE_QUEUED:
            lines = [_grid(Text("waiting"), Text("other runs come first", style="dim"), self._spinner)]
        if self._now.state == gateway_pb2.RUN_STATE_CANCELLING:
            lines.append(_grid(Text("cancel"), Text("the job at work is being stopped", style="dim"), ""))
        return Group(*lines)

    def _running(self, stage: gateway_pb2.Stage) -> RenderableType:
        if stage.state == _QUEUED:
            name = _with_spinner(stage, self._spinner)
            return _grid(name, Text(queued_text(stage), style="dim"), "")
        progress = stage.progress
        parts: list[RenderableType] = []
        if progress.total:
            share = min(progress.done, progress.total)
            parts.append(ProgressBar(total=progress.total, completed=share, width=_BAR_WIDTH))
        phase = progress.phase if progress.phase not in ("", stage_name(stage)) else ""
        text = progress_text(progress) or (
            "" if phase else "at work" if progress.phase else "waiting its turn"
        )
        body = Table.grid(padding=(0, 1, 0, 0))
        cells = [*parts, Text(" · ".join(part for part in (phase, text) if part))]
        body.add_row(*cells)
        took = Text(human.duration(seconds_of(stage)), style="dim")
        return _grid(_with_spinner(stage, self._spinner), body, took)


def _with_spinner(stage: gateway_pb2.Stage, spinner: Spinner) -> Table:
    name = Table.grid(padding=(0, 1, 0, 0))
    name.add_row(Text(stage_name(stage), style="bold"), spinner)
    return name


class LineFollower:
    """For pipes and logs: a line when a stage waits, starts or ends, and one every half minute between."""

    def __init__(self) -> None:
        self._started: set[int] = set()
        self._queued: set[int] = set()
        self._ended: set[int] = set()
        self._spoke_at = time.monotonic()

    def update(self, run: gateway_pb2.Run) -> None:
        """Print what is new."""
        for stage in run.stages:
            name = stage_name(stage)
            if stage.state == _QUEUED:
                late = time.monotonic() - self._spoke_at > _HEARTBEAT_SECONDS
                if stage.progress.message and (late or stage.name not in self._queued):
                    self._queued.add(stage.name)
                    self._say(f"{name:<{_NAME_WIDTH}} {queued_text(stage)}")
            elif stage.state == _RUNNING and stage.name not in self._started:
                self._started.add(stage.name)
                self._say(f"{name:<{_NAME_WIDTH}} starts")
            elif stage.state == _RUNNING and time.monotonic() - self._spoke_at > _HEARTBEAT_SECONDS:
                phase = stage.progress.phase if stage.progress.phase != name else ""
                text = " · ".join(part for part in (phase, progress_text(stage.progress)) if part)
                self._say(f"{name:<{_NAME_WIDTH}} {text or 'at work'}")
            if stage.state in _ENDED and stage.name not in self._ended:
                self._ended.add(stage.name)
                sign, lines = _outcome(stage)
                took = _took(stage)
                first = f"{name:<{_NAME_WIDTH}} {lines[0]}   {sign} {took}".rstrip()
                self._say(first)
                for more in lines[1:]:
                    self._say(f"{'':<{_NAME_WIDTH}} {more}")

    def close(self) -> None:
        """Nothing is left to do: every line was printed."""

    def _say(self, text: str) -> None:
        out.print(f"  {text}", soft_wrap=True)
        self._spoke_at = time.monotonic()


def finished(stage: gateway_pb2.Stage) -> RenderableType:
    """Return the lines of a stage that has ended."""
    sign, lines = _outcome(stage)
    style = "" if sign == OK else STYLES.get(sign, "")
    text = Text("\n".join(lines), style=style)
    return _grid(
        Text(stage_name(stage), style="bold"), text, Text.assemble((sign, STYLES[sign]), f" {_took(stage)}")
    )


def _outcome(stage: gateway_pb2.Stage) -> tuple[str, list[str]]:
    """Return a stage's sign and its lines."""
    if stage.state == gateway_pb2.STAGE_STATE_FAILED:
        return BAD, failure_lines(stage.error)
    if stage.state == gateway_pb2.STAGE_STATE_CANCELLED:
        return NOTE, ["cancelled"]
    promoted = stage.promote_result.outcome in (_UNTOLD, gateway_pb2.PROMOTE_OUTCOME_PROMOTED)
    return OK if promoted else NOTE, result_lines(stage)


def _took(stage: gateway_pb2.Stage) -> str:
    if stage.state == gateway_pb2.STAGE_STATE_REUSED:
        source = f"taken over from {stage.reused_from_run}" if stage.reused_from_run else "taken over"
        return f"{source}, {human.duration(stage.work_seconds)} there" if stage.work_seconds else source
    return human.duration(seconds_of(stage))


class _Row:
    """A table that leaves some room at the right, and does not grow with very wide terminals."""

    def __init__(self, table: Table) -> None:
        self._table = table

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from console.render(self._table, options.update(width=min(options.max_width - _ROOM, _WIDEST)))


def _grid(name: RenderableType, body: RenderableType, end: RenderableType) -> _Row:
    grid = Table.grid(padding=(0, 1, 0, 0), expand=True)
    grid.add_column(width=1)
    grid.add_column(width=_NAME_WIDTH + 1, no_wrap=True)
    grid.add_column(ratio=1)
    grid.add_column(justify="right", no_wrap=True)
    grid.add_row("", name, body, end)
    return _Row(grid)


def overview(run: gateway_pb2.Run) -> RenderableType:
    """Return every stage of a run as it is now."""
    lines = []
    for stage in run.stages:
        if stage.state in _ENDED:
            lines.append(finished(stage))
        elif stage.state == _QUEUED:
            lines.append(_grid(Text(stage_name(stage), style="bold"), Text(queued_text(stage)), ""))
        elif stage.state == _RUNNING:
            phase = stage.progress.phase if stage.progress.phase != stage_name(stage) else ""
            text = " · ".join(part for part in (phase, progress_text(stage.progress)) if part)
            took = Text(human.duration(seconds_of(stage)), style="dim")
            lines.append(_grid(Text(stage_name(stage), style="bold"), Text(text or "at work"), took))
        else:
            text = "not run" if run.end_time.seconds else "not yet"
            lines.append(_grid(Text(stage_name(stage), style="dim"), Text(text, style="dim"), ""))
    return Group(*lines)
