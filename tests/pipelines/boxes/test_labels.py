"""Labels and phrases with control characters."""

import pytest

from boxcar.pipelines.boxes.labels import clean
from boxcar.schemas.record import Region
from tests.small_units import EVERY_TASK, convert, record, rows_of, settings

BOX = (10.0, 20.0, 110.0, 220.0)
OTHER = (200.0, 20.0, 310.0, 220.0)
DIRTY = "traffic\nlight"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("dog", "dog"),
        ("traffic light", "traffic light"),
        ("two  blanks stay", "two  blanks stay"),
        ("traffic\nlight", "traffic light"),
        ("a\r\n\tb", "a b"),
        ("bell\x07", "bell"),
        ("c1\x85control", "c1 control"),
        ("line\u2028separator", "line separator"),
        ("红\n灯", "红 灯"),
        ("\n", ""),
    ],
)
def test_clean(text: str, expected: str) -> None:
    assert clean(text) == expected


def scene() -> list[Region]:
    return [Region(BOX, DIRTY), Region(OTHER, "traffic light"), Region(OTHER, "dog", phrases=("the left\tone",))]


def texts(policy: str) -> tuple[list[str], dict[str, int]]:
    config = settings("qwen2_5_vl", tasks=EVERY_TASK, rules={"control_characters": policy})
    result = convert(config, [record(regions=tuple(scene()), vocabulary=(DIRTY, "dog"))])
    turns = [turn for row in rows_of(result) for turn in row["turns"]]
    found = result.counts.rules["control_characters"]
    counts = {"kept": found.kept, "fixed": found.fixed, "dropped": found.dropped}
    return [f"{turn['question']} {turn['answer']}" for turn in turns], counts


def test_fixed_labels_are_one_label() -> None:
    written, counts = texts("fix")
    assert counts == {"kept": 0, "fixed": 2, "dropped": 0}
    assert not any("left\tone" in text for text in written)
    both = [text for text in written if text.count('"label": "traffic light"') == 2 and "dog" not in text]
    assert both, "both traffic lights answer the question for all of them"
    assert not any("traffic\\nlight" in text for text in written)
    assert any("the left one" in text for text in written)


def test_dropped_labels_take_their_box_along() -> None:
    written, counts = texts("drop")
    assert counts == {"kept": 0, "fixed": 0, "dropped": 2}
    assert not any("traffic\\nlight" in text or "traffic\nlight" in text or "the left" in text for text in written)
    assert any('"label": "traffic light"' in text for text in written)


def test_kept_labels_are_counted() -> None:
    written, counts = texts("keep")
    assert counts == {"kept": 2, "fixed": 0, "dropped": 0}
    assert any("traffic\\nlight" in text for text in written)
