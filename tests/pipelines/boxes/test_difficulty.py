"""Difficulty: in [0, 1], higher where a turn is harder, the same however the data is cut."""

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from boxcar.pipelines.boxes.difficulty import NUM_BINS, bins, box_features, turn_difficulty
from boxcar.pipelines.boxes.geometry import FloatBoxes
from boxcar.schemas.record import Box, Record
from boxcar.schemas.workflow import TaskConfig
from tests.small_units import convert, image, only, record, region, rows_of, settings

SIZE, OVERLAP, THIN = range(3)


def features(boxes: list[Box], images: list[int] | None = None, tokens_per_pixel: tuple[float, float] = (1 / 28, 1 / 28)) -> FloatBoxes:
    places = np.zeros(len(boxes), np.int64) if images is None else np.array(images, np.int64)
    return box_features(np.array(boxes, np.float64).reshape(-1, 4), places, np.full((len(boxes), 2), tokens_per_pixel))


def score(box_rows: list[list[int]], *, found: FloatBoxes | None = None, words: float = 1, rivals: float = 0) -> list[float]:
    found = np.full((8, 3), 0.5) if found is None else found
    count = len(box_rows)
    scores: list[float] = turn_difficulty(found, box_rows, np.full(count, words), np.full(count, rivals)).tolist()
    return scores


# ---- features


def test_a_smaller_box_is_harder_up_to_sixteen_tokens_of_side() -> None:
    sides = [28, 56, 112, 224, 448, 896]
    sizes = [features([(0.0, 0.0, float(side), float(side))])[0, SIZE] for side in sides]
    assert sizes[:5] == sorted(sizes[:5], reverse=True)
    assert sizes[0] == pytest.approx(1 - 1 / np.log2(17))  # one token
    assert sizes[4] == pytest.approx(0)  # sixteen tokens
    assert sizes[5] == 0


def test_size_counts_in_tokens_of_the_resized_image() -> None:
    box = (0.0, 0.0, 112.0, 112.0)
    assert features([box], tokens_per_pixel=(1 / 56, 1 / 56))[0, SIZE] == pytest.approx(features([(0.0, 0.0, 56.0, 56.0)])[0, SIZE])
    wide = features([box], tokens_per_pixel=(1 / 7, 1 / 28))[0, SIZE]
    assert wide == pytest.approx(features([(0.0, 0.0, 224.0, 224.0)])[0, SIZE])


def test_overlap_is_the_largest_with_another_box_of_the_same_image() -> None:
    boxes: list[Box] = [(0, 0, 10, 10), (0, 0, 10, 20), (5, 0, 15, 10), (0, 0, 10, 10), (500, 500, 510, 510)]
    found = features(boxes, images=[0, 0, 0, 1, 0])[:, OVERLAP]
    # 0 with 1: 100 of 200. 2 with 0: 50 of 150. 1 with 2: 50 of 250. 3 is another image.
    assert found.tolist() == pytest.approx([1 / 2, 1 / 2, 1 / 3, 0, 0])


def test_thinness_is_the_same_lying_and_standing_and_ends_at_one_to_eight() -> None:
    boxes: list[Box] = [(0, 0, 10, 10), (0, 0, 20, 10), (0, 0, 10, 20), (0, 0, 80, 10), (0, 0, 1000, 10)]
    assert features(boxes)[:, THIN].tolist() == pytest.approx([0, 1 / 3, 1 / 3, 1, 1])


coordinates = st.floats(0, 4000)


@given(st.lists(st.tuples(coordinates, coordinates, coordinates, coordinates), max_size=7), st.data())
def test_features_lie_in_zero_to_one_and_do_not_depend_on_order(boxes: list[Box], data: st.DataObject) -> None:
    """Boxes without area included: a workflow may keep what it does not mend."""
    images = data.draw(st.lists(st.integers(0, 2), min_size=len(boxes), max_size=len(boxes)))
    found = features(boxes, images)
    assert found.shape == (len(boxes), 3)
    assert ((found >= 0) & (found <= 1)).all()
    order = data.draw(st.permutations(range(len(boxes))))
    again = features([boxes[row] for row in order], [images[row] for row in order])
    assert np.allclose(again, found[list(order)])
    for row in range(len(boxes)):
        others = [iou(boxes[row], boxes[other]) for other in range(len(boxes)) if other != row and images[other] == images[row]]
        assert found[row, OVERLAP] == pytest.approx(max(others, default=0.0))


def iou(first: Box, second: Box) -> float:
    def area(box: Box) -> float:
        return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])

    both = area((max(first[0], second[0]), max(first[1], second[1]), min(first[2], second[2]), min(first[3], second[3])))
    union = area(first) + area(second) - both
    return both / union if union > 0 else 0.0


# ---- scores


def test_every_feature_makes_a_turn_harder() -> None:
    [base] = score([[0]])
    for column in range(3):
        harder = np.full((1, 3), 0.5)
        harder[0, column] = 1.0
        assert score([[0]], found=harder) > [base]
    assert score([[0]], words=5) > [base]
    assert score([[0]], rivals=3) > [base]
    assert score([[0, 1]]) > [base]


def test_a_turn_is_as_hard_as_its_boxes_on_average() -> None:
    found = np.array([[0.0, 0.0, 0.0], [1.0, 1.0, 1.0], [0.5, 0.5, 0.5]])
    pair, middles = score([[0, 1]], found=found), score([[2, 2]], found=found)
    assert pair == middles


@pytest.mark.parametrize("empty", [0, 1, 2], ids=["first", "in the middle", "last"])
def test_a_turn_without_boxes_takes_none_of_its_neighbours(empty: int) -> None:
    rows = [[0], [0, 0]]
    rows.insert(empty, [])
    found = np.ones((1, 3))
    scores = score(rows, found=found, words=4)
    assert scores[empty] == pytest.approx(0.15 * 4 / 20)
    assert [scores[place] for place in range(3) if place != empty] == score([[0], [0, 0]], found=found, words=4)


def test_no_turns_have_no_scores() -> None:
    assert score([]) == []
    assert score([[], []], found=np.zeros((0, 3))) == score([[]], found=np.zeros((0, 3))) * 2


@given(
    st.lists(st.lists(st.integers(0, 4), max_size=40), max_size=5),
    st.lists(st.tuples(*[st.floats(0, 1)] * 3), min_size=5, max_size=5),
    st.floats(0, 1000),
    st.floats(0, 1000),
)
def test_scores_lie_in_zero_to_one_and_do_not_depend_on_neighbours(
    box_rows: list[list[int]], found: list[tuple[float, float, float]], words: float, rivals: float
) -> None:
    columns = np.array(found)
    together = score(box_rows, found=columns, words=words, rivals=rivals)
    assert all(0 <= value <= 1 for value in together)
    # The row of a turn is the same float32 whatever unit it was in, or the bytes would depend on the cut.
    assert together == [value for rows in box_rows for value in score([rows], found=columns, words=words, rivals=rivals)]


def test_bins_cover_zero_to_one() -> None:
    scores: npt.NDArray[np.float32] = np.array([0, 1 / NUM_BINS, 0.5, np.nextafter(np.float32(1), np.float32(0)), 1], np.float32)
    assert bins(scores).tolist() == [0, 1, NUM_BINS // 2, NUM_BINS - 1, NUM_BINS - 1]


# ---- in a row


def difficulty_of(found: Record, task: str) -> float:
    config = settings("qwen2_vl", tasks=only(**{task: TaskConfig(share=1.0)}))
    value: float = rows_of(convert(config, [found]))[0]["turns"][0]["difficulty"]
    return value


def test_one_among_many_of_its_kind_is_harder_to_find() -> None:
    dog, elsewhere = (
        region("dog", (10, 10, 60, 60), "the wet one"),
        [region("dog", (100.0 * n, 300, 100.0 * n + 50, 350)) for n in (1, 2, 3)],
    )
    cats = [region("cat", (100.0 * n, 300, 100.0 * n + 50, 350)) for n in (1, 2, 3)]
    among_dogs, among_cats = (difficulty_of(record(regions=(dog, *others)), "refer") for others in (elsewhere, cats))
    assert among_dogs == pytest.approx(among_cats + 0.25 * np.log2(4) / np.log2(17))


def test_the_same_box_is_harder_in_a_larger_picture_of_the_same_budget() -> None:
    box = (100.0, 100.0, 150.0, 150.0)
    scores = []
    for width, height in ((500, 400), (4000, 3000)):
        config = settings("qwen2_vl", tasks=only(detect=TaskConfig(share=1.0)), image_max_pixels=200_000)
        rows = rows_of(convert(config, [record(images=(image(width, height),), regions=(region("dog", box),))]))
        scores.append(rows[0]["turns"][0]["difficulty"])
    assert scores[0] < scores[1]


def test_longer_words_and_described_boxes_count() -> None:
    short, long = record(captions=("A dog.",)), record(captions=("A wet dog in the rain looks up.",))
    assert difficulty_of(long, "caption") == pytest.approx(difficulty_of(short, "caption") * 4)
    small, large = (record(regions=(region("dog", box),)) for box in ((10, 10, 30, 30), (10, 10, 400, 400)))
    assert difficulty_of(small, "describe") > difficulty_of(large, "describe")
