"""`boxcar export-data`: shards for other programs, with boxes in the frame that each of them will really use.

| to            | boxes                                                                                | files                         |
|---------------|--------------------------------------------------------------------------------------|-------------------------------|
| coco          | xywh, pixels of the image file, upright                                              | instances.json, captions.json |
| llama-factory | in the text, exactly as the shards say it; LLaMA-Factory changes no numbers          | data.json, dataset_info.json  |
| ms-swift      | objects.bbox, xyxy, pixels of the image file; ms-swift turns them into model units   | data.jsonl                    |

LLaMA-Factory shrinks an image over `image_max_pixels` by whole pixels (int) before the processor *rounds* to its grid, where the family's
own rule floors: a 1920 x 1080 image under 262144 px becomes 672 x 392 there and 672 x 364 here. Where a family counts in pixels of the
resized image, such an image is written at the size that the numbers are of, which both leave as it is.

Checked against LLaMA-Factory src/llamafactory/data/mm_plugin.py and ms-swift swift/llm/template/{base,template/qwen}.py (2025).
"""

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from boxcar.pipelines import storage
from boxcar.pipelines.families.box_text import ResizedPixelGrid, TaggedBoxText
from boxcar.pipelines.families.patches import PixelLimits, SmartResize
from boxcar.pipelines.tokens.frame import Frame, frame_of
from boxcar.schemas.errors import ConfigError
from boxcar.tools.exporting.export_files import IMAGES, ImageFile, ImageFiles, require_empty
from boxcar.train.data.store import Row, ShardStore

LEAST_SIDE_PX = 28
"""LLaMA-Factory's plug-in for Qwen2-VL brings every side up to this."""
_PLACEHOLDERS = ("<image>", "<video>", "<audio>", "<bbox>", "<ref-object>")
"""What these programs take for their own marks wherever it stands."""


@dataclass
class _Job:
    """What every exporter needs."""

    store: ShardStore
    frame: Frame
    files: ImageFiles
    out: Path
    counts: Counter[str]

    def rows(self) -> Iterator[Row]:
        return map(self.store.whole_row, range(self.store.num_rows))

    def write(self, name: str, content: object) -> None:
        (self.out / name).write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def export_data(shards: str, to: str, out: Path, tokenizer: str = "") -> dict[str, int]:
    """Write the turns of these shards for program `to`, with a README.txt that says how to read them. Returns what was counted.

    tokenizer: where it is now, if it has moved. Raises ConfigError (an unknown program, a family that it has not, a folder with files),
    ShardError, ContractError and ImageError.
    """
    if to not in EXPORTERS:
        raise ConfigError("--to", found=repr(to), expected=f"one of {', '.join(EXPORTERS)}")
    store = ShardStore([shards])
    frame = frame_of(store.contract, shards, tokenizer)
    require_empty(out)
    with storage.writing(out):
        out.mkdir(parents=True, exist_ok=True)
        job = _Job(store, frame, ImageFiles(store, out / IMAGES), out, Counter())
        readme = EXPORTERS[to](job)
        if job.files.num_written:
            job.counts["images written"] = job.files.num_written
        counted = "".join(f"  {name}: {count}\n" for name, count in sorted(job.counts.items()))
        (out / "README.txt").write_text(f"{readme.strip()}\n\nFrom {shards} ({frame.family.title}):\n{counted}", encoding="utf-8")
    return dict(job.counts)


def _boxes_in(file: ImageFile, boxes: Any, image: Mapping[str, Any]) -> list[list[float]]:
    """Boxes (N, 4) in pixels of the upright original -> xyxy in pixels of the file, to the thousandth."""
    scale = np.tile(np.array(file.size_wh) / [image["width"], image["height"]], 2)
    return [[round(value, 3) for value in box] for box in (np.array(boxes, float).reshape(-1, 4) * scale).tolist()]


# ---- COCO

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


def _coco(job: _Job) -> str:
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
                for label, box in zip(turn["labels"], _boxes_in(file, turn["boxes"], image), strict=True):
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


# ---- conversations


def _usable_turns(job: _Job, row: Row) -> list[dict[str, Any]]:
    """Turns that can be said in another program's conversation; a dialogue as a whole or not at all."""
    turns: list[dict[str, Any]] = []
    for turn in row["turns"]:
        if not any(mark in text for mark in _PLACEHOLDERS for text in (turn["question"], turn["answer"])):
            turns.append(turn)
            continue
        job.counts["left out: turns whose text holds one of " + " ".join(_PLACEHOLDERS)] += 1
        if row["ordered"]:
            job.counts["left out: turns of such dialogues"] += len(row["turns"]) - 1
            return []
    return turns


def _system(job: _Job, row: Row) -> str | None:
    """The row's system prompt, as its header says it; None where there is none."""
    chat = job.frame.family.chat
    num_images = 0 if row["ordered"] else len(row["images"])
    header = list(row["header_ids"])
    if header == job.frame.header_ids(None, num_images):
        return chat.default_system
    text = job.frame.tokenizer.backend.decode(header, skip_special_tokens=False)
    before, after = chat.header("\0", num_images).split("\0")
    assert text.startswith(before), "a header with a system prompt of its own"
    return text[len(before) : len(text) - len(after)]


def _questions(job: _Job, row: Row, texts: list[str]) -> list[str]:
    """Questions with <image> where the images stand: before the first one, or where a dialogue has them."""
    if row["ordered"]:
        for number in range(len(row["images"])):
            mark = job.frame.family.chat.image_in_question(number + 1)
            place = next((place for place, text in enumerate(texts) if mark in text), None)
            assert place is not None, "a dialogue shows every image it has"
            texts[place] = texts[place].replace(mark, "<image>", 1)
        return texts
    return ["<image>" * len(row["images"]) + texts[0], *texts[1:]]


TEMPLATES = {"qwen2_vl": "qwen2_vl", "qwen2_5_vl": "qwen2_vl", "qwen3_vl": "qwen3_vl_nothink"}
"""LLaMA-Factory's name of the template of each `model_type`; ms-swift finds its own from the model."""


def _require_known(job: _Job, program: str) -> SmartResize:
    """The family's resize, which is one that both programs know. Raises ConfigError for other families."""
    family = job.frame.family
    if family.network.model_type not in TEMPLATES or not isinstance(family.resize, SmartResize):
        raise ConfigError(
            "--to",
            found=f"{program} for shards of {family.title}",
            expected=f"shards of a family that it trains as Boxcar does: {', '.join(TEMPLATES)}",
            fix="Convert for one of them, or export COCO.",
        )
    return family.resize


# ---- LLaMA-Factory

_LLAMA_FACTORY_README = """
LLaMA-Factory (sharegpt), written by `boxcar export-data`.

data.json           one conversation a row of the shards
dataset_info.json   its entry "boxcar"; set dataset_dir to this folder, or copy the entry into yours

Boxes stand in the text as {grid}. LLaMA-Factory changes no number, so train with
the very pixels they were made for:

  dataset: boxcar
  dataset_dir: {out}
  template: {template}
  image_max_pixels: {max_pixels}
  image_min_pixels: {min_pixels}

{frames}
Images are upright: LLaMA-Factory does not apply EXIF, so images that EXIF turns were written anew under images/.
Our own reader reads this back with `reader: sharegpt` and {space}.
"""
_ABSOLUTE_FRAMES = """
Another image_max_pixels (the default is 589824) or image_min_pixels moves every box. LLaMA-Factory resizes large images by a rule of its
own before the processor's: images that it would bring to another size than the boxes are of were written under images/ at the size they
are of, which it leaves as it is ({num} of them).
""".lstrip()
_RELATIVE_FRAMES = """
The numbers are shares of the image and right at every size; with these limits the model also sees as many pixels as in Boxcar, within
LLaMA-Factory's own rounding.
""".lstrip()


def llama_factory_size(size_wh: tuple[int, int], limits: PixelLimits, resize: SmartResize) -> tuple[int, int]:
    """(width, height) that the model sees there: mm_plugin's own resize under image_max_pixels and image_min_pixels, then the processor's
    under the limits of the published checkpoint."""
    width, height = size_wh
    if width * height > limits.max_pixels:
        factor = math.sqrt(limits.max_pixels / (width * height))
        width, height = int(width * factor), int(height * factor)
    if width * height < limits.min_pixels:
        factor = math.sqrt(limits.min_pixels / (width * height))
        width, height = int(width * factor), int(height * factor)
    if min(width, height) < LEAST_SIDE_PX:
        width, height = max(width, LEAST_SIDE_PX), max(height, LEAST_SIDE_PX)
    if width / height > 200:
        width = height * 180
    if height / width > 200:
        height = width * 180
    published = resize.published_limits
    sizes = resize(width, height, published.min_pixels, published.max_pixels)
    return int(sizes.width), int(sizes.height)


def _llama_factory(job: _Job) -> str:
    resize, limits = _require_known(job, "llama-factory"), job.frame.limits
    absolute = isinstance(job.frame.family.grid, ResizedPixelGrid)
    conversations = []
    num_resized = 0
    for row in job.rows():
        paths = []
        for image in row["images"]:
            seen = image["resized_width"], image["resized_height"]
            file = job.files.find(image, row["folder"])
            if absolute and llama_factory_size(file.size_wh, limits, resize) != seen:
                if llama_factory_size(seen, limits, resize) != seen:
                    job.counts["left out: rows with an image that LLaMA-Factory resizes otherwise, whatever its size"] += 1
                    break
                before = job.files.num_written
                file = job.files.find(image, row["folder"], resized=True)
                num_resized += job.files.num_written - before
            paths.append(file.path)
        turns = _usable_turns(job, row) if len(paths) == len(row["images"]) else []
        if not turns:
            continue
        questions = _questions(job, row, [turn["question"] for turn in turns])
        messages = [
            {"role": role, "content": text}
            for question, turn in zip(questions, turns, strict=True)
            for role, text in (("user", question), ("assistant", turn["answer"]))
        ]
        entry: dict[str, Any] = {"id": row["sample_id"], "messages": messages, "images": paths}
        if (system := _system(job, row)) is not None:
            entry["system"] = system
        conversations.append(entry)
        job.counts.update({"conversations": 1, "turns": len(turns)})
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    columns = {
        "messages": "messages",
        "images": "images",
        **({"system": "system"} if any("system" in one for one in conversations) else {}),
    }
    job.write("data.json", conversations)
    job.write("dataset_info.json", {"boxcar": {"file_name": "data.json", "formatting": "sharegpt", "columns": columns, "tags": tags}})
    family = job.frame.family
    limits_text = (
        f" (box_space_family: {family.name}, box_space_min_pixels: {limits.min_pixels}, box_space_max_pixels: {limits.max_pixels})"
    )
    return _LLAMA_FACTORY_README.format(
        grid=family.grid.description,
        out=job.out.absolute(),
        template=TEMPLATES[family.network.model_type],
        max_pixels=limits.max_pixels,
        min_pixels=limits.min_pixels,
        frames=_ABSOLUTE_FRAMES.format(num=num_resized) if absolute else _RELATIVE_FRAMES,
        space=f"`box_space: resized`{limits_text}" if absolute else "`box_space: per_mille`",
    )


# ---- ms-swift

_SWIFT_README = """
ms-swift (standard format with objects), written by `boxcar export-data`.

data.jsonl   one conversation a row of the shards: messages with <image>{marks}, and objects

Boxes: objects.bbox is [x0, y0, x1, y1] in pixels of the image file (bbox_type "real"). ms-swift turns them into what the model writes,
from the size of the file and the size that it resizes it to, so do not scale them yourself. Train with the pixels of the shards:

  {environment}MIN_PIXELS={min_pixels} MAX_PIXELS={max_pixels} swift sft --dataset {out}/data.jsonl ...

{form}
Images are upright: ms-swift does not apply EXIF, so images that EXIF turns were written anew under images/.
Our own reader reads this back with `reader: ms_swift`{reader}.
"""
_SWIFT_FORMS = {
    "json": (
        " and <bbox>",
        "QWENVL_BBOX_FORMAT=new ",
        "QWENVL_BBOX_FORMAT=new makes <bbox> the list [x0, y0, x1, y1] that stands in this family's JSON; the default would write "
        "Qwen2-VL's tags there.\nLabels are text within the JSON, with its escapes.",
        ": boxes without labels, since those stand in the text",
    ),
    "tags": (", <ref-object> and <bbox>", "", "ms-swift's default form of <ref-object> and <bbox> are this family's own tags.", ""),
}
_JSON_BOX = re.compile(r'(?<="bbox_2d": )\[[0-9]+, [0-9]+, [0-9]+, [0-9]+\]')


def _swift(job: _Job) -> str:
    _require_known(job, "ms-swift")
    box_text = job.frame.family.box_text
    mark = partial(_mark_tags, box_text) if isinstance(box_text, TaggedBoxText) else _mark_json
    with (job.out / "data.jsonl").open("w", encoding="utf-8") as stream:
        for row in job.rows():
            if (entry := _swift_row(job, row, mark)) is not None:
                stream.write(json.dumps(entry, ensure_ascii=False) + "\n")
    marks, environment, form, reader = _SWIFT_FORMS[box_text.form]
    limits = job.frame.limits
    return _SWIFT_README.format(
        marks=marks,
        environment=environment,
        min_pixels=limits.min_pixels,
        max_pixels=limits.max_pixels,
        out=job.out.absolute(),
        form=form,
        reader=reader,
    )


_Mark = Callable[[str], tuple[str, list[str], int]]
"""Text -> text with marks, the labels of its <ref-object>, how many <bbox>."""


def _mark_json(text: str) -> tuple[str, list[str], int]:
    marked, num = _JSON_BOX.subn("<bbox>", text)
    return marked, [], num


def _mark_tags(form: TaggedBoxText, text: str) -> tuple[str, list[str], int]:
    refs: list[str] = []
    number = "[0-9]+"
    box = rf"{re.escape(form.box_open)}\({number},{number}\),\({number},{number}\){re.escape(form.box_close)}"
    marked, num = re.subn(box, "<bbox>", text)

    def keep(found: re.Match[str]) -> str:
        refs.append(found[1])
        return "<ref-object>"

    return re.sub(f"{re.escape(form.ref_open)}(.*?){re.escape(form.ref_close)}", keep, marked, flags=re.DOTALL), refs, num


def _swift_row(job: _Job, row: Row, mark: _Mark) -> dict[str, Any] | None:
    files = [job.files.find(image, row["folder"]) for image in row["images"]]
    messages: list[dict[str, str]] = []
    refs: list[str] = []
    bbox: list[list[float]] = []
    image_ids: list[int] = []
    if (system := _system(job, row)) is not None:
        messages.append({"role": "system", "content": system})
    questions, answers = [], []
    for turn in _usable_turns(job, row):
        question, question_refs, num_asked = mark(turn["question"])
        answer, answer_refs, num_answered = mark(turn["answer"])
        several = turn["image_index"] < 0 and len(files) > 1 and turn["boxes"]
        if num_asked + num_answered != len(turn["boxes"]) or several:
            reason = "whose boxes lie in several images" if several else "whose text does not show its boxes one by one"
            job.counts[f"left out: turns {reason}"] += 1
            if row["ordered"]:
                return None
            continue
        place = max(0, turn["image_index"])
        if turn["boxes"]:
            bbox += _boxes_in(files[place], turn["boxes"], row["images"][place])
            image_ids += [place] * len(turn["boxes"])
        refs += question_refs + answer_refs
        questions.append(question)
        answers.append(answer)
    if not questions:
        return None
    for question, answer in zip(_questions(job, row, questions), answers, strict=True):
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    job.counts.update({"conversations": 1, "turns": len(questions), "boxes": len(bbox)})
    entry: dict[str, Any] = {"id": row["sample_id"], "messages": messages, "images": [file.path for file in files]}
    if bbox or refs:
        entry["objects"] = {"ref": refs, "bbox": bbox, "bbox_type": "real", **({"image_id": image_ids} if len(files) > 1 else {})}
    return entry


EXPORTERS: dict[str, Callable[[_Job], str]] = {"coco": _coco, "llama-factory": _llama_factory, "ms-swift": _swift}
"""Each writes its files and returns the text of README.txt."""
