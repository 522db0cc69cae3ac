"""`boxcar export-data --to llama-factory`: boxes stand in the text, exactly as in the shards; LLaMA-Factory changes no numbers.

LLaMA-Factory shrinks an image over `image_max_pixels` by whole pixels (int) before the processor *rounds* to its grid, where the family's
own rule floors: a 1920 x 1080 image under 262144 px becomes 672 x 392 there and 672 x 364 here. Where a family counts in pixels of the
resized image, such an image is written at the size that the numbers are of, which both leave as it is.
"""

from typing import Any

from boxcar.pipelines.audit.consumers import llama_factory_size
from boxcar.pipelines.families.patches import PixelLimits, ResizeRule
from boxcar.tools.exporting.conversation import Job, questions_with_images, require_known_family, usable_turns
from boxcar.train.data.messages import system_prompt

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


def size_seen_there(size_wh: tuple[int, int], limits: PixelLimits, resize: ResizeRule) -> tuple[int, int]:
    """(width, height) that the model sees: LLaMA-Factory's own resize under image_max_pixels and image_min_pixels, then the processor's
    under the limits of the published checkpoint."""
    width, height = llama_factory_size(*size_wh, limits.max_pixels, limits.min_pixels)
    published = resize.published_limits
    sizes = resize(width, height, published.min_pixels, published.max_pixels)
    return int(sizes.width), int(sizes.height)


def write_llama_factory(job: Job) -> str:
    require_known_family(job, "llama-factory")
    family, limits = job.frame.family, job.frame.limits
    resize, absolute = family.resize, family.grid.needs_resized_size
    conversations = []
    num_resized = 0
    for row in job.rows():
        paths = []
        for image in row["images"]:
            seen = image["resized_width"], image["resized_height"]
            file = job.files.find(image, row["folder"])
            if absolute and size_seen_there(file.size_wh, limits, resize) != seen:
                if size_seen_there(seen, limits, resize) != seen:
                    job.counts["left out: rows with an image that LLaMA-Factory resizes otherwise, whatever its size"] += 1
                    break
                before = job.files.num_written
                file = job.files.find(image, row["folder"], resized=True)
                num_resized += job.files.num_written - before
            paths.append(file.path)
        turns = usable_turns(job, row) if len(paths) == len(row["images"]) else []
        if not turns:
            continue
        questions = questions_with_images(job, row, [turn["question"] for turn in turns])
        messages = [
            {"role": role, "content": text}
            for question, turn in zip(questions, turns, strict=True)
            for role, text in (("user", question), ("assistant", turn["answer"]))
        ]
        entry: dict[str, Any] = {"id": row["sample_id"], "messages": messages, "images": paths}
        if (system := system_prompt(job.frame, row)) is not None:
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
    limits_text = (
        f" (box_space_family: {family.name}, box_space_min_pixels: {limits.min_pixels}, box_space_max_pixels: {limits.max_pixels})"
    )
    return _LLAMA_FACTORY_README.format(
        grid=family.grid.description,
        out=job.out.absolute(),
        template=family.llama_factory_template,
        max_pixels=limits.max_pixels,
        min_pixels=limits.min_pixels,
        frames=_ABSOLUTE_FRAMES.format(num=num_resized) if absolute else _RELATIVE_FRAMES,
        space=f"`box_space: resized`{limits_text}" if absolute else "`box_space: per_mille`",
    )
