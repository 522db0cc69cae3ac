"""Box metrics in the middle of training: the network as it is answers a fixed slice of questions, a part on each rank.

slice ──> every world_size-th batch ──> Predictor ──> scored rows ──> gathered on all ranks ──> train.scoring.score
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pyarrow as pa
import torch
from torch import distributed

from boxcar.schemas.errors import ConfigError
from boxcar.schemas.training import GenerateConfig
from boxcar.train.answering.adapter import Opened
from boxcar.train.answering.predict import PredictConfig
from boxcar.train.data.store import ShardStore
from boxcar.train.network.model import Base, in_packs, in_rows
from boxcar.train.running.sessions import Session
from boxcar.train.scoring.evaluate import answers_table, slice_of
from boxcar.train.scoring.questions import SCORED_SCHEMA
from boxcar.train.scoring.score import Section, score

WATCHED: tuple[tuple[Section, str], ...] = (
    ("rec", "mean_iou"),
    ("rec", "acc_50"),
    ("rec", "acc_75"),
    ("objects", "f1_50"),
    ("grec", "pr_f1"),
    ("format", "failed"),
)
"""What is reported, over all questions and by task; a figure that is not defined is left out."""


@contextmanager
def answering(base: Base, network: Any) -> Iterator[tuple[Base, Any]]:
    """(base, network) in evaluation mode, with rows instead of packs; as before after the block, whatever happens in it."""
    was_training = network.training
    network.eval()
    if base.packed:
        in_rows(base)
    try:
        # Decoding grows by a token a pass: compiled layers would be compiled again and again.
        with torch.compiler.set_stance("force_eager"):
            yield replace(base, packed=False), network
    finally:
        if base.packed:
            in_packs(base)
        network.train(was_training)


def measure_live(
    opened: Opened, shards: Sequence[str], config: GenerateConfig, session: Session, *, gathered_weights: bool
) -> dict[str, float]:
    """Metrics by name, the same on all ranks; "mean_iou" over all and "mean_iou/refer" of a task.

    gathered_weights: ZeRO-3, where every forward pass is collective: ranks then answer equally many batches, and go on until all are done.
    Raises ConfigError where the slice has no question.
    """
    store = ShardStore(shards)
    asked = list(slice_of(store, shards, config.tasks, config.max_samples, seed=0))
    if not asked:
        raise ConfigError(
            "train.validation.generate.tasks", found=f"no turn of {', '.join(config.tasks)} in {', '.join(shards)}", expected="some to ask"
        )
    mine = asked[session.rank :: session.world_size]
    num_mine = len(mine)
    most = -(-len(asked) // session.world_size)
    mine += asked[: most - num_mine]  # answered for company, and left out below
    predict = PredictConfig(config.batch_size, config.max_new_tokens, in_step=gathered_weights)
    rows = answers_table(opened, predict, store, mine).slice(0, num_mine).to_pylist()
    everything = _gathered(rows, session)
    table = pa.Table.from_pylist(everything).select(SCORED_SCHEMA.names).cast(SCORED_SCHEMA)
    return _figures(table)


def _gathered(rows: list[dict[str, Any]], session: Session) -> list[dict[str, Any]]:
    if session.world_size == 1:
        return rows
    parts: list[list[dict[str, Any]]] = [[] for _ in range(session.world_size)]
    distributed.all_gather_object(parts, rows)
    return [row for part in parts for row in part]


def _figures(table: pa.Table) -> dict[str, float]:
    found: dict[str, float] = {}
    results = score(table, draws=0)
    for section, metric in WATCHED:
        for measure in results.measures:
            if (measure.section, measure.metric) == (section, metric) and measure.by in ("all", "task") and measure.value is not None:
                found[metric if measure.by == "all" else f"{metric}/{measure.group}"] = measure.value
    return found
