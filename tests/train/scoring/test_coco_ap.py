"""COCO's numbers by hand, and what the score rules do to them."""

import sys

import numpy as np
import pytest

from boxcar.schemas.errors import ConfigError
from boxcar.train.scoring.coco_ap import STATS, coco_ap
from tests.train.scoring.small_scores import table, turn

pytest.importorskip("faster_coco_eval", reason="needs the extra `eval`")

A, FAR, OTHER = (0, 0, 40, 40), (50, 50, 90, 90), (0, 50, 40, 90)


def test_one_right_and_one_wrong_box_by_hand() -> None:
    # One label, two true boxes in two images. Ranked: right (.9), wrong (.8), right (.7).
    # Precision at recall .5 is 1, at recall 1 it is 2/3. COCO reads it at 101 recalls: 51 of them up to .5, 50 beyond.
    turns = table(
        turn([A], [A, FAR], scores=[0.9, 0.8], task="detect"),
        turn([A], [A], scores=[0.7], task="detect"),
    )
    found = coco_ap(turns, "logprob")
    expected = (51 * 1 + 50 * 2 / 3) / 101
    assert {name: found.stats[name] for name in ("AP", "AP50", "AP75", "AP_medium")} == pytest.approx(
        dict.fromkeys(("AP", "AP50", "AP75", "AP_medium"), expected)
    )
    assert {name: found.stats[name] for name in ("AR_1", "AR_10", "AR_100", "AR_medium")} == dict.fromkeys(
        ("AR_1", "AR_10", "AR_100", "AR_medium"), 1.0
    )
    assert {name: found.stats[name] for name in ("AP_small", "AP_large", "AR_small", "AR_large")} == dict.fromkeys(
        ("AP_small", "AP_large", "AR_small", "AR_large")
    )
    assert tuple(found.stats) == STATS
    assert (found.warning, found.num_labels, found.num_images) == ("", 1, 2)


def test_a_box_that_is_half_right_counts_at_the_low_thresholds_alone() -> None:
    found = coco_ap(table(turn([A], [(0, 0, 40, 26)], task="detect")), "const")  # IoU .65: right at .5, .55, .6 and .65
    assert (found.stats["AP50"], found.stats["AP75"]) == (1.0, 0.0)
    assert found.stats["AP"] == pytest.approx(4 / 10)


def test_rank_takes_the_order_of_the_reply_for_confidence() -> None:
    early = coco_ap(table(turn([A], [A, FAR, OTHER], task="detect")), "rank")
    late = coco_ap(table(turn([A], [OTHER, FAR, A], task="detect")), "rank")
    assert early.stats["AP50"] == pytest.approx(1.0)
    assert late.stats["AP50"] == pytest.approx(1 / 3)
    assert "no confidence" in early.warning


def test_constant_scores_are_no_average_precision_and_say_so() -> None:
    rng = np.random.default_rng(0)
    turns = []
    for number in range(200):
        # Right boxes have higher scores, as a model that knows something would give them.
        boxes = [A if rng.random() < 0.6 else FAR, OTHER] if rng.random() < 0.7 else [A]
        scores = [rng.normal(1.0 if box == A else 0.0) for box in boxes]
        turns.append(turn([A], boxes, scores=scores, task="detect", image=f"{number}"))
    informed, constant = coco_ap(table(*turns), "logprob"), coco_ap(table(*turns), "const")
    assert informed.stats["AP50"] is not None
    assert constant.stats["AP50"] is not None
    assert constant.stats["AP50"] < informed.stats["AP50"] - 0.1
    assert constant.stats["AR_100"] == informed.stats["AR_100"]
    assert "not an average precision" in constant.warning
    # The rule is what makes the difference: equal scores kept with the replies give what the rule const gives.
    same = [row | {"predicted_scores": [1.0] * len(row["predicted_boxes"])} for row in turns]
    assert coco_ap(table(*same), "logprob").stats == constant.stats


def test_labels_are_told_apart_in_joint_questions() -> None:
    found = coco_ap(
        table(
            turn(
                [A, FAR],
                [A, FAR, OTHER],
                asked=["dog", "cat"],
                truth_labels=["dog", "cat"],
                predicted_labels=["dog", "dog", "fish"],  # right; a dog where the cat is; nothing that was asked for
                task="detect_joint",
            )
        ),
        "const",
    )
    # dog: one right, one false, tied and in the order of the reply: AP 1. cat: never found: AP 0.
    assert found.stats["AP50"] == pytest.approx(0.5)


def test_false_boxes_of_an_absent_thing_cost_where_its_label_occurs() -> None:
    turns = [turn([A], [A], scores=[0.1], task="detect")]
    assert coco_ap(table(*turns), "logprob").stats["AP50"] == pytest.approx(1.0)
    turns.append(turn([], [A], scores=[0.2], task="absent"))
    assert coco_ap(table(*turns), "logprob").stats["AP50"] == pytest.approx(0.5)


def test_the_same_question_twice_about_an_image_counts_its_boxes_once_each() -> None:
    turns = [turn([A], [A], image="1", sample_id="1", turn=number, task="detect") for number in range(2)]
    assert coco_ap(table(*turns), "const").stats["AP50"] == pytest.approx(1.0)


def test_more_than_ten_boxes_are_seen() -> None:
    truth = [(x * 9, 0, x * 9 + 8, 50) for x in range(11)]
    found = coco_ap(table(turn(truth, truth, task="detect")), "const")
    assert found.stats["AP"] == pytest.approx(1.0)
    assert (found.stats["AR_1"], found.stats["AR_10"], found.stats["AR_100"]) == pytest.approx((1 / 11, 10 / 11, 1.0))


def test_no_box_and_no_truth() -> None:
    assert coco_ap(table(turn([A], [], task="detect")), "const").stats["AP"] == 0.0
    assert set(coco_ap(table(turn([], [A], task="absent")), "const").stats.values()) == {None}


def test_what_cannot_be_computed_is_said() -> None:
    with pytest.raises(ConfigError, match="1 of 2 replies with boxes but without scores"):
        coco_ap(table(turn([A], [A], task="detect"), turn([A], [A], scores=[0.1], task="detect")), "logprob")
    with pytest.raises(ConfigError, match="no question about categories"):
        coco_ap(table(turn([A], [A], task="refer")), "const")


def test_without_the_extra_the_way_out_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    with pytest.raises(ConfigError, match="pip install"):
        coco_ap(table(turn([A], [A], task="detect")), "const")
