"""Indexes of rows made by hand or drawn, without a conversion: for the tests of plans."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import xxhash

from boxcar.pipelines.ragged import offsets_of
from boxcar.schemas.task import TASK_NAMES, TaskName
from boxcar.train.planning.index import QUANTILES, PlanIndex
from boxcar.train.planning.plan_table import Plan

TURN_OPEN = 3


@dataclass(frozen=True)
class T:
    """A turn."""

    tokens: int = 20
    task: TaskName = "detect"
    difficulty: float = 0.5
    """Quantile."""


@dataclass(frozen=True)
class R:
    """A row."""

    sample_id: str
    turns: tuple[T, ...]
    base: int = 100
    ordered: bool = False
    source: str = "set"


def index_of(rows: Sequence[R], *, one_question_per_image: bool = False) -> PlanIndex:
    turns = [turn for row in rows for turn in row.turns]
    sources = sorted({row.source for row in rows})
    base = np.array([row.base for row in rows], np.int32)
    return PlanIndex(
        sample_keys=np.array([xxhash.xxh3_64_intdigest(row.sample_id.encode()) for row in rows], np.uint64),
        base_tokens=base,
        visual_tokens=base // 2,
        num_patches=base * 2,
        patches_squared=(base * 2).astype(np.float32) ** 2,
        ordered=np.array([row.ordered for row in rows], np.bool_),
        source_codes=np.array([sources.index(row.source) for row in rows], np.int16),
        sources=tuple(sources),
        turn_offsets=offsets_of(np.array([len(row.turns) for row in rows], np.int64)),
        turn_tokens=np.array([turn.tokens for turn in turns], np.int32),
        turn_quantiles=np.array([round(turn.difficulty * QUANTILES) for turn in turns], np.uint16),
        turn_tasks=np.array([TASK_NAMES.index(turn.task) for turn in turns], np.uint8),
        turn_open_tokens=0 if one_question_per_image else TURN_OPEN,
        one_question_per_image=one_question_per_image,
    )


def drawn_rows(num_rows: int, seed: int = 0, *, max_turns: int = 8, source: str = "set") -> list[R]:
    """Rows of all kinds: some dialogues, some with turns too long for a cutoff of 400, some too long altogether."""
    rng = np.random.default_rng(seed)
    tasks: tuple[TaskName, ...] = ("detect", "refer", "absent", "caption")
    rows = []
    for number in range(num_rows):
        count = int(rng.integers(1, max_turns + 1))
        turns = tuple(
            T(int(rng.choice([rng.integers(5, 60), rng.integers(200, 500)], p=[0.95, 0.05])), tasks[rng.integers(4)], float(rng.random()))
            for _ in range(count)
        )
        base = int(rng.choice([rng.integers(20, 250), rng.integers(390, 600)], p=[0.97, 0.03]))
        if rng.random() < 0.1:
            rows.append(R(f"{source}/{number}", tuple(replace(turn, task="dialogue") for turn in turns), base, ordered=True, source=source))
        else:
            rows.append(R(f"{source}/{number}", turns, base, source=source))
    return rows


def length(row: R, turns: Sequence[int]) -> int:
    """Tokens of a document, by the definition of a row's sequence."""
    return row.base + sum(row.turns[turn].tokens for turn in turns) + TURN_OPEN * (len(turns) - 1)


@dataclass(frozen=True)
class Doc:
    row: int
    turns: tuple[int, ...]


def packs_of(table: pa.Table) -> list[list[Doc]]:
    return [[Doc(entry["row"], tuple(entry["turns"])) for entry in pack] for pack in table["documents"].to_pylist()]


def documents_of(plan: Plan) -> list[Doc]:
    return [document for pack in packs_of(plan.packs) for document in pack]
