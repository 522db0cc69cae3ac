"""What is wrong with boxes and images, what is done about it, and that a label which lost a box is not asked for."""

import math
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from boxcar.pipelines.boxes import geometry
from boxcar.pipelines.boxes.rules import Findings, gather_boxes, gather_references, judge_boxes, judge_images
from boxcar.pipelines.images.image_file import ImageHeader
from boxcar.schemas.errors import ImageError
from boxcar.schemas.manifest import MAX_EXAMPLES
from boxcar.schemas.record import PER_MILLE, PIXELS, RELATIVE, Box, BoxMark, BoxSpace, DialogueTurn, ImageMark, ImageRef, Record, Region
from boxcar.schemas.workflow import Policy, RulesConfig, TaskConfig
from tests.small_units import EVERY_TASK, convert, files, header, image, only, record, region, rows_of, settings

NAN, INF = math.nan, math.inf
POLICIES: tuple[Policy, ...] = get_args(Policy)


@dataclass(frozen=True)
class Judged:
    boxes: list[Box | None]
    """Pixels of the upright image, to a millionth, regions before dialogue boxes; None where dropped."""
    exact: npt.NDArray[np.float64]
    """The kept ones, not rounded."""
    rejected: dict[str, str]
    """Record id -> reason."""
    counts: dict[str, tuple[int, int, int]]
    """Rule -> kept, fixed, dropped."""
    examples: dict[str, list[str]]


def judge(*records: Record, rules: RulesConfig | None = None, headers: dict[str, ImageHeader | ImageError] | None = None) -> Judged:
    """The records through all rules of images and boxes; every file is 640x480 unless `headers` says otherwise."""
    rules, findings = rules or RulesConfig(), Findings()
    references = gather_references(records, files(headers or {"a.jpg": header(640, 480)}))
    verdict = judge_images(records, references, rules, findings)
    boxes = gather_boxes(records, references)
    judge_boxes(records, boxes, references, rules, findings)
    found = [tuple(row) if kept else None for row, kept in zip(boxes.boxes.round(6).tolist(), boxes.kept.tolist(), strict=True)]
    return Judged(
        found,
        boxes.boxes[boxes.kept],
        {rejected.record_id: rejected.reason for rejected in verdict.rejected.values()},
        {rule: (finding.kept, finding.fixed, finding.dropped) for rule, finding in findings.by_rule.items()},
        {rule: finding.examples for rule, finding in findings.by_rule.items()},
    )


def rules_with(**policies: str) -> RulesConfig:
    return RulesConfig.model_validate(policies)


def one(box: Box, **fields: Any) -> Record:
    return record(regions=(region("dog", box),), **fields)


def action(policy: Policy, count: int = 1) -> tuple[int, int, int]:
    return (count * (policy == "keep"), count * (policy == "fix"), count * (policy == "drop"))


# ---- boxes


@dataclass(frozen=True)
class Fault:
    rule: str
    box: Box
    fixed: Box | None = None
    """None: there is no fix, and nothing to keep."""


FAULTS = {
    "a coordinate that is no number": Fault("not_finite", (NAN, 10, 50, 50)),
    "every coordinate no number": Fault("not_finite", (NAN, NAN, NAN, NAN)),
    "an infinite coordinate": Fault("not_finite", (10, 10, INF, 50)),
    "a coordinate infinite to the left": Fault("not_finite", (-INF, 10, 50, 50)),
    "no width": Fault("zero_area", (10, 10, 10, 50)),
    "no height": Fault("zero_area", (10, 10, 50, 10)),
    "a click without a drag": Fault("zero_area", (300, 300, 300, 300)),
    "right of the image": Fault("outside", (700, 10, 800, 50)),
    "left of the image": Fault("outside", (-50, 10, -1, 50)),
    "below, touching the border": Fault("outside", (10, 480, 50, 500)),
    "huge and outside": Fault("outside", (1e300, 10, 1.1e300, 50)),
    "both corners swapped": Fault("swapped_corners", (600, 400, 500, 300), (500, 300, 600, 400)),
    "x swapped": Fault("swapped_corners", (600, 300, 500, 400), (500, 300, 600, 400)),
    "y swapped": Fault("swapped_corners", (300, 400, 500, 100), (300, 100, 500, 400)),
    "a quarter inside": Fault("mostly_outside", (600, 10, 760, 50), (600, 10, 640, 50)),
    "a little less than half inside": Fault("mostly_outside", (600, 10, 680.1, 50), (600, 10, 640, 50)),
    "half inside": Fault("overhang", (600, 10, 680, 50), (600, 10, 640, 50)),
    "over two borders": Fault("overhang", (-5, -6, 50, 50), (0, 0, 50, 50)),
    "more than rounding over the border": Fault("overhang", (600, 10, 640.02, 50), (600, 10, 640, 50)),
    "corners written where sides belong": Fault("xywh_confusion", (300, 200, 300 + 500, 200 + 400), (300, 200, 500, 400)),
    "sides written where a corner belongs": Fault("xywh_confusion", (300, 200, 100, 50), (300, 200, 400, 250)),
    "sides where a corner belongs, one side long": Fault("xywh_confusion", (200, 200, 210, 50), (200, 200, 410, 250)),
    "fractions": Fault("relative_confusion", (0.25, 0.25, 0.5, 0.75), (160, 120, 320, 360)),
    "fractions that hang over a little": Fault("relative_confusion", (0.5, 0.5, 1.0, 1.0), (320, 240, 640, 480)),
}


BROKEN = [
    pytest.param(fault, policy, id=f"{name}, {policy}")
    for name, fault in FAULTS.items()
    for policy in POLICIES
    if policy == "drop" or (fault.fixed and (policy, fault.rule) != ("keep", "swapped_corners"))
]


@pytest.mark.parametrize(("fault", "policy"), BROKEN)
def test_a_broken_box_is_kept_fixed_or_dropped_as_the_workflow_says(fault: Fault, policy: Policy) -> None:
    suspected = fault.rule == "xywh_confusion" and policy == "keep"
    # What is kept of a suspected box may be swapped or hang over: that is then another rule's business.
    others = {"mostly_outside": "keep", "overhang": "keep"} if suspected else {}
    found = judge(one(fault.box), rules=rules_with(**others, **{fault.rule: policy}))
    assert found.counts[fault.rule] == action(policy)
    assert set(found.counts) == {fault.rule} or suspected
    x0, y0, x1, y1 = fault.box
    kept = (min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)) if suspected else fault.box
    assert found.boxes == [{"keep": kept, "fix": fault.fixed, "drop": None}[policy]]
    assert not found.rejected


def test_swapped_corners_that_are_kept_have_no_area() -> None:
    found = judge(one((600, 400, 500, 300)), rules=RulesConfig(swapped_corners="keep"))
    assert found.counts == {"swapped_corners": (1, 0, 0), "zero_area": (0, 0, 1)}
    assert found.boxes == [None]


def test_rules_of_which_only_drop_makes_sense_take_nothing_else() -> None:
    for rule in ("not_finite", "zero_area", "outside"):
        with pytest.raises(ValueError, match="drop"):
            rules_with(**{rule: "keep"})
    for rule in ("crowd", "difficult", "unusual_mode"):
        with pytest.raises(ValueError, match="drop"):
            rules_with(**{rule: "fix"})


FINE = {
    "an ordinary box": ((10, 20, 300, 400), (10, 20, 300, 400)),
    "the whole image": ((0, 0, 640, 480), (0, 0, 640, 480)),
    "a hundredth of a pixel over, by rounding": ((600, -0.01, 640.01, 50), (600, 0, 640, 50)),
    "tiny, but no fractions": ((0.5, 0.5, 2.0, 2.0), (0.5, 0.5, 2.0, 2.0)),
}


@pytest.mark.parametrize(("box", "expected"), FINE.values(), ids=FINE)
def test_ordinary_boxes_pass_without_a_word(box: Box, expected: Box) -> None:
    found = judge(one(box))
    assert found.boxes == [expected]
    assert not found.counts


def test_an_ordinary_overhang_is_no_other_kind_of_numbers() -> None:
    found = judge(one((10, 10, 310, 560)))  # [10, 10, 300, 550] would be a box as well
    assert found.boxes == [(10, 10, 310, 480)]
    assert found.counts == {"overhang": (0, 1, 0)}


def test_fractions_are_not_suspected_where_the_image_is_that_small() -> None:
    found = judge(one((0, 0, 1, 1)), headers={"a.jpg": header(4, 4)}, rules=RulesConfig(size_mismatch="keep"))
    assert found.boxes == [(0, 0, 1, 1)]
    assert set(found.counts) == {"size_mismatch"}


def test_a_dropped_box_is_judged_by_no_later_rule() -> None:
    crowd = record(regions=(region("dog", (NAN, 0, 700, 10), is_crowd=True, is_difficult=True),))
    assert judge(crowd).counts == {"crowd": (0, 0, 1)}


def test_a_crowd_that_is_kept_is_not_dropped_as_difficult() -> None:
    both = record(regions=(region("dog", (10, 10, 50, 50), is_crowd=True, is_difficult=True),))
    found = judge(both, rules=RulesConfig(crowd="keep"))
    assert found.boxes == [(10, 10, 50, 50)]
    assert found.counts == {"crowd": (1, 0, 0)}


@pytest.mark.parametrize("policy", ["keep", "drop"])
@pytest.mark.parametrize(("flag", "rule"), [("is_crowd", "crowd"), ("is_difficult", "difficult")])
def test_flagged_boxes_are_kept_or_dropped(flag: str, rule: str, policy: Policy) -> None:
    flagged = record(regions=(region("dog", (10, 10, 50, 50), **{flag: True}), region("dog", (60, 60, 90, 90))))
    found = judge(flagged, rules=rules_with(**{rule: policy}))
    assert found.boxes == [(10, 10, 50, 50) if policy == "keep" else None, (60, 60, 90, 90)]
    assert found.counts == {rule: action(policy)}


@pytest.mark.parametrize("policy", POLICIES)
def test_of_the_same_box_twice_the_first_stays(policy: Policy) -> None:
    box, other = (10.0, 10.0, 50.0, 50.0), (10.0, 10.0, 50.0, 50.5)
    regions = [region("dog", box), region("cat", box), region("dog", other), region("dog", box), region("dog", box)]
    found = judge(record(regions=tuple(regions)), record("2", regions=(region("dog", box),)), rules=RulesConfig(duplicate=policy))
    copies = [box, box] if policy == "keep" else [None, None]
    assert found.boxes == [box, box, other, *copies, box]
    assert found.counts == {"duplicate": action(policy, 2)}


def test_boxes_that_become_equal_when_fixed_are_duplicates() -> None:
    regions = (region("dog", (600, 400, 640, 480)), region("dog", (600, 400, 641, 481)), region("dog", (640, 480, 600, 400)))
    found = judge(record(regions=regions))
    assert found.boxes == [(600, 400, 640, 480), None, None]
    assert found.counts == {"overhang": (0, 1, 0), "swapped_corners": (0, 1, 0), "duplicate": (0, 2, 0)}


def test_boxes_of_a_dialogue_are_judged_like_any_but_never_as_duplicates() -> None:
    mark = BoxMark(((10, 10, 50, 50), (10, 10, 50, 50), (600, 400, 500, 300), (700, 0, 800, 10)), "dog")
    talk = record(regions=(region("dog", (10, 10, 50, 50)),), dialogue=(DialogueTurn((ImageMark(0), "Where?"), (mark,)),))
    found = judge(talk)
    assert found.boxes == [*[(10, 10, 50, 50)] * 3, (500, 300, 600, 400), None]
    assert found.counts == {"swapped_corners": (0, 1, 0), "outside": (0, 0, 1)}
    assert found.examples["outside"] == ["rows.jsonl, row 1, a box of the dialogue 'dog': [700, 0, 800, 10]"]


def test_examples_name_the_first_few_and_counts_all() -> None:
    regions = [region(f"dog {number}", (700 + number, 0, 800, 10), region_id=f"annotation {number}") for number in range(3)]
    found = judge(record(regions=tuple(regions)), record("2", regions=(region("", (1e3, 0, 2e3, 10)), region("cat", (-2, -2, -1, -1)))))
    assert found.counts == {"outside": (0, 0, 5)}
    assert found.examples["outside"] == [
        f"rows.jsonl, row 1, annotation {n} 'dog {n}': [{700 + n}, 0, 800, 10]" for n in range(MAX_EXAMPLES)
    ]
    assert judge(one((-2, -2, -1, -1))).examples["outside"] == ["rows.jsonl, row 1, a region 'dog': [-2, -2, -1, -1]"]


coordinates = st.one_of(st.floats(width=32), st.floats(-100, 800), st.sampled_from([0.0, 640.0, 480.0, NAN, INF, 1e308, -1e308]))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numbers beyond any image overflow
@given(st.lists(st.tuples(coordinates, coordinates, coordinates, coordinates), max_size=6), st.sampled_from([PIXELS, RELATIVE, PER_MILLE]))
def test_every_box_is_kept_inside_its_image_or_dropped_and_counted(boxes: list[Box], space: BoxSpace) -> None:
    fixing = RulesConfig(mostly_outside="fix", xywh_confusion="fix", relative_confusion="fix")
    found = judge(record(regions=tuple(Region(box, "dog") for box in boxes), box_space=space), rules=fixing)
    assert (geometry.area(found.exact) > 0).all()
    assert (geometry.clip(found.exact, np.full((len(found.exact), 2), (640.0, 480.0))) == found.exact).all()
    dropped = sum(count[2] for count in found.counts.values()) + found.counts.get("duplicate", (0, 0, 0))[1]
    assert dropped == found.boxes.count(None)


# ---- spaces

RESIZED = BoxSpace("resized", "qwen2_5_vl", 3136, 1_003_520)
SPACES: dict[str, tuple[BoxSpace, Box]] = {
    "pixels": (PIXELS, (64, 48, 320, 240)),
    "fractions": (RELATIVE, (0.1, 0.1, 0.5, 0.5)),
    "thousandths": (PER_MILLE, (100, 100, 500, 500)),
    # 640x480 becomes 644x476.
    "pixels of the resized image": (RESIZED, (64.4, 47.6, 322, 238)),
    "pixels of the image resized with published limits": (BoxSpace("resized", "qwen2_5_vl"), (64.4, 47.6, 322, 238)),
    # At most 100,352 px: 640x480 becomes 364x252.
    "pixels of an image resized to less": (BoxSpace("resized", "qwen2_5_vl", 0, 100_352), (36.4, 25.2, 182, 126)),
    "pixels of another family's resize": (BoxSpace("resized", "qwen3_vl"), (64, 48, 320, 240)),
}


@pytest.mark.parametrize(("space", "box"), SPACES.values(), ids=SPACES)
def test_boxes_of_every_space_become_pixels(space: BoxSpace, box: Box) -> None:
    found = judge(one(box, box_space=space), one((10, 10, 50, 50)))
    assert found.boxes == [(64, 48, 320, 240), (10, 10, 50, 50)]
    assert not found.counts


def test_records_of_several_spaces_keep_their_own() -> None:
    records = [one(box, box_space=space, record_id=str(number)) for number, (space, box) in enumerate(SPACES.values())]
    assert judge(*records).boxes == [(64, 48, 320, 240)] * len(records)


# ---- images


@st.composite
def stored_boxes(draw: st.DrawFn) -> tuple[tuple[int, int], tuple[int, int, int, int]]:
    width, height = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    x0, y0 = draw(st.integers(0, width - 1)), draw(st.integers(0, height - 1))
    return (width, height), (x0, y0, draw(st.integers(x0 + 1, width)), draw(st.integers(y0 + 1, height)))


@pytest.mark.parametrize("orientation", range(1, 9))
@given(stored_boxes())
def test_a_turned_box_lies_where_pillow_turns_its_pixels(
    orientation: int, drawn: tuple[tuple[int, int], tuple[int, int, int, int]]
) -> None:
    (width, height), box = drawn
    picture = Image.new("L", (width, height))
    picture.paste(255, box)
    picture.getexif()[0x0112] = orientation
    upright = ImageOps.exif_transpose(picture)
    [found] = geometry.to_upright(np.array([box], np.float64), np.array([(width, height)], np.float64), np.array([orientation])).tolist()
    assert tuple(found) == upright.getbbox()


@dataclass(frozen=True)
class Turned:
    orientation: int
    declared: tuple[int | None, int | None]
    policy: Policy
    counts: dict[str, tuple[int, int, int]]
    box: Box | None
    """Of (0, 0, 100, 50) in the upright image; None where the record is rejected."""
    stored: tuple[int, int] = (640, 480)


FIXED, KEPT, DROPPED = {"exif_orientation": (0, 1, 0)}, {"exif_orientation": (1, 0, 0)}, {"exif_orientation": (0, 0, 1)}
SAME: Box = (0, 0, 100, 50)
TURNED = {
    "5, drawn on the stored image": Turned(5, (640, 480), "fix", FIXED, (0, 0, 50, 100)),
    "6, drawn on the stored image": Turned(6, (640, 480), "fix", FIXED, (430, 0, 480, 100)),
    "7, drawn on the stored image": Turned(7, (640, 480), "fix", FIXED, (430, 540, 480, 640)),
    "8, drawn on the stored image": Turned(8, (640, 480), "fix", FIXED, (0, 540, 50, 640)),
    "6, drawn on the upright image": Turned(6, (480, 640), "fix", KEPT, SAME),
    "6, size unknown": Turned(6, (None, None), "fix", DROPPED, None),
    "6, half of the size unknown": Turned(6, (640, None), "fix", DROPPED, None),
    "6, another size": Turned(6, (800, 600), "fix", DROPPED, None),
    "6, a square": Turned(6, (480, 480), "fix", DROPPED, None, (480, 480)),
    "2, mirrored": Turned(2, (640, 480), "fix", DROPPED, None),
    "3, upside down": Turned(3, (640, 480), "fix", DROPPED, None),
    "4, mirrored": Turned(4, (640, 480), "fix", DROPPED, None),
    "6, kept": Turned(6, (480, 640), "keep", KEPT, SAME),
    "6, kept, size unknown": Turned(6, (None, None), "keep", KEPT, SAME),
    "6, kept, size as stored": Turned(6, (640, 480), "keep", KEPT, SAME),
    "6, kept, another size": Turned(6, (960, 1280), "keep", {**KEPT, "size_mismatch": (0, 0, 1)}, None),
    "3, kept": Turned(3, (640, 480), "keep", KEPT, SAME),
    "6, dropped": Turned(6, (480, 640), "drop", DROPPED, None),
    "3, dropped": Turned(3, (None, None), "drop", DROPPED, None),
    "1, whatever the policy": Turned(1, (640, 480), "drop", {}, SAME),
}


@pytest.mark.parametrize("case", TURNED.values(), ids=TURNED)
def test_boxes_on_an_image_that_is_stored_turned(case: Turned) -> None:
    headers: dict[str, ImageHeader | ImageError] = {"a.jpg": header(*case.stored, case.orientation)}
    drawn = one(SAME, images=(image(*case.declared),))
    found = judge(drawn, headers=headers, rules=RulesConfig(exif_orientation=case.policy))
    assert found.counts == case.counts
    if case.box is None:
        assert found.rejected == {"1": next(rule for rule, count in case.counts.items() if count[2])}
    else:
        assert not found.rejected
        assert found.boxes == [case.box]


def test_fractions_of_a_stored_image_are_turned_with_it() -> None:
    drawn = one((0.0, 0.0, 0.25, 0.5), box_space=RELATIVE)
    assert judge(drawn, headers={"a.jpg": header(640, 480, 6)}).boxes == [(240, 0, 480, 160)]


WITHOUT_BOXES = {
    "a caption": {"captions": ("A dog.",)},
    "a dialogue without boxes": {"dialogue": (DialogueTurn((ImageMark(0), "What?"), ("A dog.",)),)},
    "a verified absence": {"absent": ("cat",)},
}


@pytest.mark.parametrize("declared", [(None, None), (640, 480), (480, 640)], ids=["undeclared", "as stored", "upright"])
@pytest.mark.parametrize("fields", WITHOUT_BOXES.values(), ids=WITHOUT_BOXES)
def test_which_way_is_up_matters_to_boxes_only(fields: dict[str, Any], declared: tuple[int | None, int | None]) -> None:
    headers: dict[str, ImageHeader | ImageError] = {"a.jpg": header(640, 480, 6)}
    found = judge(record(images=(image(*declared),), **fields), headers=headers)
    assert not found.rejected
    assert not found.counts
    refused = judge(record(images=(image(*declared),), **fields), headers=headers, rules=RulesConfig(exif_orientation="drop"))
    assert refused.rejected == {"1": "exif_orientation"}


def test_only_the_image_that_has_boxes_must_be_upright() -> None:
    images = (image(None, None), image(None, None, "turned.jpg"))
    headers: dict[str, ImageHeader | ImageError] = {"a.jpg": header(640, 480), "turned.jpg": header(640, 480, 6)}
    for index, rejected in ((0, {}), (1, {"1": "exif_orientation"})):
        mark = BoxMark(((10, 10, 50, 50),), "dog", index)
        talk = record(images=images, dialogue=(DialogueTurn((ImageMark(0), ImageMark(1), "Where?"), (mark,)),))
        assert judge(talk, headers=headers).rejected == rejected


MISMATCH = [
    pytest.param("fix", PIXELS, (100, 90, 200, 180), (50, 45, 100, 90), id="boxes are scaled"),
    pytest.param("keep", PIXELS, (100, 90, 200, 180), (100, 90, 200, 180), id="file and boxes are trusted"),
    pytest.param("fix", RELATIVE, (0.1, 0.1, 0.5, 0.5), (64, 48, 320, 240), id="fractions stay, fix"),
    pytest.param("keep", RELATIVE, (0.1, 0.1, 0.5, 0.5), (64, 48, 320, 240), id="fractions stay, keep"),
    pytest.param("drop", PIXELS, (100, 90, 200, 180), None, id="the record is rejected"),
]


@pytest.mark.parametrize(("policy", "space", "box", "expected"), MISMATCH)
def test_a_declared_size_that_is_not_the_files(policy: Policy, space: BoxSpace, box: Box, expected: Box | None) -> None:
    found = judge(one(box, images=(image(1280, 960),), box_space=space), rules=RulesConfig(size_mismatch=policy))
    assert found.counts == {"size_mismatch": action(policy)}
    assert found.examples["size_mismatch"] == ["rows.jsonl, row 1, a.jpg: declared 1280x960, the file has 640x480"]
    assert found.rejected == ({} if expected else {"1": "size_mismatch"})
    if expected:
        assert found.boxes == [expected]


def test_width_and_height_are_scaled_each_by_itself() -> None:
    found = judge(one((100, 100, 200, 200), images=(image(320, 960),)), rules=RulesConfig(size_mismatch="fix"))
    assert found.boxes == [(200, 50, 400, 100)]
    half = judge(one((100, 100, 200, 200), images=(image(320, None),)), rules=RulesConfig(size_mismatch="fix"))
    assert half.boxes == [(200, 100, 400, 200)]


@pytest.mark.parametrize("policy", ["keep", "drop"])
def test_unusual_images_are_kept_or_rejected(policy: Policy) -> None:
    headers: dict[str, ImageHeader | ImageError] = {"a.jpg": header(640, 480, mode_note="cmyk")}
    found = judge(one((10, 10, 50, 50)), headers=headers, rules=rules_with(unusual_mode=policy))
    assert found.counts == {"image_cmyk": action(policy)}
    assert found.rejected == ({} if policy == "keep" else {"1": "image_cmyk"})


def test_an_image_that_cannot_be_read_rejects_its_record_for_the_first_reason() -> None:
    def broken(path: str, reason: str) -> ImageError:
        return ImageError(path, reason=reason, found="no such file", expected="an image")

    headers: dict[str, ImageHeader | ImageError] = {
        "a.jpg": header(640, 480),
        "b.jpg": broken("b.jpg", "missing_image"),
        "c.jpg": broken("c.jpg", "truncated_image"),
    }
    images = (ImageRef("b.jpg"), ImageRef("c.jpg"))
    found = judge(record("1", images, captions=("A dog.",)), one((10, 10, 50, 50), record_id="2"), headers=headers)
    assert found.rejected == {"1": "missing_image"}
    assert found.boxes == [(10, 10, 50, 50)]


def test_a_record_without_images_is_no_trouble() -> None:
    assert judge(record("1", ()), one((10, 10, 50, 50), record_id="2")).boxes == [(10, 10, 50, 50)]


@pytest.mark.parametrize("policy", POLICIES)
def test_a_box_smaller_than_a_visual_token_is_dropped_only_on_request(policy: Policy) -> None:
    # 1000x1000 becomes 1008x1008: a token is 27.8 px of the original wide.
    small, large = region("ant", (0, 0, 27.7, 500)), region("dog", (0, 0, 27.8, 500))
    result = convert(
        settings("qwen2_5_vl", rules=RulesConfig(under_one_token=policy), tasks=only(detect=TaskConfig(share=1.0))),
        [record(images=(image(1000, 1000),), regions=(small, large))],
    )
    finding = result.counts.rules["under_one_token"]
    assert (finding.kept, finding.fixed, finding.dropped) == action("drop" if policy == "drop" else "keep")
    asked = [turn["labels"] for turn in rows_of(result)[0]["turns"]]
    assert asked == ([["dog"]] if policy == "drop" else [["ant"], ["dog"]])
    assert result.counts.boxes_read == 2
    assert result.counts.boxes_kept == (1 if policy == "drop" else 2)


# ---- what a lost box does to its label

LOSSES = {
    "crowd": region("dog", (10, 10, 50, 50), "the dog", is_crowd=True),
    "crowd, where a box of an object is": region("dog", (100, 100, 200, 200), "the dog", is_crowd=True),
    "difficult": region("dog", (10, 10, 50, 50), "the dog", is_difficult=True),
    "not finite": region("dog", (NAN, 10, 50, 50), "the dog"),
    "no area": region("dog", (10, 10, 10, 50), "the dog"),
    "outside": region("dog", (700, 10, 750, 50), "the dog"),
    "mostly outside": region("dog", (600, 10, 760, 50), "the dog"),
    "suspected of xywh": region("dog", (300, 200, 100, 50), "the dog"),
    "suspected fractions": region("dog", (0.1, 0.1, 0.2, 0.2), "the dog"),
}


def asked_for(found: Record, seed: int = 0) -> dict[str, list[list[str]]]:
    """Labels of every turn by task, when all turns that can be made are made."""
    result = convert(settings("qwen2_vl", tasks=EVERY_TASK, seed=seed), [found])
    turns: dict[str, list[list[str]]] = {}
    for row in rows_of(result):
        for turn in row["turns"]:
            turns.setdefault(turn["task"], []).append(sorted(set(turn["labels"])))
    return turns


@pytest.mark.parametrize("lost", LOSSES.values(), ids=LOSSES)
def test_a_label_that_lost_a_box_is_asked_for_neither_as_all_nor_as_absent(lost: Region) -> None:
    regions = (region("dog", (100, 100, 200, 200), "the dog", "a brown dog"), lost, region("cat", (300, 300, 350, 350)), region("bird"))
    for seed in range(5):
        asked = asked_for(record(regions=regions, absent=("dog", "the dog"), vocabulary=("dog", "cat", "bird")), seed)
        assert sorted(asked["detect"]) == [["bird"], ["cat"]]
        assert asked["detect_joint"] == [["bird", "cat"]]
        assert asked["refer"] == [["a brown dog"]]
        assert "absent" not in asked
        # The box that is left is still a true answer to "what is here".
        assert len(asked["describe"]) == 3


def test_a_label_of_which_nothing_is_left_is_not_absent() -> None:
    for seed in range(5):
        asked = asked_for(record(regions=(LOSSES["outside"],), vocabulary=("dog", "cat", "bird")), seed)
        assert set(asked) == {"absent"}
        assert asked["absent"][0] != ["dog"]


def test_a_label_that_may_not_be_exhaustive_is_asked_for_neither_as_all_nor_as_absent() -> None:
    found = record(
        regions=(region("dog"), region("cat", (10, 10, 50, 50))), vocabulary=("dog", "cat", "bird"), not_exhaustive=("dog", "bird")
    )
    asked = asked_for(found)
    assert asked["detect"] == [["cat"]]
    assert "detect_joint" not in asked
    assert "absent" not in asked


def test_a_copy_that_is_taken_away_leaves_its_label_complete_and_its_names_to_its_twin() -> None:
    box, elsewhere = (10.0, 10.0, 50.0, 50.0), (100.0, 10.0, 150.0, 50.0)
    regions = [region("dog", box, "first name"), region("dog", box, "second name"), region("dog", box, "third name", "first name")]
    regions.append(region("dog", elsewhere, "second name"))
    result = convert(settings("qwen2_vl", tasks=EVERY_TASK), [record(regions=tuple(regions))])
    assert result.counts.rules["duplicate"].fixed == 2
    answers = {turn["labels"][0]: turn["boxes"] for turn in rows_of(result)[0]["turns"] if turn["task"] in ("detect", "refer")}
    both = [list(box), list(elsewhere)]
    assert answers == {"dog": both, "first name": [list(box)], "second name": both, "third name": [list(box)]}


def test_a_box_without_any_name_makes_no_turn() -> None:
    assert asked_for(record(regions=(region(""), region("dog", (10, 10, 50, 50))))) == {"detect": [["dog"]], "describe": [["dog"]]}
