"""Shows a job of the deployer as it goes: one live line on a terminal, a line a phase elsewhere."""

from __future__ import annotations

from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text
from web4.lora.v1 import jobs_pb2

from web4lora.views.console import out
from web4lora.views.stages import progress_text

_BAR_WIDTH = 28


class JobView:
    """Shows a job's snapshots; leaving the block takes the live line away."""

    def __init__(self) -> None:
        self._live = Live(console=out, transient=True, refresh_per_second=8) if out.is_terminal else None
        self._phase = ""

    def update(self, job: jobs_pb2.Job) -> None:
        """Show the newest snapshot."""
        progress = job.progress
        phase = progress.phase or ("waiting its turn" if job.state == jobs_pb2.JOB_STATE_QUEUED else "")
        if job.state == jobs_pb2.JOB_STATE_CANCELLING:
            phase = "is being stopped"
        if self._live is None:
            if phase and phase != self._phase:
                out.print(f"  {phase}", soft_wrap=True)
            self._phase = phase
            return
        row = Table.grid(padding=(0, 1, 0, 0))
        cells: list[Text | ProgressBar] = [Text(f"  {phase}", style="bold")]
        if progress.total:
            done = min(progress.done, progress.total)
            cells.append(ProgressBar(total=progress.total, completed=done, width=_BAR_WIDTH))
        row.add_row(*cells, Text(progress_text(progress)))
        self._live.update(row)
        if not self._live.is_started:
            self._live.start()

    def close(self) -> None:
        """Take the live line away; a later update brings it back."""
        if self._live is not None:
            self._live.stop()
