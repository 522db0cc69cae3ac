"""What is odd about the wording of records: things that no rule forbids, but that a person would want to know before training.

Pure: records in, counts with examples out. Nothing here rejects or changes anything.
"""

import re
from collections.abc import Sequence

from boxcar.schemas.manifest import Rejections
from boxcar.schemas.record import BoxMark, DialogueTurn, ImageMark, Record, TextPart

ABOUT = {
    "image_after_text": "A question has text before its image. Trainers that cut sequences on the right then cut the image.",
    "image_in_later_turn": "A dialogue shows an image after its first turn: it is kept as a whole or not at all.",
    "marker_in_text": "A text holds an image marker that was not taken for one, such as <image> or <img>.",
    "other_not_found": "An answer says that nothing was found, in words that are not the family's own; see the contract's not_found.",
    "boxes_without_label": "Boxes in a dialogue stand without a phrase.",
    "label_spacing": "A label begins or ends with a blank, or has several in a row.",
    "labels_alike": "Labels of one source that differ in case, blanks, - or _ alone: two names for one thing.",
}
"""Every lint, for people."""
_MARKER = re.compile(r"<image>|</?img>|<\|image\w*\|>|<image_\d+>|\[image\]", re.IGNORECASE)
_NOT_FOUND = re.compile(
    r"\s*(none|n/?a|null|nothing|not found|not present|no (such )?(object|target)s?( found| detected)?|\[\]|\{\}|没有|无|未找到|不存在)"
    r"[.。!]?\s*",
    re.IGNORECASE,
)
_BLANKS = re.compile(r"^\s|\s$|\s\s")


def lint_records(records: Sequence[Record]) -> dict[str, Rejections]:
    """Lint of a unit's records: name -> how many, and examples."""
    found: dict[str, Rejections] = {}

    def note(lint: str, record: Record, detail: str) -> None:
        entry = found.setdefault(lint, Rejections())
        entry.add(Rejections(1, [f"{record.position}: {detail}"] if len(entry.examples) < 3 else []))

    for record in records:
        for number, turn in enumerate(record.dialogue):
            for lint, detail in _turn(number, turn):
                note(lint, record, detail)
        for text in (*record.captions, record.system or ""):
            if marker := _MARKER.search(text):
                note("marker_in_text", record, f"{marker[0]!r} in {text[:80]!r}")
        for label in {region.label for region in record.regions if _BLANKS.search(region.label)}:
            note("label_spacing", record, repr(label))
    return found


def _turn(number: int, turn: DialogueTurn) -> list[tuple[str, str]]:
    found = []
    if _image_after_text(turn.question):
        found.append(("image_after_text", f"turn {number + 1} begins {_words(turn.question)[:60]!r}"))
    if number and any(isinstance(part, ImageMark) for part in turn.question):
        found.append(("image_in_later_turn", f"turn {number + 1}"))
    for part in (*turn.question, *turn.answer):
        if isinstance(part, str) and (marker := _MARKER.search(part)):
            found.append(("marker_in_text", f"{marker[0]!r} in turn {number + 1}"))
        if isinstance(part, BoxMark) and not part.label.strip():
            found.append(("boxes_without_label", f"turn {number + 1}: {len(part.boxes)} boxes"))
    answer = _words(turn.answer)
    if not any(isinstance(part, BoxMark) for part in turn.answer) and _NOT_FOUND.fullmatch(answer):
        found.append(("other_not_found", f"turn {number + 1} answers {answer!r}"))
    return found


def _image_after_text(parts: Sequence[TextPart]) -> bool:
    text = False
    for part in parts:
        if isinstance(part, ImageMark) and text:
            return True
        text = text or (isinstance(part, str) and bool(part.strip()))
    return False


def _words(parts: Sequence[TextPart]) -> str:
    return "".join(part for part in parts if isinstance(part, str)).strip()


def labels_alike(labels: Sequence[str]) -> list[list[str]]:
    """Groups of labels that differ in case, blanks, "-" or "_" alone, each sorted."""
    groups: dict[str, set[str]] = {}
    for label in labels:
        groups.setdefault(re.sub(r"[\s_-]+", "", label).casefold(), set()).add(label)
    return sorted(sorted(group) for group in groups.values() if len(group) > 1)
