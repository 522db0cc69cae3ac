"""Agreement and intervals against published and hand-worked figures."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from boxcar.train.scoring.agreement import cohen_kappa, wilson_interval


def test_kappa_by_hand() -> None:
    # 50 grant proposals: 20 both yes, 15 both no, 5 and 10 apart. Observed .7; chance .5 * .6 + .5 * .4 = .5; kappa .4.
    first = ["yes"] * 25 + ["no"] * 25
    second = ["yes"] * 20 + ["no"] * 5 + ["yes"] * 10 + ["no"] * 15
    found = cohen_kappa(first, second)
    assert [found.observed, found.expected, found.num] == pytest.approx([0.7, 0.5, 50])
    assert found.kappa == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        pytest.param([1, 2, 3, 4], [1, 2, 3, 4], 1.0, id="always"),
        pytest.param([1, 2], [2, 1], -1.0, id="never"),
        pytest.param([1, 1, 2, 2], [1, 2, 1, 2], 0.0, id="as by chance"),
        pytest.param([1, 1, 1], [1, 1, 1], None, id="one answer only"),
        pytest.param([1, 1], [2, 2], 0.0, id="one answer each, another"),
    ],
)
def test_kappa_at_its_edges(first: list[int], second: list[int], expected: float | None) -> None:
    assert cohen_kappa(first, second).kappa == expected


@pytest.mark.parametrize(("first", "second"), [([], []), ([1], [1, 2])])
def test_kappa_refuses_ratings_that_do_not_pair(first: list[int], second: list[int]) -> None:
    with pytest.raises(ValueError, match="expected as many of both"):
        cohen_kappa(first, second)


ratings = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=40)


@given(ratings, st.permutations([1, 2, 3, 4]))
def test_kappa_is_symmetrical_and_blind_to_names(pairs: list[tuple[int, int]], names: list[int]) -> None:
    first, second = [a for a, _ in pairs], [b for _, b in pairs]
    found = cohen_kappa(first, second)
    assert cohen_kappa(second, first) == found
    renamed = cohen_kappa([names[a - 1] for a in first], [names[b - 1] for b in second])
    assert renamed.kappa == pytest.approx(found.kappa)
    assert found.kappa is None or -1 <= found.kappa <= 1


@pytest.mark.parametrize(
    ("hits", "num", "expected"),
    [
        # Newcombe 1998, table I, method 3 (score without continuity correction).
        pytest.param(81, 263, (0.2553, 0.3662), id="81 of 263"),
        pytest.param(15, 148, (0.0624, 0.1605), id="15 of 148"),
        pytest.param(0, 20, (0.0, 0.1611), id="0 of 20"),
        pytest.param(1, 29, (0.0061, 0.1718), id="1 of 29"),
        pytest.param(0, 0, (0.0, 1.0), id="nothing known"),
        pytest.param(20, 20, (0.8389, 1.0), id="all"),
    ],
)
def test_wilson_against_published_figures(hits: int, num: int, expected: tuple[float, float]) -> None:
    assert wilson_interval(hits, num) == pytest.approx(expected, abs=5e-5)


@given(st.integers(1, 2000).flatmap(lambda num: st.tuples(st.integers(0, num), st.just(num))), st.floats(0.5, 0.99))
def test_wilson_holds_the_rate_and_mirrors(drawn: tuple[int, int], confidence: float) -> None:
    hits, num = drawn
    low, high = wilson_interval(hits, num, confidence)
    assert 0 <= low <= hits / num <= high <= 1
    mirrored = wilson_interval(num - hits, num, confidence)
    assert mirrored == pytest.approx((1 - high, 1 - low))


@pytest.mark.parametrize(("hits", "num", "confidence"), [(-1, 3, 0.95), (4, 3, 0.95), (1, 3, 1.0), (1, 3, 0.0)])
def test_wilson_refuses_what_is_no_rate(hits: int, num: int, confidence: float) -> None:
    with pytest.raises(ValueError, match="expected 0 <= hits <= num"):
        wilson_interval(hits, num, confidence)
