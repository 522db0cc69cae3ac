"""gRefCOCO: expressions for one object, for several, or for none.

| what        | in the files                                                        | in the record                               |
|-------------|---------------------------------------------------------------------|---------------------------------------------|
| annotations | grefs(unc).json, a list of refs (or grefs(unc).p)                   | one record per image that has refs          |
| one object  | ann_id: [18] or 18                                                  | phrases of one region                       |
| several     | ann_id: [18, 19]                                                    | the same phrase on each of these regions    |
| none        | ann_id: [-1] or -1, no_target: true                                 | absent: a phrase verified to name nothing   |
| instances   | COCO: the boxes, [x, y, width, height], pixels, float, 0-based      | regions: of the referred objects alone      |
| split       | train, val, testA, testB                                            | `split` of the workflow; "" reads all refs  |
| vocabulary  | open: other objects of a label may stand among the referred ones    | not_exhaustive: every label                 |

Traps beyond those of `refcoco.py`, and what is done:
- a ref of several objects of which one is unknown: the whole ref is rejected, for the answer would miss a box.
- one phrase for other sets of objects, or for objects and for nothing, in two refs of one image: taken off all (ambiguous_phrase).
- -1 among real ids, an empty list, `no_target` that contradicts ann_id: rejected (broken_ref), for nobody knows what was meant.
- hundreds of refs without a sentence (henghuiding/gRefCOCO#8): left out, as its authors do; counted in the notes.
- MDETR's conversion writes a box [0, 0, 0, 0] for "none"; it is another file, of another format.

Checked against henghuiding/gRefCOCO, mdetr/scripts/fine-tuning/grefexp_coco_format.py @b4b1e55. Reasons of rejection: as RefCOCO's.
"""

from collections.abc import Iterator
from pathlib import Path

from boxcar.pipelines.readers.reader import COMMON_KEYS, SourcePlan, Unit
from boxcar.pipelines.readers.shared.coco_index import Id
from boxcar.pipelines.readers.shared.referring import plan_refs, read_refs_unit
from boxcar.pipelines.readers.shared.refs_file import RefRow, Refused
from boxcar.schemas.record import Record, Rejected
from boxcar.schemas.workflow import SourceConfig

NO_TARGET = (-1, "-1")


class _Ref(RefRow):
    ann_id: Id | list[Id]
    no_target: bool | None = None


class GrefcocoReader:
    """gRefCOCO."""

    name = "grefcoco"
    uses = COMMON_KEYS | {"instances"}

    def plan(self, config: SourceConfig, work_dir: Path, records_per_unit: int) -> SourcePlan:
        return plan_refs(config, work_dir, records_per_unit, _Ref, _targets)

    def read(self, config: SourceConfig, unit: Unit) -> Iterator[Record | Rejected]:
        return read_refs_unit(config, unit)


def _targets(ref: _Ref) -> list[Id]:
    ids = ref.ann_id if isinstance(ref.ann_id, list) else [ref.ann_id]
    real = [key for key in ids if key not in NO_TARGET]
    if not ids or (real and len(real) < len(ids)):
        raise Refused(f"found ann_id {ids}, expected ids of annotations, or -1 alone")
    if ref.no_target is not None and ref.no_target != (not real):
        raise Refused(f"found no_target: {str(ref.no_target).lower()} with ann_id {ids}, expected one of them to say so")
    return real
