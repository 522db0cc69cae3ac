"""`boxcar export-data --to ms-swift`: objects.bbox is xyxy in pixels of the image file; ms-swift turns it into the model's numbers.

Checked against ms-swift swift/llm/template/{base,template/qwen}.py (2025).
"""

import json
import re
from typing import Any

from boxcar.pipelines.families.box_text import BoxText
from boxcar.tools.exporting.conversation import Job, boxes_in_file, questions_with_images, require_known_family, usable_turns
from boxcar.train.data.messages import system_prompt
from boxcar.train.data.store import Row

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


def write_ms_swift(job: Job) -> str:
    require_known_family(job, "ms-swift")
    box_text = job.frame.family.box_text
    with (job.out / "data.jsonl").open("w", encoding="utf-8") as stream:
        for row in job.rows():
            if (entry := _swift_row(job, row)) is not None:
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


def _marked(text: str, form: BoxText) -> tuple[str, list[str], int]:
    """Text -> text with marks, the labels of its <ref-object>, how many <bbox>."""
    marked, num = re.subn(form.box_pattern, "<bbox>", text)
    refs: list[str] = []

    def keep(found: re.Match[str]) -> str:
        refs.append(found[1])
        return "<ref-object>"

    if form.label_pattern is not None:
        marked = re.sub(form.label_pattern, keep, marked, flags=re.DOTALL)
    return marked, refs, num


def _swift_row(job: Job, row: Row) -> dict[str, Any] | None:
    form = job.frame.family.box_text
    files = [job.files.find(image, row["folder"]) for image in row["images"]]
    messages: list[dict[str, str]] = []
    refs: list[str] = []
    bbox: list[list[float]] = []
    image_ids: list[int] = []
    if (system := system_prompt(job.frame, row)) is not None:
        messages.append({"role": "system", "content": system})
    questions, answers = [], []
    for turn in usable_turns(job, row):
        question, question_refs, num_asked = _marked(turn["question"], form)
        answer, answer_refs, num_answered = _marked(turn["answer"], form)
        several = turn["image_index"] < 0 and len(files) > 1 and turn["boxes"]
        if num_asked + num_answered != len(turn["boxes"]) or several:
            reason = "whose boxes lie in several images" if several else "whose text does not show its boxes one by one"
            job.counts[f"left out: turns {reason}"] += 1
            if row["ordered"]:
                return None
            continue
        place = max(0, turn["image_index"])
        if turn["boxes"]:
            bbox += boxes_in_file(files[place], turn["boxes"], row["images"][place])
            image_ids += [place] * len(turn["boxes"])
        refs += question_refs + answer_refs
        questions.append(question)
        answers.append(answer)
    if not questions:
        return None
    for question, answer in zip(questions_with_images(job, row, questions), answers, strict=True):
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    job.counts.update({"conversations": 1, "turns": len(questions), "boxes": len(bbox)})
    entry: dict[str, Any] = {"id": row["sample_id"], "messages": messages, "images": [file.path for file in files]}
    if bbox or refs:
        entry["objects"] = {"ref": refs, "bbox": bbox, "bbox_type": "real", **({"image_id": image_ids} if len(files) > 1 else {})}
    return entry
