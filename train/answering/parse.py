"""A model's reply -> boxes in model units, and how they were read.

    reply ── the family's own form ──────────────────────────────> strict
          └─ less thinking, fences, control tokens ─ own form ───> repaired
             └─ loosely (`train.answering.loose_boxes`) ───────────────────> repaired, each repair named and counted
                └─ says that nothing is there ───────────────────> none_found, else failed

Which pixels the numbers mean is the family's convention and the image's resized size, both from the frame contract: never a guess from
the numbers, never the ground truth. Nothing is made up: a box is four numbers that the reply marks as one.

| repair              | what was found                                                                                     |
|---------------------|----------------------------------------------------------------------------------------------------|
| whitespace          | blanks around the reply                                                                            |
| control_tokens      | end-of-turn tokens; what follows them is left out                                                  |
| thinking            | a <think> block before the answer                                                                  |
| answer_tag          | <answer> around it                                                                                 |
| prose               | words around the boxes                                                                             |
| no_fence            | JSON without ```json around it                                                                     |
| bare_object         | objects that stand in no list                                                                      |
| layout              | the right form with other blanks, digits or brackets                                               |
| unclosed            | brackets, strings or tags that end with the text (or line)                                         |
| missing_bracket     | a bracket that another one, or a key, shows to be missing                                          |
| missing_comma, trailing_comma, single_quotes, unescaped_quotes, unquoted, quoted_numbers, full_width    | as they say    |
| quoted_box          | a box as a string                                                                                  |
| missing_label, other_key, extra_keys, label_as_key, corner_keys, corner_lists                           | JSON of other keys |
| tags_in_label, other_tags, missing_tags | tags where none belong, another family's tags, none where they belong          |
| as_json, as_tags, as_list, as_pairs     | the form of another family                                                     |
| fraction            | numbers that are no integers (once a box)                                                          |
| quad                | an outline of four corners, taken as the box around it (once a box)                                |
| swapped_corners     | x1 < x0 or y1 < y0, put in order (once a box)                                                      |
| clamped             | values beyond the image, moved to its edge (once a box)                                            |
| not_found_in_words  | "nothing is there" in other words than the family's                                                |
| dropped_incomplete, dropped_wrong_length, dropped_not_number, dropped_unknown_key                       | no box, left out (each) |
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from boxcar.pipelines.families.box_text import CoordinateGrid, FloatBoxes
from boxcar.pipelines.families.catalog import FAMILIES
from boxcar.pipelines.families.family import Family
from boxcar.train.answering.loose_boxes import LooseBox, LooseBoxes, find_loosely
from boxcar.train.answering.loose_text import TAG

Status = Literal["strict", "repaired", "none_found", "failed"]
"""strict: the family's own form, nothing done. repaired: boxes, with repairs. none_found: the reply says that nothing is there. failed:
neither a box nor that."""

_THOUGHT = re.compile(r"<(/?)think(?:ing)?>")
_ANSWER = re.compile(r"<(/?)answer>")
# Of every family: a base may write what it wrote before it was trained for this one.
_ENDS = dict.fromkeys(re.escape(token) for family in FAMILIES.values() for token in family.chat.reply_ends)
_OPENS = dict.fromkeys(re.escape(token) for family in FAMILIES.values() for token in family.chat.reply_opens)
_TURN_END = re.compile("|".join(_ENDS))
_TURN_START = re.compile(rf"\A(?:\s|{'|'.join(_OPENS)})+")
_WORDY = re.compile(r"\w")
_BETWEEN_BOXES = " \t\r\n,;.:，；、。："
_LONGEST_REFUSAL = 400
_THING = r"[^.!?;:\n]{1,120}?"
_NOT_FOUND_WORDS = (
    r"(?:none|null|nothing|not found)",
    r"(?:no|zero) (?:objects?|matche?s?|instances?|boxes|bounding boxes|results?)(?: (?:was|were|is|are))?(?: found| detected)?",
    r"there (?:is|are|was|were) (?:no|not any|none)\b",
    r"there (?:isn't|aren't|wasn't|weren't) (?:a|an|any)\b",
    rf"no {_THING} (?:(?:is|are|was|were|can be|could be) )?(?:visible|present|found|detected|seen|in the (?:image|picture|photo))\b",
    rf"{_THING} (?:is|are|was|were|does|do)(?: not|n't) (?:visible|present|found|detected|in the (?:image|picture|photo)|appear|exist)\b",
    r"i (?:do not|don't|cannot|can't|can not|could not|couldn't) (?:see|find|locate|detect) (?:a|an|any|the|such)\b",
)
_NOT_FOUND_ZH = (
    r"(?:抱歉[，,]?|对不起[，,]?)?(?:在?(?:这张|该|此)?(?:图|图片|图像|画面|照片)(?:中|里|上)?[，,]?)?(?:并|也)?(?:没有|没|未|无|不存在|找不到|无法找到)"
    r"[^。！？，,；\n]{0,120}(?:[。！.]|\Z)"
)
_NOT_FOUND = re.compile(
    rf"(?:(?:sorry|unfortunately|no)[,.]? (?:but )?)?(?:{'|'.join(_NOT_FOUND_WORDS)})(?![^.!\n]*\bbut\b)[^.;:!\n]{{0,160}}(?:[.!]|\Z)"
    rf"|{_NOT_FOUND_ZH}",
    re.IGNORECASE,
)
"""The first sentence of a short reply without boxes: known ways of saying that nothing is there. A refusal is none of them."""


@dataclass(frozen=True, eq=False)
class ParsedReply:
    """What a reply says. `boxes` keeps those without area: rounding makes them of small things, and they are a fault only of the size."""

    boxes: FloatBoxes
    """(N, 4) float64, xyxy, model units, corners in order, within the family's grid; in the order of the reply."""
    labels: tuple[str | None, ...]
    """(N,) as the reply names them; None where it does not."""
    points: npt.NDArray[np.float64]
    """(M, 2) float64, model units: what the reply marks as points. Never turned into boxes."""
    point_labels: tuple[str | None, ...]
    status: Status
    """strict and repaired: N >= 1; none_found and failed: N = 0."""
    repairs: tuple[str, ...]
    """Names (see the head of this file) in the order of their first time, a repair of single boxes once for each. strict: ()."""

    @property
    def says_none(self) -> bool:
        """The reply says that nothing matches."""
        return self.status == "none_found"


def parse(reply: str, family: Family, resized_wh: tuple[int, int]) -> ParsedReply:
    """Read a reply, strictly first and then with repairs. Takes any text and never raises; linear in its length.

    reply: without the prompt, with the box tags (for families whose tags are special tokens: decoded with them). resized_wh: size of the
    image as the model saw it, in pixels; it bounds the coordinates of families that count in those.
    """
    if (strict := _strict(reply, family)) is not None:
        return _of_strict(strict, [], family, resized_wh)
    text, repairs = _unwrapped(reply)
    if repairs and (strict := _strict(text, family)) is not None:
        return _of_strict(strict, repairs, family, resized_wh)
    fenced = _fenced(text)
    if fenced != text:
        outside = text.replace(fenced, "", 1)
        prose = ["prose"] if _WORDY.search(outside) else ["layout"]
        if (strict := _strict(fenced, family)) is not None:
            return _of_strict(strict, repairs + prose, family, resized_wh)
        found = find_loosely(fenced, family.box_text)
        if found.boxes or found.has_empty:
            found.has_prose = found.has_prose or prose == ["prose"]
            return _of_loose(fenced, found, repairs, family, resized_wh)
    return _of_loose(text, find_loosely(text, family.box_text), repairs, family, resized_wh)


def to_original_px(boxes: FloatBoxes, grid: CoordinateGrid, size_wh: tuple[int, int], resized_wh: tuple[int, int]) -> FloatBoxes:
    """Boxes (N, 4) in model units -> float64 pixels of the upright original image, within it. Sizes are (width, height) in pixels."""
    sizes = np.tile(np.array(size_wh, np.int64), (len(boxes), 1))
    return grid.dequantise(boxes, sizes, np.tile(np.array(resized_wh, np.int64), (len(boxes), 1)))


def points_to_original_px(
    points: npt.NDArray[np.float64], grid: CoordinateGrid, size_wh: tuple[int, int], resized_wh: tuple[int, int]
) -> npt.NDArray[np.float64]:
    """Points (M, 2) in model units -> float64 pixels of the upright original image, within it."""
    return to_original_px(np.tile(points, 2), grid, size_wh, resized_wh)[:, :2]


# ---- the family's own form


_Read = list[tuple[tuple[float, float, float, float], str | None]]
"""Boxes with their labels; [] where the reply says that there are none."""


def _strict(text: str, family: Family) -> _Read | None:
    """None: not in the family's own form."""
    # Labels stand between no quotes in a list of brackets: a thought would be the first label.
    is_wrapped = family.box_text.form == "list" and (_THOUGHT.search(text) or _ANSWER.search(text))
    boxes = None if is_wrapped else family.box_text.parse_answer(text)
    if boxes is not None:
        return [(box.values, box.label) for box in boxes]
    for template in family.not_found.values():
        head, slot, tail = template.partition("{label}")
        if text == template if not slot else len(text) > len(head) + len(tail) and text.startswith(head) and text.endswith(tail):
            return []
    return None


def _of_strict(read: _Read, repairs: Sequence[str], family: Family, resized_wh: tuple[int, int]) -> ParsedReply:
    return _reply(read, [], dict.fromkeys(repairs, 1), family, resized_wh, says_none=not read)


# ---- what stands around an answer


def _unwrapped(reply: str) -> tuple[str, list[str]]:
    """The reply without what is no part of the answer, and the names of what was taken away."""
    repairs = []
    text = reply.strip()
    if text != reply:
        repairs.append("whitespace")
    start, end = _TURN_START.match(text), _TURN_END.search(text)
    if start or end:
        repairs.append("control_tokens")
        text = text[start.end() if start else 0 : end.start() if end else len(text)].strip()
    if thoughts := list(_THOUGHT.finditer(text)):
        repairs.append("thinking")
        # A chat template may write the opening tag itself: then all before the closing one is thought.
        before = text[: thoughts[0].start()] if not thoughts[0][1] else ""
        closing = [tag.end() for tag in thoughts if tag[1]]
        text = f"{before}\n{text[closing[-1] :] if closing else ''}".strip()
    if answers := list(_ANSWER.finditer(text)):
        repairs.append("answer_tag")
        last = max((number for number, tag in enumerate(answers) if not tag[1]), default=None)
        if last is not None:
            stop = answers[last + 1].start() if last + 1 < len(answers) else len(text)
            text = text[answers[last].end() : stop].strip()
        else:
            text = text[: answers[0].start()].strip()
    return text, repairs


def _fenced(text: str) -> str:
    """From the first code fence to the last; the whole text where there is none."""
    start, end = text.find("```"), text.rfind("```")
    if start < 0:
        return text
    return text[start : end + 3] if end > start else text[start:]


# ---- with repairs


def _of_loose(text: str, found: LooseBoxes, before: Sequence[str], family: Family, resized_wh: tuple[int, int]) -> ParsedReply:
    own = family.box_text.form
    boxes = [box for box in found.boxes if _is_allowed(box, found, own)]
    if not boxes:
        return _without_boxes(text, found, before, family, resized_wh)
    repairs = dict.fromkeys(before, 1)
    repairs.update(found.repairs)
    labels = _labels_before(text, boxes) if own == "list" else None
    if labels is not None:
        for box, label in zip(boxes, labels, strict=True):
            box.label = label
    notes = ["prose"] if found.has_prose and labels is None else []
    notes += _form_notes(text, boxes, found, family)
    if any(not text[box.span[0] : box.span[1]].isascii() for box in boxes if box.form != "json"):
        notes.append("full_width")
    for note in notes:
        repairs.setdefault(note, 1)
    if not repairs:
        repairs["layout"] = 1
    return _reply([(box.values, box.label) for box in boxes], found.points, repairs, family, resized_wh)


def _is_allowed(box: LooseBox, found: LooseBoxes, own: str) -> bool:
    """Pairs in running text are boxes only where a family writes pairs, four numbers between round brackets only where nothing else is."""
    if box.form == "untagged":
        return own == "tags"
    return box.form != "tuple" or (len(found.boxes) == 1 and not found.has_prose)


def _form_notes(text: str, boxes: Sequence[LooseBox], found: LooseBoxes, family: Family) -> list[str]:
    """In which form of whose the boxes stand."""
    own = family.box_text.form
    names: dict[str, None] = {}
    for box in boxes:
        form = "list" if box.form == "tuple" else box.form
        if form == "untagged":
            names["missing_tags"] = None
        elif form != own:
            names[f"as_{form}"] = None
    if own == "tags" and found.tags - {tag for tag in found.tags if tag in "".join(family.box_text.inline_gaps("x", 1))}:
        names["other_tags"] = None
    if any(box.label is None for box in boxes if box.form == own != "list"):
        names["missing_label"] = None
    if any(box.form == "json" for box in boxes):
        if own == "json" and not text.startswith("```"):
            names["no_fence"] = None
        if any(box.root.kind == "{" for box in boxes):
            names["bare_object"] = None
    return list(names)


def _labels_before(text: str, boxes: Sequence[LooseBox]) -> list[str] | None:
    """Labels of several brackets with a name before each and nothing else: "dog [[...]], cat [[...]]". None: not so."""
    roots = {box.root.start: box.root for box in boxes if box.form == "list"}
    if len(roots) < 2 or len({box.root.start for box in boxes}) != len(roots):
        return None
    names, position = {}, 0
    for start in sorted(roots):
        names[start] = text[position:start].strip(_BETWEEN_BOXES)
        position = roots[start].stop
    if not all(names.values()) or _WORDY.search(text[position:]):
        return None
    return [names[box.root.start] for box in boxes]


def _without_boxes(text: str, found: LooseBoxes, before: Sequence[str], family: Family, resized_wh: tuple[int, int]) -> ParsedReply:
    repairs = dict.fromkeys(before, 1)
    dropped = {name: count for name, count in found.repairs.items() if name.startswith("dropped")}
    says_none = False
    if not dropped and not found.points and not found.boxes:
        if found.has_empty and not found.has_prose:
            says_none = True
            is_own = family.box_text.form == "json"
            repairs[("layout" if text.startswith("```") else "no_fence") if is_own else "as_json"] = 1
        elif len(text) <= _LONGEST_REFUSAL and _NOT_FOUND.match(text):
            says_none = True
            repairs["not_found_in_words"] = 1
    repairs.update(dropped)
    return _reply([], found.points, repairs, family, resized_wh, says_none=says_none)


# ---- values


def _reply(
    read: _Read,
    points: Sequence[tuple[float, float, str | None]],
    repairs: dict[str, int],
    family: Family,
    resized_wh: tuple[int, int],
    *,
    says_none: bool = False,
) -> ParsedReply:
    """Corners in order, values within the grid, both counted."""
    right, bottom = family.grid.largest(resized_wh)
    boxes, labels = [], []
    count = {"fraction": 0, "swapped_corners": 0, "clamped": 0, "tags_in_label": 0}
    for (x0, y0, x1, y1), label in read:
        left, top = max(min(x0, x1), 0), max(min(y0, y1), 0)
        box = (min(left, right), min(top, bottom), max(min(max(x0, x1), right), 0), max(min(max(y0, y1), bottom), 0))
        boxes.append(box)
        bare = TAG.sub("", label) if label is not None and "<" in label else label
        labels.append(bare)
        count["swapped_corners"] += x1 < x0 or y1 < y0
        count["clamped"] += min(x0, x1, y0, y1) < 0 or max(x0, x1) > right or max(y0, y1) > bottom
        count["fraction"] += any(value % 1 for value in box)
        count["tags_in_label"] += bare != label
    repairs = repairs | {name: times for name, times in count.items() if times}
    return ParsedReply(
        boxes=np.array(boxes, np.float64).reshape(-1, 4),
        labels=tuple(labels),
        points=np.array([point[:2] for point in points], np.float64).reshape(-1, 2),
        point_labels=tuple(point[2] for point in points),
        status=("repaired" if repairs else "strict") if boxes else "none_found" if says_none else "failed",
        repairs=tuple(name for name, times in repairs.items() for _ in range(times)),
    )
