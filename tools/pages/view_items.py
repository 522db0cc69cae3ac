"""What a page shows: questions with their true and predicted boxes in the pixels that the model sees, from results or from shards.

    results.json, answers-*.arrow ──> verdicts ──┐
                                                 ├──> a sample of every stratum ──> items, pictures
    shards ──> rows, turns ──────────────────────┘

True boxes are decoded from the answer's text by the family's own grammar, predicted ones were decoded from the reply: the page shows what
is taught and what is said, not what the annotations were.
"""

import json
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from boxcar.pipelines.boxes import geometry
from boxcar.pipelines.families.box_text import TextBox
from boxcar.pipelines.families.catalog import find_family
from boxcar.pipelines.families.family import Family
from boxcar.schemas.errors import ConfigError, ShardError
from boxcar.train.data.store import ShardStore
from boxcar.train.planning.index import load_manifest, read_index
from boxcar.train.scoring.score import SIZE_AREAS, SIZES
from boxcar.train.scoring.verdict import Verdicts, verdicts

ROWS_LOOKED_AT = 10
"""Rows of shards that are read for each item to show; of more, these are chosen by hash."""


@dataclass(frozen=True)
class Picture:
    """An image, and where it is."""

    folder: str
    path: str | None
    """None: embedded."""
    shard: int | None
    shard_row: int | None
    size_wh: tuple[int, int]
    """Pixels of the upright original."""
    resized_wh: tuple[int, int]
    """Pixels that the model sees."""

    @property
    def where(self) -> str:
        return self.path if self.path is not None else f"{self.folder}, image shard {self.shard}, row {self.shard_row}"


@dataclass(frozen=True)
class Drawn:
    """A box on a picture."""

    box: list[float]
    """xyxy, pixels that the model sees."""
    label: str
    iou: float | None = None
    """Of a predicted box with its match."""
    score: float | None = None


@dataclass(frozen=True)
class Reply:
    """What one arm said."""

    question: str
    text: str
    """Raw."""
    status: str
    repairs: list[str]
    complete: bool
    tokens: int
    boxes: list[Drawn]
    iou: float | None
    right: bool | None
    """None: the question asks for no boxes."""


@dataclass(frozen=True)
class Item:
    """One question."""

    sample_id: str
    turn: int
    task: str
    source: str
    language: str
    asked: list[str]
    """Labels or phrases."""
    question: str
    answer: str
    """Of the shards."""
    difficulty: float
    tokens: int
    """Of the prompt; of shards, of question and answer."""
    sizes: list[str]
    """Of the true boxes, in the pixels that the model sees."""
    truth: list[Drawn]
    picture: Picture | None
    replies: dict[str, Reply] = field(default_factory=dict)
    """By arm."""


@dataclass(frozen=True)
class Shown:
    """All that a page needs."""

    title: str
    where: str
    fingerprint: str
    """Of what is shown: ratings belong to it."""
    arms: list[str]
    """The first is the one that is rated; of shards, none."""
    items: list[Item]
    num_items: int
    """Before sampling."""
    note: str
    """How the items were chosen; "" where all are there."""
    results: dict[str, Any] | None


# ---- which


def spread(strata: Sequence[Hashable], names: Sequence[str], most: int, seed: int) -> list[int]:
    """At most `most` places, in order: every stratum in equal numbers as far as it has them, within it by hash of name and seed."""
    groups: dict[Hashable, list[int]] = {}
    for place, stratum in enumerate(strata):
        groups.setdefault(stratum, []).append(place)
    chosen: list[int] = []
    left = most
    by_length = sorted(groups.items(), key=lambda group: (len(group[1]), str(group[0])))
    for number, (_, places) in enumerate(by_length):
        share = left // (len(by_length) - number)
        places.sort(key=lambda place: (xxhash.xxh3_64_intdigest(names[place].encode(), seed=seed), place))
        chosen += places[:share]
        left -= min(share, len(places))
    return sorted(chosen)


def sizes_of(boxes_resized: npt.NDArray[np.float64]) -> list[str]:
    """The sizes that occur among boxes (N, 4) in the pixels that the model sees, the smallest first; COCO's limits (`scoring.score`)."""
    areas = geometry.sides(boxes_resized).prod(axis=1)
    return [SIZES[code] for code in np.unique(np.searchsorted(SIZE_AREAS, areas, side="right"))]


# ---- results


RESULTS_NAME = "results.json"


def load_results(folder: Path) -> dict[str, Any]:
    """What `boxcar evaluate` wrote. Raises ConfigError where there is none, or another file of this name."""
    path = folder / RESULTS_NAME
    try:
        results = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        found = "no such file" if isinstance(error, FileNotFoundError) else f"{error}"
        raise ConfigError(str(path), found=found, expected="results of `boxcar evaluate`", fix="Give the folder it named.") from error
    if not isinstance(results, dict) or results.get("format") != "boxcar-evaluation":
        raise ConfigError(str(path), found="another file of this name", expected="results of `boxcar evaluate`")
    return results


def load_answers(folder: Path, arm: str) -> pa.Table:
    """The answers of an arm. Raises ShardError where they are missing or of another version."""
    from boxcar.train.scoring.evaluate import ANSWERS, ANSWERS_SCHEMA, OWN_PROMPTS  # noqa: PLC0415  (brings torch; shards go without)

    path = folder / ANSWERS.format(arm.replace(OWN_PROMPTS, "-own-prompts"))
    try:
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    except (OSError, pa.ArrowInvalid) as error:
        raise ShardError(str(path), found=f"{error}", expected="the answers beside results.json", fix="Evaluate again.") from error
    if not table.schema.equals(ANSWERS_SCHEMA):
        raise ShardError(str(path), found="another schema", expected="this version's", fix="Evaluate again with this version of Boxcar.")
    return table


def items_of_results(folder: Path, most: int, seed: int) -> Shown:
    """A sample of the answers, all arms of a question together. Raises ConfigError and ShardError."""
    results = load_results(folder)
    arms = list(results["arms"])
    tables = {arm: load_answers(folder, arm) for arm in arms}
    judged = {arm: verdicts(table) for arm, table in tables.items()}
    first = tables[arms[0]]
    names = [f"{sample}/{turn}" for sample, turn in zip(first["sample_id"].to_pylist(), first["turn"].to_pylist(), strict=True)]
    sizes = _sizes_of_truth(first)
    chosen, note = list(range(first.num_rows)), ""
    if first.num_rows > most:
        strata = list(zip(first["task"].to_pylist(), (size[:1] for size in map(tuple, sizes)), judged[arms[0]].right.tolist(), strict=True))
        chosen = spread(strata, names, most, seed)
        note = f"{len(chosen):,} of {first.num_rows:,} questions, evenly from {len(set(strata))} strata (task, size, right or wrong)."
    rows = {arm: _by_name(table.take(_places(table, names, chosen))) for arm, table in tables.items()}
    places = {arm: _place_of(table) for arm, table in tables.items()}
    families: dict[str, Family] = {}
    items = []
    for place in chosen:
        replies = {}
        for arm in arms:
            if (row := rows[arm].get(names[place])) is not None:
                replies[arm] = _reply(row, judged[arm], places[arm][names[place]])
        row = rows[arms[0]][names[place]]
        if row["folder"] not in families:
            families[row["folder"]] = find_family(load_manifest(row["folder"]).contract.family)
        items.append(_item_of_answer(row, families[row["folder"]], sizes[place], replies))
    adapter = Path(results["adapter"])
    title = f"{adapter.parent.name} – {adapter.name}" if adapter.parent.name else adapter.name
    where = f"{adapter}, measured on {', '.join(results['shards'])}"
    return Shown(title, where, results["fingerprint"], arms, items, first.num_rows, note, results)


def _names_of(table: pa.Table) -> list[str]:
    return [f"{sample}/{turn}" for sample, turn in zip(table["sample_id"].to_pylist(), table["turn"].to_pylist(), strict=True)]


def _place_of(table: pa.Table) -> dict[str, int]:
    return {name: place for place, name in enumerate(_names_of(table))}


def _places(table: pa.Table, names: Sequence[str], chosen: Sequence[int]) -> list[int]:
    place_of = _place_of(table)
    return [place_of[names[place]] for place in chosen if names[place] in place_of]


def _by_name(table: pa.Table) -> dict[str, dict[str, Any]]:
    return dict(zip(_names_of(table), table.to_pylist(), strict=True))


def _sizes_of_truth(table: pa.Table) -> list[list[str]]:
    """For each question, the sizes of its true boxes."""
    lengths = pc.list_value_length(table["truth_boxes"]).to_numpy()
    flat = pc.list_flatten(table["truth_boxes"]).combine_chunks().flatten().to_numpy().reshape(-1, 4)
    scale = np.stack([(table[f"resized_{side}"].to_numpy() / table[side].to_numpy()) for side in ("width", "height")], axis=1)
    resized = flat * np.tile(np.repeat(scale, lengths, axis=0), 2)
    return [sizes_of(boxes) for boxes in np.split(resized, np.cumsum(lengths)[:-1])] if len(lengths) else []


def _reply(row: dict[str, Any], judged: Verdicts, place: int) -> Reply:
    scale = _scale(row)
    scores = row["predicted_scores"] or [None] * len(row["predicted_boxes"])
    ious: Sequence[float | None] = judged.box_iou[place] or [None] * len(row["predicted_boxes"])
    boxes = [
        Drawn([round(value * factor, 2) for value, factor in zip(box, scale, strict=True)], label or "", _rounded(iou), _rounded(score))
        for box, label, iou, score in zip(row["predicted_boxes"], row["predicted_labels"], ious, scores, strict=True)
    ]
    iou, right = float(judged.iou[place]), int(judged.right[place])
    return Reply(
        question=row["question"],
        text=row["reply"],
        status=row["status"],
        repairs=row["repairs"],
        complete=row["complete"],
        tokens=row["num_reply_tokens"],
        boxes=boxes,
        iou=None if np.isnan(iou) else _rounded(iou),
        right=None if right < 0 else bool(right),
    )


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def _scale(row: dict[str, Any]) -> tuple[float, float, float, float]:
    """From pixels of the original to pixels that the model sees, for x, y, x, y."""
    across, down = row["resized_width"] / row["width"], row["resized_height"] / row["height"]
    return across, down, across, down


def _item_of_answer(row: dict[str, Any], family: Family, sizes: list[str], replies: dict[str, Reply]) -> Item:
    resized = row["resized_width"], row["resized_height"]
    picture = Picture(row["folder"], row["image_path"], row["shard"], row["shard_row"], (row["width"], row["height"]), resized)
    has_image = row["shard"] is not None or bool(row["image_path"])
    return Item(
        sample_id=row["sample_id"],
        turn=row["turn"],
        task=row["task"],
        source=row["source"],
        language=row["language"],
        asked=row["asked"],
        question=row["question"],
        answer=row["answer"],
        difficulty=round(row["difficulty"], 3),
        tokens=row["num_prompt_tokens"],
        sizes=sizes,
        truth=_drawn(_said(row["question"], row["answer"], family), family, resized),
        picture=picture if has_image else None,
        replies=replies,
    )


def _said(question: str, answer: str, family: Family) -> list[TextBox]:
    """The boxes that a turn's texts say, in their order."""
    strict = family.box_text.parse_answer(answer)
    return family.box_text.find_boxes(question) + (family.box_text.find_boxes(answer) if strict is None else strict)


def _drawn(boxes: Sequence[TextBox], family: Family, resized_wh: tuple[int, int]) -> list[Drawn]:
    """In the pixels that the model sees."""
    if not boxes:
        return []
    size = np.tile(np.array(resized_wh), (len(boxes), 1))
    values = family.grid.dequantise(np.array([box.values for box in boxes]), size, size)
    return [Drawn(np.round(value, 2).tolist(), box.label or "") for value, box in zip(values, boxes, strict=True)]


# ---- shards


def items_of_shards(folder: str, most: int, seed: int) -> Shown:
    """A sample of the turns of a conversion. Raises ShardError."""
    store = ShardStore([folder])
    manifest = store.folders[0].manifest
    family = find_family(manifest.contract.family)
    keys = read_index([folder]).sample_keys
    rows: list[int] = list(range(store.num_rows))
    if store.num_rows > ROWS_LOOKED_AT * most:
        mixed = np.array([xxhash.xxh3_64_intdigest(key.tobytes(), seed=seed) for key in keys], np.uint64)
        rows = np.sort(np.argsort(mixed, kind="stable")[: ROWS_LOOKED_AT * most]).tolist()
    items = [_item_of_turn(row, turn, folder, family) for row in map(store.whole_row, rows) for turn in range(len(row["turns"]))]
    note = "" if len(rows) == store.num_rows else f"From {len(rows):,} of {store.num_rows:,} rows, chosen by hash. "
    num_items = len(items)
    if num_items > most:
        strata = [(item.task, *item.sizes[:1]) for item in items]
        chosen = spread(strata, [f"{item.sample_id}/{item.turn}" for item in items], most, seed)
        note += f"{len(chosen):,} of {num_items:,} questions, evenly from {len(set(strata))} strata (task, size)."
        items = [items[place] for place in chosen]
    return Shown(Path(folder).name, f"{folder}, {family.title}", manifest.manifest_xxh3_128, [], items, num_items, note, None)


def _item_of_turn(row: dict[str, Any], number: int, folder: str, family: Family) -> Item:
    turn = row["turns"][number]
    image = row["images"][max(0, turn["image_index"])] if row["images"] else None
    picture = None
    resized = (1, 1)
    if image is not None:
        resized = image["resized_width"], image["resized_height"]
        picture = Picture(folder, image["path"], image["shard"], image["shard_row"], (image["width"], image["height"]), resized)
    truth = _drawn(_said(turn["question"], turn["answer"], family), family, resized)
    return Item(
        sample_id=row["sample_id"],
        turn=number,
        task=turn["task"],
        source=row["source"],
        language=turn["language"],
        asked=list(dict.fromkeys(label for label in turn["labels"] if label)),
        question=turn["question"],
        answer=turn["answer"],
        difficulty=round(turn["difficulty"], 3),
        tokens=len(turn["prompt_ids"]) + len(turn["answer_ids"]),
        sizes=sizes_of(np.array([box.box for box in truth])) if truth else [],
        truth=truth,
        picture=picture,
    )
