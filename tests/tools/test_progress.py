"""Progress of long work where no terminal is."""

import io
import re
import time

import pytest
from rich.console import Console
from rich.progress import TextColumn

from boxcar.tools import progress as progress_lines
from boxcar.tools.progress import Progress


def log_of(monkeypatch: pytest.MonkeyPatch, interval_s: float, work_s: float) -> list[str]:
    monkeypatch.setattr(progress_lines, "LOG_INTERVAL_S", interval_s)
    stream = io.StringIO()
    with Progress(TextColumn("{task.description}"), console=Console(file=stream, width=20)) as progress:
        task = progress.add_task("training", total=2000, detail="starting")
        progress.update(task, completed=1200, detail="loss 1.2345, 900 tokens/s")
        time.sleep(work_s)
    return stream.getvalue().splitlines()


def test_a_log_gets_a_line_at_each_interval_and_one_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = log_of(monkeypatch, interval_s=0.05, work_s=0.3)
    assert len(lines) >= 3
    assert all(re.fullmatch(r"00:00 training: 1,200 of 2,000; loss 1\.2345, 900 tokens/s", line) for line in lines), lines


def test_short_work_writes_nothing_in_a_log(monkeypatch: pytest.MonkeyPatch) -> None:
    assert log_of(monkeypatch, interval_s=30.0, work_s=0.0) == []


def test_a_terminal_gets_a_bar_and_no_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress_lines, "LOG_INTERVAL_S", 0.02)
    stream = io.StringIO()
    with Progress(TextColumn("{task.description}"), console=Console(file=stream, force_terminal=True, width=60)) as progress:
        progress.add_task("training", total=2)
        time.sleep(0.1)
    assert "training" in stream.getvalue()
    assert "of 2" not in stream.getvalue()
