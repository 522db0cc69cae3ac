"""Samples for the GPU bench, drawn rather than read: documents with random pixels, in the trainer's own types.

Images are of the sizes that COCO has (640 x 480 gives 391 visual tokens under Qwen2.5-VL); questions and answers alternate until a sample
has its 60 to 600 tokens of text, and a fifth to a half of these are answers, so that some 12 % of all tokens are labels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from boxcar.pipelines.families.catalog import find_family
from boxcar.tools.bench.qwen_sizes import FAMILY, SIZES, first_special
from boxcar.train.data.collate import MicroBatch, Pixels, pack, pad
from boxcar.train.data.documents import NO_LABEL, Document, ImageSlot, group_of
from boxcar.train.data.pixels import patch_rule, qwen_patches
from boxcar.train.data.positions import Placed, positions_of
from boxcar.train.planning.packing import fill_packs

_SIZES_WH = ((640, 480), (640, 480), (480, 640), (640, 427), (640, 426), (500, 375), (612, 612))
_HEADER_TOKENS, _FOOTER_TOKENS = 15, 5
_CANDIDATES_PER_PACK = 40
"""Documents to choose from for each pack: what is left over must not decide how well packs are filled."""


@dataclass(frozen=True)
class Sample:
    """A document with its pixels."""

    document: Document
    images: tuple[Pixels, ...]


def draw_packs(size: str, tokens: int, num_packs: int, seed: int = 0) -> list[list[Sample]]:
    """Packs of up to `tokens` tokens, filled by the planner's own rule. Smaller samples for the tiny network."""
    rng = np.random.default_rng(seed)
    shrink = 4 if size == "tiny" else 1
    made = [_draw(rng, size, number, shrink) for number in range(num_packs * _CANDIDATES_PER_PACK)]
    pack_of = fill_packs(np.array([len(document) for document in made], np.int32), tokens)
    chosen = rng.permutation(int(pack_of.max()) + 1)[:num_packs]
    return [[_with_pixels(rng, made[number]) for number in np.flatnonzero(pack_of == one)] for one in chosen]


def _draw(rng: np.random.Generator, size: str, number: int, shrink: int) -> Document:
    family, config = find_family(FAMILY), SIZES[size]
    width, height = _SIZES_WH[rng.integers(len(_SIZES_WH))]
    limits = family.resize.published_limits
    resized = family.resize(width // shrink, height // shrink, limits.min_pixels, limits.max_pixels)
    visual = int(resized.visual_tokens)
    num_text = int(np.exp(rng.uniform(np.log(60), np.log(600)))) // shrink
    is_answer = _answers(rng, num_text)
    start = _HEADER_TOKENS + 1
    length = start + visual + 1 + num_text + _FOOTER_TOKENS
    ids = rng.integers(0, first_special(size), length)
    ids[start - 1], ids[start + visual] = config["vision_start_token_id"], config["vision_end_token_id"]
    ids[start : start + visual] = config["image_token_id"]
    weights = np.zeros(length, np.float32)
    weights[start + visual + 1 : start + visual + 1 + num_text] = is_answer
    group = group_of("detect", number % 4, is_coordinate=True)
    grid = int(resized.grid_h), int(resized.grid_w)
    placed = Placed(start, visual, (grid[0] // 2, grid[1] // 2))
    resized_wh = int(resized.width), int(resized.height)
    return Document(
        sample_id=f"drawn/{number}",
        row=-1,
        input_ids=ids,
        label_weights=weights,
        label_groups=np.where(weights > 0, group, NO_LABEL).astype(np.int16),
        positions=positions_of(family.network.positions, length, [placed]),
        images=(ImageSlot(None, -1, -1, -1, resized_wh, resized_wh, (1, *grid), f"drawn image {number}"),),
    )


def _answers(rng: np.random.Generator, num_text: int) -> npt.NDArray[np.bool_]:
    """(num_text,): turns of a question and an answer, one after another."""
    parts: list[npt.NDArray[np.bool_]] = []
    while sum(map(len, parts)) < num_text:
        question, answer = rng.integers(14, 40), rng.integers(8, 24)
        parts += [np.zeros(question, np.bool_), np.ones(answer, np.bool_)]
    flags = np.concatenate(parts)[:num_text]
    flags[-1] = True  # a sample without a label would be none
    return flags


def _with_pixels(rng: np.random.Generator, document: Document) -> Sample:
    shapes = [(*slot.resized_wh[::-1], 3) for slot in document.images]
    return Sample(document, tuple(rng.integers(0, 256, shape, np.uint8) for shape in shapes))


def packed(samples: Sequence[Sample], size: str, *, pad_to: int | None = None) -> MicroBatch:
    """Samples side by side, for the trainer."""
    images = [image for sample in samples for image in sample.images]
    return pack([sample.document for sample in samples], images, pad_id=SIZES[size]["eos_token_id"], pad_to=pad_to)


def padded_inputs(samples: Sequence[Sample], size: str) -> tuple[dict[str, Any], int]:
    """(what the transformers model takes by keyword, tokens without padding): rows filled up to the longest, labels -100 elsewhere."""
    family, image_token = find_family(FAMILY), SIZES[size]["image_token_id"]
    images = [image for sample in samples for image in sample.images]
    batch = pad([sample.document for sample in samples], images, pad_id=SIZES[size]["eos_token_id"])
    assert batch.attention_mask is not None, "a padded batch has one"
    sizes_hw = [(height, width) for height, width in batch.image_sizes_hw.tolist()]
    inputs = {
        "input_ids": batch.input_ids,
        "attention_mask": batch.attention_mask.long(),
        "labels": torch.where(batch.label_weights > 0, batch.input_ids, -100),
        # Without it, Qwen2.5-VL would give images the positions of text, and say nothing.
        "mm_token_type_ids": (batch.input_ids == image_token).int(),
        "pixel_values": qwen_patches(batch.pixels, sizes_hw, patch_rule(family), family.image_normalisation, torch.float32),
        "image_grid_thw": batch.image_grid_thw,
    }
    return inputs, batch.num_useful_tokens
