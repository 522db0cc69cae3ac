"""COCO instances, with captions joined by image.

| what       | convention                                                                                              |
|------------|---------------------------------------------------------------------------------------------------------|
| structure  | images [id, file_name, width, height], annotations [image_id, category_id, bbox, iscrowd], categories    |
| bbox       | [x, y, width, height], absolute pixels, float, 0-based                                                   |
| vocabulary | closed: every category is annotated in every image, unless `exhaustive: false`                           |

Traps and what is done: category ids are sparse (looked up, never counted) · crowd regions are RLE, one box around many (flagged) ·
`ignore` (flagged difficult) · user-made files lack width, height, segmentation or area (optional) · an annotation of an unknown category
or image, or one that cannot be read (rejected alone; its label counts as incomplete in its image) · duplicate image ids (the first
stays) · NaN, which Python's json writes (read; a later rule drops the box) · files of many gigabytes (`pipelines.coco_index`).
"""

from collections.abc import Iterator
from pathlib import Path

from pipelines.coco_rows import broken_labels, image_ref, images_of, plan_index, read_index, refused_image, regions_of, unknown_categories
from pipelines.readers.reader import COMMON_KEYS, SourcePlan, Unit
from schemas.record import Record, Rejected
from schemas.workflow import SourceConfig


class CocoReader:
    """COCO instances."""

    name = "coco"
    uses = COMMON_KEYS | {"captions", "exhaustive"}

    def plan(self, config: SourceConfig, work_dir: Path, records_per_unit: int) -> SourcePlan:
        return plan_index(config.annotations, config.captions, work_dir, records_per_unit, with_regions=True)

    def read(self, config: SourceConfig, unit: Unit) -> Iterator[Record | Rejected]:
        index = read_index(unit.path)
        labels = {str(key): name for key, name in index.categories}
        vocabulary = tuple(sorted(labels.values())) if config.exhaustive in (None, True) else ()
        duplicates = set(index.duplicate_images)
        for entry in images_of(unit.path, index, unit.start, unit.stop):
            yield from unknown_categories(index, entry, labels)
            if rejected := refused_image(index, entry, duplicates):
                yield rejected
                continue
            yield Record(
                record_id=entry.image_id,
                position=f"{index.source_name}, image {entry.image_id}",
                images=(image_ref(entry),),
                regions=regions_of(entry, labels),
                captions=tuple(entry.captions),
                vocabulary=vocabulary,
                not_exhaustive=broken_labels(entry, labels),
                language=config.language,
                split=config.split,
            )
