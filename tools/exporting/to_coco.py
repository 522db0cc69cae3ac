"""`boxcar export-data --to coco`: boxes xywh in pixels of the image file, upright; instances.json and captions.json."""

from typing import Any

from boxcar.tools.exporting.conversation import Job, boxes_in_file

_COCO_README = """
COCO, written by `boxcar export-data`.

instances.json   images (file_name is an absolute path), annotations, categories
captions.json    the captions, where there are any

Boxes: [x, y, width, height] in pixels of the image file, float, from 0, half-open. The file is upright: images that EXIF turns were written
anew under images/, since COCO tools do not turn them.

What is here: the boxes of detect and detect_joint turns, each once. `neg_category_ids` of an image (as in LVIS): what was asked for and is
not there. What is not: phrases (refer, describe) and dialogues, for which COCO has no place; boxes that the conversion's rules left out.
area is that of the box.
"""


def write_coco(job: Job) -> str:
    images: dict[str, dict[str, Any]] = {}
    boxes: dict[tuple[int, str, tuple[float, ...]], None] = {}
    absent: dict[tuple[int, str], None] = {}
    captions: dict[tuple[int, str], None] = {}
    for row in job.rows():
        for turn in row["turns"]:
            task = turn["task"]
            if task not in ("detect", "detect_joint", "absent", "caption") or not row["images"]:
                job.counts[f"left out: turns of {task}"] += 1
                continue
            image = row["images"][max(0, turn["image_index"])]
            file = job.files.find(image, row["folder"])
            known = images.setdefault(
                file.path, {"id": len(images) + 1, "file_name": file.path, "width": file.size_wh[0], "height": file.size_wh[1]}
            )
            if task == "caption":
                captions[known["id"], turn["answer"]] = None
            elif task == "absent":
                absent |= {(known["id"], label): None for label in turn["labels"]}
            else:
                for label, box in zip(turn["labels"], boxes_in_file(file, turn["boxes"], image), strict=True):
                    boxes[known["id"], label, tuple(box)] = None
    labels = sorted({label for _, label, _ in boxes} | {label for _, label in absent})
    category = {label: number for number, label in enumerate(labels, 1)}
    by_id = {image["id"]: image for image in images.values()}
    for image_id, label in absent:
        by_id[image_id].setdefault("neg_category_ids", []).append(category[label])
    annotations = [
        {"id": number, "image_id": image_id, "category_id": category[label], **_xywh(box), "iscrowd": 0}
        for number, (image_id, label, box) in enumerate(boxes, 1)
    ]
    categories = [{"id": number, "name": label} for label, number in category.items()]
    job.write("instances.json", {"images": list(images.values()), "annotations": annotations, "categories": categories})
    if captions:
        entries = [{"id": number, "image_id": image_id, "caption": text} for number, (image_id, text) in enumerate(captions, 1)]
        job.write("captions.json", {"images": list(images.values()), "annotations": entries})
    job.counts.update({"images": len(images), "boxes": len(boxes), "categories": len(labels), "captions": len(captions)})
    return _COCO_README


def _xywh(box: tuple[float, ...]) -> dict[str, Any]:
    x0, y0, x1, y1 = box
    width, height = round(x1 - x0, 3), round(y1 - y0, 3)
    return {"bbox": [x0, y0, width, height], "area": round(width * height, 3)}
