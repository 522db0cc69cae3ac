"""A blank image that weighs nothing, for batches without images.

Where the vision tower is trained, the other ranks wait for its gradients; under ZeRO-3 they wait for its weights, layer by layer, in the
order of the forward pass. So a batch without an image gets one more document, with the smallest image that the family takes: it goes
the way that every image goes, deepstack levels and all, and its tokens are no labels.
"""

import numpy as np

from boxcar.pipelines.families.catalog import find_family
from boxcar.schemas.contract import FrameContract
from boxcar.train.data.collate import Pixels
from boxcar.train.data.documents import NO_LABEL, Document, ImageSlot
from boxcar.train.data.positions import Placed, positions_of


def blank_document(contract: FrameContract) -> tuple[Document, Pixels]:
    """A document of one black image between two tokens of control text, and the image."""
    family = find_family(contract.family)
    width, height = family.resize.pixels_per_token
    sizes = family.resize(width, height, 1, family.resize.published_limits.max_pixels)
    num_placeholders = int(sizes.visual_tokens) + contract.extra_placeholders
    size_wh = int(sizes.width), int(sizes.height)
    close = contract.turn_close_ids[0]
    ids = np.array([close, *[contract.image_token_id] * num_placeholders, close], np.int64)
    grid = 1, int(sizes.grid_h), int(sizes.grid_w)
    merged = max(1, round((int(sizes.visual_tokens) * grid[1] / grid[2]) ** 0.5))
    placed = Placed(1, num_placeholders, (merged, int(sizes.visual_tokens) // merged))
    document = Document(
        sample_id="",
        row=-1,
        input_ids=ids,
        label_weights=np.zeros(len(ids), np.float32),
        label_groups=np.full(len(ids), NO_LABEL, np.int16),
        positions=positions_of(family.network.positions, len(ids), [placed]),
        images=(ImageSlot(None, -1, -1, -1, size_wh, size_wh, grid, "a blank image"),),
    )
    return document, np.zeros((size_wh[1], size_wh[0], 3), np.uint8)
