"""An audit's one pass over annotations: headers and strings -> columns, unit by unit, with the very readers, rules and turns of conversion.

    reader.plan ──> units ──> Ray Data or this process ──> things-00012.columns, texts-qwen2_5_vl-00012.columns ──> chunks of units
                                                          (kept: a stopped or repeated audit reads them again)

Nothing is converted: no ids are written and no image is decoded. A family that is asked for later adds its texts alone.
"""

import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import xxhash

from boxcar.pipelines import storage
from boxcar.pipelines.audit.columns import NumberLengths, Texts, Things, concat_texts, concat_things, load, save, texts_of, things_of
from boxcar.pipelines.audit.what_if import Grammar
from boxcar.pipelines.boxes.rules import Findings
from boxcar.pipelines.convert import images_root, source_name
from boxcar.pipelines.images.lookup import ImageLookup
from boxcar.pipelines.readers.catalog import find_reader, plan_source
from boxcar.pipelines.rows.unit import UnitConverter, judge_unit
from boxcar.pipelines.shards.ray_tasks import run_with_ray
from boxcar.pipelines.shards.work_folder import SavedPlan, stamps_of
from boxcar.pipelines.tokens.frame import Frame, build_frame
from boxcar.pipelines.tokens.tokenizer import PieceTable
from boxcar.schemas.errors import BoxcarError, ConfigError
from boxcar.schemas.record import Record, Rejected
from boxcar.schemas.workflow import ConvertConfig

UNITS_PER_CHUNK = 2
"""Some 8,000 records: their columns stay in the caches, which was twice as fast as 16 units."""
LARGE_RECORDS = 50_000
"""From here on, several workers earn what Ray costs to start."""
_NOT_READ = ("output", "executor", "num_workers", "family", "tokenizer", "cutoff_len", "image_max_pixels", "image_min_pixels")
_NOT_READ_EITHER = ("over_length", "shrink_images", "image_storage")
OnUnit = Callable[[int, int], None]
"""(units that are read, units in all)."""


@dataclass(frozen=True)
class Candidate:
    """One family that an audit looks at."""

    config: ConvertConfig
    """As it would be converted for this family."""
    frame: Frame
    grammar: Grammar

    @property
    def key(self) -> str:
        """Of its texts: everything that its turns and their words hang on."""
        contract = self.frame.contract()
        drops = self.config.rules.under_one_token == "drop"
        limits = (contract.min_pixels, contract.max_pixels) if drops else ()
        parts = [contract.family, contract.prompts, contract.tokenizer_fingerprint, contract.box_text_example, limits]
        digest = xxhash.xxh3_64_hexdigest(msgspec.json.encode(parts, order="sorted"))
        return f"{contract.family}-{digest}"


def candidate_of(config: ConvertConfig) -> Candidate:
    """Bind a family for an audit. The cutoff may be longer than the family takes: what-ifs stop at its longest sequence.

    Raises ConfigError and TokenizerError as `build_frame`.
    """
    frame = build_frame(config.model_copy(update={"cutoff_len": 1}))
    return Candidate(config, frame, grammar_of(frame))


def grammar_of(frame: Frame) -> Grammar:
    return Grammar(
        family=frame.family,
        turn_open=len(frame.turn_open_ids),
        around_answer=len(frame.answer_open_ids) + len(frame.turn_close_ids),
        turn_close=len(frame.turn_close_ids),
        numbers=NumberLengths(frame.tokenizer, frame.family.box_text.number_format),
    )


class _Job(msgspec.Struct):
    """What a task needs to know; travels as JSON."""

    configs: list[dict[str, Any]]
    """One for each family; they differ in nothing that is read."""
    keys: list[str]
    folder: str


@dataclass(frozen=True)
class Reading:
    """Columns of a whole source on disk."""

    folder: Path
    plan: SavedPlan
    candidates: Sequence[Candidate]

    @property
    def num_chunks(self) -> int:
        return -(-len(self.plan.units) // UNITS_PER_CHUNK)

    def chunks(self, candidate: Candidate) -> Iterator[tuple[Things, Texts]]:
        """All columns of a family, some UNITS_PER_CHUNK units at a time. Raises ShardError where they are damaged."""
        for first in range(0, len(self.plan.units), UNITS_PER_CHUNK):
            numbers = range(first, min(first + UNITS_PER_CHUNK, len(self.plan.units)))
            things = [load(_things_path(self.folder, number), Things) for number in numbers]
            texts = [load(_texts_path(self.folder, candidate.key, number), Texts) for number in numbers]
            yield concat_things(things), concat_texts(texts, things)

    def things(self) -> Iterator[Things]:
        """What all families share, unit by unit."""
        for number in range(len(self.plan.units)):
            yield load(_things_path(self.folder, number), Things)


def read_annotations(candidates: Sequence[Candidate], folder: Path, on_unit: OnUnit = lambda *_: None) -> Reading:
    """Read a source for some families into columns below `folder`, or take what an earlier audit left there.

    The families' configs differ in family, tokenizer, limits and cutoff alone. Raises BoxcarError as conversion does.
    """
    config = candidates[0].config
    if config.rules.under_one_token == "drop" and config.shrink_images:
        raise ConfigError(
            "convert",
            found="rules.under_one_token: drop together with shrink_images: true",
            expected="one of them: with both, which boxes there are depends on how far each image was shrunk",
            fix="Audit with one of them overridden.",
        )
    here = folder / f"columns-{_key(config)}"
    plan = _plan(config, here)
    job = _Job(
        [candidate.config.model_dump(mode="json") for candidate in candidates], [candidate.key for candidate in candidates], str(here)
    )
    num_units = len(plan.units)
    pending = [number for number in range(num_units) if _missing(job, number)]
    on_unit(num_units - len(pending), num_units)
    large = (plan.num_records or num_units * config.records_per_shard) >= LARGE_RECORDS and num_units > 1
    encoded = msgspec.json.encode(job)

    def task(number: int) -> None:
        read_unit(msgspec.json.decode(encoded, type=_Job), number)

    done = num_units - len(pending)
    for _ in run_with_ray(task, pending, config.num_workers) if large and config.executor == "ray" else map(task, pending):
        done += 1
        on_unit(done, num_units)
    if missing := [number for number in pending if _missing(job, number)]:
        raise BoxcarError(
            str(here),
            found=f"{len(missing)} of {num_units} units without columns, the first is unit {missing[0]}",
            expected="all of them",
            fix="Run the same command again: only what is missing is read. If it fails again, look at the worker's log.",
        )
    return Reading(here, plan, candidates)


def _key(config: ConvertConfig) -> str:
    """Of what is read: other annotations, rules or tasks are other columns."""
    settings = {name: value for name, value in config.model_dump(mode="json").items() if name not in _NOT_READ + _NOT_READ_EITHER}
    parts = [version("boxcar-vl"), settings, stamps_of(config)]
    return xxhash.xxh3_64_hexdigest(msgspec.json.encode(parts, order="sorted"))


def _plan(config: ConvertConfig, folder: Path) -> SavedPlan:
    path = folder / "plan.json"
    if path.exists() and stamps_of(config) is not None:
        try:
            return msgspec.json.decode(path.read_bytes(), type=SavedPlan)
        except (OSError, msgspec.DecodeError):
            path.unlink(missing_ok=True)  # half written by an older version: it is made again
    with storage.writing(folder):
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "index").mkdir(parents=True)
    made = plan_source(config, folder / "index", config.records_per_shard, unlabelled=True)
    notes = list(made.notes)
    if made.unlabelled:
        notes.append(f"found {made.unlabelled}: their visual tokens are counted; there is nothing to train on")
    plan = SavedPlan(
        fingerprint=made.fingerprint,
        units=[(unit.path, unit.start, unit.stop) for unit in made.units],
        num_records=made.num_records,
        notes=notes,
        rejected=list(made.rejected),
    )
    with storage.atomic_write(path) as stream:
        stream.write(msgspec.json.encode(plan))
    return plan


def _things_path(folder: Path, number: int) -> Path:
    return folder / f"things-{number:05d}.columns"


def _texts_path(folder: Path, key: str, number: int) -> Path:
    return folder / f"texts-{key}-{number:05d}.columns"


def _missing(job: _Job, number: int) -> bool:
    folder = Path(job.folder)
    return not all(path.exists() for path in (_things_path(folder, number), *(_texts_path(folder, key, number) for key in job.keys)))


@lru_cache(maxsize=2)
def _converters(configs_json: str) -> list[UnitConverter]:
    """One for each family, kept per process. Families of one tokenizer share its pieces: what two of them say alike is encoded once."""
    configs = [ConvertConfig.model_validate(config) for config in msgspec.json.decode(configs_json)]
    tables: dict[str, PieceTable] = {}
    converters = []
    for config in configs:
        frame = candidate_of(config).frame
        pieces = tables.setdefault(frame.tokenizer.fingerprint, PieceTable(frame.tokenizer))
        converters.append(UnitConverter(config, frame, source_name(config), pieces))
    return converters


def read_unit(job: _Job, number: int) -> None:
    """Read one unit and write its columns: what the families share, then what is missing of each."""
    folder = Path(job.folder)
    converters = _converters(msgspec.json.encode(job.configs).decode())
    config = converters[0].config
    plan = msgspec.json.decode((folder / "plan.json").read_bytes(), type=SavedPlan)
    things, texts = columns_of(converters, find_reader(config.reader).read(config, plan.unit(number)))
    for key, columns in zip(job.keys, texts, strict=True):
        save(_texts_path(folder, key, number), columns)
    save(_things_path(folder, number), things)


def columns_of(converters: Sequence[UnitConverter], items: Iterable[Record | Rejected]) -> tuple[Things, list[Texts]]:
    """The columns of one unit, for every family. items: what the reader yields."""
    forget_if_large(converters)
    config = converters[0].config
    decode = config.image_storage == "embed_resized"
    lookup = ImageLookup(images_root(config), config.rules, trust_sizes=config.trust_sizes, decode=decode)
    judged = judge_unit(items, lookup, config.rules)
    things = things_of(judged, converters[0].source, config.split)
    texts = []
    for converter in converters:
        limits = np.full(len(judged.references.paths), converter.frame.limits.max_pixels)
        unit, drafts, attempt = converter.draft(judged, limits, Findings())
        texts.append(texts_of(judged, unit, drafts, attempt, converter.pieces))
    return things, texts


def forget_if_large(converters: Sequence[UnitConverter]) -> None:
    """Bound the memory of long runs: of a table that forgets, every scribe's codes are void."""
    for pieces in {id(converter.pieces): converter.pieces for converter in converters}.values():
        if pieces.forget_if_large():
            for converter in converters:
                if converter.pieces is pieces:
                    converter.scribe.forget()


def for_family(config: ConvertConfig, family: str, tokenizer: str, max_pixels: int | None, min_pixels: int | None) -> ConvertConfig:
    """A workflow's convert section as it would be for another family."""
    changes = {"family": family, "tokenizer": tokenizer, "image_max_pixels": max_pixels, "image_min_pixels": min_pixels}
    return config.model_copy(update=changes)
