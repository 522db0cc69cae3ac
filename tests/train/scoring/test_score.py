"""Metrics worked out by hand, their edges, and what must hold of any scores."""

import json
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from boxcar.pipelines.boxes import geometry
from boxcar.schemas.errors import ShardError
from boxcar.train.scoring.questions import SCORED_SCHEMA, read_questions
from boxcar.train.scoring.score import OBJECT_IOUS, Results, markdown, score
from tests.train.scoring.small_scores import table, turn

A = (0, 0, 10, 10)
HALF = (0, 0, 10, 5)
"""IoU with A: exactly .5."""
THIRD = (5, 0, 15, 10)
"""IoU with A: 50 / 150."""
FAR = (50, 50, 60, 60)


def results(*turns: dict[str, Any], **options: Any) -> Results:
    return score(table(*turns), **({"draws": 0} | options))


def values(found: Results, section: Any, by: str = "all", group: str = "all") -> dict[str, float | None]:
    return {
        measure.metric: measure.value for measure in found.measures if (measure.section, measure.by, measure.group) == (section, by, group)
    }


# ---- one thing asked for, one true box


def test_rec_takes_the_first_box_and_counts_what_cannot_be_read_as_wrong() -> None:
    found = results(
        turn([A], [A]),
        turn([A], [HALF]),
        turn([A], [THIRD, A]),
        turn([A], status="failed"),
        turn([A]),
        turn([A, FAR], [A]),  # two true boxes: not a question of rec
        turn([], [A]),
    )
    assert values(found, "rec") == pytest.approx({"acc_50": 2 / 5, "acc_75": 1 / 5, "acc_90": 1 / 5, "mean_iou": (1 + 0.5 + 1 / 3) / 5})
    assert found.measure("rec", "acc_50").num == 5


def test_a_box_at_the_threshold_itself_counts() -> None:
    assert results(turn([A], [HALF])).value("rec", "acc_50") == 1.0
    assert results(turn([A], [(0, 0, 10, 4.999)])).value("rec", "acc_50") == 0.0


def test_rec_is_grouped_by_task_language_source_and_size() -> None:
    found = results(
        turn([A], [A], task="refer", language="zh", source="coco"),
        turn([A], [FAR], task="detect", language="en", source="voc"),
    )
    for by, group, expected in [("task", "refer", 1.0), ("task", "detect", 0.0), ("language", "zh", 1.0), ("source", "voc", 0.0)]:
        assert found.value("rec", "acc_50", by, group) == expected
    with pytest.raises(KeyError):
        found.value("rec", "acc_50", "language", "fr")


@pytest.mark.parametrize(
    ("box", "resized", "group"),
    [
        pytest.param((0, 0, 31.9, 31.9), (100, 100), "small", id="below 32 squared"),
        pytest.param((0, 0, 32, 32), (100, 100), "medium", id="32 squared"),
        pytest.param((0, 0, 95, 96), (100, 100), "medium", id="below 96 squared"),
        pytest.param((0, 0, 96, 96), (100, 100), "large", id="96 squared"),
        pytest.param((0, 0, 90, 90), (30, 30), "small", id="large in the picture, small for the model"),
        pytest.param((0, 0, 10, 10), (1000, 1000), "large", id="small in the picture, large for the model"),
    ],
)
def test_size_is_that_for_the_model(box: tuple[float, ...], resized: tuple[int, int], group: str) -> None:
    found = results(turn([box], [box], resized_width=resized[0], resized_height=resized[1]))
    assert {name: found.value("rec", "acc_50", "size", name) for name in ("small", "medium", "large")} == {
        name: 1.0 if name == group else None for name in ("small", "medium", "large")
    }
    assert found.value("objects", "recall_50", "size", group) == 1.0


# ---- many boxes


def test_objects_are_matched_one_to_one() -> None:
    found = results(
        turn([A, FAR], [A, A, HALF], task="detect"),  # one hit, two false: A is taken
        turn([A], [HALF, FAR], task="detect"),  # one hit, one false
    )
    got = values(found, "objects")
    assert got["precision_50"] == pytest.approx(2 / 5)
    assert got["recall_50"] == pytest.approx(2 / 3)
    assert got["f1_50"] == pytest.approx(2 * 2 / (5 + 3))
    assert got["question_f1_50"] == pytest.approx((2 / 5 + 2 / 3) / 2)
    assert got["count_mae"] == pytest.approx((1 + 1) / 2)
    assert got["duplicates"] == pytest.approx(1 / 5)
    # At .55 and above only the first question's hit is left: precision 2/5 once and 1/5 nine times.
    assert got["precision_50_95"] == pytest.approx((2 / 5 + 9 / 5) / 10)
    assert got["f1_50_95"] == pytest.approx((4 / 8 + 9 * 2 / 8) / 10)


def test_greedy_takes_the_most_alike_pair_first() -> None:
    # The first box overlaps both; it is closest to the second true one, which leaves the first true one to nobody.
    truth = [(0, 0, 10, 10), (0, 3, 10, 13)]
    questions = read_questions(table(turn(truth, [(0, 2, 10, 12), (0, 5.5, 10, 15.5)])))
    units = questions.units
    of_predicted, of_truth = units.match(units.pair_iou, 0.5)
    assert of_predicted == pytest.approx([9 / 11, -np.inf])
    assert of_truth == pytest.approx([-np.inf, 9 / 11])


def test_ties_go_to_what_comes_first() -> None:
    units = read_questions(table(turn([A, A], [HALF, A, A]))).units
    of_predicted, of_truth = units.match(units.pair_iou, 0.5)
    assert of_predicted.tolist() == [-np.inf, 1, 1]
    assert of_truth.tolist() == [1, 1]


def test_macro_is_the_mean_over_labels_and_forgets_none_that_was_seen() -> None:
    found = results(
        turn([A], [A], asked="dog"),
        turn([A], [A], asked="Dog "),  # the same label
        turn([A], [FAR], asked="cat"),
        turn([], [A], asked="bird"),  # false boxes only: no recall, precision and F1 are 0
        turn([], [], asked="fish"),  # nothing there, nothing said: not among them
    )
    got = values(found, "objects")
    assert got["macro_recall_50"] == pytest.approx((1 + 0) / 2)
    assert got["macro_precision_50"] == pytest.approx((1 + 0 + 0) / 3)
    assert got["macro_f1_50"] == pytest.approx((1 + 0 + 0) / 3)
    assert found.measure("objects", "macro_recall_50").num == 2
    assert any("2 of 4 labels never occur in the truth ('bird', 'fish')" in note for note in found.notes)


def test_a_question_about_several_labels_goes_by_what_the_reply_calls_its_boxes() -> None:
    found = results(
        turn(
            [A, FAR],
            [A, FAR, A, HALF],
            asked=["dog", "cat", "bird"],
            truth_labels=["dog", "cat"],
            predicted_labels=["DOG", "dog", "bird", None],  # right; wrong name; absent object; no name
            task="detect_joint",
        )
    )
    got = values(found, "objects")
    assert [got["precision_50"], got["recall_50"]] == pytest.approx([1 / 4, 1 / 2])
    assert got["hallucinated"] == 1.0  # the one absent label, bird, was given a box
    assert got["stray"] == pytest.approx(1 / 4)
    assert values(found, "rec")["acc_50"] is None
    assert values(found, "grec")["pr_f1"] is None


def test_a_question_about_one_label_ignores_names() -> None:
    found = results(turn([A], [A], predicted_labels=["a brown dog"]))
    assert found.value("objects", "f1_50") == 1.0
    assert found.value("objects", "stray") == 0.0


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        pytest.param((0, 0, 10, 9.5), 1 / 2, id="nearly the same"),
        pytest.param((0, 0, 10, 9), 0.0, id="exactly .9 is none"),
        pytest.param(HALF, 0.0, id="half"),
    ],
)
def test_duplicates(box: tuple[float, ...], expected: float) -> None:
    assert results(turn([A], [A, box])).value("objects", "duplicates") == expected


# ---- phrases with any number of boxes


def test_grec_by_hand() -> None:
    found = results(
        turn([A, FAR], [FAR, A]),  # all
        turn([A, FAR], [A]),  # one is missing
        turn([A], [A, FAR]),  # one too many
        turn([A], []),  # says none
        turn([], []),  # rightly
        turn([], [A]),
        turn([], [], status="failed"),
    )
    assert values(found, "grec") == pytest.approx({"pr_f1": 2 / 7, "n_acc": 1 / 3, "t_acc": 3 / 4})


def test_grec_official_counts_what_cannot_be_read_as_no_box_and_is_stricter_about_overlap() -> None:
    # IoU 25/45 = .56; the hull of 10 x 9 and 5 x 5 touching corners leaves a share uncovered: GIoU is below .5.
    truth, predicted = (0, 0, 10, 4.5), (0, 0, 10, 8.5)
    assert results(turn([truth], [predicted])).value("grec", "pr_f1") == 1.0
    shifted = [(0, 0, 10, 10), (2, 1.5, 12, 11.5)]
    iou = geometry.iou_pairs(np.array(shifted[:1], float), np.array(shifted[1:], float))[0]
    giou = geometry.giou_pairs(np.array(shifted[:1], float), np.array(shifted[1:], float))[0]
    assert iou == pytest.approx(8 * 8.5 / (200 - 68))
    assert giou == pytest.approx(iou - (12 * 11.5 - 132) / (12 * 11.5))
    assert giou < 0.5 < iou
    turns = [turn(shifted[:1], shifted[1:]), turn([], [], status="failed")]
    assert values(results(*turns), "grec") == {"pr_f1": 0.5, "n_acc": 0.0, "t_acc": 1.0}
    assert values(results(*turns, grec_official=True), "grec") == {"pr_f1": 0.5, "n_acc": 1.0, "t_acc": 1.0}


# ---- how replies were read


def test_format_by_hand() -> None:
    found = results(
        turn([A], [A]),
        turn([A], [A, A], repairs=["clamped", "clamped", "prose"]),
        turn([A], [(3, 3, 3, 9)], repairs=["swapped_corners"]),
        turn([A], status="failed", repairs=["dropped_incomplete"]),
        turn([], []),
    )
    assert values(found, "format") == pytest.approx(
        {
            "strict": 1 / 5,
            "repaired": 2 / 5,
            "none_found": 1 / 5,
            "failed": 1 / 5,
            "wrong_count": 2 / 5,
            "out_of_range": 1 / 5,
            "swapped": 1 / 5,
            "no_area": 1 / 4,
            "label_exact": None,
            "repair:clamped": 1 / 5,
            "repair:dropped_incomplete": 1 / 5,
            "repair:prose": 1 / 5,
            "repair:swapped_corners": 1 / 5,
        }
    )


def test_labels_are_those_asked_for_letter_by_letter() -> None:
    def exact(**named: Any) -> float | None:
        return results(turn([A], [A], **named)).value("format", "label_exact")

    assert exact(asked=["green heart"], predicted_labels=["green heart"]) == 1
    assert exact(asked=["green heart"], predicted_labels=["green har"]) == 0
    assert exact(asked=["green heart"], predicted_labels=[None]) is None, "a family that writes no labels"
    both = results(turn([A], [A], asked=["a"], predicted_labels=["a"]), turn([A], [A, A], asked=["b"], predicted_labels=["b", "�"]))
    assert both.value("format", "label_exact") == pytest.approx(2 / 3)


# ---- edges


def test_no_truth_at_all_is_said_and_not_zero() -> None:
    found = results(turn([], []), turn([], [A]))
    assert {name: found.value("rec", name) for name in ("acc_50", "mean_iou")} == {"acc_50": None, "mean_iou": None}
    got = values(found, "objects")
    assert (got["recall_50"], got["macro_recall_50"], got["precision_50"], got["hallucinated"]) == (None, None, 0.0, 0.5)
    assert values(found, "grec") == {"pr_f1": 0.5, "n_acc": 0.5, "t_acc": None}
    assert any("No question has a true box" in note for note in found.notes)


def test_no_box_in_any_reply() -> None:
    found = results(turn([A], status="failed"), turn([A]))
    got = values(found, "objects")
    assert (got["precision_50"], got["recall_50"], got["f1_50"], got["duplicates"]) == (None, 0.0, 0.0, None)
    assert found.value("rec", "mean_iou") == 0.0
    assert found.value("format", "no_area") is None
    assert any("No reply gives a box" in note for note in found.notes)
    assert any("No question is about an absent object" in note for note in found.notes)


def test_questions_for_no_boxes_are_left_out_and_counted() -> None:
    found = results(turn([A], [A]), turn([], [], asked=[], task="caption"))
    assert found.settings["num_questions"] == 1
    assert "1 questions ask for no boxes and are not scored here." in found.notes
    with pytest.raises(ShardError, match="none that asks for boxes"):
        results(turn([], [], asked=[], task="caption"))
    with pytest.raises(ShardError, match="0 questions"):
        results()


def _without_status() -> pa.Table:
    return table(turn([A], [A])).drop_columns(["status"])


REFUSED = [
    pytest.param(_without_status(), "it lacks status: string", id="a column is missing"),
    pytest.param(table(turn([A], [A], truth_labels=["a", "b"])), "000000, question 0: found 1 truth_boxes and 2 truth_labels", id="labels"),
    pytest.param(table(turn([A], [A], scores=[0.1, 0.2])), "1 predicted_boxes and 2 predicted_scores", id="scores"),
    pytest.param(table(turn([A], [(3, 0, 1, 9)])), "predicted_boxes with", id="corners that are not in order"),
    pytest.param(table(turn([(0, 0, float("nan"), 1)], [])), "truth_boxes with", id="not a number"),
    pytest.param(table(turn([A], [A], status="fine")), "status ['fine']", id="another status"),
    pytest.param(
        table(turn([A], [A], asked=["dog", "cat"], truth_labels=["bird"])),
        "a true box of 'bird'",
        id="true boxes of what was not asked for",
    ),
    pytest.param(table(*[turn([A], [A], sample_id="x", image="x")] * 2), "x, question 0: found this question more than once", id="twice"),
]


@pytest.mark.parametrize(("turns", "message"), REFUSED)
def test_a_table_that_does_not_fit_together_is_refused(turns: pa.Table, message: str) -> None:
    with pytest.raises(ShardError) as caught:
        score(turns)
    assert message in str(caught.value)


# ---- intervals


def test_intervals_are_seeded_and_hold_the_value() -> None:
    rng = np.random.default_rng(0)
    turns = [turn([A], [A if rng.random() < 0.7 else FAR], image=f"{number // 2}") for number in range(400)]
    found = results(*turns, draws=500, seed=3)
    measure = found.measure("rec", "acc_50")
    assert measure.value is not None
    assert measure.low is not None
    assert measure.high is not None
    assert measure.low < measure.value < measure.high
    # Normal approximation: 1.96 * sqrt(.7 * .3 / 400) = .045 on each side.
    assert measure.high - measure.low == pytest.approx(0.09, abs=0.02)
    assert results(*turns, draws=500, seed=3).measures == found.measures
    assert results(*turns, draws=500, seed=4).measures != found.measures


def test_images_are_drawn_and_not_questions() -> None:
    # Ten images of forty questions each, all right or all wrong: the interval is that of ten throws, not of four hundred.
    turns = [turn([A], [A if image < 5 else FAR], image=f"{image}", turn=number) for image in range(10) for number in range(40)]
    measure = results(*turns, draws=1000).measure("rec", "acc_50")
    assert measure.low is not None
    assert measure.high is not None
    assert measure.high - measure.low == pytest.approx(2 * 1.96 * (0.25 / 10) ** 0.5, abs=0.12)


def test_the_interval_of_a_macro_mean_is_that_of_resampled_images() -> None:
    rng = np.random.default_rng(1)
    turns = [turn([A], [A if rng.random() < 0.5 else FAR], asked="ab"[number % 3 > 0], image=f"{number:03d}") for number in range(60)]
    measure = results(*turns, draws=200, seed=7).measure("objects", "macro_recall_50")
    right = np.array([row["predicted_boxes"] == [list(map(float, A))] for row in turns])
    is_a = np.array([row["asked"] == ["a"] for row in turns])
    draws = np.concatenate(
        [np.random.default_rng(7).integers(60, size=(64, 60))]
    )  # the first 64 draws, as they come: enough to see that these are the means
    expected = [(right[drawn][is_a[drawn]].mean() + right[drawn][~is_a[drawn]].mean()) / 2 for drawn in draws]
    first = results(*turns, draws=64, seed=7).measure("objects", "macro_recall_50")
    assert (first.low, first.high) == pytest.approx(tuple(np.percentile(expected, [2.5, 97.5])))
    assert measure.value == first.value == pytest.approx((right[is_a].mean() + right[~is_a].mean()) / 2)


def test_one_image_has_no_interval() -> None:
    found = results(turn([A], [A]), draws=100)
    assert all(measure.low is None and measure.high is None for measure in found.measures)


# ---- what must hold of any scores

coordinates = st.integers(0, 20)


@st.composite
def boxes(draw: st.DrawFn) -> list[int]:
    x0, y0 = draw(coordinates), draw(coordinates)
    return [x0, y0, x0 + draw(st.integers(1, 20)), y0 + draw(st.integers(1, 20))]


@st.composite
def turns_of_anything(draw: st.DrawFn) -> dict[str, Any]:
    asked = draw(st.lists(st.sampled_from(["dog", "cat", "bird"]), min_size=1, max_size=3, unique=True))
    truth, predicted = draw(st.lists(boxes(), max_size=4)), draw(st.lists(boxes(), max_size=5))
    return turn(
        truth,
        predicted,
        asked=asked,
        truth_labels=[draw(st.sampled_from(asked)) for _ in truth],
        predicted_labels=[draw(st.sampled_from([*asked, "fish", None])) for _ in predicted],
        task=draw(st.sampled_from(["refer", "detect"])),
        language=draw(st.sampled_from(["en", "zh"])),
        status=draw(st.sampled_from(["strict", "repaired"] if predicted else ["none_found", "failed"])),
        image=draw(st.sampled_from(["1", "2", "3"])),
    )


def named(turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row | {"sample_id": f"{number}"} for number, row in enumerate(turns)]


@hypothesis_settings(max_examples=60)
@given(st.lists(turns_of_anything(), min_size=1, max_size=8), st.randoms(use_true_random=False), st.booleans())
def test_the_order_of_rows_changes_nothing(turns: list[dict[str, Any]], random: Any, official: bool) -> None:
    rows = named(turns)
    shuffled = random.sample(rows, len(rows))
    first, second = (score(pa.Table.from_pylist(some, schema=SCORED_SCHEMA), draws=20, grec_official=official) for some in (rows, shuffled))
    assert json.dumps(first.to_json()) == json.dumps(second.to_json())
    assert markdown(first) == markdown(second)


@hypothesis_settings(max_examples=60)
@given(st.lists(turns_of_anything(), min_size=1, max_size=8))
def test_shares_are_shares_and_hang_together(turns: list[dict[str, Any]]) -> None:
    found = score(pa.Table.from_pylist(named(turns), schema=SCORED_SCHEMA), draws=30)
    official = score(pa.Table.from_pylist(named(turns), schema=SCORED_SCHEMA), draws=0, grec_official=True)
    for measure in found.measures:
        if measure.value is not None and measure.metric != "count_mae":
            assert 0 <= measure.value <= 1
        if measure.low is not None and measure.high is not None:
            assert measure.low <= measure.high
    got = values(found, "objects")
    for name in ("precision", "recall", "f1"):
        low, high = got[f"{name}_50_95"], got[f"{name}_50"]
        assert (low is None) == (high is None)
        assert low is None or high is None or low <= high + 1e-12
    rec = values(found, "rec")
    if rec["acc_50"] is not None:
        assert (rec["acc_90"] or 0) <= (rec["acc_75"] or 0) <= rec["acc_50"]
    # All boxes right means no box where nothing is and some where something is: never more often than those.
    grec = {name: found.measure("grec", name) for name in ("pr_f1", "n_acc", "t_acc")}
    right = sum(round((grec[name].value or 0) * grec[name].num) for name in ("n_acc", "t_acc"))
    assert round((grec["pr_f1"].value or 0) * grec["pr_f1"].num) <= right
    assert (official.value("grec", "t_acc"), official.value("rec", "acc_50")) == (grec["t_acc"].value, rec["acc_50"])


@given(st.lists(turns_of_anything(), min_size=1, max_size=8))
def test_a_perfect_reply_is_perfect_in_everything(turns: list[dict[str, Any]]) -> None:
    perfect = [
        row
        | {
            "predicted_boxes": row["truth_boxes"][::-1],
            "predicted_labels": row["truth_labels"][::-1],
            "status": "strict" if row["truth_boxes"] else "none_found",
        }
        for row in named(turns)
    ]
    found = score(pa.Table.from_pylist(perfect, schema=SCORED_SCHEMA), draws=0)
    got = {**values(found, "rec"), **values(found, "objects"), **values(found, "grec")}
    expected = {name: 0.0 if name in ("count_mae", "hallucinated", "stray", "duplicates") else 1.0 for name in got}
    distinct = all(len({tuple(box) for box in row["truth_boxes"]}) == len(row["truth_boxes"]) for row in turns)
    unsure = {"duplicates"} | ({"acc_50", "acc_75", "acc_90", "mean_iou"} if not distinct else set())
    assert {name: value for name, value in got.items() if value is not None and name not in unsure} == {
        name: expected[name] for name, value in got.items() if value is not None and name not in unsure
    }


@given(st.lists(st.tuples(boxes(), boxes()), min_size=1, max_size=10))
def test_overlap_is_symmetrical_and_generalised_overlap_is_less(pairs: list[tuple[list[int], list[int]]]) -> None:
    first, second = (np.array(column, np.float64) for column in zip(*pairs, strict=True))
    iou, giou = geometry.iou_pairs(first, second), geometry.giou_pairs(first, second)
    assert np.array_equal(iou, geometry.iou_pairs(second, first))
    assert np.allclose(giou, geometry.giou_pairs(second, first))
    assert (giou <= iou + 1e-12).all()
    assert (giou >= -1).all()
    assert geometry.giou_pairs(first, first) == pytest.approx(np.ones(len(first)))


@given(st.lists(boxes(), max_size=6), st.lists(boxes(), max_size=6))
def test_the_matching_is_what_greedy_does_one_pair_at_a_time(truth: list[list[int]], predicted: list[list[int]]) -> None:
    units = read_questions(table(turn(truth, predicted))).units
    likeness = {
        (p, t): geometry.iou_pairs(np.array([predicted[p]], float), np.array([truth[t]], float))[0]
        for p in range(len(predicted))
        for t in range(len(truth))
    }
    taken: dict[int, float] = {}
    left = dict(likeness)
    while left and max(left.values()) >= 0.5:
        best = min(left, key=lambda pair: (-left[pair], pair))
        taken[best[0]] = left[best]
        left = {pair: value for pair, value in left.items() if pair[0] != best[0] and pair[1] != best[1]}
    of_predicted, _ = units.match(units.pair_iou, 0.5)
    assert of_predicted.tolist() == [taken.get(p, -np.inf) for p in range(len(predicted))]
    for least in OBJECT_IOUS:  # a higher threshold is the same matching, cut there
        again, _ = units.match(units.pair_iou, least)
        assert again.tolist() == [value if value >= least else -np.inf for value in of_predicted.tolist()]


# ---- for people


def test_markdown_shows_every_number_and_escapes_names() -> None:
    text = markdown(results(turn([A], [A], source="a|b"), turn([A], [FAR], source="c"), draws=50))
    assert "| acc_50 | 50.0 [0.0, 100.0] | 2 |" in text
    assert "| a\\|b | 100.0 |" in text
    assert "| count_mae | 0.00 [0.00, 0.00] | 2 |" in text
    assert "| n_acc | – | 0 |" in text
    assert "- No question is about an absent object" in text
    assert all(f"## {section}" in text for section in ("rec", "objects", "grec", "format"))


def test_json_holds_everything_and_no_nan() -> None:
    found = results(turn([A], [A]), draws=20)
    read = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert len(read["measures"]) == len(found.measures)
    assert read["settings"]["bootstrap"] == {"draws": 20, "seed": 0, "unit": "image"}
    assert {"section": "rec", "by": "all", "group": "all", "metric": "acc_50", "value": 1.0, "low": None, "high": None, "num": 1} in read[
        "measures"
    ]
