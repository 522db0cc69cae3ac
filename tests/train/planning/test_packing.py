"""Packs: every document once, none too full, well filled; steps of one cost that every number of workers cuts evenly."""

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from boxcar.tools.bench.planning import synthetic_index
from boxcar.train.planning.packing import CostModel, Layout, fill_packs, lay_out
from boxcar.train.planning.sampling import mix

LENGTHS = st.lists(st.integers(1, 300), min_size=1, max_size=200)


def tokens_of_packs(lengths: list[int], packs: npt.NDArray[np.int64]) -> list[float]:
    return list(np.bincount(packs, lengths).tolist())


@given(LENGTHS, st.integers(300, 1000))
def test_every_document_has_a_pack_and_no_pack_is_too_full_or_empty(lengths: list[int], capacity: int) -> None:
    tokens = tokens_of_packs(lengths, fill_packs(np.array(lengths, np.int32), capacity))
    assert sum(tokens) == sum(lengths)
    assert 0 < min(tokens) <= max(tokens) <= capacity


@given(LENGTHS, st.integers(300, 1000))
def test_never_more_than_twice_the_packs_that_are_needed(lengths: list[int], capacity: int) -> None:
    packs = fill_packs(np.array(lengths, np.int32), capacity)
    assert packs.max() + 1 <= 2 * sum(lengths) / capacity + 1


@pytest.mark.parametrize(
    ("lengths", "capacity", "num_packs"),
    [
        pytest.param([10], 10, 1, id="one that fills a pack"),
        pytest.param([6, 6, 6], 10, 3, id="none beside another"),
        pytest.param([7, 7, 3, 3], 10, 2, id="pairs"),
        pytest.param([6, 5, 5, 4], 10, 2, id="pairs that best-fit decreasing finds, too"),
        pytest.param([5] * 9, 10, 5, id="all of one length"),
        pytest.param([1] * 1000, 100, 10, id="many small ones"),
        pytest.param([8, 7, 6, 4, 3, 2], 10, 3, id="three perfect pairs"),
    ],
)
def test_small_sets_are_packed_as_well_as_can_be(lengths: list[int], capacity: int, num_packs: int) -> None:
    assert fill_packs(np.array(lengths, np.int32), capacity).max() + 1 == num_packs


@pytest.mark.parametrize(
    ("low", "high", "fill"),
    [
        pytest.param(300, 1000, 0.998, id="broad"),
        pytest.param(600, 800, 0.98, id="narrow, where best-fit decreasing fills 93 %"),
        pytest.param(411, 591, 0.998, id="images of one size"),
        pytest.param(100, 4096, 0.99, id="up to the capacity"),
    ],
)
def test_packs_of_a_window_are_full(low: int, high: int, fill: float) -> None:
    lengths = np.random.default_rng(0).integers(low, high + 1, 50_000).astype(np.int32)
    packs = fill_packs(lengths, 4096)
    assert lengths.sum() / 4096 / (packs.max() + 1) > fill


def layout_of(lengths: list[int], windows: list[int], global_batch: int, *, packed: bool = True, capacity: int = 300) -> Layout:
    tokens = np.array(lengths, np.int32)
    costs = CostModel().of_documents(tokens, tokens, tokens.astype(np.float32))
    hashes = mix(np.arange(len(lengths) + 1, dtype=np.uint64))
    return lay_out(tokens, costs, windows, hashes, capacity=capacity, global_batch=global_batch, packed=packed)


@given(LENGTHS, st.integers(1, 60), st.integers(1, 9), st.booleans())
def test_the_layout_holds_every_document_once_in_whole_steps(lengths: list[int], window: int, global_batch: int, packed: bool) -> None:
    windows = [*range(window, len(lengths), window), len(lengths)]
    layout = layout_of(lengths, windows, global_batch, packed=packed)
    assert sorted(layout.documents.tolist()) == list(range(len(lengths)))
    assert layout.pack_offsets[-1] == len(lengths)
    assert layout.step_offsets[-1] == len(layout.pack_offsets) - 1
    sizes = np.diff(layout.step_offsets)
    assert (sizes[:-1] == global_batch).all()
    assert 0 < sizes[-1] <= global_batch
    tokens = np.add.reduceat(np.array(lengths)[layout.documents], layout.pack_offsets[:-1])
    assert tokens.max() <= 300
    if not packed:
        assert (np.diff(layout.pack_offsets) == 1).all()


def test_documents_stay_in_their_window_but_for_those_of_the_packs_left_over() -> None:
    rng = np.random.default_rng(0)
    layout = layout_of(rng.integers(10, 200, 4000).tolist(), [1000, 2000, 3000, 4000], 8)
    windows = layout.documents // 1000
    assert (np.diff(windows) < 0).mean() < 0.05
    assert (np.diff(windows) > 1).sum() == 0


@pytest.mark.parametrize("world", [1, 2, 4, 8, 16])
def test_every_power_of_two_of_workers_gets_the_same_cost(world: int) -> None:
    lengths = np.arange(16 * 100) % 251 + 40
    layout = layout_of(lengths.tolist(), [len(lengths)], 16, packed=False)
    costs = lengths[layout.documents].reshape(-1, 16)
    by_rank = np.stack([costs[:, rank::world].sum(axis=1) for rank in range(world)], axis=1)
    assert (by_rank.max(axis=1) / by_rank.mean(axis=1) - 1).mean() < 0.03


def test_the_packs_of_a_step_cost_nearly_the_same() -> None:
    index = synthetic_index(20_000, 4)
    lengths = (index.base_tokens + index.turn_tokens.reshape(-1, 4).sum(axis=1)).astype(np.int32)
    costs = CostModel().of_documents(lengths, index.num_patches, index.patches_squared)
    hashes = mix(np.arange(2000, dtype=np.uint64))
    layout = lay_out(lengths, costs, [20_000], hashes, capacity=4096, global_batch=16, packed=True)
    packs = np.add.reduceat(costs[layout.documents], layout.pack_offsets[:-1])
    steps = packs[: len(packs) // 16 * 16].reshape(-1, 16)
    assert np.median(steps.max(axis=1) / steps.mean(axis=1)) < 1.002
    assert packs.max() / packs.min() > 1.05, "without sorting they would not"


def test_steps_of_a_window_are_not_in_order_of_cost() -> None:
    lengths = np.random.default_rng(0).integers(10, 250, 2000)
    layout = layout_of(lengths.tolist(), [2000], 4, packed=False)
    means = lengths[layout.documents].reshape(-1, 4).mean(axis=1)
    assert abs(np.corrcoef(np.arange(len(means)), means)[0, 1]) < 0.1


@pytest.mark.parametrize(
    ("tokens", "patches", "flops"),
    [
        pytest.param(1000, [], 2.61e10 * 1000 + 6.02e5 * 1e6, id="text alone"),
        pytest.param(1000, [1564], 2.61e10 * 1000 + 6.02e5 * 1e6 + 1.29e9 * 1564 + 2.05e4 * 1564**2, id="one image"),
        pytest.param(9, [10, 20], 2.61e10 * 9 + 6.02e5 * 81 + 1.29e9 * 30 + 2.05e4 * 500, id="images apart from each other"),
    ],
)
def test_cost_by_hand(tokens: int, patches: list[int], flops: float) -> None:
    squared = np.array([sum(patch**2 for patch in patches)], np.float32)
    found = CostModel().of_documents(np.array([tokens], np.int32), np.array([sum(patches)], np.int32), squared)
    assert found.tolist() == pytest.approx([flops], rel=1e-6)
