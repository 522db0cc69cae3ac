"""Boxcar's own form: JSON lines (or a JSON list) that can say whatever a Record can hold.

    {"id": "7", "image": "a.jpg",
     "regions": [{"box": [10, 20, 110, 220], "label": "dog", "phrases": ["the dog on the left"]}],
     "captions": ["Two dogs on a beach."],
     "dialogue": [{"question": "<image>Where is the dog?", "answer": "It is here: <box:0|dog>."}],
     "absent": ["cat"]}

    key              what                                                                                       if missing
    id               the row's own id, text or integer                                                          a hash of the row
    image, images    one image, or a list: a path, or {"path", "width", "height"} in pixels                     no image
    regions          [{"box": [x0, y0, x1, y1], "label", "phrases": [..], "image": 0, "crowd", "difficult", "id"}]  none
    captions         texts about the whole image                                                                none
    dialogue         [{"question", "answer"}], kept in order                                                    none
    absent           labels or phrases verified to be absent                                                    none
    vocabulary       the closed list of labels annotated exhaustively here                                      open
    not_exhaustive   labels with possibly more objects than boxes                                               none
    box_space        pixels, relative, per_mille or resized (with the workflow's `box_space_...`)               the workflow's; pixels
    language, split  of this row; with `split` in the workflow, rows of another split are left out              the workflow's
    system           the dialogue's system prompt; "" is an empty one                                           the family's

In a dialogue `<image>` stands for the next image, and `<box:0>`, or `<box:0,2|two dogs>` with a phrase, for the boxes of these regions,
counted from 0; they must lie in one image. There is no other mark: numbers and tags of any family are text. A region with neither label
nor phrases makes no turn of its own.

Traps, and what is done: an unknown key is refused with its name, for a misspelt key that is ignored loses what it says; numbers of the
wrong count or type, indices of no region or image, images under both keys and a dialogue whose markers are not as many as its images are
refused too. `null` is as good as a missing key, as data frames write it.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from boxcar.pipelines.readers.reader import COMMON_KEYS, Refused, SourcePlan, Unit
from boxcar.pipelines.readers.shared.marked_text import (
    BAD_IMAGE_PATH,
    BOX_SPACE_KEYS,
    MALFORMED_BOX,
    Marks,
    Place,
    compile_forms,
    image_refs,
    make_turn,
    plan_rows,
    read_rows,
    space_of_kind,
    split_text,
)
from boxcar.schemas.record import Box, BoxMark, BoxSpaceKind, DialogueTurn, ImageRef, Record, Region, Rejected, TextPart
from boxcar.schemas.workflow import SourceConfig

UNKNOWN_IMAGE = "unknown_image"
UNKNOWN_REGION = "unknown_region"

_PATTERN = compile_forms("image", starts="<", box=r"<box:[0-9]+(?>(?:,[0-9]+)*)(?:\|[^>]*+)?>", stray_box=r"<box:")

_Pixels = Annotated[int, msgspec.Meta(gt=0)]
_Index = Annotated[int, msgspec.Meta(ge=0)]


class _Image(msgspec.Struct, forbid_unknown_fields=True):
    path: str
    width: _Pixels | None = None
    height: _Pixels | None = None


class _Region(msgspec.Struct, forbid_unknown_fields=True):
    box: Box
    label: str = ""
    phrases: tuple[str, ...] = ()
    image: _Index = 0
    crowd: bool = False
    difficult: bool = False
    id: str | int = ""


class _Turn(msgspec.Struct, forbid_unknown_fields=True):
    question: str
    answer: str


class _Row(msgspec.Struct, forbid_unknown_fields=True):
    id: str | int | None = None
    image: str | _Image | None = None
    images: list[str | _Image] | None = None
    regions: tuple[_Region, ...] | None = None
    captions: tuple[str, ...] | None = None
    dialogue: tuple[_Turn, ...] | None = None
    absent: tuple[str, ...] | None = None
    vocabulary: tuple[str, ...] | None = None
    not_exhaustive: tuple[str, ...] | None = None
    box_space: BoxSpaceKind | None = None
    language: Literal["en", "zh"] | None = None
    split: str | None = None
    system: str | None = None


class JsonlReader:
    name = "jsonl"
    uses = COMMON_KEYS | BOX_SPACE_KEYS

    def plan(self, config: SourceConfig, work_dir: Path, records_per_unit: int) -> SourcePlan:
        return plan_rows(config, records_per_unit)

    def read(self, config: SourceConfig, unit: Unit) -> Iterator[Record | Rejected]:
        return read_rows(unit, _Row, partial(_record, config))


def _record(config: SourceConfig, row: _Row, place: Place) -> Record | None:
    if config.split and row.split and row.split != config.split:
        return None
    images = _images(row)
    regions = tuple(_region(number, region, len(images)) for number, region in enumerate(row.regions or ()))
    space = space_of_kind(row.box_space or config.box_space or "pixels", config)
    return Record(
        record_id=place.record_id,
        position=place.position,
        images=images,
        regions=regions,
        captions=row.captions or (),
        dialogue=_dialogue(row.dialogue or (), regions, Marks(len(images), space)),
        box_space=space,
        absent=row.absent or (),
        vocabulary=row.vocabulary or (),
        not_exhaustive=row.not_exhaustive or (),
        language=row.language or config.language,
        split=row.split or config.split,
        system=row.system,
    )


def _images(row: _Row) -> tuple[ImageRef, ...]:
    if row.image is not None and row.images is not None:
        raise Refused(BAD_IMAGE_PATH, "found both `image` and `images`, expected one of them")
    images = row.images or ([row.image] if row.image is not None else [])
    named = [_Image(image) if isinstance(image, str) else image for image in images]
    image_refs([image.path for image in named])
    return tuple(ImageRef(image.path, image.width, image.height) for image in named)


def _region(number: int, region: _Region, num_images: int) -> Region:
    if region.image >= num_images:
        raise Refused(UNKNOWN_IMAGE, f"found image {region.image} in region {number}, expected an index below {num_images}")
    return Region(
        box=region.box,
        label=region.label,
        phrases=region.phrases,
        image_index=region.image,
        is_crowd=region.crowd,
        is_difficult=region.difficult,
        region_id=str(region.id),
    )


def _dialogue(turns: Sequence[_Turn], regions: Sequence[Region], marks: Marks) -> tuple[DialogueTurn, ...]:
    if not turns:
        return ()

    def parse(form: str, found: str) -> Sequence[TextPart]:
        return (marks.image(),) if form == "image" else (_box_mark(found, regions),)

    made = tuple(make_turn(split_text(turn.question, _PATTERN, parse), split_text(turn.answer, _PATTERN, parse)) for turn in turns)
    marks.check_images()
    return made


def _box_mark(found: str, regions: Sequence[Region]) -> BoxMark:
    numbers, _, label = found.removeprefix("<box:").removesuffix(">").partition("|")
    if not numbers:
        raise Refused(MALFORMED_BOX, f"found {found!r} without region numbers, expected <box:0> or <box:0,1|phrase>")
    indices = [int(number) for number in numbers.split(",")]
    if max(indices) >= len(regions):
        raise Refused(UNKNOWN_REGION, f"found {found!r}, expected region numbers below {len(regions)}")
    image_indices = {regions[index].image_index for index in indices}
    if len(image_indices) > 1:
        raise Refused(MALFORMED_BOX, f"found {found!r}, whose regions lie in several images; expected a mark for each image")
    return BoxMark(tuple(regions[index].box for index in indices), label, image_indices.pop())
