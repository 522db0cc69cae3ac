"""What a reader yields: one annotated sample, before any model family is known.

Boxes stay in the space in which the source wrote them (`BoxSpace`) until the image's size is known from its header; `pipelines.boxes.rules`
then turns them into pixels of the upright original image. Nothing here opens an image or knows a tokenizer.

The types are msgspec structs: immutable, compared by value, and several times cheaper to make than dataclasses, which counts at ten
million records.
"""

from typing import Literal

import msgspec

Language = Literal["en", "zh"]
BoxSpaceKind = Literal["pixels", "relative", "per_mille", "resized"]


class BoxSpace(msgspec.Struct, frozen=True):
    """The space in which a source wrote its boxes. All are xyxy, x to the right, y down.

    pixels     pixels of the original image, 0-based, half-open: [0, width] x [0, height]
    relative   fractions of the image's width and height, [0, 1]
    per_mille  thousandths of the width and height, [0, 1000]
    resized    pixels of the image after `family`'s resize with these pixel limits, 0 for the published one (Qwen2.5-VL's own form)
    """

    kind: BoxSpaceKind = "pixels"
    family: str = ""
    min_pixels: int = 0
    max_pixels: int = 0


PIXELS = BoxSpace("pixels")
RELATIVE = BoxSpace("relative")
PER_MILLE = BoxSpace("per_mille")

Box = tuple[float, float, float, float]
"""(x0, y0, x1, y1) in the record's BoxSpace."""


class ImageRef(msgspec.Struct, frozen=True):
    """An image as the source names it. `path` is relative to the workflow's `images` root, absolute, or a URI."""

    path: str
    declared_width: int | None = None
    """Pixels, as the annotation says; None where it says nothing. Checked against the file's header."""
    declared_height: int | None = None


class Region(msgspec.Struct, frozen=True):
    """One annotated box."""

    box: Box
    label: str
    """Category name, or "" where the source gives phrases only."""
    phrases: tuple[str, ...] = ()
    """Referring expressions of this very box. Regions of one image that share a phrase are all its boxes."""
    image_index: int = 0
    is_crowd: bool = False
    """One box around many objects (COCO iscrowd, Open Images IsGroupOf)."""
    is_difficult: bool = False
    """Pascal VOC difficult, or marked 'ignore' by the source."""
    region_id: str = ""
    """The source's own id, for messages: "annotation 4131"."""


class ImageMark(msgspec.Struct, frozen=True):
    """The place of an image inside a dialogue's text."""

    image_index: int


class BoxMark(msgspec.Struct, frozen=True):
    """Boxes inside a dialogue's text, with the phrase they ground ("" where there is none)."""

    boxes: tuple[Box, ...]
    label: str = ""
    image_index: int = 0


TextPart = str | ImageMark | BoxMark


class DialogueTurn(msgspec.Struct, frozen=True):
    """One question and its answer, as text with images and boxes in their places."""

    question: tuple[TextPart, ...]
    answer: tuple[TextPart, ...]


class Record(msgspec.Struct, frozen=True):
    """One sample of a source: its images and all that is known about them."""

    record_id: str
    """The record's own id within its source: stable, and not its position in the file."""
    position: str
    """Where it stands, for people: "instances.json, image 139"."""
    images: tuple[ImageRef, ...]
    regions: tuple[Region, ...] = ()
    captions: tuple[str, ...] = ()
    dialogue: tuple[DialogueTurn, ...] = ()
    box_space: BoxSpace = PIXELS
    absent: tuple[str, ...] = ()
    """Labels or phrases verified to be absent from the image (LVIS negatives, gRefCOCO no-target)."""
    vocabulary: tuple[str, ...] = ()
    """The closed vocabulary that was annotated exhaustively here: a label in it without a region is verified absent. () where open."""
    not_exhaustive: tuple[str, ...] = ()
    """Labels with possibly more objects than boxes: never asked for as 'all of them'."""
    language: Language = "en"
    """Of labels, phrases and captions."""
    split: str = ""
    system: str | None = None
    """The dialogue's own system prompt; None: the family's default."""


class Rejected(msgspec.Struct, frozen=True):
    """A record that cannot be used, with its reason. Kept in the quarantine file and counted in the manifest."""

    reason: str
    """One word from the closed list of its room, such as "unknown_category": the key it is counted under."""
    position: str
    """Where it stands: file, record, byte offset."""
    detail: str
    """What was found and what was expected."""
    record_id: str = ""
    source_text: str = ""
    """The beginning of the raw record, at most 2,000 characters, where the reader still has it."""
