"""Source text and boxes -> text specs in a family's own form: the wording that questions and answers share.

Text of the source is untrusted: a label that holds a special token would open an image or close a turn, so it is refused here.
"""

from collections.abc import Sequence
from itertools import pairwise

import msgspec

from boxcar.pipelines.families.family import Family
from boxcar.pipelines.tokens.compose import TextSpec
from boxcar.pipelines.tokens.tokenizer import PieceTable
from boxcar.schemas.record import BoxMark, DialogueTurn, ImageMark, TextPart

SPECIAL_TOKEN = "special_token_in_text"
EMPTY_TEXT = "empty_text"
INVALID_TEXT = "invalid_unicode"


class BadText(Exception):
    """A text of the source that cannot stand in a training text. Caught by the caller and counted."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


class PlacedBoxes(msgspec.Struct, gc=False):
    """Boxes inside a running text, by row of the unit's box table."""

    label: str
    rows: list[int]


PlacedPart = str | ImageMark | PlacedBoxes


def place_boxes(parts: Sequence[TextPart], first_row: int) -> tuple[list[PlacedPart], int]:
    """Replace each BoxMark by rows counted from `first_row`; also the row after the last."""
    placed: list[PlacedPart] = []
    row = first_row
    for part in parts:
        if isinstance(part, BoxMark):
            assert part.boxes, "a mark of no boxes"
            placed.append(PlacedBoxes(part.label, list(range(row, row + len(part.boxes)))))
            row += len(part.boxes)
        else:
            placed.append(part)
    return placed, row


class Scribe:
    """Writes texts for one family into a piece table. Caches what it has checked; the output does not depend on the cache."""

    def __init__(self, family: Family, pieces: PieceTable) -> None:
        self.family, self.pieces = family, pieces
        self._special = pieces.tokenizer.special_pattern
        self._answer_gaps: dict[tuple[str | None, str | None, bool], int] = {}
        self._questions: dict[tuple[str, str], TextSpec] = {}
        self._box_questions: dict[str, list[int]] = {}
        self._same_label: dict[str, tuple[int, int, int]] = {}

    def forget(self) -> None:
        """Codes of the piece table are void: start anew."""
        self._answer_gaps.clear()
        self._questions.clear()
        self._box_questions.clear()
        self._same_label.clear()

    def checked(self, text: str) -> str:
        """The text itself. Raises BadText where it is blank, no valid Unicode, or holds a special token."""
        if not text.strip():
            raise BadText(EMPTY_TEXT, f"found {text!r}, expected a text")
        if match := self._special.search(text):
            raise BadText(SPECIAL_TOKEN, f"found {match[0]!r} in {text[:200]!r}, which the tokenizer takes for a control token")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise BadText(INVALID_TEXT, f"found a lone surrogate in {text[:200]!a}") from error
        return text

    def question(self, prompt: str, label: str) -> TextSpec:
        """A question without boxes, in the family's frame: the prompt with `label` in the place of `{label}`."""
        key = (prompt, label)
        spec = self._questions.get(key)
        if spec is None:
            chat = self.family.chat
            text = prompt.replace("{label}", self.checked(label)) if "{label}" in prompt else prompt
            framed = f"{chat.question_prefix}{self.checked(text).strip()}{chat.question_suffix}"
            spec = self._questions[key] = TextSpec([self.pieces.intern_gap(framed)], [])
        return spec

    def plain_answer(self, text: str) -> TextSpec:
        return TextSpec([self.pieces.intern_gap(self.checked(text).strip())], [])

    def boxes_answer(self, labels: Sequence[str], rows: Sequence[int]) -> TextSpec:
        """A whole answer of boxes, one or more: labels[i] is the label of the box at rows[i]."""
        if len(set(labels)) == 1:
            return self.same_label_answer(labels[0], rows)
        several = True
        gaps = [self._answer_gap(None, labels[0], several)]
        gaps += [self._answer_gap(previous, following, several) for previous, following in pairwise(labels)]
        gaps.append(self._answer_gap(labels[-1], None, several))
        return TextSpec(gaps, list(rows))

    def same_label_answer(self, label: str, rows: Sequence[int]) -> TextSpec:
        """A whole answer of boxes that all have one label."""
        codes = self._same_label.get(label)
        if codes is None:
            opens, closes = self._answer_gap(None, label, False), self._answer_gap(label, None, False)
            codes = self._same_label[label] = (opens, self._answer_gap(label, label, False), closes)
        return TextSpec([codes[0], *[codes[1]] * (len(rows) - 1), codes[2]], list(rows))

    def _answer_gap(self, previous: str | None, following: str | None, several: bool) -> int:
        key = (previous, following, several)
        code = self._answer_gaps.get(key)
        if code is None:
            for label in {previous, following} - {None}:
                self.checked(label or "")
            text = self.family.box_text.answer_gap(previous, following, several_labels=several)
            code = self._answer_gaps[key] = self.pieces.intern_gap(
                text.lstrip() if previous is None else text, after_number=previous is not None, before_number=following is not None
            )
        return code

    def question_with_box(self, template: str, row: int) -> TextSpec:
        """A question whose `{box}` is the place of one box."""
        gaps = self._box_questions.get(template)
        if gaps is None:
            before, _, after = template.partition("{box}")
            gaps = self._box_questions[template] = self.running_question([before, PlacedBoxes("", [row]), after]).gaps
        return TextSpec(gaps, [row])

    def running_question(self, parts: Sequence[PlacedPart]) -> TextSpec:
        chat = self.family.chat
        return self._running([chat.question_prefix, *self._stripped(parts), chat.question_suffix], checked=parts)

    def running_answer(self, parts: Sequence[PlacedPart]) -> TextSpec:
        """An answer as the source words it. Boxes and nothing else become the family's whole answer of boxes."""
        boxes = [part for part in parts if not isinstance(part, str) or part.strip()]
        if boxes and all(isinstance(part, PlacedBoxes) and part.label.strip() for part in boxes):
            named = [(part.label, row) for part in boxes if isinstance(part, PlacedBoxes) for row in part.rows]
            return self.boxes_answer([label for label, _ in named], [row for _, row in named])
        return self._running(self._stripped(parts), checked=parts)

    def history(self, turns: Sequence[tuple[list[PlacedPart], list[PlacedPart]]], question: Sequence[PlacedPart]) -> list[PlacedPart]:
        """Earlier turns and a question as one question, as families write it that know one question per image (CogVLM chat)."""
        chat = self.family.chat
        parts: list[PlacedPart] = []
        for earlier_question, earlier_answer in turns:
            opening = chat.question_prefix if parts else ""
            asked, answered = self._stripped(earlier_question), self._stripped(earlier_answer)
            parts += [opening, *asked, f"{chat.question_suffix} ", *answered, "\n"]
        return [*parts, chat.question_prefix if parts else "", *self._stripped(question)]

    def _running(self, parts: Sequence[PlacedPart], checked: Sequence[PlacedPart]) -> TextSpec:
        self._check_parts(checked)
        gaps: list[int] = []
        rows: list[int] = []
        gap: list[str] = []
        for part in parts:
            if isinstance(part, str):
                gap.append(part)
            elif isinstance(part, ImageMark):
                gap.append(self._image(part))
            else:
                *before, last = self.family.box_text.inline_gaps(part.label, len(part.rows))
                for text in before:
                    gaps.append(self.pieces.intern_gap(self._joined([*gap, text]), after_number=bool(gaps), before_number=True))
                    gap = []
                gap = [last]
                rows += part.rows
        gaps.append(self.pieces.intern_gap(self._joined(gap), after_number=bool(gaps)))
        return TextSpec(gaps, rows)

    def _image(self, mark: ImageMark) -> str:
        return self.family.chat.image_in_question(mark.image_index + 1)

    def _joined(self, pieces: Sequence[str]) -> str:
        """Pieces that hold no special token of the source, as one text. Raises BadText where two neighbours make one: "<" and "s>"."""
        text = "".join(pieces)
        if len(pieces) > 1 and len(self._special.findall(text)) != sum(len(self._special.findall(piece)) for piece in pieces):
            raise BadText(SPECIAL_TOKEN, f"found pieces of {text[:200]!r} that together make a control token")
        return text

    def _stripped(self, parts: Sequence[PlacedPart]) -> list[PlacedPart]:
        """Without white space at the two ends: between a template and a text it belongs to neither. An image that the family puts
        elsewhere is no end."""
        result = list(parts)
        places = range(len(result))
        for order, strip in ((places, str.lstrip), (reversed(places), str.rstrip)):
            for place in order:
                part = result[place]
                if isinstance(part, str):
                    part = result[place] = strip(part)
                if part if isinstance(part, str) else isinstance(part, PlacedBoxes) or self._image(part):
                    break
        return result

    def _check_parts(self, parts: Sequence[PlacedPart]) -> None:
        texts = [part if isinstance(part, str) else part.label for part in parts if not isinstance(part, ImageMark)]
        if not any(text.strip() for text in texts) and not any(isinstance(part, PlacedBoxes) for part in parts):
            raise BadText(EMPTY_TEXT, "found no text, expected some")
        for text in texts:
            if text.strip():
                self.checked(text)


def place_dialogue(dialogue: Sequence[DialogueTurn], first_row: int) -> list[tuple[list[PlacedPart], list[PlacedPart]]]:
    """Question and answer of each turn with their boxes placed; rows count up from `first_row` in the order of the text."""
    placed = []
    row = first_row
    for turn in dialogue:
        question, row = place_boxes(turn.question, row)
        answer, row = place_boxes(turn.answer, row)
        placed.append((question, answer))
    return placed
