"""CogVLM's pairs of prompt and label, as JSON or JSON lines: one image, one question, one answer.

    what            in the file                                                       in the record
    image           `image`                                                           the one image, before the question
    question        `prompt`, or `query`                                              question
    answer          `label`, or `answer`                                              answer
    boxes           `[[x0,y0,x1,y1]]`, three digits each, 000 to 999                  BoxMark, no label; thousandths of the image
    several boxes   `[[x0,y0,x1,y1;x0,y0,x1,y1]]`                                     one BoxMark with all of them
    id              `id`; without it a hash of the row                                record_id

CogVLM itself reads folders of images with a text or JSON file beside each; convert those to rows first. Checked against the README of
zai-org/CogVLM and its issues #25, #46, #165, #388 and #455.

Traps, and what is done:
- pixels. `[[086,540,400,760]]` is no pixel box but already in thousandths, whatever the image's size; a number of four digits or more, or
  with a fraction, is of another space, and the row is rejected.
- [x, y, w, h]: a maintainer says so once (#455) against README, code and all other answers. Boxes are read as corners; a second corner
  left of or above the first is what widths look like, and the row is rejected instead of being turned around by a later rule.
- numbers without the leading zeros are taken: they mean the same.
- `[[x0,y0,x1,y1]]` with letters, in the published prompts, is text; so are `[[1]]` and other brackets that hold no comma or semicolon
  between numbers.
- `[[a],[b]]` is not CogVLM's form: rejected.
"""

import re
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import msgspec

from boxcar.pipelines.readers.reader import COMMON_KEYS, Refused, SourcePlan, Unit
from boxcar.pipelines.readers.shared.marked_text import (
    BOX_OUT_OF_RANGE,
    MALFORMED_BOX,
    Marks,
    Place,
    boxes_of,
    compile_forms,
    image_refs,
    make_turn,
    number_list,
    plan_rows,
    read_rows,
    split_text,
)
from boxcar.schemas.record import PER_MILLE, Record, Rejected, TextPart
from boxcar.schemas.workflow import SourceConfig

MISSING_TEXT = "missing_text"
BOX_NOT_XYXY = "box_not_xyxy"

# Whatever looks like numbers in double brackets; what it is, is found out then.
_PATTERN = compile_forms(starts="[", candidate=r"\[\[(?=[^\[\]]*[0-9]\s*[,;])[-+.,;\s0-9\[\]]*?\]\]")
_FOUR = number_list(4, "[0-9]+")
_BOXES = re.compile(rf"\[\[{_FOUR}(?>(?:;{_FOUR})*)\]\]")


class _Row(msgspec.Struct):
    image: str
    id: str | int | None = None
    prompt: str | None = None
    query: str | None = None
    label: str | None = None
    answer: str | None = None


class CogvlmTextReader:
    name = "cogvlm_text"
    uses = COMMON_KEYS

    def plan(self, config: SourceConfig, work_dir: Path, records_per_unit: int) -> SourcePlan:
        return plan_rows(config, records_per_unit)

    def read(self, config: SourceConfig, unit: Unit) -> Iterator[Record | Rejected]:
        return read_rows(unit, _Row, partial(_record, config))


def _parse(marks: Marks, _: str, found: str) -> Sequence[TextPart]:
    if not _BOXES.fullmatch(found):
        raise Refused(MALFORMED_BOX, f"found {found[:100]!r}, expected [[x0,y0,x1,y1]] or [[box;box]] with integers from 000 to 999")
    boxes = boxes_of(found)
    if any(number > 999 for box in boxes for number in box):
        raise Refused(BOX_OUT_OF_RANGE, f"found {found[:100]!r}, expected thousandths from 000 to 999; are these pixels?")
    if any(x1 < x0 or y1 < y0 for x0, y0, x1, y1 in boxes):
        raise Refused(BOX_NOT_XYXY, f"found {found[:100]!r}, expected two corners [[x0,y0,x1,y1]]; is it [[x,y,w,h]]?")
    return (marks.boxes(found, boxes),)


def _one_of(first: str | None, second: str | None, names: str) -> str:
    if (first is None) == (second is None):
        raise Refused(MISSING_TEXT, f"found {'neither' if first is None else 'both'} of {names}, expected one")
    return first or second or ""


def _record(config: SourceConfig, row: _Row, place: Place) -> Record:
    images = image_refs([row.image])
    marks = Marks(len(images), PER_MILLE)
    question = split_text(_one_of(row.prompt, row.query, "`prompt` and `query`"), _PATTERN, partial(_parse, marks))
    answer = split_text(_one_of(row.label, row.answer, "`label` and `answer`"), _PATTERN, partial(_parse, marks))
    return Record(
        record_id=place.record_id,
        position=place.position,
        images=images,
        dialogue=(make_turn((marks.image(), *question), answer),),
        box_space=PER_MILLE,
        language=config.language,
        split=config.split,
    )
