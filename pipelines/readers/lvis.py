"""LVIS: COCO's structure with 1,203 categories, annotated federally.

| what       | convention                                                                                             |
|------------|--------------------------------------------------------------------------------------------------------|
| structure  | as COCO; images have a coco_url instead of file_name                                                     |
| bbox       | [x, y, width, height], absolute pixels, float, 0-based                                                   |
| vocabulary | open: of each image only some categories were checked. neg_category_ids are verified absent,             |
|            | not_exhaustive_category_ids may have more objects than boxes                                             |

The file name is the last two parts of coco_url ("train2017/000000123456.jpg"): LVIS takes images from both folders of COCO, so `images`
is the folder above them. Other traps: see `coco.py`.
"""

from collections.abc import Iterator
from pathlib import Path

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


class LvisReader:
    """LVIS instances."""

    name = "lvis"
    uses = COMMON_KEYS | {"captions"}

    def plan(self, config: SourceConfig, work_dir: Path, records_per_unit: int) -> SourcePlan:
        return plan_index(config.annotations, config.captions, work_dir, records_per_unit, with_regions=True)

    def read(self, config: SourceConfig, unit: Unit) -> Iterator[Record | Rejected]:
        index = read_index(unit.path)
        # LVIS writes names with underscores and disambiguations: "stop_sign", "crab_(animal)".
        labels = {str(key): name.replace("_", " ") for key, name in index.categories}
        duplicates = set(index.duplicate_images)
        for entry in images_of(unit.path, index, unit.start, unit.stop):
            yield from unknown_categories(index, entry, labels)
            if rejected := refused_image(index, entry, duplicates):
                yield rejected
                continue
            broken = broken_labels(entry, labels)
            open_labels = [labels[key] for key in entry.not_exhaustive if key in labels]
            absent = [labels[key] for key in entry.negative if key in labels]
            yield Record(
                record_id=entry.image_id,
                position=f"{index.source_name}, image {entry.image_id}",
                images=(image_ref(entry),),
                regions=regions_of(entry, labels),
                captions=tuple(entry.captions),
                absent=tuple(label for label in absent if label not in broken),
                not_exhaustive=(*open_labels, *broken),
                language=config.language,
                split=config.split,
            )
