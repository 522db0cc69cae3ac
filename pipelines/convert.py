"""`boxcar convert`: annotations -> shards. The wiring: units to tasks, tasks to files, files to a manifest.

    reader.plan ──> units ──> Ray Data, one task each ──> rows, images, quarantine, commit     (or one process, `executor: inline`)
                                                               └── all there? ──> manifest

A unit is cut by the input alone, and its files are a pure function of it. So a task may run twice, on any node, after any crash: it writes
the same bytes to the same names. The driver trusts only commits whose files have the hashes that they say, and writes the manifest last.
"""

import gc
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import Any

import msgspec
import numpy as np
import polars as pl

from boxcar.pipelines import storage
from boxcar.pipelines.boxes.rules import References
from boxcar.pipelines.images.lookup import ImageLookup
from boxcar.pipelines.readers.catalog import find_reader, plan_source
from boxcar.pipelines.readers.shared.compressed import unpacked_name
from boxcar.pipelines.readers.shared.file_per_image import is_folder
from boxcar.pipelines.rows.encode import EmbeddedImages, Sized
from boxcar.pipelines.rows.unit import UnitConverter
from boxcar.pipelines.shards.arrow_files import open_rows, write_quarantine, write_rows
from boxcar.pipelines.shards.embed import embed_images
from boxcar.pipelines.shards.ray_tasks import run_with_ray
from boxcar.pipelines.shards.work_folder import SOURCE_KEYS, Commit, Run, SavedPlan, WorkDir, settings_of, stamps_of
from boxcar.pipelines.tokens.frame import build_frame
from boxcar.schemas import manifest as manifests
from boxcar.schemas.errors import BoxcarError, ConfigError
from boxcar.schemas.manifest import Counts, FileEntry, Manifest, Rejections
from boxcar.schemas.row import ROW_SCHEMA
from boxcar.schemas.workflow import ConvertConfig, SourceConfig

OnCommit = Callable[[Commit], None]


@dataclass(frozen=True)
class Progress:
    """What a caller is told while a conversion runs."""

    planned: "Callable[[int, int | None, Done], None]"
    """(number of units, number of records if known, what an earlier run completed)."""
    committed: OnCommit
    """A unit is complete."""


@dataclass
class Done:
    """Units that are complete. Their commits stay on disk: with their histograms, those of a giant source fill half a gigabyte."""

    units: set[int] = field(default_factory=set)
    records_read: int = 0
    records_rejected: int = 0

    def add(self, commit: Commit | None) -> None:
        if commit is not None:
            self.units.add(commit.number)
            self.records_read += commit.counts.records_read
            self.records_rejected += commit.counts.num_rejected


class _Job(msgspec.Struct):
    """What a task needs to know; travels as JSON."""

    config: dict[str, Any]
    images_root: str
    source: str


def convert(config: ConvertConfig, progress: Progress) -> tuple[Manifest, bool]:
    """Run a conversion to its end, or go on with one that stopped. True: it was complete already, and nothing was done.

    Raises BoxcarError where something is wrong that the user can mend; what was done until then is kept.
    """
    _check_keys(config, find_reader(config.reader).uses)
    config_paths = resolve_paths(config)
    frame = build_frame(config_paths)
    work = WorkDir(config_paths.output)
    stamps = stamps_of(config_paths)
    run = Run(boxcar_version=version("boxcar-vl"), settings=settings_of(config_paths), contract=frame.contract(), stamps=stamps or {})
    work.open(run)
    with work.lock():
        work.require_own(run)
        unchanged = stamps is not None and work.saved_stamps == stamps
        work.sweep()
        if work.manifest_path.exists() and unchanged:
            manifest = manifests.load(work.folder)
            work.finish()
            return manifest, True
        plan = work.read_plan() if unchanged and work.index_is_ready else None
        if plan is None:
            plan = _plan(config_paths, work)
        if work.manifest_path.exists():
            return _finished(work, plan), True
        num_units = len(plan.units)
        done = Done()
        for number in range(num_units):
            done.add(work.read_commit(number))
        progress.planned(num_units, plan.num_records, done)
        pending = [number for number in range(num_units) if number not in done.units]
        work.forget_attempts()
        job = _Job(config_paths.model_dump(mode="json"), images_root(config_paths), source_name(config))
        execute = _run_inline if config.executor == "inline" else _run_with_ray
        for number in execute(job, pending, config.num_workers):
            commit = work.read_commit(number)
            done.add(commit)
            if commit is not None:
                progress.committed(commit)
        missing = [number for number in range(num_units) if number not in done.units]
        if missing:
            raise BoxcarError(
                str(work.folder),
                found=f"{len(missing)} of {num_units} units without a result, the first is unit {missing[0]}",
                expected="all of them",
                fix="Run the same command again: only what is missing is done. If it fails again, a worker dies on it: is there memory for "
                "records_per_shard records on each core?",
            )
        manifest = _manifest(run, plan, work, job)
        with storage.atomic_write(work.manifest_path) as stream:
            stream.write(manifests.dump(manifest))
        work.finish()
        return manifests.load(work.folder), False


def _check_keys(config: ConvertConfig, uses: frozenset[str]) -> None:
    """Refuse keys of the source that the format does not know: a forgotten key would be ignored in silence."""
    for name, known in SourceConfig.model_fields.items():
        if name not in uses and getattr(config, name) != known.default:
            raise ConfigError(
                f"convert.{name}",
                found=f"{getattr(config, name)!r}",
                expected=f"nothing: reader {config.reader!r} does not use this key",
                fix=f"It uses: {', '.join(sorted(uses))}.",
            )


def resolve_paths(config: ConvertConfig) -> ConvertConfig:
    """Local paths made absolute, so that tasks in other folders and on other nodes mean the same files."""
    in_job_copy = "runtime_resources/working_dir_files" in str(Path.cwd())
    changes: dict[str, str] = {}
    for key in ("output", "images", "tokenizer", *SOURCE_KEYS):
        path = getattr(config, key)
        local = storage.local_path(path) if path else None
        if local is None or (key == "tokenizer" and not Path(local).exists()):
            continue
        if key == "output" and in_job_copy and not os.path.isabs(local):
            raise ConfigError(
                "convert.output",
                found=f"the relative path {path!r} inside a Ray job",
                expected="an absolute path on a mount that all nodes share",
                fix="A job runs in a temporary copy of the working directory: the shards would be lost with it.",
            )
        changes[key] = os.path.abspath(os.path.expanduser(local))
    return config.model_copy(update=changes)


def images_root(config: SourceConfig) -> str:
    """Where relative image paths start: `images`, else the folder of the annotations."""
    if config.images:
        return config.images
    if is_folder(config.annotations):
        return config.annotations
    return config.annotations.rpartition("/")[0]


def source_name(config: ConvertConfig) -> str:
    """The source's name in sample ids."""
    if config.source:
        return config.source
    path = PurePosixPath(unpacked_name(config.annotations.rstrip("/")))
    return path.stem if path.suffix else path.name


def _plan(config: ConvertConfig, work: WorkDir) -> SavedPlan:
    previous = work.read_plan()
    index = work.clear_index()
    try:
        made = plan_source(config, index, config.records_per_shard)
    except OSError as error:  # what readers do not name themselves is about the index
        raise storage.write_error(index, error) from error
    plan = SavedPlan(
        fingerprint=made.fingerprint,
        units=[(unit.path, unit.start, unit.stop) for unit in made.units],
        num_records=made.num_records,
        notes=list(made.notes),
        rejected=list(made.rejected),
    )
    if previous is not None and previous.fingerprint != plan.fingerprint:
        raise BoxcarError(
            config.annotations,
            found="annotations that changed since the conversion into this folder began",
            expected="the same annotations, to go on",
            fix=f"Delete {work.folder} and convert anew, or choose another `output`.",
        )
    work.write_plan(plan)
    return plan


def _finished(work: WorkDir, plan: SavedPlan) -> Manifest:
    manifest = manifests.load(work.folder)
    work.finish()
    if manifest.source_fingerprint != plan.fingerprint:
        raise ConfigError(
            str(work.folder),
            found="a complete conversion of other annotations under the same settings",
            expected="an empty folder",
            fix="The annotations changed since: choose another `output`, or delete this folder.",
        )
    return manifest


# --- one unit, in whichever process -------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=2)
def _converter(config_json: str, source: str) -> tuple[ConvertConfig, UnitConverter]:
    """Kept per process: a tokenizer costs as much to load as thousands of samples to convert."""
    config = ConvertConfig.model_validate_json(config_json)
    return config, UnitConverter(config, build_frame(config), source)


@contextmanager
def _without_cyclic_gc() -> Iterator[None]:
    """A unit makes half a million small objects in no cycles: passing over them again and again costs an eighth of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@_without_cyclic_gc()
def convert_unit(job: _Job, number: int) -> None:
    """Convert one unit: write its files, then its commit."""
    config, converter = _converter(msgspec.json.encode(job.config).decode(), job.source)
    work = WorkDir(config.output)
    plan = work.read_plan()
    assert plan is not None, "the driver writes the plan before it gives out units"
    image_files: list[FileEntry] = []

    def embed(references: References, sized: Sized, records: Sequence[int]) -> EmbeddedImages:
        path = work.name("images", number, "arrow")
        resized = config.image_storage == "embed_resized"
        embedded, entry = embed_images(path, number, job.images_root, references, sized, records, resized=resized)
        image_files.append(entry)
        return embedded

    items = find_reader(config.reader).read(config, plan.unit(number))
    lookup = ImageLookup(job.images_root, config.rules, trust_sizes=config.trust_sizes, decode=config.image_storage == "embed_resized")
    result = converter.convert(items, lookup, None if config.image_storage == "reference" else embed)
    rows = write_rows(work.name("rows", number, "arrow"), result.table)
    quarantine = work.name("rejected", number, "jsonl")
    quarantine.unlink(missing_ok=True)  # an attempt that died may have rejected what can be used by now
    rejected = write_quarantine(quarantine, result.rejected) if result.rejected else None
    images = image_files[0] if image_files else None
    work.write_commit(Commit(number=number, rows=rows, images=images, rejected=rejected, counts=result.counts))


def _run_inline(job: _Job, pending: Sequence[int], _num_workers: int | None) -> Iterator[int]:
    for number in pending:
        convert_unit(job, number)
        yield number


def _run_with_ray(job: _Job, pending: Sequence[int], num_workers: int | None) -> Iterator[int]:
    encoded = msgspec.json.encode(job)

    def task(number: int) -> None:
        task_job = msgspec.json.decode(encoded, type=_Job)
        mistake: BoxcarError | None = None
        with WorkDir(task_job.config["output"]).attempt(number) as allowed:
            try:
                if allowed:
                    convert_unit(task_job, number)
            except BoxcarError as error:  # the attempt itself ended as it should
                mistake = error
        if mistake is not None:
            raise mistake

    yield from run_with_ray(task, pending, num_workers)


# --- the manifest -------------------------------------------------------------------------------------------------------------------------


def _manifest(run: Run, plan: SavedPlan, work: WorkDir, job: _Job) -> Manifest:
    counts = Counts()
    shards: list[FileEntry] = []
    images: list[FileEntry] = []
    quarantine: list[FileEntry] = []
    if plan.rejected:
        # Rows of the annotations that belong to no unit: dangling and unreadable ones.
        counts.records_read += len(plan.rejected)
        for entry in plan.rejected:
            counts.records_rejected.setdefault(entry.reason, Rejections()).add(Rejections(1, [f"{entry.position}: {entry.detail}"]))
        quarantine.append(write_quarantine(work.folder / "rejected-plan.jsonl", plan.rejected))
    for number in range(len(plan.units)):
        commit = work.load_commit(number)
        assert commit is not None, "every unit was seen complete"
        counts.add(commit.counts)
        shards.append(commit.rows)
        images += [commit.images] if commit.images else []
        quarantine += [commit.rejected] if commit.rejected else []
    _check_counts(counts)
    return Manifest(
        boxcar_version=run.boxcar_version,
        contract=run.contract,
        settings=run.settings,
        source_fingerprint=plan.fingerprint,
        source_notes=plan.notes + _repeated_ids(work.folder, shards),
        images_root=job.images_root,
        sizes_trusted=bool(run.settings["trust_sizes"]),
        shards=shards,
        image_shards=images,
        quarantine=quarantine,
        counts=counts,
    )


def _check_counts(counts: Counts) -> None:
    """Nothing is lost: what was read was written or rejected."""
    assert counts.records_read == counts.records_written + counts.num_rejected, (
        f"{counts.records_read} records read, {counts.records_written} written, {counts.num_rejected} rejected"
    )


def _repeated_ids(folder: Path, shards: Sequence[FileEntry]) -> list[str]:
    """A note on sample ids that stand in several shards; within a unit the second is rejected."""
    hashes = [_sample_ids(folder, entry).hash().to_numpy() for entry in shards if entry.num_rows]
    if not hashes:
        return []
    # 8 bytes an id, sorted in place: ten million ids are 80 MB.
    every = np.concatenate(hashes)
    hashes.clear()
    every.sort()
    repeated = np.unique(every[1:][every[1:] == every[:-1]])
    if not len(repeated):
        return []
    wanted = pl.Series("hash", repeated)
    named = (ids.filter(ids.hash().is_in(wanted.implode())) for ids in (_sample_ids(folder, entry) for entry in shards if entry.num_rows))
    examples = list(dict.fromkeys(name for ids in named for name in ids))
    return [f"{len(examples)} sample ids stand in more than one shard, such as {', '.join(map(repr, examples[:3]))}"]


def _sample_ids(folder: Path, entry: FileEntry) -> pl.Series:
    return pl.Series("sample_id", open_rows(folder / entry.name, ROW_SCHEMA).read_all()["sample_id"], dtype=pl.String)
