"""What `boxcar evaluate` writes, made by hand from shards: true boxes as predictions, some of them moved, lost, or said in garbage."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from boxcar.pipelines.families.box_text import render
from boxcar.pipelines.families.catalog import find_family
from boxcar.pipelines.families.family import Family
from boxcar.train.answering.parse import parse, to_original_px
from boxcar.train.data.store import ShardStore
from boxcar.train.scoring.evaluate import ANSWERS, ANSWERS_SCHEMA, GROUNDING
from boxcar.train.scoring.questions import SCORED_SCHEMA
from boxcar.train.scoring.score import score


def write_results(folder: Path, shards: Path, *, base: bool = True, logprobs: bool = False, seed: int = 0) -> dict[str, Any]:
    """results.json and answers of an adapter (boxes moved a little) and a base (a lot, or garbage). Returns what results.json holds."""
    store = ShardStore([str(shards)])
    arms: dict[str, Any] = {}
    for number, name in enumerate(["adapter", *(["base"] if base else [])]):
        rng = np.random.default_rng(seed + number)
        rows = [
            _row(row, turn, store, rng, moved_px=(3.0, 40.0)[number], garbage=(0.15, 0.3)[number], logprobs=logprobs)
            for row in map(store.whole_row, range(store.num_rows))
            for turn in range(len(row["turns"]))
            if row["turns"][turn]["task"] in GROUNDING
        ]
        table = pa.Table.from_pylist(rows, ANSWERS_SCHEMA)
        folder.mkdir(parents=True, exist_ok=True)
        with pa.ipc.new_file(str(folder / ANSWERS.format(name)), table.schema) as writer:
            writer.write_table(table)
        figures = score(table.select(SCORED_SCHEMA.names).cast(SCORED_SCHEMA), draws=20).to_json()
        arms[name] = {"seconds": 1.0, "num_answers": table.num_rows, "boxes": figures, "cut": 0.0}
    results: dict[str, Any] = {
        "format": "boxcar-evaluation",
        "fingerprint": f"{seed:032x}",
        "adapter": "runs/by-hand/adapter",
        "shards": [str(shards)],
        "settings": {"score_rule": "logprob" if logprobs else "rank"},
        "leakage": "none of 12 images",
        "arms": arms,
    }
    (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")
    return results


def reply_of(boxes: Any, labels: list[str], family: Family) -> str:
    """Boxes (N, 4) in model units as the family writes them."""
    if not len(boxes):
        return family.not_found["en"]
    several = len(set(labels)) > 1
    gaps = [
        family.box_text.answer_gap(before, after, several_labels=several)
        for before, after in zip([None, *labels], [*labels, None], strict=True)
    ]
    return render(gaps, np.asarray(boxes).tolist(), family.box_text)


def _row(
    row: Any, number: int, store: ShardStore, rng: np.random.Generator, *, moved_px: float, garbage: float, logprobs: bool
) -> dict[str, Any]:
    turn, folder = row["turns"][number], store.folders[row["folder"]]
    family = find_family(folder.manifest.contract.family)
    image = row["images"][0]
    size, resized = (image["width"], image["height"]), (image["resized_width"], image["resized_height"])
    truth = np.array(turn["boxes"], float).reshape(-1, 4)
    moved = np.clip(truth + rng.normal(0, moved_px, truth.shape), 0, np.tile(size, 2))
    moved = np.concatenate([np.minimum(moved[:, :2], moved[:, 2:]), np.maximum(moved[:, :2], moved[:, 2:])], axis=1)
    units = family.grid.quantise(moved, *(np.tile(np.array(one), (len(moved), 1)) for one in (size, resized)))
    reply = "The picture is nice; 4 things." if rng.random() < garbage else reply_of(units, list(turn["labels"])[: len(units)], family)
    parsed = parse(reply, family, resized)
    boxes = to_original_px(parsed.boxes, family.grid, size, resized)
    embedded = image["shard"] is not None
    return {
        "sample_id": row["sample_id"],
        "turn": number,
        "image": f"{folder.path}#{image['shard']}/{image['shard_row']}" if embedded else image["path"],
        "source": row["source"],
        "task": turn["task"],
        "language": turn["language"],
        "asked": list(dict.fromkeys(turn["labels"])),
        "width": size[0],
        "height": size[1],
        "resized_width": resized[0],
        "resized_height": resized[1],
        "truth_boxes": truth.tolist(),
        "truth_labels": list(turn["labels"]) if len(truth) else [],
        "predicted_boxes": boxes.tolist(),
        "predicted_labels": list(parsed.labels),
        "predicted_scores": (-rng.random(len(boxes))).tolist() if logprobs else None,
        "status": parsed.status,
        "repairs": list(parsed.repairs),
        "question": turn["question"],
        "answer": turn["answer"],
        "reply": reply,
        "complete": True,
        "difficulty": float(turn["difficulty"]),
        "num_prompt_tokens": 100,
        "num_reply_tokens": 20,
        "row": row["row"],
        "folder": folder.path,
        "image_path": None if embedded else image["path"],
        "shard": image["shard"] if embedded else None,
        "shard_row": image["shard_row"] if embedded else None,
    }
