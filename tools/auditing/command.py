"""`boxcar audit` and `boxcar diff`, as people type them: options to requests, progress, and where results are written."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn

from boxcar.pipelines.storage import atomic_write, writing
from boxcar.schemas.errors import ConfigError
from boxcar.schemas.manifest import MANIFEST_NAME
from boxcar.schemas.workflow import Workflow
from boxcar.tools.auditing.diff import differences, load_side
from boxcar.tools.auditing.result import RESULT_NAME, AuditResult, FamilyResult
from boxcar.tools.auditing.run import Request, audit_shards, audit_workflow
from boxcar.tools.auditing.tables import print_audit
from boxcar.tools.auditing.workflow_edit import write_settings
from boxcar.tools.plain import visible
from boxcar.tools.progress import Progress
from boxcar.tools.tables import result_console

PAGE_NAME = "audit.html"


def numbers(text: str | None, option: str) -> list[int] | None:
    """1024,2048 as numbers. Raises ConfigError."""
    if text is None:
        return None
    parts = [part.strip().replace("_", "") for part in text.split(",") if part.strip()]
    if not parts or any(not part.isdigit() or not int(part) for part in parts):
        raise ConfigError(option, found=repr(text), expected="whole numbers above 0, separated by commas, such as 1024,2048,4096")
    return sorted({int(part) for part in parts})


def share(text: str | None) -> float | None:
    """99.5% or 0.995 as a share. Raises ConfigError."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(%?)", text.strip())
    value = float(match[1]) / (100 if match[2] else 1) if match else -1.0
    if not 0 < value <= 1:
        raise ConfigError("--keep", found=repr(text), expected="a share of the turns, such as 99.5% or 0.995")
    return value


def is_shards(target: str) -> bool:
    """Whether a target is a folder of shards rather than a workflow's name."""
    return (Path(target) / MANIFEST_NAME).is_file()


def run_audit(
    target: str | Sequence[Path],
    workflow: Workflow | None,
    request: Request,
    *,
    file: Path,
    out: Path | None,
    page: bool,
    as_json: bool,
    write: bool,
) -> int:
    """Audit, write the results, print them. target: a workflow's name, or folders of shards. Returns the exit code."""
    name = target if isinstance(target, str) else f"{target[0].name}-shards"  # beside the audit of a workflow of that name
    folder = out or request.work / name
    result = audit_with_progress(target, workflow, request)
    page_path = write_results(result, folder, page=page)
    changes = _keep(result, request, file, str(name)) if write else []
    if as_json:
        print(result.dumps().decode(), end="")
    else:
        console = result_console()
        print_audit(console, result, page=page_path, folder=str(folder))
        for line in changes:
            console.print(visible(f"{file}, {name}.convert: {line}"), style="green", markup=False, soft_wrap=True)
        if write and not changes:
            console.print(f"{file}, {name}.convert: the settings stand there already", markup=False, soft_wrap=True)
    return 0


def audit_with_progress(target: str | Sequence[Path], workflow: Workflow | None, request: Request) -> AuditResult:
    """Audit with a bar on stderr. target: the workflow's name, or folders of shards, which may be those that a workflow trains on."""
    errors = Console(stderr=True)
    with Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=errors,
        transient=True,
    ) as progress:
        task = progress.add_task("", total=None)

        def say(what: str, done: int, total: int) -> None:
            progress.update(task, description=what, completed=done, total=total or None)

        if not isinstance(target, str):
            return audit_shards(target, request, workflow.train if workflow else None, say)
        assert workflow is not None, "the target is its name"
        return audit_workflow(workflow, request, say)


def write_results(result: AuditResult, folder: Path, *, page: bool) -> str:
    """audit.json, and the page. Returns the page's path, or an empty string."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / RESULT_NAME) as stream:
        stream.write(result.dumps())
    if not page:
        (folder / PAGE_NAME).unlink(missing_ok=True)  # of an audit before this one
        return ""
    from boxcar.tools.auditing.page import write_page  # noqa: PLC0415  (plotly is an extra)

    write_page(folder / PAGE_NAME, result)
    return str(folder / PAGE_NAME)


def _keep(result: AuditResult, request: Request, file: Path, name: str) -> list[str]:
    """Write the setting that was asked for into the workflow."""
    family: FamilyResult = result.families[0]
    knee = next(one for one in family.knees if one.keep == request.keep)
    if knee.cutoff_len is None or knee.max_pixels is None:
        raise ConfigError(
            "--keep", found=f"no setting of the grid that keeps {knee.keep:.4%} of the turns", expected="one", fix="Try larger --cutoffs."
        )
    settings = {"cutoff_len": knee.cutoff_len}
    published = family.contract.max_pixels == knee.max_pixels
    if family.limits_matter and not published:
        settings["image_max_pixels"] = knee.max_pixels
    return write_settings(file, name, settings)


def run_diff(first: str, second: str, *, as_json: bool) -> int:
    """Print what differs between two manifests or audits. Returns 1 where anything does."""
    found = differences(load_side(first), load_side(second))
    if as_json:
        print(json.dumps([line.as_dict() for line in found], indent=1, ensure_ascii=False))
    else:
        console = Console()
        for line in found:
            console.print(visible(str(line)), markup=False, soft_wrap=True)
        if not found:
            console.print("no difference in contract, counts and tokens")
    return 1 if found else 0
