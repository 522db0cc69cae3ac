"""A plan as a thing: its table of packs, what it says of itself, its fingerprint, its file.

Workers read it (`stream`, `worker`); how it comes about stands in `plan`.
"""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash

from boxcar.pipelines.ragged import IntColumn, offsets_of
from boxcar.pipelines.storage import atomic_write
from boxcar.schemas.errors import ShardError

PLAN_VERSION = 1
_PACKS_PER_BATCH = 1 << 16


def _field(name: str, kind: pa.DataType, about: str) -> pa.Field:
    return pa.field(name, kind, nullable=False, metadata={"about": about})


def _list(item: pa.DataType) -> pa.ListType:
    return pa.list_(pa.field("item", item, nullable=False))


DOCUMENT = pa.struct(
    [
        _field("row", pa.int64(), "number of the row over all folders of the index"),
        _field("turns", _list(pa.int16()), "positions of the chosen turns within the row, in their order in the text"),
    ]
)
PLAN_SCHEMA = pa.schema(
    [
        _field("step", pa.int32(), "optimizer step within the epoch, from 0"),
        _field("phase", pa.int16(), "number of the phase of the run"),
        _field("documents", _list(DOCUMENT), "samples side by side in this pack"),
        _field("num_tokens", pa.int32(), "tokens of all documents"),
        _field("num_patches", pa.int32(), "patches of all images"),
        _field("cost", pa.float32(), "FLOPs by the plan's cost model"),
    ]
)


# ---- what a plan says of itself


class TaskCount(msgspec.Struct, frozen=True):
    samples: int
    """With at least one turn of the task."""
    turns: int


class SourceCount(msgspec.Struct, frozen=True):
    rows: int
    """In the shards."""
    samples: int
    """Visits of rows that gave documents."""
    turns: int
    tokens: int


class PhaseCount(msgspec.Struct, frozen=True):
    number: int
    until: float
    """Share of the run."""
    schedule: str
    steps: int
    packs: int
    documents: int
    turns: int
    tokens: int


class LeftOut(msgspec.Struct, frozen=True):
    count: int
    examples: list[str] = []
    """The first few, as `boxcar show` takes them."""


class PlanCounts(msgspec.Struct, frozen=True, kw_only=True):
    """What an epoch will be. samples + rows_left_out without "source_weight" = visits, and turns + turns_left_out = turns offered."""

    rows: int
    """In the shards."""
    visits: int
    """Of rows in this epoch, by the sources' weights, up to the end of the run."""
    samples: int
    """Visits that gave documents."""
    documents: int
    """As samples; one for each turn where a family knows one question an image."""
    turns: int
    turns_offered: int
    packs: int
    steps: int
    tokens: int
    visual_tokens: int
    fill: float
    """Tokens over what the packs could hold: cutoff_len each; padded: the longest of the step."""
    imbalance: float | None
    """Mean over the whole steps of (largest cost of a rank / mean cost - 1); None where no step is whole."""
    imbalance_ranks: int
    """Ranks for which it is stated: the largest divisor of global_batch up to 8."""
    last_step_packs: int
    """Smallest step, where packs make no whole one; 0: all steps are whole."""
    contested_samples: int
    """Visits whose turns did not all come: where the schedule chose."""
    tasks: dict[str, TaskCount]
    sources: dict[str, SourceCount]
    phases: list[PhaseCount]
    rows_left_out: dict[str, LeftOut]
    """over_cutoff, task_share, schedule, source_weight."""
    turns_left_out: dict[str, int]
    """over_cutoff (the turn alone), task_share, schedule (or the document was full)."""


@dataclass(frozen=True)
class Plan:
    """One epoch."""

    packs: pa.Table
    """PLAN_SCHEMA, a row a pack, in global order."""
    counts: PlanCounts
    epoch: int
    seed: int
    cutoff_len: int
    settings: dict[str, Any]
    """The plan's part of the train section."""
    fingerprint: str
    """xxh3_128 of everything that is trained on, in order, and of the samples' ids: equal on every worker, before and after a restart."""

    @property
    def num_steps(self) -> int:
        return self.counts.steps

    @cached_property
    def step_offsets(self) -> IntColumn:
        """(num_steps + 1,) packs of step s are step_offsets[s] .. step_offsets[s + 1]."""
        return offsets_of(np.bincount(self.packs["step"].to_numpy(), minlength=self.num_steps))


def packs_of_step(plan: Plan, step: int) -> range:
    """Rows of `plan.packs` that make an optimizer step."""
    return range(int(plan.step_offsets[step]), int(plan.step_offsets[step + 1]))


def rank_packs(first: int, stop: int, rank: int, world_size: int) -> range:
    """A rank's packs of a step first .. stop. The last step may have fewer packs than there are ranks: then some get none."""
    return range(first + rank, stop, world_size)


def bytes_of(values: npt.NDArray[Any]) -> memoryview:
    """What a hash reads of a column, without a copy where it lies in one piece."""
    return np.ascontiguousarray(values).data.cast("B")


def fingerprint_of(packs: pa.Table, samples: str, cutoff: int) -> str:
    digest = xxhash.xxh3_128(f"{PLAN_VERSION} {samples} {cutoff}".encode())
    # Column by column and as lengths: neither chunks nor offsets of the table are part of what it says.
    for name in ("step", "phase", "num_tokens"):
        for chunk in packs[name].chunks:
            digest.update(bytes_of(chunk.to_numpy()))
    lists = packs["documents"].chunks
    for chunk in lists:
        digest.update(bytes_of(np.diff(chunk.offsets.to_numpy())))
    documents = [chunk.flatten() for chunk in lists]
    for chunk in documents:
        digest.update(bytes_of(chunk.field("row").to_numpy()))
    for chunk in documents:
        digest.update(bytes_of(np.diff(chunk.field("turns").offsets.to_numpy())))
    for chunk in documents:
        digest.update(bytes_of(chunk.field("turns").flatten().to_numpy()))
    return str(digest.hexdigest())


# ---- plans on disk


def write_plan(path: Path, plan: Plan) -> None:
    """Write a plan as an Arrow file, atomically."""
    with atomic_write(path) as stream, pa.ipc.new_file(pa.PythonFile(stream, mode="w"), plan.packs.schema) as writer:
        writer.write_table(plan.packs, max_chunksize=_PACKS_PER_BATCH)


def read_plan(path: Path) -> Plan:
    """Memory-map a plan and check its fingerprint. Raises ShardError where it is missing or damaged."""
    try:
        packs = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        metadata = {key.decode(): value.decode() for key, value in (packs.schema.metadata or {}).items()}
        if metadata.get("boxcar.schema") != "plan" or metadata.get("boxcar.version") != str(PLAN_VERSION):
            raise ShardError(str(path), found="another kind or version of file", expected=f"a plan of version {PLAN_VERSION}")
        packs.validate(full=True)
        found = fingerprint_of(packs, metadata["samples"], int(metadata["cutoff_len"]))
        if found != metadata["fingerprint"]:
            raise ShardError(
                str(path), found=f"a plan of hash {found}", expected=metadata["fingerprint"], fix="Delete it: it is made again."
            )
        return Plan(
            packs=packs,
            counts=msgspec.json.decode(metadata["counts"], type=PlanCounts),
            epoch=int(metadata["epoch"]),
            seed=int(metadata["seed"]),
            cutoff_len=int(metadata["cutoff_len"]),
            settings=json.loads(metadata["settings"]),
            fingerprint=metadata["fingerprint"],
        )
    except (OSError, pa.ArrowException, ValueError, KeyError, msgspec.DecodeError) as error:
        found = f"a plan that cannot be read ({error})"
        raise ShardError(str(path), found=found, expected="the file as it was written", fix="Delete it: it is made again.") from error
