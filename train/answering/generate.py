"""Prompts -> replies: transformers' `generate`, greedy, on rows filled up on the left.

What the network sees is made by the code that makes training batches (ids, pixels); positions are its own, and a test holds its first
logits against the training forward's.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from boxcar.train.answering.adapter import Opened
from boxcar.train.data import pixels
from boxcar.train.data.collate import MicroBatch, Pixels, pad
from boxcar.train.data.documents import Document
from boxcar.train.network.model import Base

_OPENS, _CLOSES = "[(,;", "]),;"
LEAST_LOGPROB = -100.0
"""Of a box without a number of its own: below any real one, and finite."""


@dataclass(frozen=True)
class Reply:
    """What the network said."""

    ids: list[int]
    """Without the token that ended it."""
    text: str
    """Control tokens included: some families write boxes with them."""
    logprobs: list[float] | None
    """Log-probability of each of `ids`; None where not asked for."""
    complete: bool
    """Whether it ended by itself rather than at max_new_tokens."""


class _Recorder(LogitsProcessor):  # type: ignore[misc, unused-ignore]
    """Log-probabilities of the tokens chosen, one step late; keeps one step's logits, not all of them."""

    def __init__(self) -> None:
        self.chosen: list[torch.Tensor] = []
        self._last: torch.Tensor | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self._settle(input_ids)
        self._last = torch.log_softmax(scores.float(), dim=-1)
        return scores

    def _settle(self, input_ids: torch.Tensor) -> None:
        if self._last is not None:
            self.chosen.append(self._last.gather(1, input_ids[:, -1:])[:, 0])

    def finish(self, input_ids: torch.Tensor) -> list[list[float]]:
        """(B, new tokens)."""
        self._settle(input_ids)
        rows: list[list[float]] = torch.stack(self.chosen, dim=1).tolist()
        return rows


def generate(
    opened: Opened,
    prompts: Sequence[Document],
    images: Sequence[Pixels],
    *,
    max_new_tokens: int,
    with_logprobs: bool = False,
    in_step: bool = False,
) -> list[Reply]:
    """A reply to each prompt, greedily. images: of all prompts, in order, at the model's size. in_step: see `PredictConfig`."""
    base, frame = opened.base, opened.frame
    device = next(opened.network.parameters()).device
    stop = frame.turn_close_ids[0]
    batch = pad(prompts, images, pad_id=stop).to(device)
    inputs = _on_the_left(batch, stop)
    length = inputs["input_ids"].shape[1]
    if len(batch.image_sizes_hw):
        is_image = inputs["attention_mask"].bool() & (inputs["input_ids"] == base.image_token_id)
        inputs |= _vision(base, batch, is_image)
    recorder = _Recorder()
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=_stops(opened, stop), pad_token_id=stop, bos_token_id=None
    )
    with torch.no_grad():
        output = opened.network.generate(
            **inputs,
            generation_config=settings,
            logits_processor=LogitsProcessorList([recorder] if with_logprobs else []),
            synced_gpus=in_step,
        )
    logprobs = recorder.finish(output) if with_logprobs else [None] * len(prompts)
    return [_reply(opened, row, scores, _stops(opened, stop)) for row, scores in zip(output[:, length:].tolist(), logprobs, strict=True)]


def _on_the_left(batch: MicroBatch, pad_id: int) -> dict[str, torch.Tensor]:
    """`pad` fills up on the right; what comes next must follow the last token."""
    assert batch.attention_mask is not None, "padded rows"
    mask = batch.attention_mask
    width = mask.shape[1]
    # Roll each row by what is empty at its end.
    places = (torch.arange(width, device=mask.device)[None] - (width - mask.sum(dim=1))[:, None]) % width
    ids = batch.input_ids.gather(1, places)
    mask = mask.gather(1, places)
    return {"input_ids": torch.where(mask, ids, pad_id), "attention_mask": mask.long()}


def _vision(base: Base, batch: MicroBatch, is_image: torch.Tensor) -> dict[str, torch.Tensor]:
    """is_image: (B, T) bool, the placeholders."""
    images = {"pixel_values": pixels.images_of(batch, base.family, base.vision_dtype)}
    if base.native:
        return images | {"image_mask": is_image}
    return images | {"image_grid_thw": batch.image_grid_thw, "mm_token_type_ids": is_image.int()}


def _stops(opened: Opened, stop: int) -> list[int]:
    """What closes a turn, and what the base itself ends with."""
    own = opened.base.model.generation_config.eos_token_id
    return sorted({stop, *(own if isinstance(own, list) else [] if own is None else [own])})


def _reply(opened: Opened, ids: list[int], logprobs: list[float] | None, stops: list[int]) -> Reply:
    end = next((place for place, token in enumerate(ids) if token in stops), None)
    kept = ids[:end]
    text = opened.frame.tokenizer.backend.decode(kept, skip_special_tokens=False)
    return Reply(kept, text, None if logprobs is None else logprobs[: len(kept)], end is not None)


def box_scores(reply: Reply, num_boxes: int, opened: Opened) -> list[float] | None:
    """Mean log-probability of the tokens of each box's numbers, in the order of the reply; None where none were recorded.

    Numbers are runs of tokens of digits between brackets, commas and blanks. Where the reply has four for each box they are taken in
    fours; else (a repaired reply) every box gets the mean over all of them.
    """
    if reply.logprobs is None:
        return None
    decode = opened.frame.tokenizer.backend.decode
    numbers = _numbers([decode([token], skip_special_tokens=False) for token in reply.ids], reply.logprobs)
    groups = [numbers[4 * box : 4 * box + 4] for box in range(num_boxes)] if len(numbers) == 4 * num_boxes else [numbers] * num_boxes
    return [_mean([score for number in group for score in number]) for group in groups]


def _numbers(texts: Sequence[str], scores: Sequence[float]) -> list[list[float]]:
    """Scores of the tokens of each number that stands where a coordinate may stand."""
    numbers: list[list[float]] = []
    current: list[float] = []
    before, at_start = "", ""
    for text, score in zip([*texts, " ]"], [*scores, 0.0], strict=True):
        stripped = text.strip()
        if stripped.isdigit():
            at_start = at_start if current else before
            current.append(score)
        elif stripped:
            if current and at_start in _OPENS and stripped[0] in _CLOSES:
                numbers.append(current)
            current = []
        before = stripped[-1:] or before
    return numbers


def _mean(scores: Sequence[float]) -> float:
    return sum(scores) / len(scores) if scores else LEAST_LOGPROB
