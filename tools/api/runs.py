"""`boxcar.convert` and `boxcar.audit`: the two commands as functions."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from boxcar.pipelines import convert as conversion
from boxcar.schemas.errors import ConfigError
from boxcar.schemas.manifest import Manifest
from boxcar.schemas.workflow import Workflow
from boxcar.tools.auditing.command import is_shards
from boxcar.tools.auditing.result import AuditResult
from boxcar.tools.auditing.run import Request, audit_shards, audit_workflow
from boxcar.tools.workflows import DEFAULT_FILE, config_error, load_workflow


@dataclass(frozen=True)
class Conversion:
    """A conversion that is complete."""

    output: str
    """Folder of the shards; `boxcar.load` opens it."""
    manifest: Manifest
    """What was read, written and rejected, for each reason (`manifest.counts`), and the frame contract."""
    was_complete: bool
    """Whether everything was there already: same annotations, same settings."""


def convert(
    workflow: str | None = None,
    *,
    file: str | PathLike[str] = DEFAULT_FILE,
    on_progress: Callable[[int, int], None] = lambda _done, _total: None,
    **settings: Any,
) -> Conversion:
    """Annotations -> Arrow shards, as `boxcar convert` does it. Run again after a crash, it does only what is missing.

    workflow: name in `file`; None: `settings` are the whole convert section. settings: its keys (reader, annotations, images, family,
    tokenizer, cutoff_len, output, ...: `boxcar schema`); sections are dictionaries: tasks={"caption": {"share": 0}}. executor="inline"
    works in this process; the default is Ray. on_progress: called with (units done, units in all).

    Raises ConfigError for settings that are wrong, AnnotationError and others where the input cannot be read at all; single bad records are
    counted in the manifest and kept in rejected-*.jsonl.

        done = boxcar.convert(reader="coco", annotations="instances.json", images="images", family="qwen2_5_vl",
                              tokenizer="Qwen/Qwen2.5-VL-7B-Instruct", output="shards/mine", executor="inline")
    """
    config = _workflow(workflow, Path(file), settings).convert
    assert config is not None, "the section was asked for"
    done, total = 0, 0

    def planned(num_units: int, _num_records: int | None, before: conversion.Done) -> None:
        nonlocal done, total
        done, total = len(before.units), num_units
        on_progress(done, total)

    def committed(_commit: object) -> None:
        nonlocal done
        done += 1
        on_progress(done, total)

    manifest, was_complete = conversion.convert(config, conversion.Progress(planned, committed))
    return Conversion(config.output, manifest, was_complete)


def audit(
    target: str | PathLike[str] | None = None,
    *,
    file: str | PathLike[str] = DEFAULT_FILE,
    cutoffs: Sequence[int] | None = None,
    pixels: Sequence[int] | None = None,
    families: Sequence[str] = (),
    base: str = "",
    gpu: str = "H100",
    mfu: float | None = None,
    duplicates: bool = True,
    work: str | PathLike[str] = "audits",
    on_progress: Callable[[str, int, int], None] = lambda _what, _done, _total: None,
    **settings: Any,
) -> AuditResult:
    """What a data set costs, and what a cutoff or a resolution would lose, as `boxcar audit` does it. Needs no GPU and no torch.

    target: name of a workflow in `file`, or a folder of shards; None: `settings` are a convert section, as in `convert`. cutoffs: values of
    cutoff_len in tokens to try; pixels: values of image_max_pixels; None: chosen from the data. families: others to compare, FAMILY or
    FAMILY=TOKENIZER. base: folder with the base's config.json, for FLOPs, GPU-hours and memory on `gpu` at the assumed share `mfu` of its
    peak. duplicates: compare image files. work: folder for columns, which make a second audit fast. on_progress: called with (what is done,
    how far, of how much).

    Raises ConfigError for settings that are wrong, and what `convert` raises. The result's fields are described in
    boxcar.tools.auditing.result; `result.dumps()` gives the JSON of `boxcar audit --json`.
    """
    request = Request(
        families=families, cutoffs=cutoffs, pixels=pixels, base=base, gpu=gpu, mfu=mfu, duplicates=duplicates, work=Path(work)
    )
    if target is not None and is_shards(fspath(target)):
        if settings:
            raise ConfigError(fspath(target), found=f"settings ({', '.join(settings)}) for shards", expected="settings for a workflow")
        return audit_shards([Path(target)], request, None, on_progress)
    return audit_workflow(_workflow(None if target is None else fspath(target), Path(file), settings), request, on_progress)


def _workflow(name: str | None, file: Path, settings: dict[str, Any]) -> Workflow:
    plain = {key: fspath(value) if isinstance(value, PathLike) else value for key, value in settings.items()}
    if name is not None:
        return load_workflow(file, name, "convert", [f"{key}={json.dumps(value)}" for key, value in plain.items()])
    try:
        return Workflow.model_validate({"convert": plain})
    except ValidationError as error:
        raise config_error("settings", error) from error
