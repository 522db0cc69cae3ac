"""Small networks with random weights, and random documents for them."""

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from boxcar.pipelines.families.catalog import find_family
from boxcar.pipelines.families.patches import SmartResize
from boxcar.tools.quickstart.tiny_base import write_tiny_base
from boxcar.train.data.blank import blank_document
from boxcar.train.data.collate import MicroBatch, pack, pad
from boxcar.train.data.documents import Document, ImageSlot
from boxcar.train.data.positions import Placed, positions_of
from boxcar.train.network.model import Base, open_base
from tests import small_units
from tests.small_tokenizers import folder_of

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")


def base_folder(folder: Path, family: str) -> Path:
    path = folder / family
    write_tiny_base(path, family, folder_of("qwen2"))
    return path


def image_token_id(folder: Path) -> int:
    token: int = json.loads((folder / "config.json").read_text())["image_token_id"]
    return token


def tiny_base(folder: Path, family: str, *, packed: bool = True, dtype: torch.dtype = torch.float32) -> Base:
    path = base_folder(folder, family)
    return open_base(str(path), find_family(family), image_token_id(path), random_weights=True, dtype=dtype, packed=packed, seed=1)


def random_document(base: Base, seed: int, images_hw: list[tuple[int, int]], num_text: int = 9) -> tuple[Document, list[Any]]:
    """Text, images of these merged grids, text; every text token behind the images is a label. With its pixels."""
    rng = np.random.default_rng(seed)
    resize = base.family.resize
    assert isinstance(resize, SmartResize)
    special = base.image_token_id
    ids: list[int] = rng.integers(0, 250, 3).tolist()
    placed, slots, pixels = [], [], []
    for height, width in images_hw:
        placed.append(Placed(len(ids), height * width, (height, width)))
        ids += [special] * (height * width) + rng.integers(0, 250, 1).tolist()
        size = (width * resize.factor, height * resize.factor)
        grid = (1, height * resize.merge, width * resize.merge)
        slots.append(ImageSlot(f"{seed}.jpg", 0, -1, 0, size, size, grid, "a test"))
        pixels.append(rng.integers(0, 256, (size[1], size[0], 3)).astype(np.uint8))
    first_label = len(ids) + 1
    ids += rng.integers(0, 250, num_text).tolist()
    weights = np.zeros(len(ids), np.float32)
    weights[first_label:] = rng.random(len(ids) - first_label).astype(np.float32) + 0.1
    groups = np.where(weights > 0, seed % 8, -1).astype(np.int16)
    positions = positions_of(base.family.network.positions, len(ids), placed)
    return Document(f"sample/{seed}", seed, np.array(ids), weights, groups, positions, tuple(slots)), pixels


LAYOUTS: list[list[tuple[int, int]]] = [[(2, 3)], [], [(4, 2), (1, 5)], [(6, 5)]]
"""One image, none, two, a larger one."""


def random_documents(base: Base) -> tuple[list[Document], list[list[Any]]]:
    made = [random_document(base, seed, layout, 5 + seed) for seed, layout in enumerate(LAYOUTS)]
    return [document for document, _ in made], [pixels for _, pixels in made]


def packed_batch(documents: list[Document], pixels: list[list[Any]], **options: Any) -> MicroBatch:
    return pack(documents, [image for images in pixels for image in images], pad_id=0, **options)


def padded_batch(documents: list[Document], pixels: list[list[Any]]) -> MicroBatch:
    return pad(documents, [image for images in pixels for image in images], pad_id=0)


def blank_of(base: Base) -> tuple[Document, Any]:
    """The blank image of a contract that has this base's image token."""
    config = small_units.settings(base.family.name)
    contract = msgspec.structs.replace(small_units.frame_of(config).contract(), image_token_id=base.image_token_id, turn_close_ids=[1])
    return blank_document(contract)
