"""COCO captions alone: images with what people wrote about them, no boxes.

| what      | convention                                                        |
|-----------|-------------------------------------------------------------------|
| structure | images [id, file_name, width, height], annotations [image_id, caption] |

Where there are instances too, use `reader: coco` with `captions:`; both then stand in one row and the image is paid for once.
Traps: see `coco.py`. An image without a caption gives no turn and is rejected as such, with its count.
"""

from collections.abc import Iterator
from pathlib import Path

from boxcar.pipelines.readers.reader import COMMON_KEYS, SourcePlan, Unit
from boxcar.pipelines.readers.shared.coco_rows import image_ref, images_of, plan_index, read_index, refused_image
from boxcar.schemas.record import Record, Rejected
from boxcar.schemas.workflow import SourceConfig


class CocoCaptionsReader:
    """COCO captions."""

    name = "coco_captions"
    uses = COMMON_KEYS

    def plan(self, config: SourceConfig, work_dir: Path, records_per_unit: int) -> SourcePlan:
        return plan_index(config.annotations, None, work_dir, records_per_unit, with_regions=False)

    def read(self, config: SourceConfig, unit: Unit) -> Iterator[Record | Rejected]:
        index = read_index(unit.path)
        duplicates = set(index.duplicate_images)
        for entry in images_of(unit.path, index, unit.start, unit.stop):
            if rejected := refused_image(index, entry, duplicates):
                yield rejected
                continue
            yield Record(
                record_id=entry.image_id,
                position=f"{index.source_name}, image {entry.image_id}",
                images=(image_ref(entry),),
                captions=tuple(entry.captions),
                language=config.language,
                split=config.split,
            )
