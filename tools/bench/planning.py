"""What planning costs, and how well packs are filled and balanced."""

import resource
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from boxcar.schemas.task import TASK_NAMES
from boxcar.schemas.training import PlanConfig, ScheduleConfig
from boxcar.train.planning.index import QUANTILES, PlanIndex
from boxcar.train.planning.plan import plan_epoch
from boxcar.train.planning.plan_table import Plan

_CHUNK = 1 << 22


def synthetic_index(num_rows: int, num_turns: int, seed: int = 0) -> PlanIndex:
    """Rows of one image each, as COCO's are under Qwen2.5-VL: long side 640 px (23 tokens) and an aspect of 1 to 2.3; one image in eight
    is a photograph of 600 to 1280 tokens. Questions and answers of 20 to 160 tokens, most of them short; one turn in nine is absent."""
    rng = np.random.default_rng(seed)
    visual = np.asarray(23 * rng.integers(10, 24, num_rows), np.int32)
    large = rng.random(num_rows, np.float32) < 0.125
    visual[large] = rng.integers(600, 1281, int(large.sum()))
    patches = 4 * visual
    tasks = np.array([TASK_NAMES.index(name) for name in ("detect", "refer", "absent")], np.uint8)
    total = num_rows * num_turns
    answers = _drawn(total, np.int32, lambda size: np.minimum(rng.exponential(24, size) + 8, 120))
    return PlanIndex(
        sample_keys=rng.integers(0, 1 << 64, num_rows, np.uint64),
        base_tokens=visual + np.int32(22),
        visual_tokens=visual,
        num_patches=patches,
        patches_squared=patches.astype(np.float32) ** 2,
        ordered=np.zeros(num_rows, np.bool_),
        source_codes=np.asarray(rng.random(num_rows, np.float32) < 0.3, np.int16),
        sources=("first", "second"),
        turn_offsets=np.arange(num_rows + 1, dtype=np.int64) * num_turns,
        turn_tokens=answers + _drawn(total, np.int32, lambda size: rng.integers(12, 40, size)),
        turn_quantiles=_drawn(total, np.uint16, lambda size: rng.integers(0, QUANTILES + 1, size)),
        turn_tasks=_drawn(total, np.uint8, lambda size: tasks[np.minimum(rng.integers(0, 9, size) // 4, 2)]),
        turn_open_tokens=3,
        one_question_per_image=False,
    )


def _drawn(size: int, dtype: npt.DTypeLike, draw: Callable[[int], npt.NDArray[Any]]) -> npt.NDArray[Any]:
    """A column drawn in stretches, so that no wide copy of all of it exists."""
    column = np.empty(size, dtype)
    for start in range(0, size, _CHUNK):
        column[start : start + _CHUNK] = draw(min(_CHUNK, size - start))
    return column


def plan(num_rows: int, num_turns: int, schedule: ScheduleConfig, window: int, cutoff_len: int, global_batch: int) -> None:
    """Plan an epoch of a synthetic index and print what it cost."""
    pa.set_cpu_count(1)
    index = synthetic_index(num_rows, num_turns)
    index_mb = sum(value.nbytes for value in vars(index).values() if isinstance(value, np.ndarray)) / 1e6
    print(f"{num_rows:,} rows of {num_turns} turns: an index of {index_mb:,.0f} MB; peak so far {_peak_mb():,.0f} MB")
    config = PlanConfig(schedule=schedule, pack_window=window, global_batch=global_batch)
    wall, cpu = time.monotonic(), time.process_time()
    made = plan_epoch(index, config, 0, cutoff_len)
    wall, cpu = time.monotonic() - wall, time.process_time() - cpu
    print(f"planned in {cpu:.1f} CPU-s, {wall:.1f} s of wall time, one thread; peak memory of the process {_peak_mb():,.0f} MB")
    _print(made)


def _print(made: Plan) -> None:
    counts = made.counts
    print(f"{counts.documents:,} documents of {counts.turns:,} turns in {counts.packs:,} packs in {counts.steps:,} steps")
    balance = "no whole step" if counts.imbalance is None else f"{counts.imbalance:.3%} over {counts.imbalance_ranks} ranks"
    print(f"fill {counts.fill:.3%} at {made.cutoff_len} tokens, cost imbalance {balance}")
    print(f"samples whose turns the schedule chose: {counts.contested_samples:,}; fingerprint {made.fingerprint}")


def _peak_mb() -> float:
    """Peak resident memory of this process: the index, the plan, and Python with its libraries."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
