"""`boxcar export-results`: the answers of an evaluation for other programs.

| to              | boxes                                                   | files                                               |
|-----------------|---------------------------------------------------------|-----------------------------------------------------|
| coco-detections | xywh, pixels of the upright original, each with a score | OUT, and OUT's name + -truth.json                   |
| label-studio    | x, y, width, height in percent of the image             | OUT, and OUT's name + -config.xml                   |

Beside them OUT's name + .txt says what the numbers are.
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.sax.saxutils import quoteattr

import pyarrow as pa

from boxcar.pipelines import storage
from boxcar.schemas.errors import ConfigError
from boxcar.tools.exporting.export_files import ImageFile, ImageFiles
from boxcar.tools.pages.view_items import load_answers, load_results
from boxcar.train.data.store import ShardStore

SCORES = {
    "const": "1 for every box: what comes of it is no average precision",
    "rank": "1 - place / number of the boxes of its reply, the first box first",
    "logprob": "exp(mean log-probability of the tokens of the box's numbers), in (0, 1]; the same order as the log itself",
}
CATEGORY_TASKS = ("detect", "detect_joint", "absent")


@dataclass
class _Job:
    table: pa.Table
    arm: str
    rule: str
    out: Path
    images_url: str
    files: ImageFiles
    stores: list[str]
    counts: Counter[str]

    def rows(self) -> Iterator[dict[str, Any]]:
        yield from self.table.to_pylist()

    def image(self, row: dict[str, Any]) -> ImageFile:
        image = {"path": row["image_path"], "shard": row["shard"], "shard_row": row["shard_row"], "orientation": 1}
        image |= {key: row[key] for key in ("width", "height", "resized_width", "resized_height")}
        return self.files.find(image, self.stores.index(row["folder"]))

    def beside(self, ending: str) -> Path:
        return self.out.with_name(f"{self.out.stem}{ending}")


def export_results(results: Path, to: str, out: Path, *, arm: str = "adapter", images_url: str = "") -> dict[str, int]:
    """Write the answers of an arm for program `to`. Returns what was counted.

    images_url: for label-studio, what stands before an image's file name instead of its folder. Raises ConfigError (an unknown program or
    arm, no results), ShardError and ImageError.
    """
    if to not in EXPORTERS:
        raise ConfigError("--to", found=repr(to), expected=f"one of {', '.join(EXPORTERS)}")
    content = load_results(results)
    if arm not in content["arms"]:
        raise ConfigError("--arm", found=repr(arm), expected=f"one of {', '.join(content['arms'])}")
    table = load_answers(results, arm)
    folders = sorted(set(table["folder"].to_pylist()))
    # Where images are embedded they must be read; where they are not, the shards may be gone.
    embedded = table["shard"].null_count < table.num_rows
    with storage.writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        files = ImageFiles(ShardStore(folders) if embedded else None, out.with_name(f"{out.stem}-images"))
        job = _Job(table, arm, content["settings"]["score_rule"], out, images_url, files, folders, Counter())
        readme = EXPORTERS[to](job)
        counted = "".join(f"  {name}: {count}\n" for name, count in sorted(job.counts.items()))
        job.beside(".txt").write_text(f"{readme.strip()}\n\nFrom {results}, {arm} of {content['adapter']}:\n{counted}", encoding="utf-8")
    return dict(job.counts)


def _write(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def scores_of(row: dict[str, Any], rule: str) -> list[float]:
    """The score of each predicted box of an answer, in [0, 1]. Raises ConfigError where the rule needs what was not kept."""
    num = len(row["predicted_boxes"])
    if rule == "const":
        return [1.0] * num
    if rule == "rank":
        return [1 - place / num for place in range(num)]
    if row["predicted_scores"] is None and num:
        raise ConfigError(
            "evaluate.score_rule",
            found="logprob, and answers without log-probabilities",
            expected="answers that keep them",
            fix="Evaluate again.",
        )
    return [math.exp(min(0.0, score)) for score in row["predicted_scores"] or []]


# ---- COCO

_COCO_README = """
COCO detections, written by `boxcar export-results`.

{name}         a list of {{image_id, category_id, bbox, score}}; what pycocotools' and faster-coco-eval's loadRes take
{truth}   images, categories and true boxes with the same ids

bbox: [x, y, width, height] in pixels of the upright original image, float, from 0.
score: {score}.

Answers to questions about categories (detect, detect_joint, absent). Where one image was asked for a category more than once, the first
answer counts (detect before detect_joint), so that no box is there twice. A box belongs to the category that was asked for; of questions
about several, to the one that it names, and a name that was not asked for is left out. Ids are this file's own.
"""


def _coco(job: _Job) -> str:
    rows = sorted((row for row in job.rows() if row["task"] in CATEGORY_TASKS and row["asked"]), key=_first_asked)
    job.counts["left out: answers about phrases and others"] = job.table.num_rows - len(rows)
    if not rows:
        raise ConfigError("--to", found="no answer about categories", expected="answers to detect, detect_joint or absent turns")
    labels = sorted({_plain(label) for row in rows for label in row["asked"]})
    category = {label: number for number, label in enumerate(labels, 1)}
    images: dict[str, dict[str, Any]] = {}
    truth: list[dict[str, Any]] = []
    detections: list[dict[str, Any]] = []
    answered: set[tuple[int, str]] = set()
    for row in rows:
        image = images.setdefault(
            row["image"], {"id": len(images) + 1, "file_name": row["image"], "width": row["width"], "height": row["height"]}
        )
        asked = {_plain(label) for label in row["asked"]}
        fresh = {label for label in asked if (image["id"], label) not in answered}
        answered |= {(image["id"], label) for label in fresh}
        for label, box in zip(row["truth_labels"], row["truth_boxes"], strict=True):
            if _plain(label) in fresh:
                x, y, width, height = _xywh(box)
                known = {"id": len(truth) + 1, "image_id": image["id"], "category_id": category[_plain(label)], "iscrowd": 0}
                truth.append({**known, "bbox": [x, y, width, height], "area": width * height})
        for label, box, score in zip(row["predicted_labels"], row["predicted_boxes"], scores_of(row, job.rule), strict=True):
            named = next(iter(asked)) if len(asked) == 1 else _plain(label or "")
            if named not in asked:
                job.counts["left out: boxes of names that were not asked for"] += 1
            elif named in fresh:
                detections.append({"image_id": image["id"], "category_id": category[named], "bbox": _xywh(box), "score": round(score, 6)})
            else:
                job.counts["left out: boxes of a category that was asked for before"] += 1
    categories = [{"id": number, "name": label} for label, number in category.items()]
    _write(job.out, detections)
    _write(job.beside("-truth.json"), {"images": list(images.values()), "annotations": truth, "categories": categories})
    job.counts.update({"images": len(images), "categories": len(categories), "true boxes": len(truth), "detections": len(detections)})
    return _COCO_README.format(name=job.out.name, truth=job.beside("-truth.json").name, score=SCORES[job.rule])


def _first_asked(row: dict[str, Any]) -> tuple[str, int, str, int]:
    return row["image"], CATEGORY_TASKS.index(row["task"]), row["sample_id"], row["turn"]


def _plain(label: str) -> str:
    """Labels are compared as `train.scoring.questions` compares them."""
    return " ".join(label.casefold().split())


def _xywh(box: Sequence[float]) -> list[float]:
    x0, y0, x1, y1 = box
    return [round(value, 3) for value in (x0, y0, x1 - x0, y1 - y0)]


# ---- Label Studio

_LABEL_STUDIO_README = """
Label Studio tasks, written by `boxcar export-results`.

{name}    one task an image: what the model said as a prediction, the true boxes as an annotation
{config}   the labelling interface to create the project with; its labels are those of the file

Boxes are x, y, width and height in percent of the image (0..100), from its upper left corner; rotation 0.
score of a box: {score}. Score of a prediction: their mean.
`boxcar_questions` of a task holds what was asked, and the raw replies.

Images: {images}
"""
_SERVED = """{url} + file name. Serve the files there, or let Label Studio serve them as local files."""
_LOCAL = """absolute paths, which Label Studio does not open by itself: import with --images-url "/data/local-files/?d=..." (with
LABEL_STUDIO_LOCAL_FILES_SERVING_ENABLED=true), or the address of a server that has them."""


def _label_studio(job: _Job) -> str:
    tasks: dict[str, dict[str, Any]] = {}
    labels: dict[str, None] = {}
    for row in job.rows():
        if row["image_path"] is None and row["shard"] is None:
            job.counts["left out: answers without an image"] += 1
            continue
        task = tasks.get(row["image"])
        if task is None:
            path = job.image(row).path
            shown = f"{job.images_url}{Path(path).name}" if job.images_url else path
            task = {
                "data": {"image": shown, "boxcar_questions": []},
                "predictions": [{"model_version": job.arm, "score": 0.0, "result": []}],
                "annotations": [{"result": []}],
            }
            tasks[row["image"]] = task
        asked = {"question": row["question"], "reply": row["reply"], "sample_id": row["sample_id"], "turn": row["turn"]}
        task["data"]["boxcar_questions"].append(asked)
        fallback = row["asked"][0] if row["asked"] else row["task"]
        predicted = [label or fallback for label in row["predicted_labels"]]
        scores = scores_of(row, job.rule)
        name = f"{row['sample_id']}/{row['turn']}"
        task["predictions"][0]["result"] += _regions(row, f"{name}/p", row["predicted_boxes"], predicted, scores)
        task["annotations"][0]["result"] += _regions(row, f"{name}/t", row["truth_boxes"], row["truth_labels"], None)
        labels |= dict.fromkeys([*predicted, *row["truth_labels"]])
    for task in tasks.values():
        scores = [region["score"] for region in task["predictions"][0]["result"]]
        task["predictions"][0]["score"] = round(sum(scores) / len(scores), 6) if scores else 0.0
        job.counts.update({"tasks": 1, "predicted boxes": len(scores), "true boxes": len(task["annotations"][0]["result"])})
    _write(job.out, list(tasks.values()))
    job.beside("-config.xml").write_text(_config(list(labels)), encoding="utf-8")
    images = _SERVED.format(url=job.images_url) if job.images_url else _LOCAL
    return _LABEL_STUDIO_README.format(name=job.out.name, config=job.beside("-config.xml").name, score=SCORES[job.rule], images=images)


def _regions(
    row: dict[str, Any], name: str, boxes: Sequence[Sequence[float]], labels: Sequence[str], scores: Sequence[float] | None
) -> list[dict[str, Any]]:
    regions = []
    for place, (box, label) in enumerate(zip(boxes, labels, strict=True)):
        x, y, width, height = (
            100 * value / side
            for value, side in zip((box[0], box[1], box[2] - box[0], box[3] - box[1]), (row["width"], row["height"]) * 2, strict=True)
        )
        region = {
            "id": f"{name}{place}",
            "from_name": "label",
            "to_name": "image",
            "type": "rectanglelabels",
            "original_width": row["width"],
            "original_height": row["height"],
            "image_rotation": 0,
            "value": {"x": x, "y": y, "width": width, "height": height, "rotation": 0, "rectanglelabels": [label]},
        }
        regions.append(region if scores is None else {**region, "score": round(scores[place], 6)})
    return regions


def _config(labels: Sequence[str]) -> str:
    """The labelling interface; labels are attribute values, escaped."""
    lines = [f"    <Label value={quoteattr(label)}/>" for label in labels]
    return "\n".join(
        [
            "<View>",
            '  <Image name="image" value="$image"/>',
            '  <RectangleLabels name="label" toName="image">',
            *lines,
            "  </RectangleLabels>",
            "</View>",
            "",
        ]
    )


EXPORTERS: dict[str, Callable[[_Job], str]] = {"coco-detections": _coco, "label-studio": _label_studio}
"""Each writes its files and returns the text that explains them."""
