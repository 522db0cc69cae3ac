"""A row as a conversation: its system prompt, and its questions cut where their images stand."""

from collections.abc import Sequence

from boxcar.pipelines.families.family import Family
from boxcar.pipelines.tokens.frame import Frame
from boxcar.train.data.store import Row

Segment = str | None
"""A piece of text, or None where an image stands."""


def question_parts(family: Family, row: Row, questions: Sequence[str]) -> list[list[Segment]]:
    """Each question as pieces of text and images. The images of a row stand before its first question, or where a dialogue has them."""
    if not row["ordered"]:
        return [[*([None] * len(row["images"]) if number == 0 else []), text] for number, text in enumerate(questions)]
    parts: list[list[Segment]] = [[text] for text in questions]
    for number in range(1, len(row["images"]) + 1):
        mark = family.chat.image_in_question(number)
        if mark:
            _cut_at(parts, mark)
        else:  # the template has the image before every question (CogVLM)
            parts[0].insert(0, None)
    return [[part for part in one if part != ""] for one in parts]


def _cut_at(parts: list[list[Segment]], mark: str) -> None:
    """Replace the first `mark` by an image."""
    for one in parts:
        for place, text in enumerate(one):
            if text is not None and mark in text:
                before, _, after = text.partition(mark)
                one[place : place + 1] = [before, None, after]
                return
    raise AssertionError("a dialogue shows every image it has")


def system_prompt(frame: Frame, row: Row) -> str | None:
    """The row's system prompt, as its header says it: the family's default or its own; None where there is none."""
    chat = frame.family.chat
    num_images = 0 if row["ordered"] else len(row["images"])
    header = list(row["header_ids"])
    if header == frame.header_ids(None, num_images):
        return chat.default_system
    text = frame.tokenizer.backend.decode(header, skip_special_tokens=False)
    before, after = chat.header("\0", num_images).split("\0")
    assert text.startswith(before), "a header with a system prompt of its own"
    return text[len(before) : len(text) - len(after)]
