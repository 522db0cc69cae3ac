"""Long work with a progress bar, and what is said at its end."""

import sys
from pathlib import Path

import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn

from boxcar.pipelines import convert as conversion
from boxcar.pipelines.shards.work_folder import Commit
from boxcar.pipelines.verify import Report, verify_folder
from boxcar.schemas.manifest import Manifest
from boxcar.schemas.workflow import ConvertConfig
from boxcar.tools.converting.summary import print_summary
from boxcar.tools.plain import visible
from boxcar.tools.progress import Progress
from boxcar.tools.tables import result_console


class _Bar:
    """Rows per second and rejections of a running conversion."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.task: TaskID = progress.add_task("reading the annotations", total=None, detail="")
        self.num_units = self.num_done = self.read = self.rejected = self.read_before = 0

    def planned(self, num_units: int, num_records: int | None, done: conversion.Done) -> None:
        self.num_units, self.num_done = num_units, len(done.units)
        self.read = self.read_before = done.records_read
        self.rejected = done.records_rejected
        what = f"going on ({self.num_done} of {num_units} units were complete)" if done.units else "converting"
        self.progress.update(self.task, description=what, total=num_records)
        self._show()

    def committed(self, commit: Commit) -> None:
        self.num_done += 1
        self.read += commit.counts.records_read
        self.rejected += commit.counts.num_rejected
        self._show()

    def _show(self) -> None:
        elapsed = self.progress.tasks[0].elapsed or 0.0
        rate = (self.read - self.read_before) / elapsed if elapsed > 0 else 0.0
        detail = f"{rate:,.0f} records/s, {self.rejected:,} rejected, unit {self.num_done} of {self.num_units}"
        self.progress.update(self.task, completed=self.read, detail=detail)


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("{task.fields[detail]}", markup=False),
        TimeRemainingColumn(),
        console=console,
    )


def convert_with_bar(config: ConvertConfig) -> tuple[Manifest, bool]:
    """Convert and show progress on standard error. Returns the manifest, and whether everything was there already."""
    errors = Console(stderr=True)
    try:
        with _progress(errors) as progress:
            bar = _Bar(progress)
            return conversion.convert(config, conversion.Progress(bar.planned, bar.committed))
    except KeyboardInterrupt:
        errors.print(
            f"Stopped. {bar.num_done} of {bar.num_units} units are complete and kept in {config.output}; run the same command to go on.",
            markup=False,
        )
        sys.exit(130)


def convert_with_progress(config: ConvertConfig, *, as_json: bool) -> None:
    """Convert, show progress on standard error, and print the summary on standard output."""
    errors = Console(stderr=True)
    manifest, was_complete = convert_with_bar(config)
    if was_complete:
        errors.print(f"{config.output} is complete already: same annotations, same settings. Nothing was done.", markup=False)
    if as_json:
        print(msgspec.json.encode(manifest.counts, order="sorted").decode())
    else:
        print_summary(result_console(), manifest, config.output)
    if not manifest.counts.records_written:
        hint = "Nothing was written: every record was rejected, for the reasons above."
        errors.print(
            f"{hint} Mend the cause (is `images` right?), delete {config.output}, and convert again.", markup=False, soft_wrap=True
        )
        sys.exit(1)


def verify_with_progress(folder: Path, *, as_json: bool) -> int:
    """Verify, and return the exit code: 0 where all is well, 1 where not."""
    errors = Console(stderr=True)
    with _progress(errors) as progress:
        task = progress.add_task("verifying", total=None, detail="")

        def on_file(name: str, number: int, total: int) -> None:
            progress.update(task, total=total, completed=number, detail=name)

        report: Report = verify_folder(folder, on_file)
    if as_json:
        print(msgspec.json.encode(report).decode())
    else:
        console = Console(soft_wrap=True)
        for problem in report.problems:
            console.print(visible(problem), markup=False)
        verdict = "all is well" if not report.problems else f"{len(report.problems)} problems"
        console.print(
            f"{folder}: {report.num_files} files, {report.num_rows:,} rows, {report.num_turns:,} turns checked: {verdict}", markup=False
        )
    return 1 if report.problems else 0
