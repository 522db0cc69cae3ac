"""A row and a choice of its turns -> one document: ids, labels, positions, and where its images come from. Pure numpy, no image is opened.

    header | question answer_open ANSWER TURN_CLOSE | turn_open question answer_open ANSWER TURN_CLOSE        capitals: labels

The ids are those that the conversion counted (`schemas.row`); nothing is encoded here. A turn is there whole or not at all.

Labels. An answer is trained with what closes its turn: `<|im_end|>` and the newline after it for ChatML (the rule of Qwen's finetuning
code), `</s>` for CogVLM. Everything else has weight 0, and so has the first token of a document, which nothing precedes: in a pack, no
document is predicted from another.

Qwen-VL v1 (`Network.trains_frame`) follows its own finetune.py: system and user messages are masked, **but the `<|im_start|>`, `<|im_end|>`
and newline around them are trained**, and so is the `<|im_start|>` of the assistant; the role's name and the newline behind it are not.
Here that is turn_open_ids[0] and every occurrence of turn_close_ids in header, turn_open, question and answer_open; they weigh as words of
the turn that they belong to, the header's as words of the first turn.

Weight of a label = turn.weight * loss.tasks[task] * (loss.coordinates or loss.words).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from boxcar.schemas.errors import ShardError
from boxcar.schemas.task import TASK_NAMES
from boxcar.train.data.positions import Placed, positions_of

if TYPE_CHECKING:  # the training loop imports this module where there is torch and numpy and little else
    from boxcar.pipelines.families.family import Network
    from boxcar.schemas.contract import FrameContract
    from boxcar.schemas.training import LossConfig

NUM_QUARTILES = 4
GROUPS_PER_TASK = 2 * NUM_QUARTILES
NUM_GROUPS = len(TASK_NAMES) * GROUPS_PER_TASK
NO_LABEL = -1
"""Group of a token that is not a label."""

Quantiles = npt.NDArray[np.uint16]
"""(tasks, bins of raw difficulty): quantile among the turns of the task in 1/65535, as `train.planning.index.quantile_tables` makes it."""


@dataclass(frozen=True)
class ImageSlot:
    """Where an image of a document comes from and what it must become. Equal slots mean equal pixels."""

    path: str | None
    """Joined with the root of its folder's images, or a URI; None where it is embedded."""
    folder: int
    """Number of the folder of shards that the row stands in."""
    shard: int
    """Number of the image shard; -1 where it is referenced."""
    shard_row: int
    size_wh: tuple[int, int]
    """Pixels of the upright original."""
    resized_wh: tuple[int, int]
    """Pixels that the model sees."""
    grid_thw: tuple[int, int, int]
    """Patches."""
    where: str
    """Row and image, for messages."""


@dataclass(frozen=True)
class Document:
    """One sample as the model reads it. L tokens, P rows of positions (`train.data.positions.NUM_ROWS`)."""

    sample_id: str
    row: int
    """Number over all folders; -1 where it was not read from a store."""
    input_ids: npt.NDArray[np.int64]
    """(L,), every image token expanded to its placeholders."""
    label_weights: npt.NDArray[np.float32]
    """(L,): weight of predicting this token from those before it; 0 where it is no label."""
    label_groups: npt.NDArray[np.int16]
    """(L,): what kind of label it is, for reporting (`group_name`, `group_quartile`); NO_LABEL where the weight is 0."""
    positions: npt.NDArray[np.int64]
    """(P, L)."""
    images: tuple[ImageSlot, ...]
    """In the order of their placeholders."""

    def __len__(self) -> int:
        return len(self.input_ids)


def group_of(task: str, quartile: int, *, is_coordinate: bool) -> int:
    """The group of a label; `quartile`: 0 (easiest) to 3."""
    return TASK_NAMES.index(task) * GROUPS_PER_TASK + is_coordinate * NUM_QUARTILES + quartile


def group_name(group: int) -> str:
    """Task and token class of a group: "detect/coordinates", "caption/words"."""
    task, rest = divmod(group, GROUPS_PER_TASK)
    return f"{TASK_NAMES[task]}/{'coordinates' if rest >= NUM_QUARTILES else 'words'}"


def group_quartile(group: int) -> int:
    """Difficulty quartile of a group, 0 (easiest) to 3, among all turns of its task."""
    return group % NUM_QUARTILES


def compose(
    row: Mapping[str, Any], turns: Sequence[int], contract: "FrameContract", network: "Network", weights: "LossConfig", quantiles: Quantiles
) -> Document:
    """The document of these turns of a row, in this order.

    row: fields of `schemas.row.ROW_SCHEMA` (lists or arrays), image paths joined; `row` and `folder` where a store knows them.
    turns: places in row["turns"]; all in their order where the row is `ordered`, one where the contract says one_question_per_image.
    Raises ShardError where the row does not hold as many image tokens as images, or where the plan asks for turns that it does not have.
    """
    _check(row, turns, contract)
    parts = _Parts(contract, network)
    chosen = [row["turns"][number] for number in turns]
    kinds = [_label_kind(turn, weights, quantiles) for turn in chosen]
    parts.add(row["header_ids"], kinds[0])
    for number, (turn, kind) in enumerate(zip(chosen, kinds, strict=True)):
        if number:
            parts.add(contract.turn_open_ids, kind)
        parts.add(turn["prompt_ids"], kind)
        parts.add(contract.answer_open_ids, kind)
        parts.add_answer(turn["answer_ids"], turn["answer_is_coordinate"], kind)
    return parts.document(row)


def prompt_of(row: Mapping[str, Any], number: int, contract: "FrameContract", network: "Network") -> Document:
    """What stands before the answer of turn `number`, without labels: what training fed the network up to there. A dialogue's earlier
    turns come with their own answers. Raises ShardError where the row does not hold as many image tokens as images."""
    parts = _Parts(contract, network)
    nothing = _LabelKind(0.0, 0.0, NO_LABEL, NO_LABEL)
    parts.add(row["header_ids"], nothing)
    before = range(number) if row["ordered"] and not contract.one_question_per_image else range(0)
    for earlier in before:
        turn = row["turns"][earlier]
        parts.add(turn["prompt_ids"], nothing)
        parts.add(contract.answer_open_ids, nothing)
        parts.add_answer(turn["answer_ids"], turn["answer_is_coordinate"], nothing)
        parts.add(contract.turn_open_ids, nothing)
    parts.add(row["turns"][number]["prompt_ids"], nothing)
    parts.add(contract.answer_open_ids, nothing)
    if row["ordered"]:  # a dialogue shows its images as it goes
        row = {**row, "images": row["images"][: parts.num_images]}
    return parts.document(row)


def _check(row: Mapping[str, Any], turns: Sequence[int], contract: "FrameContract") -> None:
    num_turns = len(row["turns"])
    whole = row["ordered"] and not contract.one_question_per_image
    fits = list(turns) == list(range(num_turns)) if whole else len(set(turns)) == len(turns) > 0 and all(0 <= t < num_turns for t in turns)
    if not fits or (contract.one_question_per_image and len(turns) != 1):
        raise ShardError(
            f"row {row['sample_id']}",
            found=f"a plan that takes turns {list(turns)} of {num_turns}",
            expected="all in their order, of a dialogue" if whole else "turns that the row has, each once",
            fix="The plan was made from other shards: plan again.",
        )


@dataclass(frozen=True)
class _LabelKind:
    """What the labels of one turn weigh, and their groups."""

    words: float
    coordinates: float
    words_group: int
    coordinates_group: int


def _label_kind(turn: Mapping[str, Any], weights: "LossConfig", quantiles: Quantiles) -> _LabelKind:
    task = turn["task"]
    scale = float(turn["weight"]) * weights.tasks.get(task, 1.0)
    of_task = quantiles[TASK_NAMES.index(task)]
    number = min(int(float(turn["difficulty"]) * len(of_task)), len(of_task) - 1)  # the bin, as `pipelines.boxes.difficulty.bins` has it
    quartile = int(of_task[number]) * NUM_QUARTILES >> 16
    words, coordinates = (group_of(task, quartile, is_coordinate=flag) for flag in (False, True))
    return _LabelKind(scale * weights.words, scale * weights.coordinates, words, coordinates)


class _Parts:
    """Stretches of ids with their labels, one image token still standing for each image."""

    def __init__(self, contract: "FrameContract", network: "Network") -> None:
        self.contract = contract
        self.network = network
        self.close = np.asarray(contract.turn_close_ids, np.int64)
        self.ids: list[npt.NDArray[np.int64]] = []
        self.weights: list[npt.NDArray[np.float32]] = []
        self.groups: list[npt.NDArray[np.int16]] = []
        self.is_image: list[npt.NDArray[np.bool_]] = []

    def add(self, ids: Sequence[int] | npt.NDArray[Any], kind: _LabelKind) -> None:
        """A question, or what stands around one: no label, but for a family that trains its frame."""
        values = np.asarray(ids, np.int64)
        trained = self._trained(values) if self.network.trains_frame else np.zeros(len(values), np.bool_)
        self._append(values, trained * kind.words, np.full(len(values), kind.words_group), values == self.contract.image_token_id)

    def _trained(self, values: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        trained = np.asarray(values == self.contract.turn_open_ids[0])
        for start in range(len(values) - len(self.close) + 1):
            stop = start + len(self.close)
            if values[start] == self.close[0] and np.array_equal(values[start:stop], self.close):
                trained[start:stop] = True
        return trained

    def add_answer(self, ids: Sequence[int] | npt.NDArray[Any], is_coordinate: Any, kind: _LabelKind) -> None:
        values = np.concatenate([np.asarray(ids, np.int64), self.close])
        numbers = np.zeros(len(values), np.bool_)
        numbers[: len(ids)] = is_coordinate
        weights = np.where(numbers, kind.coordinates, kind.words)
        # An id of an answer never stands for an image, whatever it is.
        self._append(values, weights, np.where(numbers, kind.coordinates_group, kind.words_group), np.zeros(len(values), np.bool_))

    def _append(
        self, ids: npt.NDArray[np.int64], weights: npt.NDArray[Any], groups: npt.NDArray[Any], is_image: npt.NDArray[np.bool_]
    ) -> None:
        self.ids.append(ids)
        self.weights.append(weights.astype(np.float32))
        self.groups.append(groups.astype(np.int16))
        self.is_image.append(is_image)

    @property
    def num_images(self) -> int:
        return sum(int(flags.sum()) for flags in self.is_image)

    def document(self, row: Mapping[str, Any]) -> Document:
        slots = image_slots(row)
        is_image = np.concatenate(self.is_image)
        if int(is_image.sum()) != len(slots):
            raise ShardError(
                f"row {row['sample_id']}",
                found=f"{int(is_image.sum())} image tokens for {len(slots)} images",
                expected="one for each",
                fix="Run `boxcar verify` on the shards; if they are whole, convert again.",
            )
        repeats = np.ones(len(is_image), np.int64)
        repeats[is_image] = [image["visual_tokens"] + self.contract.extra_placeholders for image in row["images"]]
        stops = np.cumsum(repeats)
        weights = np.repeat(np.concatenate(self.weights), repeats)
        weights[0] = 0
        placed = [
            Placed(int(stop - count), int(count), _merged_hw(image))
            for stop, count, image in zip(stops[is_image], repeats[is_image], row["images"], strict=True)
        ]
        return Document(
            sample_id=row["sample_id"],
            row=row.get("row", -1),
            input_ids=np.repeat(np.concatenate(self.ids), repeats),
            label_weights=weights,
            label_groups=np.where(weights > 0, np.repeat(np.concatenate(self.groups), repeats), np.int16(NO_LABEL)),
            positions=positions_of(self.network.positions, int(stops[-1]), placed),
            images=slots,
        )


def _merged_hw(image: Mapping[str, Any]) -> tuple[int, int]:
    """Grid of visual tokens: patches are merged alike in both directions."""
    height, width = image["grid_h"], image["grid_w"]
    merge = math.isqrt(height * width // image["visual_tokens"])
    return height // merge, width // merge


def image_slots(row: Mapping[str, Any]) -> tuple[ImageSlot, ...]:
    """The images of a row."""
    return tuple(_slot(row, number, image) for number, image in enumerate(row["images"]))


def _slot(row: Mapping[str, Any], number: int, image: Mapping[str, Any]) -> ImageSlot:
    path, shard = image["path"], image["shard"]
    named = path if shard is None else f"image shard {shard}, row {image['shard_row']}"
    return ImageSlot(
        path=path if shard is None else None,
        folder=row.get("folder", 0),
        shard=-1 if shard is None else shard,
        shard_row=-1 if shard is None else image["shard_row"],
        size_wh=(image["width"], image["height"]),
        resized_wh=(image["resized_width"], image["resized_height"]),
        grid_thw=(image["grid_t"], image["grid_h"], image["grid_w"]),
        where=f"sample {row['sample_id']} (row {row.get('row', '?')}), image {number + 1} of {len(row['images'])} ({named})",
    )
