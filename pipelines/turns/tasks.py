"""Which turns are made of a record: the choosing, by hash.

    regions  ─ label ──> detect (all its boxes), detect_joint (several labels in one turn)
             ─ phrase ─> refer (its boxes)          ─ box ──> describe (its phrase)
    verified absences ─> absent (the family's not-found reply)
    captions ──────────> caption                    dialogue ──> dialogue, in order

Turns of one kind are chosen by the hash of (seed, record, kind, item): no order of work and no other record changes a choice.

A label is only asked for as "all of them" where every box of it in the image is known and kept: not where one was dropped (crowd,
difficult, broken), nor where the source says that it may not be exhaustive.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import ParamSpec, TypeVar

import msgspec
import xxhash

from boxcar.pipelines.families.family import Family, PromptBank
from boxcar.pipelines.families.prompts import LABEL_JOIN
from boxcar.pipelines.tokens.compose import TextSpec
from boxcar.pipelines.turns.texts import BadText, PlacedBoxes, Scribe, place_dialogue
from boxcar.schemas.record import Language, Record
from boxcar.schemas.task import TaskName
from boxcar.schemas.workflow import ConvertConfig, TaskConfig

WRONG_BOX = "wrong_box_in_dialogue"
NO_HISTORY = "history_unsupported"

T = TypeVar("T")
P = ParamSpec("P")


class Turn(msgspec.Struct, gc=False):
    """A turn to be encoded: codes of pieces and rows of boxes, no ids yet."""

    task: TaskName
    language: Language
    question: TextSpec
    answer: TextSpec
    labels: list[str]
    """Of each box of question and answer; for absent turns the label asked for."""
    text: str = ""
    """The label or phrase in question, for the difficulty."""
    num_rivals: int = 0
    """Boxes of the same label in the image that are not in the answer."""


class RejectedTurn(msgspec.Struct):
    """A turn that cannot be made."""

    reason: str
    detail: str


class Regions(msgspec.Struct):
    """The kept regions of one record, by row of the unit's box table, and what is not known completely."""

    rows_by_label: dict[str, list[int]]
    rows_by_phrase: dict[str, list[int]]
    phrases_of_row: dict[int, Sequence[str]]
    """The phrases of each kept box, or its label where it has none."""
    label_of_row: dict[int, str]
    incomplete_labels: set[str]
    """Never asked for as "all of them"."""
    incomplete_phrases: set[str]
    """Likewise; apart from the labels, for a phrase may read like a label ("dog") and yet be known completely."""
    present: set[str]
    """Every label and phrase of the record, kept or not: never absent."""


ReadingOrder = Callable[[list[int]], list[int]]
"""Sorts box rows from top to bottom, then left to right: one fixed order gives one answer to learn."""


class _Choice:
    """Choices for one record, by hash."""

    def __init__(self, record_id: str, seed: int) -> None:
        self._key = xxhash.xxh3_64_intdigest(record_id.encode(errors="surrogatepass"), seed=seed)

    def number(self, *what: str) -> int:
        """64 bits that depend on the seed, the record and these words."""
        return xxhash.xxh3_64_intdigest("\0".join(what).encode(errors="surrogatepass"), seed=self._key)

    def happens(self, share: float, *what: str) -> bool:
        return share >= 1.0 or (share > 0.0 and self.number(*what) < share * 2.0**64)

    def shuffled(self, items: Sequence[T], *what: str) -> list[T]:
        return sorted(items, key=lambda item: self.number(*what, str(item)))

    def one_of(self, items: Sequence[T], *what: str) -> T:
        return items[self.number(*what) % len(items)]

    def some(self, task: TaskName, config: TaskConfig, items: Sequence[str]) -> Sequence[str]:
        """The items that get a turn: each with the task's share, at most as many as the task allows, in their given order."""
        chosen = items if config.share >= 1.0 else [item for item in items if self.happens(config.share, task, item)]
        if config.max_per_sample is None or len(chosen) <= config.max_per_sample:
            return chosen
        best = set(self.shuffled(chosen, task, "rank")[: config.max_per_sample])
        return [item for item in chosen if item in best]


class TurnMaker:
    """Makes turns for one workflow."""

    def __init__(self, config: ConvertConfig, family: Family, bank: PromptBank, scribe: Scribe) -> None:
        self.config, self.family, self.bank, self.scribe = config, family, bank, scribe
        self._languages = list(config.languages)

    def _language(self, choose: _Choice, *item: str) -> Language:
        if len(self._languages) == 1:
            return self._languages[0]
        at = choose.number("language", *item) / 2.0**64
        for language in self._languages[:-1]:
            at -= self.config.languages[language]
            if at < 0:
                return language
        return self._languages[-1]

    def _prompt(self, choose: _Choice, task: TaskName, language: Language, item: str) -> str:
        return choose.one_of(self.bank[task][language], "prompt", task, item)

    def region_turns(self, record: Record, regions: Regions, reading_order: ReadingOrder) -> Iterator[Turn | RejectedTurn]:
        """The unordered turns that a record's regions and verified absences give."""
        choose = _Choice(record.record_id, self.config.seed)
        tasks = self.config.tasks
        complete = [label for label in regions.rows_by_label if label not in regions.incomplete_labels]
        for label in choose.some("detect", tasks.detect, complete):
            rows = reading_order(regions.rows_by_label[label])
            yield self._try(self._grounding, choose, "detect", label, rows, 0)
        if len(complete) > 1 and choose.some("detect_joint", tasks.detect_joint, [""]):
            yield self._try(self._joint, choose, choose.shuffled(complete, "joint order"), regions, reading_order)
        phrases = [phrase for phrase in regions.rows_by_phrase if phrase not in regions.incomplete_phrases]
        for phrase in choose.some("refer", tasks.refer, phrases):
            rows = reading_order(regions.rows_by_phrase[phrase])
            rivals = len(set(regions.rows_by_label.get(regions.label_of_row[rows[0]], [])).difference(rows))
            yield self._try(self._grounding, choose, "refer", phrase, rows, rivals)
        numbered = {str(number): row for number, row in enumerate(regions.phrases_of_row)}
        for number in choose.some("describe", tasks.describe, list(numbered)):
            yield self._try(self._describe, choose, number, numbered[number], regions)
        for label in self._absences(choose, record, regions.present):
            yield self._try(self._absent, choose, label)

    def caption_turns(self, record: Record) -> Iterator[Turn | RejectedTurn]:
        choose = _Choice(record.record_id, self.config.seed)
        numbered = {str(number): caption for number, caption in enumerate(record.captions)}
        for number in choose.some("caption", self.config.tasks.caption, list(numbered)):
            yield self._try(self._caption, choose, record.language, number, numbered[number])

    def _try(self, make: Callable[P, Turn], *args: P.args, **kwargs: P.kwargs) -> Turn | RejectedTurn:
        try:
            return make(*args, **kwargs)
        except BadText as bad:
            return RejectedTurn(bad.reason, bad.detail)

    def _grounding(self, choose: _Choice, task: TaskName, label: str, rows: list[int], num_rivals: int) -> Turn:
        language = self._language(choose, task, label)
        question = self.scribe.question(self._prompt(choose, task, language, label), label)
        answer = self.scribe.same_label_answer(label, rows)
        return Turn(task, language, question, answer, [label] * len(rows), label, num_rivals)

    def _joint(self, choose: _Choice, asked: list[str], regions: Regions, reading_order: ReadingOrder) -> Turn:
        language = self._language(choose, "detect_joint")
        named = LABEL_JOIN[language].join(self.scribe.checked(label) for label in asked)
        question = self.scribe.question(self._prompt(choose, "detect_joint", language, ""), named)
        boxes = [(label, row) for label in asked for row in reading_order(regions.rows_by_label[label])]
        labels = [label for label, _ in boxes]
        answer = self.scribe.boxes_answer(labels, [row for _, row in boxes])
        return Turn("detect_joint", language, question, answer, labels, named)

    def _describe(self, choose: _Choice, number: str, row: int, regions: Regions) -> Turn:
        language = self._language(choose, "describe", number)
        text = choose.one_of(regions.phrases_of_row[row], "describe", "phrase", number)
        question = self.scribe.question_with_box(self._prompt(choose, "describe", language, number), row)
        return Turn("describe", language, question, self.scribe.plain_answer(text), [text], text)

    def _absences(self, choose: _Choice, record: Record, present: set[str]) -> list[str]:
        """Labels to ask for that are verified to be absent; explicit ones first, then one of the closed vocabulary for each free place."""
        config = self.config.tasks.absent
        explicit = [label for label in dict.fromkeys(record.absent) if label not in present]
        chosen = list(choose.some("absent", config, explicit))
        if record.vocabulary and not chosen:
            for place in range(config.max_per_sample or 1):
                if not choose.happens(config.share, "absent", "place", str(place)):
                    continue
                start = choose.number("absent", "label", str(place)) % len(record.vocabulary)
                rest = (record.vocabulary[(start + step) % len(record.vocabulary)] for step in range(len(record.vocabulary)))
                label = next((label for label in rest if label not in present and label not in chosen), None)
                if label is not None:
                    chosen.append(label)
        return chosen

    def _absent(self, choose: _Choice, label: str) -> Turn:
        language = self._language(choose, "absent", label)
        question = self.scribe.question(self._prompt(choose, "absent", language, label), label)
        answer = self.scribe.plain_answer(self.family.not_found[language].replace("{label}", label))
        return Turn("absent", language, question, answer, [label], label)

    def _caption(self, choose: _Choice, language: Language, number: str, caption: str) -> Turn:
        # A caption is answered in its own language, so it is asked for in that language.
        question = self.scribe.question(self._prompt(choose, "caption", language, number), "")
        return Turn("caption", language, question, self.scribe.plain_answer(caption), [], caption)

    def wants_dialogue(self, record: Record) -> bool:
        """Whether a record's dialogue is taken: as a whole, for its turns belong together."""
        return bool(record.dialogue) and _Choice(record.record_id, self.config.seed).happens(self.config.tasks.dialogue.share, "dialogue")

    def dialogue_turns(self, record: Record, first_row: int, kept: Callable[[int], bool]) -> list[Turn] | RejectedTurn:
        """All turns of a dialogue, or why there can be none. Its boxes stand at `first_row` and after it, in the order of the text."""
        chat = self.family.chat
        if chat.one_question_per_image and not chat.supports_history and len(record.dialogue) > 1:
            return RejectedTurn(
                NO_HISTORY, f"found {len(record.dialogue)} turns, but {self.family.name} answers one question and knows no history"
            )
        placed = place_dialogue(record.dialogue, first_row)
        turns = []
        try:
            for number, (question, answer) in enumerate(placed):
                # Where each turn is a sequence of its own, what was said before becomes part of the question.
                asked = self.scribe.history(placed[:number], question) if chat.one_question_per_image else question
                boxes = [part for part in [*asked, *answer] if isinstance(part, PlacedBoxes)]
                if wrong := [row for part in boxes for row in part.rows if not kept(row)]:
                    return RejectedTurn(WRONG_BOX, f"turn {number + 1}: {len(wrong)} boxes broke a rule that drops them")
                labels = [part.label for part in boxes for _ in part.rows]
                turns.append(
                    Turn("dialogue", record.language, self.scribe.running_question(asked), self.scribe.running_answer(answer), labels)
                )
        except BadText as bad:
            return RejectedTurn(bad.reason, bad.detail)
        return turns
