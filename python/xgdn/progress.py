# SPDX-License-Identifier: Apache-2.0
"""Progress on stderr."""

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn


class Bar:
    """A progress bar on stderr, erased when done; nothing if stderr is not a terminal."""

    def __init__(self, description: str) -> None:
        console = Console(stderr=True)
        self._progress = Progress(
            TextColumn(description),
            BarColumn(),
            MofNCompleteColumn(),
            console=console,
            transient=True,
            redirect_stdout=False,  # stdout belongs to the generated text
            redirect_stderr=False,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task(description)

    def update(self, done: int, total: int) -> None:
        self._progress.update(self._task, completed=done, total=total)
        if done < total:
            self._progress.start()
        else:
            self.hide()

    def hide(self) -> None:
        """Hide the bar until the next update, so that other lines can be printed."""
        self._progress.stop()
