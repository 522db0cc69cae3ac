"""Held-out shards -> questions -> replies -> scored tables -> figures, with the adapter and without it.

    shards ──> fixed slice ──> Predictor (adapter, base; the shards' questions or the adapter's) ──> SCORED table ──> train.scoring.score
       └─ contract, leakage: refused unless allowed

What is measured is what was trained: prompts, pixels and frame come from the same code.
"""

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
import xxhash

from boxcar.pipelines import storage
from boxcar.schemas.adapter import CARD
from boxcar.schemas.contract import FrameContract
from boxcar.schemas.errors import ConfigError, ContractError
from boxcar.schemas.evaluation import EvaluateConfig
from boxcar.schemas.task import TaskName
from boxcar.train.answering.adapter import Opened, find_adapter, open_adapter
from boxcar.train.answering.ask import Asker
from boxcar.train.answering.predict import Answer, Asked, PredictConfig, Predictor
from boxcar.train.data.store import ShardStore
from boxcar.train.planning.index import load_manifest, read_index
from boxcar.train.running.run_folder import ADAPTER
from boxcar.train.scoring.captions import caption_figures, require_captions
from boxcar.train.scoring.coco_ap import coco_ap
from boxcar.train.scoring.leakage import shared_with_training
from boxcar.train.scoring.questions import SCORED_SCHEMA
from boxcar.train.scoring.score import Section, markdown, number, results_of, score

NUM_NAMED_PAIRS = 5
OnEvent = Callable[[dict[str, Any]], None]
GROUNDING: frozenset[TaskName] = frozenset({"refer", "detect", "detect_joint", "absent"})
"""Tasks whose answers are boxes, or that there are none."""

_EXTRA = [
    pa.field("question", pa.string(), nullable=False, metadata={"about": "as it was asked"}),
    pa.field("answer", pa.string(), nullable=False, metadata={"about": "of the shards"}),
    pa.field("reply", pa.string(), nullable=False, metadata={"about": "raw, control tokens included"}),
    pa.field("complete", pa.bool_(), nullable=False, metadata={"about": "false: cut at max_new_tokens"}),
    pa.field("difficulty", pa.float32(), nullable=False, metadata={"about": "raw, as in the row"}),
    pa.field("num_prompt_tokens", pa.int32(), nullable=False, metadata={"about": "image placeholders included"}),
    pa.field("num_reply_tokens", pa.int32(), nullable=False, metadata={"about": "without what ended it"}),
    pa.field("row", pa.int64(), nullable=False, metadata={"about": "number over all folders"}),
    pa.field("folder", pa.string(), nullable=False, metadata={"about": "of shards"}),
    pa.field("image_path", pa.string(), nullable=True, metadata={"about": "file of the image; null where embedded"}),
    pa.field("shard", pa.int32(), nullable=True, metadata={"about": "number of the image shard; null where referenced"}),
    pa.field("shard_row", pa.int32(), nullable=True, metadata={"about": "row within that image shard"}),
]
ANSWERS_SCHEMA = pa.schema([*SCORED_SCHEMA, *_EXTRA], metadata={"boxcar.schema": "answers", "boxcar.version": "1"})
"""What is kept of every answer: the scored columns, and what people want to see."""


@dataclass(frozen=True)
class Arm:
    """One way of answering the same questions."""

    name: str
    """adapter or base; with " (its own prompts)" where the adapter's questions were asked."""
    table: pa.Table
    """ANSWERS_SCHEMA, scored or not (captions)."""
    seconds: float


def answer_all(config: EvaluateConfig, opened: Opened, shards: Sequence[str], on_event: OnEvent) -> list[Arm]:
    """Every arm over the slice of these shards. Raises ContractError, ConfigError, ShardError, ImageError."""
    store = ShardStore(shards)
    ways = ways_to_ask(config, opened.frame.contract(), store.contract, shards)
    asked = list(slice_of(store, shards, config.tasks, config.max_samples, config.seed))
    if not asked:
        raise ConfigError(
            "evaluate.shards",
            found=f"{', '.join(shards)} with no turn of {', '.join(config.tasks)}",
            expected="turns to ask",
            fix="Add tasks to evaluate.tasks, or convert with them.",
        )
    predict = PredictConfig(config.batch_size, config.max_new_tokens, with_logprobs=config.score_rule == "logprob")
    arms = []
    for name, bare in [("adapter", False), *([("base", True)] if config.compare_base and opened.card else [])]:
        for way in ways:
            label = name + (OWN_PROMPTS if way == "adapter" and len(ways) > 1 else "")
            on_event({"event": "arm", "name": label, "total": len(asked)})
            start = time.perf_counter()
            with opened.bare() if bare else nullcontext():
                arms.append(Arm(label, answers_table(opened, predict, store, asked, way, on_event), time.perf_counter() - start))
    return arms


def ways_to_ask(
    config: EvaluateConfig, mine: FrameContract, theirs: FrameContract, shards: Sequence[str]
) -> list[Literal["shards", "adapter"]]:
    """Whose questions are asked. Raises ContractError where the contracts differ in more than prompts, or in prompts without leave."""
    differences = mine.differences(theirs)
    if not differences:
        return ["shards"]
    only_prompts = mine.differing_fields(theirs) == {"prompts"}
    if not only_prompts or not (config.allow_prompt_mismatch or config.ask_as != "shards"):
        fix = "Convert the evaluation data under the adapter's contract."
        if only_prompts:
            fix = "evaluate.allow_prompt_mismatch=true asks anyway; evaluate.ask_as=both shows what it costs."
        raise ContractError(
            ", ".join(shards),
            found="another frame contract than the adapter's (here: the adapter, there: the shards):\n  " + "\n  ".join(differences) + "\n",
            expected="the adapter's",
            fix=fix,
        )
    return ["shards", "adapter"] if config.ask_as == "both" else [config.ask_as]


def slice_of(store: ShardStore, shards: Sequence[str], tasks: Sequence[TaskName], max_samples: int | None, seed: int) -> Iterator[Asked]:
    """The turns to ask, by row and turn: of all rows, or of a fixed `max_samples` of them, by hash of sample id and seed."""
    keys = read_index(shards).sample_keys
    rows: npt.NDArray[np.int64] = np.arange(len(keys))
    if max_samples is not None and max_samples < len(keys):
        mixed = np.array([xxhash.xxh3_64_intdigest(key.tobytes(), seed=seed) for key in keys], np.uint64)
        rows = np.sort(np.argsort(mixed, kind="stable")[:max_samples])
    for place in rows.tolist():
        row = store.whole_row(place)
        for turn in range(len(row["turns"])):
            if row["turns"][turn]["task"] in tasks:
                yield Asked(row, turn)


def _answers(
    opened: Opened, config: PredictConfig, store: ShardStore, asked: Sequence[Asked], way: Literal["shards", "adapter"], on_event: OnEvent
) -> Iterator[tuple[Asked, Answer]]:
    predictor = Predictor(opened, config, store)
    if way == "adapter":
        asker = Asker(opened.frame)
        asked = [Asked(asker.ask_again(one.row, one.turn), one.turn) for one in asked]
    for done, (one, answer) in enumerate(zip(asked, predictor.answer(asked), strict=True), start=1):
        on_event({"event": "answer", "done": done})
        yield one, answer


def answers_table(
    opened: Opened,
    predict: PredictConfig,
    store: ShardStore,
    asked: Sequence[Asked],
    way: Literal["shards", "adapter"] = "shards",
    on_event: OnEvent = lambda _: None,
) -> pa.Table:
    """ANSWERS_SCHEMA: a row for each question, in their order. way: whose questions are asked."""
    rows = [_row(one, answer, store) for one, answer in _answers(opened, predict, store, asked, way, on_event)]
    return pa.Table.from_pylist(rows, ANSWERS_SCHEMA)


def _row(one: Asked, answer: Answer, store: ShardStore) -> dict[str, Any]:
    row, turn = one.row, one.row["turns"][one.turn]
    image: dict[str, Any] = {"path": "", "shard": None, "shard_row": None}
    if row["images"]:
        image = row["images"][max(0, turn["image_index"])]
    grounded = answer.task in GROUNDING
    truth = [list(map(float, box)) for box in turn["boxes"]] if grounded else []
    embedded = image["shard"] is not None and image["shard"] >= 0
    folder = store.folders[row["folder"]]
    key = f"{folder.path}#{image['shard']}/{image['shard_row']}" if embedded else str(image["path"])
    return {
        # Names are unique within a conversion; of several, each says which it is from.
        "sample_id": row["sample_id"] if len(store.folders) == 1 else f"{row['sample_id']} ({os.path.basename(folder.path)})",
        "turn": one.turn,
        "image": key,
        "source": row["source"],
        "task": answer.task,
        "language": answer.language,
        "asked": list(dict.fromkeys(turn["labels"])) if grounded else [],
        "width": answer.size_wh[0],
        "height": answer.size_wh[1],
        "resized_width": answer.resized_wh[0],
        "resized_height": answer.resized_wh[1],
        "truth_boxes": truth,
        "truth_labels": list(turn["labels"]) if truth else [],
        "predicted_boxes": answer.boxes_xyxy_px.tolist(),
        "predicted_labels": list(answer.labels),
        "predicted_scores": answer.scores,
        "status": answer.status,
        "repairs": list(answer.repairs),
        "question": answer.question,
        "answer": turn["answer"],
        "reply": answer.reply,
        "complete": answer.complete,
        "difficulty": float(turn["difficulty"]),
        "num_prompt_tokens": answer.num_prompt_tokens,
        "num_reply_tokens": answer.num_reply_tokens,
        "row": row["row"],
        "folder": folder.path,
        "image_path": None if embedded else str(image["path"]),
        "shard": image["shard"] if embedded else None,
        "shard_row": image["shard_row"] if embedded else None,
    }


# ---- the whole of it


ANSWERS = "answers-{}.arrow"
RESULTS_JSON, RESULTS_MD = "results.json", "results.md"
OWN_PROMPTS = " (its own prompts)"


def fingerprint_of(config: EvaluateConfig, adapter: Path) -> str:
    """Hash of everything that an evaluation's figures follow from: settings, the held-out shards, the adapter's card and weights."""
    digest = xxhash.xxh3_128()
    settings = config.model_dump(mode="json", exclude={"output", "adapter", "batch_size"})
    manifests = [load_manifest(folder).manifest_xxh3_128 for folder in (*config.shards, *config.forgetting)]
    digest.update(json.dumps([settings, manifests], sort_keys=True).encode())
    for path in sorted(adapter.iterdir()):
        if path.name == CARD or path.suffix == ".safetensors":
            digest.update(path.name.encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


def folder_of(config: EvaluateConfig, adapter: Path) -> Path:
    """Where the results are, or will be."""
    run = adapter.parent if adapter.name == ADAPTER or adapter.name.startswith("step-") else adapter
    return Path(config.output) if config.output else run / f"evaluation-{fingerprint_of(config, adapter)[:10]}"


def finished(config: EvaluateConfig, adapter: str) -> dict[str, Any] | None:
    """The results of this very evaluation, where it was made before."""
    found = find_adapter(adapter)
    folder = folder_of(config, found)
    if not (folder / RESULTS_JSON).is_file():
        return None
    results: dict[str, Any] = json.loads((folder / RESULTS_JSON).read_bytes())
    return results | {"folder": str(folder)} if results.get("fingerprint") == fingerprint_of(config, found) else None


def evaluate(config: EvaluateConfig, adapter: str, on_event: OnEvent = lambda _: None) -> dict[str, Any]:
    """Measure an adapter, and the base without it. Writes results.json, results.md and answers-*.arrow.

    Returns what is in results.json, and `folder`.

    Raises ConfigError (also for held-out images that were trained on, without leave), ContractError, ShardError, ImageError.
    """
    if config.caption_metrics:
        require_captions()
    elif not set(config.tasks) & set(GROUNDING):
        raise ConfigError(
            "evaluate.tasks",
            found=", ".join(config.tasks),
            expected="a task with boxes, or evaluate.caption_metrics=true: nothing would be measured",
        )
    found = find_adapter(adapter)
    gpu = torch.cuda.is_available() if config.use_gpu is None else config.use_gpu
    bf16 = config.precision == "bf16" or (config.precision is None and gpu)
    on_event({"event": "opening", "what": str(found)})
    opened = open_adapter(
        str(found),
        torch.device("cuda" if gpu else "cpu"),
        torch.bfloat16 if bf16 else torch.float32,
        base=config.base,
        tokenizer=config.tokenizer,
    )
    assert opened.card is not None, "an adapter has a card"
    leakage = require_unseen(config, opened.card.train_shards)
    arms = answer_all(config, opened, config.shards, on_event)
    results: dict[str, Any] = {
        "format": "boxcar-evaluation",
        "fingerprint": fingerprint_of(config, found),
        "adapter": str(found),
        "shards": list(config.shards),
        "settings": config.model_dump(mode="json"),
        "leakage": leakage,
        "arms": {arm.name: _figures(arm, config) for arm in arms},
    }
    if config.forgetting:
        old = answer_all(config, opened, config.forgetting, on_event)
        results["forgetting"] = {"shards": list(config.forgetting), "arms": {arm.name: _figures(arm, config) for arm in old}}
    out = folder_of(config, found)
    with storage.writing(out):
        out.mkdir(parents=True, exist_ok=True)
        for arm in arms:
            with pa.ipc.new_file(str(out / ANSWERS.format(arm.name.replace(OWN_PROMPTS, "-own-prompts"))), arm.table.schema) as writer:
                writer.write_table(arm.table)
        (out / RESULTS_MD).write_text(as_markdown(results), encoding="utf-8")
        with storage.atomic_write(out / RESULTS_JSON) as stream:  # last: its presence means that all is there
            stream.write(json.dumps(results, indent=1, ensure_ascii=False, allow_nan=False).encode())
    return results | {"folder": str(out)}


def require_unseen(config: EvaluateConfig, train_shards: Mapping[str, str]) -> str:
    """What was compared, in words. train_shards: folders with their manifests' hashes. Raises ConfigError for images that were trained on,
    without leave."""
    pairs, said = shared_with_training(train_shards, [*config.shards])
    if pairs and not config.allow_leakage:
        named = "\n  ".join(f"{first} = {second}" for first, second in pairs[:NUM_NAMED_PAIRS])
        raise ConfigError(
            "evaluate.shards",
            found=f"{len(pairs)} images that were trained on (same content):\n  {named}\n",
            expected="images that the adapter has not seen",
            fix="Split by image before converting, or evaluate.allow_leakage=true to measure anyway.",
        )
    return said


def _figures(arm: Arm, config: EvaluateConfig) -> dict[str, Any]:
    """The figures of one arm, ready for JSON."""
    scored_columns = arm.table.select(SCORED_SCHEMA.names).cast(SCORED_SCHEMA)
    figures: dict[str, Any] = {"seconds": round(arm.seconds, 1), "num_answers": arm.table.num_rows}
    if any(task in GROUNDING for task in set(arm.table["task"].to_pylist())):
        figures["boxes"] = score(scored_columns, seed=config.seed, grec_official=config.grec_official).to_json()
        figures["coco_ap"] = _coco_ap(scored_columns, config)
    if config.caption_metrics:
        figures["captions"] = caption_figures(arm.table)
    figures["cut"] = 1.0 - float(np.mean(arm.table["complete"].to_numpy(zero_copy_only=False)))
    return figures


def _coco_ap(table: pa.Table, config: EvaluateConfig) -> dict[str, Any]:
    """COCO's figures, or why there are none."""
    if not {"detect", "detect_joint", "absent"} & set(table["task"].to_pylist()):
        return {"left_out": "no question about categories"}
    try:
        return asdict(coco_ap(table, config.score_rule))
    except ConfigError as error:  # the extra is not installed: everything else is there, and the reason stands in its place
        return {"left_out": str(error)}


def as_markdown(results: dict[str, Any]) -> str:
    """The results for people: one table that compares the arms, then everything of each."""
    lines = [f"# {results['adapter']}", "", f"Held-out shards: {', '.join(results['shards'])}. Leakage: {results['leakage']}.", ""]
    lines += comparison(results["arms"])
    if "forgetting" in results:
        lines += ["", f"## Forgetting ({', '.join(results['forgetting']['shards'])})", "", *comparison(results["forgetting"]["arms"])]
    for name, figures in results["arms"].items():
        lines += ["", f"# {name}", ""]
        if "boxes" in figures:
            lines += [markdown(results_of(figures["boxes"]))]
        if "stats" in figures.get("coco_ap", {}):
            ap = figures["coco_ap"]
            stats = ", ".join(f"{key} {value:.3f}" for key, value in ap["stats"].items() if value is not None)
            lines += [f"COCO AP ({ap['rule']}): {stats}. {ap['warning']}"]
        if "captions" in figures:
            values = ", ".join(f"{key} {value:.3f}" for key, value in figures["captions"].items() if isinstance(value, float))
            lines += [f"Captions ({figures['captions']['num']}, not the official tokenizer): {values}."]
        if "left_out" in figures.get("coco_ap", {}):
            lines += [f"No COCO AP: {figures['coco_ap']['left_out']}"]
    return "\n".join(lines) + "\n"


COMPARED: tuple[tuple[Section, str], ...] = (
    ("rec", "mean_iou"),
    ("rec", "acc_50"),
    ("rec", "acc_75"),
    ("rec", "acc_90"),
    ("objects", "f1_50"),
    ("objects", "precision_50"),
    ("objects", "recall_50"),
    ("objects", "hallucinated"),
    ("grec", "n_acc"),
    ("grec", "t_acc"),
    ("format", "strict"),
    ("format", "failed"),
    ("format", "label_exact"),
)
"""What arms are compared by."""


def comparison(arms: Mapping[str, dict[str, Any]]) -> list[str]:
    """A Markdown table: a figure a row, an arm a column; percent with intervals."""
    heads, rows = compared(arms)
    return [f"| | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|", *(f"| {name} | {' | '.join(cells)} |" for name, cells in rows)]


def compared(arms: Mapping[str, dict[str, Any]]) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """(columns, rows of a name and a cell for each column). An arm that was asked in both ways has its gap, in points, beside it."""
    boxes = {name: results_of(figures["boxes"]) for name, figures in arms.items() if "boxes" in figures}
    gaps = [name for name in boxes if name + OWN_PROMPTS in boxes]
    rows = []
    for section, metric in COMPARED if boxes else ():
        cells = [number(results.measure(section, metric)) for results in boxes.values()]
        for name in gaps:
            here, own = (boxes[arm].value(section, metric) for arm in (name, name + OWN_PROMPTS))
            cells.append("–" if here is None or own is None else f"{100 * (own - here):+.1f}")
        rows.append((f"{section} {metric}", cells))
    return [*boxes, *(f"gap of {name}" for name in gaps)], rows
