"""RefCOCO, RefCOCO+, RefCOCOg: expressions that people used to tell one object of an image from the others.

| what        | in the files                                                             | in the record                          |
|-------------|--------------------------------------------------------------------------|----------------------------------------|
| annotations | refs(unc).p, refs(google).p, refs(umd).p, a pickled list of refs; or the | one record per image that has refs     |
|             | same list as JSON                                                        |                                        |
| a ref       | {ref_id, ann_id, image_id, split, sentences [{sent, raw}]}               | phrases of one region                  |
| instances   | COCO: the boxes, [x, y, width, height], pixels, float, 0-based           | regions: of the referred objects alone |
| split       | train, val, testA, testB (unc); train, val, test (google, umd)           | `split` of the workflow; "" reads all  |
|             |                                                                          | refs, and the record says which        |
| vocabulary  | open: other objects of a label may stand among the referred ones         | not_exhaustive: every label            |

Traps, and what is done:
- pickle can run anything. This one holds plain data or is refused, naming what it asked for (`refs_file`). The published files are of
  Python 2: their strings are bytes (UTF-8, else Latin-1).
- the refs' own file_name ends in the annotation's number (COCO_train2014_000000581857_16.jpg), and no such image exists: the name is taken
  from instances.json, by image_id.
- a phrase that two refs of one image use for two objects: nobody can answer it, so it is taken off both (ambiguous_phrase, counted). Case
  and blanks make no other phrase. Two refs of the same object may share one.
- one image in two splits (google splits by object, not by image): only the refs of the wanted split, for phrases and for boxes.
- a ref whose annotation or image is not in instances.json, cannot be read, or belongs to another image (rejected alone).
- the same sentence several times in a ref (once is enough) · a blank `sent` (`raw` stands in) · a ref without a sentence (left out, counted
  in the notes) · ids that are numbers here and text there (7 and "7" are one id).

Checked against lichengunc/refer, refer.py @2fe1dfe. Reasons of rejection: broken_ref, unknown_image, unknown_annotation, broken_annotation,
annotation_of_other_image, unknown_category, no_file_name, ambiguous_phrase.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from boxcar.pipelines.readers.reader import COMMON_KEYS, SourcePlan, Unit
from boxcar.pipelines.readers.shared.coco_index import Id
from boxcar.pipelines.readers.shared.referring import plan_refs, read_refs_unit
from boxcar.pipelines.readers.shared.refs_file import RefRow
from boxcar.schemas.errors import AnnotationError
from boxcar.schemas.record import Record, Rejected
from boxcar.schemas.workflow import SourceConfig


class _Ref(RefRow):
    ann_id: Id | list[Id]


class RefcocoReader:
    """RefCOCO, RefCOCO+ and RefCOCOg."""

    name = "refcoco"
    uses = COMMON_KEYS | {"instances"}

    def plan(self, config: SourceConfig, work_dir: Path, records_per_unit: int) -> SourcePlan:
        return plan_refs(config, work_dir, records_per_unit, _Ref, partial(_target, config.annotations))

    def read(self, config: SourceConfig, unit: Unit) -> Iterator[Record | Rejected]:
        return read_refs_unit(config, unit)


def _target(path: str, ref: _Ref) -> list[Id]:
    if isinstance(ref.ann_id, list):
        found = f"a list of ann_id in ref {ref.ref_id}: this is gRefCOCO"
        raise AnnotationError(path, found=found, expected="one ann_id in a ref of RefCOCO", fix="Set `reader: grefcoco`.")
    return [ref.ann_id]
