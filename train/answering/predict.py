"""Rows or queries -> replies -> boxes in the pixels of the original images. The same frame, prompts and pixels as in training.

row, turn ──> prompt (documents.prompt_of) ─┐
                                            ├─> batches of like length ──> generate ──> parse ──> original pixels
image ──> pixels (stream.load_pixels) ──────┘
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from boxcar.schemas.errors import ImageError
from boxcar.schemas.record import Language
from boxcar.train.answering.adapter import Opened
from boxcar.train.answering.ask import Asker, Query
from boxcar.train.answering.generate import Reply, box_scores, generate
from boxcar.train.answering.parse import Status, parse, to_original_px
from boxcar.train.data.collate import Pixels
from boxcar.train.data.documents import Document, ImageSlot, prompt_of
from boxcar.train.data.store import ShardStore
from boxcar.train.data.stream import load_pixels

BATCHES_PER_WINDOW = 16
"""Prompts of so many batches are sorted by length together: less padding, and answers still come steadily."""


@dataclass(frozen=True)
class PredictConfig:
    """How replies are made."""

    batch_size: int = 8
    max_new_tokens: int = 512
    with_logprobs: bool = False
    pixels: Literal["exact", "fast"] = "exact"
    in_step: bool = False
    """Every rank generates until all are done: where a forward pass is collective (ZeRO-3)."""


@dataclass(frozen=True)
class Answer:
    """A reply and what it says."""

    id: str
    """sample_id, or the query's id."""
    turn: int
    """Number of the turn within its row."""
    task: str
    language: str
    question: str
    reply: str
    """Raw, control tokens included."""
    complete: bool
    """False: cut at max_new_tokens."""
    status: Status
    repairs: tuple[str, ...]
    boxes_xyxy_px: npt.NDArray[np.float64]
    """(N, 4) float64, pixels of the upright original image, within it."""
    boxes_model: npt.NDArray[np.float64]
    """(N, 4) float64, the family's own units."""
    labels: tuple[str | None, ...]
    scores: list[float] | None
    """(N,) mean log-probability of the tokens of each box's numbers (`train.answering.generate.box_scores`); None where not recorded."""
    size_wh: tuple[int, int]
    """Pixels of the upright original."""
    resized_wh: tuple[int, int]
    """Pixels that the model saw."""
    num_prompt_tokens: int
    num_reply_tokens: int
    extra: Mapping[str, Any] = field(default_factory=dict)


def as_json(answer: Answer) -> dict[str, Any]:
    """An answer as JSON has it; boxes in pixels of the upright original image."""
    scores: list[float | None] = [None] * len(answer.labels) if answer.scores is None else [round(score, 5) for score in answer.scores]
    boxes = [
        {"box_xyxy_px": [round(value, 2) for value in box], "label": label, "score": score}
        for box, label, score in zip(answer.boxes_xyxy_px.tolist(), answer.labels, scores, strict=True)
    ]
    facts = {name: getattr(answer, name) for name in ("id", "task", "language", "question", "reply", "complete", "status")}
    sizes = {"size_wh": list(answer.size_wh), "resized_wh": list(answer.resized_wh)}
    return {**facts, "repairs": list(answer.repairs), "boxes": boxes, **sizes, **answer.extra}


@dataclass(frozen=True)
class Asked:
    """A turn of a row, to be answered by the network. The row may have no answer of its own."""

    row: Mapping[str, Any]
    turn: int = 0
    extra: Mapping[str, Any] = field(default_factory=dict)


class Predictor:
    """Answers of one opened network."""

    def __init__(self, opened: Opened, config: PredictConfig | None = None, store: ShardStore | None = None) -> None:
        """store: where embedded images of rows are read from."""
        self.opened = opened
        self.config = config or PredictConfig()
        self._store = store
        self._asker = Asker(opened.frame)
        self._contract = opened.frame.contract()
        self._family = opened.frame.family

    def check(self, query: Query) -> None:
        """Raises what `ask` would, for a query or an image that cannot be answered; the image is decoded for it."""
        prompt = prompt_of(self._asker.row(query), 0, self._contract, self._family.network)
        for slot in prompt.images:
            load_pixels(slot, self._store, self.config.pixels)  # type: ignore[arg-type]

    def ask(self, queries: Iterable[Query]) -> Iterator[Answer]:
        """Answers in the order of the queries. Raises ImageError, ConfigError and BudgetError of the first bad one."""
        yield from self.answer(Asked(self._asker.row(query), 0, query.extra) for query in queries)

    def answer(self, asked: Iterable[Asked]) -> Iterator[Answer]:
        """Answers in the order asked. Raises ImageError where an image cannot be read."""
        source = iter(asked)
        while window := list(islice(source, self.config.batch_size * BATCHES_PER_WINDOW)):
            prompts = [prompt_of(one.row, one.turn, self._contract, self._family.network) for one in window]
            # Longest first: what does not fit into memory fails at once. Equal lengths keep their order, and neighbours share images.
            order = sorted(range(len(window)), key=lambda place: -len(prompts[place]))
            found: dict[int, Answer] = {}
            for start in range(0, len(order), self.config.batch_size):
                places = order[start : start + self.config.batch_size]
                replies = self._replies([prompts[place] for place in places])
                found |= {place: self._read(window[place], prompts[place], reply) for place, reply in zip(places, replies, strict=True)}
            yield from (found[place] for place in range(len(window)))

    def _replies(self, prompts: Sequence[Document]) -> list[Reply]:
        decoded: dict[tuple[Any, ...], Pixels] = {}
        images = [self._pixels(slot, decoded) for prompt in prompts for slot in prompt.images]
        config = self.config
        return generate(
            self.opened, prompts, images, max_new_tokens=config.max_new_tokens, with_logprobs=config.with_logprobs, in_step=config.in_step
        )

    def _pixels(self, slot: ImageSlot, decoded: dict[tuple[Any, ...], Pixels]) -> Pixels:
        key = slot.path, slot.folder, slot.shard, slot.shard_row, slot.resized_wh
        if key not in decoded:
            if slot.path is None and self._store is None:
                raise ImageError(slot.where, reason="no_store", found="an embedded image", expected="the folder of shards it stands in")
            decoded[key] = load_pixels(slot, self._store, self.config.pixels)  # type: ignore[arg-type]
        return decoded[key]

    def _read(self, asked: Asked, prompt: Document, reply: Reply) -> Answer:
        row, turn = asked.row, asked.row["turns"][asked.turn]
        image = row["images"][max(0, turn["image_index"])] if row["images"] else None
        size, resized = (
            ((image["width"], image["height"]), (image["resized_width"], image["resized_height"])) if image else ((1, 1), (1, 1))
        )
        parsed = parse(reply.text, self._family, resized)
        return Answer(
            id=row["sample_id"],
            turn=asked.turn,
            task=turn["task"],
            language=turn["language"],
            question=turn["question"],
            reply=reply.text,
            complete=reply.complete,
            status=parsed.status,
            repairs=parsed.repairs,
            boxes_xyxy_px=to_original_px(parsed.boxes, self._family.grid, size, resized),
            boxes_model=parsed.boxes,
            labels=parsed.labels,
            scores=box_scores(reply, len(parsed.boxes), self.opened),
            size_wh=size,
            resized_wh=resized,
            num_prompt_tokens=len(prompt),
            num_reply_tokens=len(reply.ids),
            extra=asked.extra,
        )


# ---- crowded images, in two steps

_WHICH: Mapping[Language, str] = {
    "en": 'Which categories of objects are in the image, and how many of each? Answer in JSON format: {"category": count}.',
    "zh": '图中有哪些类别的物体，每类各有多少个？请以JSON格式回答：{"类别": 数量}。',
}
_COUNTED = re.compile(r'"((?:[^"\\]|\\.){1,100})"\s*:\s*(\d{1,4})\b')


@dataclass(frozen=True)
class Stepwise:
    """What two steps gave."""

    listing: Answer
    """The first reply."""
    expected: dict[str, int]
    """Count of each category that the first reply names."""
    answers: dict[str, Answer]
    """The second step's answer for each category."""


def stepwise(predictor: Predictor, image: str, language: Language = "en", categories: Sequence[str] = ()) -> Stepwise:
    """First which categories and how many, then the boxes of each. categories: ask for these, whatever the first reply names."""
    (listing,) = predictor.ask([Query(image, _WHICH[language], "question", language)])
    expected = {name: int(count) for name, count in _COUNTED.findall(listing.reply) if int(count) > 0}
    names = list(categories) or list(expected)
    answers = predictor.ask([Query(image, name, "detect", language, id=name) for name in names])
    return Stepwise(listing, expected, dict(zip(names, answers, strict=True)))
