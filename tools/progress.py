"""Progress of long work: a bar in a terminal, a line every half minute where there is none (a log file, `nohup`, `ray job submit`)."""

import threading
import time
from types import TracebackType
from typing import Self

from rich import progress as rich_progress
from rich.console import Console
from rich.progress import ProgressColumn, Task
from rich.text import Text

from boxcar.tools.plain import visible

LOG_INTERVAL_S = 30.0
"""Seconds between two lines of progress in a log."""


class Progress(rich_progress.Progress):
    """A progress bar of rich that a log file can show, too.

    In a terminal it is rich's own. Elsewhere nothing is drawn; every LOG_INTERVAL_S seconds each unfinished task is a line such as
    `01:30 training: 12 of 100; loss 1.2345, 900 tokens/s`, and so is its last state when the work ends.
    """

    def __init__(self, *columns: str | ProgressColumn, console: Console, transient: bool = False) -> None:
        self._log: _Log | None = None if console.is_terminal else _Log(self)
        super().__init__(*columns, console=console, transient=transient, disable=self._log is not None)

    def __enter__(self) -> Self:
        super().__enter__()
        if self._log:
            self._log.start()
        return self

    def __exit__(self, exc_type: type[BaseException] | None, exc_val: BaseException | None, exc_tb: TracebackType | None) -> None:
        if self._log:
            self._log.end()
        super().__exit__(exc_type, exc_val, exc_tb)


class _Log(threading.Thread):
    """Prints the tasks of a Progress at fixed intervals. A line is printed also where only its time is new: the work is alive."""

    def __init__(self, progress: Progress) -> None:
        super().__init__(daemon=True, name="progress log")
        self._progress = progress
        self._ended = threading.Event()
        self._start_s = time.monotonic()

    def run(self) -> None:
        while not self._ended.wait(LOG_INTERVAL_S):
            self._print()

    def end(self) -> None:
        self._ended.set()
        self.join()
        if time.monotonic() - self._start_s >= LOG_INTERVAL_S:  # work of a few seconds needs no line
            self._print()

    def _print(self) -> None:
        elapsed_s = time.monotonic() - self._start_s
        for task in self._progress.tasks:
            self._progress.console.print(Text(visible(line_of(task, elapsed_s))), soft_wrap=True)


def line_of(task: Task, elapsed_s: float) -> str:
    """A task as a line. elapsed_s: seconds since the work began."""
    minutes, seconds = divmod(int(elapsed_s), 60)
    hours, minutes = divmod(minutes, 60)
    clock = f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes:02d}:{seconds:02d}"
    what = f"{clock} {task.description.strip() or 'working'}"
    if task.total is not None:
        what += f": {task.completed:,.0f} of {task.total:,.0f}"
    elif task.completed:
        what += f": {task.completed:,.0f}"
    detail = str(task.fields.get("detail", ""))
    return f"{what}; {detail}" if detail else what
