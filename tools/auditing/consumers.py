"""`--as`: which samples another trainer would break, drop or cut, and how far boxes would be off."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from boxcar.pipelines.audit.annotations import Candidate
from boxcar.pipelines.audit.columns import Texts, Things
from boxcar.pipelines.audit.consumers import (
    LLAMA_FACTORY_MAX_PIXELS,
    ConsumerRule,
    find_consumer,
    infer_seqlen,
    llama_factory_size,
    ms_swift_size,
)
from boxcar.pipelines.audit.what_if import number_tokens
from boxcar.pipelines.boxes import geometry
from boxcar.pipelines.families.patches import ResizedSizes
from boxcar.pipelines.ragged import IntColumn, offsets_of
from boxcar.schemas.errors import ConfigError
from boxcar.tools.auditing.result import Consumer

NUM_EXAMPLES = 10


@dataclass
class _Tally:
    samples: int = 0
    crash: int = 0
    drop: int = 0
    question: int = 0
    answer: int = 0
    boxes: int = 0
    shift: float = 0.0
    iou: float = 0.0
    examples: dict[str, list[str]] = field(default_factory=dict)

    def note(self, what: str, drafts: IntColumn, things: Things, texts: Texts) -> int:
        found = self.examples.setdefault(what, [])
        for draft in drafts[: NUM_EXAMPLES - len(found)].tolist():
            found.append(things.sample_ids[texts.draft_records[draft]])
        return len(drafts)


def consumer_result(name: str, chunks: Iterable[tuple[Things, Texts]], candidate: Candidate) -> Consumer:
    """Every sample with all its turns, as `name` would take it under the workflow's cutoff and pixel limit.

    Raises ConfigError for a consumer that is not known, or a family that it does not resize so.
    """
    rule = find_consumer(name)
    family = candidate.frame.family
    if not family.resize.limits_matter:
        raise ConfigError(f"--as {name}", found=family.name, expected="a family of smart_resize: Qwen2-VL, Qwen2.5-VL or Qwen3-VL")
    tally = _Tally()
    for things, texts in chunks:
        _add(tally, things, texts, candidate, rule)
    return Consumer(
        name=rule.name,
        version=rule.version,
        rules=list(rule.about),
        samples=tally.samples,
        would_crash=tally.crash,
        would_drop=tally.drop,
        loses_question=tally.question,
        loses_answer=tally.answer,
        mean_box_shift_px=tally.shift / tally.boxes if tally.boxes else 0.0,
        mean_box_iou=tally.iou / tally.boxes if tally.boxes else 1.0,
        boxes=tally.boxes,
        examples={what: found for what, found in tally.examples.items() if found},
    )


def _sizes(things: Things, candidate: Candidate, rule: ConsumerRule) -> ResizedSizes:
    """What the model sees: the consumer's own resize, then the checkpoint's."""
    resize = candidate.frame.family.resize
    asked = candidate.config.image_max_pixels
    if rule.truncation == "pairs":
        width, height = llama_factory_size(things.sizes_wh[:, 0], things.sizes_wh[:, 1], asked or LLAMA_FACTORY_MAX_PIXELS)
    else:
        width, height = ms_swift_size(things.sizes_wh[:, 0], things.sizes_wh[:, 1], asked or 1 << 62)
    limits = resize.published_limits
    return resize(width, height, limits.min_pixels, limits.max_pixels)


def _add(tally: _Tally, things: Things, texts: Texts, candidate: Candidate, rule: ConsumerRule) -> None:
    if not len(texts.draft_records):
        return
    grammar, cutoff = candidate.grammar, candidate.config.cutoff_len
    sizes = _sizes(things, candidate, rule)
    visual = np.where(sizes.refused, 0, sizes.visual_tokens)
    placeholders = np.diff(offsets_of(visual)[things.image_offsets])[texts.draft_records]
    base = texts.draft_header.astype(np.int64) + placeholders
    boxes = number_tokens(things, grammar, sizes)
    running = offsets_of(boxes[texts.box_rows])
    border = texts.box_offsets[:-1] + texts.turn_question_boxes
    source = texts.turn_question + (running[border] - running[texts.box_offsets[:-1]]) + grammar.around_answer - grammar.turn_close
    target = texts.turn_answer + (running[texts.box_offsets[1:]] - running[border]) + grammar.turn_close
    refused = np.diff(offsets_of(sizes.refused.astype(np.int64))[things.image_offsets])[texts.draft_records] > 0
    tally.samples += len(base)
    if rule.truncation == "pairs":
        crash, question, answer = _pairs(base, source, target, texts.turn_offsets, grammar.turn_open, cutoff)
        crash |= refused
        question, answer = question & ~crash, answer & ~crash
        drop = np.zeros_like(crash)
    else:
        firsts, counts = texts.turn_offsets[:-1], np.diff(texts.turn_offsets)
        total = base + np.add.reduceat(source + target, firsts) + (counts - 1) * grammar.turn_open
        over = (total > cutoff) & ~refused
        crash, nothing = refused, np.zeros_like(over)
        drop = over if rule.truncation == "delete" else nothing
        question = over if rule.truncation == "left" else nothing
        answer = over if rule.truncation == "right" else nothing
    tally.crash += tally.note("would crash", np.flatnonzero(crash), things, texts)
    tally.drop += tally.note("would be dropped", np.flatnonzero(drop), things, texts)
    tally.question += tally.note("lose part of a question", np.flatnonzero(question), things, texts)
    tally.answer += tally.note("lose answers", np.flatnonzero(answer), things, texts)
    if candidate.frame.family.grid.needs_resized_size:
        _boxes(tally, things, sizes)


def _pairs(
    base: IntColumn, source: IntColumn, target: IntColumn, turn_offsets: IntColumn, turn_open: int, cutoff: int
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """(D,) whether image tokens are cut, a question's end is, an answer's. Images stand in the first source."""
    counts = np.diff(turn_offsets)
    total = np.zeros(len(base), np.int64)
    crash, question, answer = (np.zeros(len(base), np.bool_) for _ in range(3))
    for position in range(int(counts.max(initial=0))):
        here = np.flatnonzero(counts > position)
        open_ = here[total[here] < cutoff]
        answer[here[total[here] >= cutoff]] = True
        turns = turn_offsets[open_] + position
        asked = source[turns] + (base[open_] if position == 0 else turn_open)
        kept_source, kept_target = infer_seqlen(asked, target[turns], cutoff - total[open_])
        if position == 0:
            crash[open_] = kept_source < base[open_]
        question[open_] |= kept_source < asked
        answer[open_] |= kept_target < target[turns]
        total[open_] += kept_source + kept_target
    return crash, question, answer


def _boxes(tally: _Tally, things: Things, sizes: ResizedSizes) -> None:
    """Boxes in pixels of the original, read in pixels of the image that the model sees."""
    seen = ~sizes.refused[things.box_references]
    boxes = things.boxes[seen]
    references = things.box_references[seen]
    resized = np.stack([sizes.width, sizes.height], axis=1)[references]
    right = geometry.scale(boxes, resized / things.sizes_wh[references])
    tally.boxes += len(boxes)
    tally.shift += float(np.abs(right - boxes).max(axis=1).sum()) if len(boxes) else 0.0
    tally.iou += float(geometry.iou_pairs(boxes, right).sum())
