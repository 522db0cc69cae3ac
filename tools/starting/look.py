"""A first look at a source: how many records, how large its images are, how many are missing. Needs no tokenizer."""

import itertools
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from boxcar.pipelines.convert import images_root
from boxcar.pipelines.images.image_file import read_header
from boxcar.pipelines.readers.catalog import find_reader
from boxcar.pipelines.storage import join
from boxcar.schemas.errors import ImageError
from boxcar.schemas.record import Record
from boxcar.schemas.workflow import SourceConfig
from boxcar.tools.starting.sniff import Found

MAX_RECORDS = 500
"""Whose images are looked at."""
RECORDS_PER_UNIT = 4096


@dataclass(frozen=True)
class Look:
    """What a source holds."""

    num_records: int | None
    """None where the format does not know it before all is read."""
    num_looked_at: int
    num_regions: int
    """Of those that were looked at."""
    num_rejected: int
    rejection: str
    """The most frequent reason, with an example."""
    sizes_wh: tuple[tuple[int, int], ...]
    """Of the images that were opened, in pixels, sorted by area."""
    num_missing: int
    missing: str
    """An example."""
    notes: tuple[str, ...]
    """The reader's own, such as how it understood the source."""


def source_config(found: Found) -> SourceConfig:
    """The part of a convert section that says what is read and how."""
    images = {} if found.images is None else {"images": str(found.images)}
    return SourceConfig.model_validate(
        {"reader": found.reader, "annotations": str(found.path), "split": found.split, **images, **found.keys}
    )


def look(found: Found) -> Look:
    """Read the first records of a source, and the headers of their images. Raises AnnotationError where it cannot be read as a whole."""
    config, reader = source_config(found), find_reader(found.reader)
    with tempfile.TemporaryDirectory(prefix="boxcar-init-") as scratch:
        plan = reader.plan(config, Path(scratch), RECORDS_PER_UNIT)
        first = list(itertools.islice((entry for unit in plan.units for entry in reader.read(config, unit)), MAX_RECORDS))
    records = [entry for entry in first if isinstance(entry, Record)]
    reasons = Counter(entry.reason for entry in first if not isinstance(entry, Record))
    rejection = ""
    if reasons:
        reason = reasons.most_common(1)[0][0]
        example = next(entry for entry in first if not isinstance(entry, Record) and entry.reason == reason)
        rejection = f"{reason}, as in {example.position}: {example.detail}"
    sizes, missing = [], []
    root = images_root(config)
    for record in records:
        for image in record.images:
            try:
                header = read_header(join(root, image.path))
            except ImageError as error:
                missing.append(str(error))
            else:
                sizes.append((header.width, header.height))
    return Look(
        plan.num_records,
        len(first),
        sum(len(record.regions) for record in records),
        reasons.total(),
        rejection,
        tuple(sorted(sizes, key=lambda size: size[0] * size[1])),
        len(missing),
        missing[0] if missing else "",
        plan.notes,
    )
