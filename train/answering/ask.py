"""A question about an image -> a row, as the conversion would have written it: the same template, the same resize, the same prompts.

"the red cube", images ──> header sizes ──> family's resize ──> header_ids, prompt_ids ──> the row that `documents.prompt_of` takes
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np

from boxcar.pipelines.families.prompts import LABEL_JOIN
from boxcar.pipelines.images.image_file import ImageHeader, read_header
from boxcar.pipelines.tokens.compose import TextSpec, compose
from boxcar.pipelines.tokens.frame import Frame
from boxcar.pipelines.tokens.tokenizer import PieceTable
from boxcar.pipelines.turns.texts import BadText, Scribe
from boxcar.schemas.errors import BudgetError, ConfigError
from boxcar.schemas.record import Language

AskedTask = Literal["detect", "refer", "detect_joint", "absent", "describe", "caption", "question"]
"""The tasks of training, and `question`: the text as it is."""


@dataclass(frozen=True)
class Query:
    """What is asked about an image."""

    image: str
    """Path or URI."""
    text: str = ""
    """Label (detect), phrase (refer), labels joined by commas (detect_joint), question; nothing for a caption."""
    task: AskedTask = "refer"
    language: Language = "en"
    box_xyxy_px: tuple[float, float, float, float] | None = None
    """describe: the region, in pixels of the upright original image."""
    id: str = ""
    prompt: int = 0
    """Which of the task's questions, modulo their number."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """What the caller wants back beside the answer."""


class Asker:
    """Rows for one frame."""

    def __init__(self, frame: Frame) -> None:
        self.frame = frame
        self._pieces = PieceTable(frame.tokenizer)
        self._scribe = Scribe(frame.family, self._pieces)

    def row(self, query: Query) -> dict[str, Any]:
        """The row of one unanswered turn. Raises ImageError, ConfigError (an empty or unusable query) and BudgetError (the image)."""
        header = read_header(query.image)
        image = self._image(query, header)
        question, ids = self._question(query, image)
        turn = {
            "task": query.task,
            "language": query.language,
            "question": question,
            "answer": "",
            "prompt_ids": ids,
            "answer_ids": [],
            "answer_is_coordinate": [],
            "boxes": [],
            "labels": [],
            "image_index": 0,
            "difficulty": 0.0,
            "weight": 1.0,
        }
        return {
            "sample_id": query.id or query.image,
            "source": "",
            "images": [image],
            "turns": [turn],
            "ordered": False,
            "header_ids": self.frame.header_ids(None, 1),
        }

    def ask_again(self, row: Mapping[str, Any], number: int) -> dict[str, Any]:
        """The row with turn `number` asked in this frame's words; dialogues and descriptions of regions stay as they are."""
        turn = row["turns"][number]
        task = turn["task"]
        if task in ("dialogue", "describe"):
            return dict(row)
        labels = ",".join(dict.fromkeys(turn["labels"]))
        choice = int.from_bytes(row["sample_id"].encode()[-4:], "little")
        image = row["images"][max(0, turn["image_index"])]
        question, ids = self._question(Query("", labels, task, turn["language"], prompt=choice), image)
        turns = list(row["turns"])
        turns[number] = {**turn, "question": question, "prompt_ids": ids}
        return {**row, "turns": turns}

    def _image(self, query: Query, header: ImageHeader) -> dict[str, Any]:
        limits = self.frame.limits
        sizes = self.frame.family.resize(header.width, header.height, limits.min_pixels, limits.max_pixels)
        if bool(np.any(sizes.refused)):
            raise BudgetError(
                query.image,
                found=f"{header.width} x {header.height} px",
                expected=f"an image that {self.frame.family.title} takes ({self.frame.family.resize.description})",
                fix="Crop the image: its sides differ too much.",
            )
        return {
            "path": query.image,
            "shard": None,
            "shard_row": None,
            "width": header.width,
            "height": header.height,
            "orientation": header.orientation,
            "resized_width": int(sizes.width),
            "resized_height": int(sizes.height),
            "grid_t": 1,
            "grid_h": int(sizes.grid_h),
            "grid_w": int(sizes.grid_w),
            "visual_tokens": int(sizes.visual_tokens),
        }

    def _question(self, query: Query, image: Mapping[str, Any]) -> tuple[str, list[int]]:
        """Text and ids."""
        if query.task not in get_args(AskedTask):
            raise ConfigError("task", found=repr(query.task), expected=f"one of {', '.join(get_args(AskedTask))}")
        text = query.text.strip()
        if not text and query.task not in ("caption", "describe"):
            raise ConfigError("query", found="an empty one", expected="a label, a phrase or a question", fix="Say what to look for.")
        boxes = np.empty((0, 4))
        try:
            if query.task == "describe":
                boxes = self._box(query)
                spec = self._scribe.question_with_box(self._prompt(query), 0)
            elif query.task == "question":
                spec = self._scribe.question(text.replace("{label}", ""), "")
            else:
                spec = self._scribe.question(self._prompt(query), _named(text, query))
        except BadText as bad:
            raise ConfigError(
                "query", found=bad.detail.removeprefix("found "), expected="plain text", fix="Leave control tokens out."
            ) from bad
        return self._composed(spec, boxes, image)

    def _prompt(self, query: Query) -> str:
        by_language = next((bank for task, bank in self.frame.bank.items() if task == query.task), {})
        found = by_language.get(query.language, ())
        if not found:
            raise ConfigError("language", found=f"{query.language!r} for {query.task}", expected="one that the frame has questions in")
        prompt: str = found[query.prompt % len(found)]
        return prompt

    def _box(self, query: Query) -> Any:
        if query.box_xyxy_px is None:
            raise ConfigError("query", found="describe without a box", expected="box_xyxy_px, four numbers")
        return np.asarray([query.box_xyxy_px], np.float64)

    def _composed(self, spec: TextSpec, boxes: Any, image: Mapping[str, Any]) -> tuple[str, list[int]]:
        family, pieces = self.frame.family, self._pieces
        size_wh, resized_wh = (
            np.array([[image[f"{kind}width"], image[f"{kind}height"]]] * len(boxes)).reshape(-1, 2) for kind in ("", "resized_")
        )
        values = family.grid.quantise(boxes, size_wh, resized_wh)
        numbers = pieces.intern_numbers(values, family.box_text.number_format)[:, family.box_text.order]
        separators = pieces.intern_separators(family.box_text.separators)
        pieces.encode_pending()
        composed = compose([spec], numbers, separators, pieces)
        text = bytes(composed.utf8(np.array([0])).values).decode()
        return text, composed.ids(np.array([0])).values.tolist()


def _named(text: str, query: Query) -> str:
    """The label as it stands in the question."""
    if query.task != "detect_joint":
        return text
    labels: Sequence[str] = [label.strip() for label in text.replace("、", ",").split(",")]
    return LABEL_JOIN[query.language].join(label for label in labels if label)
