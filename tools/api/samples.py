"""`boxcar.load`: shards as a map-style dataset of samples. Needs no torch; an image is opened only when it is asked for."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt
from PIL import Image

from boxcar.pipelines.families.catalog import find_family
from boxcar.pipelines.families.family import Family
from boxcar.pipelines.images.image_file import decode_image, load_image, resize_image
from boxcar.pipelines.tokens.frame import Frame, frame_of
from boxcar.schemas.contract import FrameContract
from boxcar.schemas.task import TaskName
from boxcar.train.data.messages import question_parts, system_prompt
from boxcar.train.data.store import Row, ShardStore

Message = dict[str, Any]
"""{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "..."}]}: what transformers' chat templates and TRL take."""


@dataclass(frozen=True, eq=False)
class SampleImage:
    """One image of a sample."""

    path: str | None
    """Local path or URI; None where the shards hold the image's bytes."""
    size_wh: tuple[int, int]
    """Width and height in pixels of the original image, upright after EXIF."""
    resized_size_wh: tuple[int, int]
    """Width and height in pixels of the image as the model sees it."""
    num_visual_tokens: int
    """Tokens that carry the image, without the tokens that open and close it."""
    _store: ShardStore
    _folder: int
    _shard: tuple[int, int] | None

    def open(self) -> Image.Image:
        """The original image: upright, 8-bit RGB. Where the shards were written with `image_storage: embed_resized`, the resized one.

        Raises ImageError where it cannot be read, ShardError where the shard is damaged.
        """
        if self.path is not None:
            return load_image(self.path)
        assert self._shard is not None, "an image has a path or a place in an image shard"
        shard, row = self._shard
        where = f"{self._store.folders[self._folder].path}, image shard {shard}, row {row}"
        return decode_image(self._store.image_bytes(self._folder, shard, row), where)

    def open_resized(self) -> Image.Image:
        """The image at `resized_size_wh`, by the resize of the family's own processor. Raises what `open` raises."""
        image = self.open()
        return image if image.size == self.resized_size_wh else resize_image(image, self.resized_size_wh)


@dataclass(frozen=True, eq=False)
class SampleTurn:
    """One question and its answer."""

    task: TaskName
    language: str
    """Of the question: en or zh."""
    question: str
    answer: str
    labels: tuple[str, ...]
    """(N,) label of each box; of a turn about something absent, the label that was asked for."""
    boxes_xyxy_px: npt.NDArray[np.float64]
    """(N, 4) float64, pixels of the upright original image; the boxes of the question, then those of the answer."""
    boxes_in_text: npt.NDArray[np.int64]
    """(N, 4) int64, the numbers that stand in question and answer, in the family's units (pixels of the resized image, thousandths ...)."""
    image_index: int
    """Image of the sample that the boxes belong to; -1 where they belong to several or there are none."""
    num_tokens: int
    """Of question and answer, without what stands around them."""
    difficulty: float
    """In [0, 1], before it is turned into a quantile."""
    weight: float
    """Of the turn in the loss."""


@dataclass(frozen=True, eq=False)
class Sample:
    """One row of the shards: images, and turns about them."""

    sample_id: str
    source: str
    split: str
    position: str
    """Where the record stands in the annotation file."""
    images: tuple[SampleImage, ...]
    turns: tuple[SampleTurn, ...]
    ordered: bool
    """True: a dialogue, whose turns belong together in this order. False: every subset of the turns is a training example."""
    num_tokens: int
    """Length of the sequence with all turns."""
    num_visual_tokens: int
    """Image placeholders among them."""
    _row: Row
    _frame: Callable[[], Frame]

    @cached_property
    def messages(self) -> list[Message]:
        """System prompt (where there is one), questions and answers of all turns. Images stand as {"type": "image"}, in the order of
        `images`. Reads the system prompt by the tokenizer of the conversion: raises TokenizerError or ContractError where that is gone."""
        frame = self._frame()
        questions = question_parts(frame.family, self._row, [turn.question for turn in self.turns])
        system = system_prompt(frame, self._row)
        found: list[Message] = [] if system is None else [{"role": "system", "content": [_text(system)]}]
        for parts, turn in zip(questions, self.turns, strict=True):
            found.append({"role": "user", "content": [{"type": "image"} if part is None else _text(part) for part in parts]})
            found.append({"role": "assistant", "content": [_text(turn.answer)]})
        return found


class Samples(Sequence[Sample]):
    """All rows of one or several folders of shards. Picklable, so that a torch DataLoader with workers can use it as it is."""

    def __init__(self, folders: Sequence[str], tokenizer: str = "") -> None:
        self._store = ShardStore(folders)
        self._tokenizer = tokenizer
        self._opened_frame: Frame | None = None

    @property
    def contract(self) -> FrameContract:
        """Family, pixel limits, template and tokenizer that the shards were made for."""
        return self._store.contract

    @property
    def _family(self) -> Family:
        return find_family(self.contract.family)

    def _frame(self) -> Frame:
        if self._opened_frame is None:
            self._opened_frame = frame_of(self.contract, self._store.folders[0].path, self._tokenizer)
        return self._opened_frame

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_opened_frame": None}

    def __len__(self) -> int:
        return self._store.num_rows

    def __iter__(self) -> Iterator[Sample]:
        return (self[number] for number in range(len(self)))

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        """Raises IndexError beyond the end, ShardError where a block of a shard does not have the hash that its manifest says."""
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        number = index + len(self) if index < 0 else index
        if not 0 <= number < len(self):
            raise IndexError(f"found sample {index}, expected one of {len(self)}")
        return self._sample(self._store.whole_row(number))

    def _sample(self, row: Row) -> Sample:
        return Sample(
            sample_id=row["sample_id"],
            source=row["source"],
            split=row["split"],
            position=row["position"],
            images=tuple(self._image(image, row["folder"]) for image in row["images"]),
            turns=tuple(map(self._turn, row["turns"])),
            ordered=row["ordered"],
            num_tokens=row["total_tokens"],
            num_visual_tokens=row["visual_tokens"],
            _row=row,
            _frame=self._frame,
        )

    def _image(self, image: dict[str, Any], folder: int) -> SampleImage:
        return SampleImage(
            path=image["path"],
            size_wh=(image["width"], image["height"]),
            resized_size_wh=(image["resized_width"], image["resized_height"]),
            num_visual_tokens=image["visual_tokens"],
            _store=self._store,
            _folder=folder,
            _shard=None if image["path"] is not None else (image["shard"], image["shard_row"]),
        )

    def _turn(self, turn: dict[str, Any]) -> SampleTurn:
        box_text = self._family.box_text
        in_answer = box_text.parse_answer(turn["answer"])
        boxes = box_text.find_boxes(turn["question"]) + (box_text.find_boxes(turn["answer"]) if in_answer is None else in_answer)
        return SampleTurn(
            task=turn["task"],
            language=turn["language"],
            question=turn["question"],
            answer=turn["answer"],
            labels=tuple(turn["labels"]),
            boxes_xyxy_px=np.array(turn["boxes"], np.float64).reshape(-1, 4),
            boxes_in_text=np.array([box.values for box in boxes], np.int64).reshape(-1, 4),
            image_index=turn["image_index"],
            num_tokens=len(turn["prompt_ids"]) + len(turn["answer_ids"]),
            difficulty=turn["difficulty"],
            weight=turn["weight"],
        )


def _text(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def load(shards: str | Path | Sequence[str | Path], *, tokenizer: str = "") -> Samples:
    """Open shards that `boxcar convert` wrote as a map-style dataset: `len(samples)`, `samples[7]`, iteration.

    shards: one folder or several of one frame contract; local paths, or URIs such as s3://bucket/shards. tokenizer: where the tokenizer is
    now, if it has moved since the conversion; only `messages` needs it.

    Nothing but the manifests is read here. Raises ShardError where a folder holds no complete conversion, ContractError where folders were
    converted for different frames.

        samples = boxcar.load("shards/demo")
        samples[0].turns[0].boxes_xyxy_px        # (N, 4) float64
        samples[0].images[0].open_resized()      # PIL image, as the model sees it
    """
    folders = [shards] if isinstance(shards, str | Path) else list(shards)
    return Samples([str(folder) for folder in folders], tokenizer)
