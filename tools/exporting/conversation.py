"""What exporters of shards share: the job, image files, and rows as the conversations of other programs."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from boxcar.pipelines.families.catalog import FAMILIES
from boxcar.pipelines.tokens.frame import Frame
from boxcar.schemas.errors import ConfigError
from boxcar.tools.exporting.export_files import ImageFile, ImageFiles
from boxcar.train.data.messages import question_parts
from boxcar.train.data.store import Row, ShardStore

PLACEHOLDERS = ("<image>", "<video>", "<audio>", "<bbox>", "<ref-object>")
"""What these programs take for their own marks wherever it stands."""


@dataclass
class Job:
    """What every exporter needs."""

    store: ShardStore
    frame: Frame
    files: ImageFiles
    out: Path
    counts: Counter[str]
    image_bytes: bool = True
    """parquet: whether the images themselves are written, or their paths."""

    def rows(self) -> Iterator[Row]:
        return map(self.store.whole_row, range(self.store.num_rows))

    def write(self, name: str, content: object) -> None:
        (self.out / name).write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def boxes_in_file(file: ImageFile, boxes: Any, image: Mapping[str, Any]) -> list[list[float]]:
    """Boxes (N, 4) in pixels of the upright original -> xyxy in pixels of the file, to the thousandth."""
    scale = np.tile(np.array(file.size_wh) / [image["width"], image["height"]], 2)
    return [[round(value, 3) for value in box] for box in (np.array(boxes, float).reshape(-1, 4) * scale).tolist()]


def usable_turns(job: Job, row: Row) -> list[dict[str, Any]]:
    """Turns that can be said in another program's conversation; a dialogue as a whole or not at all."""
    turns: list[dict[str, Any]] = []
    for turn in row["turns"]:
        if not any(mark in text for mark in PLACEHOLDERS for text in (turn["question"], turn["answer"])):
            turns.append(turn)
            continue
        job.counts["left out: turns whose text holds one of " + " ".join(PLACEHOLDERS)] += 1
        if row["ordered"]:
            job.counts["left out: turns of such dialogues"] += len(row["turns"]) - 1
            return []
    return turns


def questions_with_images(job: Job, row: Row, texts: list[str]) -> list[str]:
    """Questions with <image> where the images stand: before the first one, or where a dialogue has them."""
    return ["".join("<image>" if part is None else part for part in parts) for parts in question_parts(job.frame.family, row, texts)]


def require_known_family(job: Job, program: str) -> None:
    """Raises ConfigError where LLaMA-Factory and ms-swift do not train the shards' family as Boxcar does."""
    family = job.frame.family
    if not family.llama_factory_template:
        known = dict.fromkeys(one.network.model_type for one in FAMILIES.values() if one.llama_factory_template)
        raise ConfigError(
            "--to",
            found=f"{program} for shards of {family.title}",
            expected=f"shards of a family that it trains as Boxcar does: {', '.join(known)}",
            fix="Convert for one of them, or export COCO.",
        )
