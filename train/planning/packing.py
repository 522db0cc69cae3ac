"""Documents -> packs -> optimizer steps. Pure: lengths and costs in, positions out.

    documents in shuffled order ──> windows ──> packs, filled ──> sorted by cost ──> steps of global_batch ──> in hash order
                                       ^                                                        │
                                       └──────── documents of packs that make no whole step ────┘

Nothing here knows how many workers there are. A step is a fixed slice of packs of nearly one cost, laid out so that `slice[rank::world]`
is balanced for every world.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from boxcar.pipelines.ragged import IntColumn, offsets_of

FloatColumn = npt.NDArray[np.float64]


@dataclass(frozen=True)
class CostModel:
    """FLOPs of forward and backward of a document of L tokens whose images have p_i patches each:

        linear_text L + quadratic_text L^2 + linear_vision sum(p_i) + quadratic_vision sum(p_i^2)

    Only ratios matter: costs decide which packs share a step, never what is in them. The defaults are LoRA on the language model of
    Qwen2.5-VL-7B, by its config.json (28 layers of 3584 with 18944 in the MLP and 512 for keys and values; vision: 32 layers of 1280 with
    3420, 4 of them with attention over the whole image):

        linear_text       4 P: forward 2 P, backward to activations 2 P; P = 28 (2 3584^2 + 2 3584 512 + 3 3584 18944) = 6.53e9
        quadratic_text    causal attention: forward 4 3584 28 / 2, backward twice that
        linear_vision     2 P_v, forward alone as the tower rests; P_v = 32 (4 1280^2 + 3 1280 3420) + a merger of 4.5e7 for 4 patches
        quadratic_vision  4 1280 4
    """

    linear_text: float = 2.61e10
    quadratic_text: float = 6.02e5
    linear_vision: float = 1.29e9
    quadratic_vision: float = 2.05e4

    def of_documents(
        self, tokens: npt.NDArray[np.int32], patches: npt.NDArray[np.int32], patches_squared: npt.NDArray[np.float32]
    ) -> FloatColumn:
        """(D,) FLOPs. A pack costs the sum of its documents, as attention stays within a document."""
        text = (self.linear_text + self.quadratic_text * tokens) * tokens
        return np.asarray(text + self.linear_vision * patches + self.quadratic_vision * patches_squared.astype(np.float64))


@dataclass(frozen=True)
class Layout:
    """D documents in P packs in S steps, all in the order in which they are trained on."""

    documents: IntColumn
    """(D,) rows of the documents that were laid out; each once."""
    pack_offsets: IntColumn
    """(P + 1,) into `documents`."""
    step_offsets: IntColumn
    """(S + 1,) into the packs."""


def lay_out(
    lengths: npt.NDArray[np.int32],
    costs: FloatColumn,
    windows: Sequence[int],
    step_hashes: npt.NDArray[np.uint64],
    *,
    capacity: int,
    global_batch: int,
    packed: bool,
) -> Layout:
    """Every document in one pack, every pack in one step.

    lengths: (D,) tokens, at most `capacity`, in shuffled order. costs: (D,). windows: ascending stops of the windows, the last one D.
    step_hashes: at least one for each step, whose order becomes that of a window's steps. packed: False gives each document a pack.

    The emptiest packs, where they make no whole step, are opened again and their documents wait for the next window; behind the last
    window they are a last, smaller step.
    """
    documents, pack_sizes, step_sizes = [], [], []
    waiting = np.zeros(0, np.int64)
    first = num_steps = 0
    for stop in windows:
        here = np.concatenate([waiting, np.arange(first, stop)])
        first = stop
        pack_of = fill_packs(lengths[here], capacity) if packed else np.arange(len(here))
        num_packs = int(pack_of.max(initial=-1)) + 1
        tokens = np.bincount(pack_of, lengths[here], num_packs)
        # The emptiest are left over: in the next window they are filled up.
        by_tokens = np.argsort(-tokens, kind="stable")
        whole = num_packs - num_packs % global_batch
        rest = by_tokens[whole:]
        pack_costs = np.bincount(pack_of, costs[here], num_packs)
        by_cost = by_tokens[:whole][np.argsort(pack_costs[by_tokens[:whole]], kind="stable")]
        steps = by_cost.reshape(-1, global_batch)[:, _interleaved(global_batch)]
        order = np.argsort(step_hashes[num_steps : num_steps + len(steps)], kind="stable")
        num_steps += len(steps)
        sequence = steps[order].ravel()
        step_sizes.append(np.full(len(steps), global_batch))
        if stop == windows[-1] and len(rest):
            rest = rest[np.argsort(pack_costs[rest], kind="stable")][_interleaved(len(rest))]
            sequence = np.concatenate([sequence, rest])
            step_sizes.append(np.array([len(rest)]))
        # Documents by pack, packs by sequence; within a pack in shuffled order.
        place = np.full(num_packs, len(sequence))
        place[sequence] = np.arange(len(sequence))
        by_place = np.argsort(place[pack_of], kind="stable")
        sizes = np.bincount(place[pack_of], minlength=len(sequence) + 1)
        num_placed = len(here) - sizes[len(sequence)]
        documents.append(here[by_place[:num_placed]])
        pack_sizes.append(sizes[: len(sequence)])
        waiting = np.sort(here[by_place[num_placed:]])
    return Layout(np.concatenate(documents), offsets_of(np.concatenate(pack_sizes)), offsets_of(np.concatenate(step_sizes)))


def _interleaved(num_packs: int) -> IntColumn:
    """(num_packs,) order of packs sorted by cost in which `[rank::world]` is balanced: even places rising, then odd places falling.

    8 packs: 0 2 4 6 7 5 3 1. By 4 workers: 0+7, 2+5, 4+3, 6+1; by 2: 0+4+7+3, 2+6+5+1.
    """
    places = np.arange(num_packs)
    return np.concatenate([places[::2], places[1::2][::-1]])


def fill_packs(lengths: npt.NDArray[np.int32], capacity: int) -> IntColumn:
    """(D,) pack of each document, in as few packs as are found; no pack is empty. Lengths from 1 to `capacity`.

    A pack is put together by lengths: one document from an end of the distribution, the next ones a little below the mean of what is then
    left for each, and the last by best fit. That recipe is then used as often as there are documents of its lengths, so that the work grows
    with the number of distinct lengths: 100,000 documents take some 30 ms.

    Best-fit decreasing was measured and rejected. It spends all long documents on one another: of images of about one size and a few turns
    each, 95.5 % of a pack was filled, and 99 % by these recipes (4096 tokens, windows of 100,000; on broad distributions both 99.8 %).
    """
    values, counts = np.unique(lengths, return_counts=True)
    best = _best_recipes(values, counts, capacity)
    packs = np.empty(len(lengths), np.int64)
    # Documents by length; of each length, recipes take the first that are left.
    left = dict(zip(values.tolist(), offsets_of(counts)[:-1].tolist(), strict=True))
    by_length = np.empty(len(lengths), np.int64)
    first = 0
    for recipe in best:
        numbers = np.arange(first, first + recipe.times)
        for length, number in recipe.lengths.items():
            by_length[left[length] : left[length] + number * recipe.times] = np.repeat(numbers, number)
            left[length] += number * recipe.times
        first += recipe.times
    packs[np.argsort(lengths, kind="stable")] = by_length
    return packs


def count_packs(values: npt.NDArray[np.integer[Any]], counts: IntColumn, capacity: int) -> int:
    """How many packs `fill_packs` makes of so many documents of each length. values: ascending, 1 to `capacity`; counts: 1 or more."""
    return sum(recipe.times for recipe in _best_recipes(values, counts, capacity))


def _best_recipes(values: npt.NDArray[np.integer[Any]], counts: IntColumn, capacity: int) -> "list[_Recipe]":
    """The recipes of the fewest packs that a guide finds."""
    total = int(values @ counts)
    best: list[_Recipe] = []
    fewest = int(counts.sum()) + 1
    for guide in _GUIDES:
        recipes = _Stock(values, counts, capacity).recipes(guide)
        num_packs = sum(recipe.times for recipe in recipes)
        if num_packs < fewest:
            best, fewest = recipes, num_packs
        if total >= _GOOD_FILL * fewest * capacity or fewest == -(-total // capacity):
            break
    return best


_GOOD_FILL = 0.999


@dataclass(frozen=True)
class _Guide:
    """How recipes are looked for. Which way is best hangs on the distribution; each costs some milliseconds, so several are tried."""

    ends: str
    """Where the first document comes from, in turn: l(ongest) or s(hortest)."""
    shifts: Sequence[float]
    """Numbers of further documents that are tried: the remaining room over the mean length, plus each of these, rounded down."""


_GUIDES = (_Guide("l", (0.5, 0.0, 1.0)), _Guide("l", (0.5, 1.5, -0.5)), _Guide("ls", (1.0, 0.0)), _Guide("s", (0.0, 1.0)))


@dataclass(frozen=True)
class _Recipe:
    """Packs of the same lengths."""

    lengths: dict[int, int]
    """Length -> documents of it in each pack."""
    times: int


class _Stock:
    """Documents that are left, by length. The lengths that are there are bits of one integer: the longest up to x is a shift away."""

    def __init__(self, values: npt.NDArray[np.integer[Any]], counts: IntColumn, capacity: int) -> None:
        self.capacity = capacity
        self.counts: dict[int, int] = dict(zip(values.tolist(), counts.tolist(), strict=True))
        self.present = sum(1 << length for length in self.counts)
        self.num_left = int(counts.sum())
        self.tokens_left = int(values @ counts)

    def recipes(self, guide: _Guide) -> list[_Recipe]:
        """Recipes that use everything up."""
        made: list[_Recipe] = []
        while self.num_left:
            longest = guide.ends[len(made) % len(guide.ends)] == "l"
            first = self.present.bit_length() - 1 if longest else (self.present & -self.present).bit_length() - 1
            lengths = self._best(first, guide.shifts)
            times = min(self.counts[length] // number for length, number in lengths.items())
            for length, number in lengths.items():
                self._take(length, number * times)
            made.append(_Recipe(lengths, times))
        return made

    def _take(self, length: int, number: int) -> None:
        self.counts[length] -= number
        self.num_left -= number
        self.tokens_left -= number * length
        if not self.counts[length]:
            self.present ^= 1 << length

    def _best(self, first: int, shifts: Sequence[float]) -> dict[int, int]:
        """The lengths of a pack that begins with `first`: those that leave the least room."""
        ideal = (self.capacity - first) * self.num_left / self.tokens_left
        best, least = {first: 1}, self.capacity
        for number in dict.fromkeys(int(ideal + shift) for shift in shifts):
            lengths, room = self._filled(first, number)
            if room < least:
                best, least = lengths, room
            if not room:
                break
        return best

    def _filled(self, first: int, number: int) -> tuple[dict[int, int], int]:
        """(lengths, room left) of a pack of `first` and some `number` more of about one length, and then whatever fits."""
        lengths, room = {first: 1}, self.capacity - first
        while True:
            length = self._longest_up_to(room // number if number > 1 else room, lengths)
            if length:
                lengths[length] = lengths.get(length, 0) + 1
                room -= length
            elif number <= 1:
                return lengths, room
            number = number - 1 if length else 1

    def _longest_up_to(self, limit: int, taken: dict[int, int]) -> int:
        """0: there is none."""
        candidates = self.present & ((2 << limit) - 1)
        while candidates:
            length = candidates.bit_length() - 1
            if self.counts[length] > taken.get(length, 0):
                return length
            candidates ^= 1 << length
        return 0
