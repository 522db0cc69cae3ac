"""COCO instances, with captions joined by image.

| what       | convention                                                                                              |
|------------|---------------------------------------------------------------------------------------------------------|
| structure  | images [id, file_name, width, height], annotations [image_id, category_id, bbox, iscrowd], categories    |
| bbox       | [x, y, width, height], absolute pixels, float, 0-based                                                   |
| vocabulary | closed: every category is annotated in every image, unless `exhaustive: false`; by default only those    |
|            | that have a box somewhere in the file                                                                    |
| sizes      | width, height in pixels; None where missing, 0 or NaN                                                    |

Traps and what is done: category ids are sparse (looked up, never counted) · ids are numbers here and text there (7 and "7" are one id) ·
crowd regions are RLE, one box around many (flagged) · `ignore` (flagged difficult) · flags as true, 1.0 or null (read) · user-made files
lack width, height, segmentation, area or ids (optional) · an annotation of an unknown category or image (rejected alone) · an annotation
that cannot be read (rejected alone; its label counts neither as complete nor as absent in its image; where not even the image can be
read, nothing is taken as absent in the whole file) · duplicate image ids (the first stays) · one category id with two names (an error:
nobody knows which is meant) · NaN, which Python's json writes (read; a later rule drops the box) · files of many gigabytes
(`pipelines.readers.shared.coco_index`).
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path, PurePosixPath

from boxcar.pipelines.readers.reader import COMMON_KEYS, SourcePlan, Unit
from boxcar.pipelines.readers.shared.coco_rows import (
    broken_labels,
    image_ref,
    images_of,
    plan_index,
    read_index,
    refused_image,
    regions_of,
    unknown_categories,
)
from boxcar.schemas.record import Record, Rejected
from boxcar.schemas.workflow import SourceConfig


class CocoReader:
    """COCO instances."""

    name = "coco"
    uses = COMMON_KEYS | {"captions", "exhaustive"}

    def plan(self, config: SourceConfig, work_dir: Path, records_per_unit: int) -> SourcePlan:
        plan = plan_index(config.annotations, config.captions, work_dir, records_per_unit, with_regions=True)
        if PurePosixPath(config.annotations).name.startswith("stuff_"):
            note = "a file of COCO-Stuff: its boxes lie around regions such as sky or grass, one for each image and category"
            plan = replace(plan, notes=(*plan.notes, note))
        unused = read_index(plan.units[0].path).unused_categories if not plan.unlabelled else []
        if config.exhaustive is not None or not unused:
            return plan
        names = ", ".join(repr(name) for name in unused[:5]) + (", ..." if len(unused) > 5 else "")
        note = f"{len(unused)} categories have no box in the file and are never asked for as absent ({names}); if they were looked for: "
        note += "exhaustive: true"
        return replace(plan, notes=(*plan.notes, note))

    def read(self, config: SourceConfig, unit: Unit) -> Iterator[Record | Rejected]:
        index = read_index(unit.path)
        labels = {str(key): name for key, name in index.categories}
        is_closed = config.exhaustive is not False and index.is_exhaustive
        # A category that is never annotated may be no category at all (Roboflow's exports put a heading first).
        unsure = set() if config.exhaustive else set(index.unused_categories)
        vocabulary = tuple(sorted(set(labels.values()) - unsure)) if is_closed else ()
        duplicates = set(index.duplicate_images)
        for entry in images_of(unit.path, index, unit.start, unit.stop):
            yield from unknown_categories(index, entry, labels)
            if rejected := refused_image(index, entry, duplicates):
                yield rejected
                continue
            broken = broken_labels(entry, labels)
            yield Record(
                record_id=entry.image_id,
                position=f"{index.source_name}, image {entry.image_id}",
                images=(image_ref(entry),),
                regions=regions_of(entry, labels),
                captions=tuple(entry.captions),
                vocabulary=tuple(label for label in vocabulary if label not in broken) if broken else vocabulary,
                not_exhaustive=broken,
                language=config.language,
                split=config.split,
            )
