"""What other trainers make of the same sizes and lengths: their resize and truncation, as arithmetic over columns.

LLaMA-Factory   shrinks to image_max_pixels by a square root and int(), grows likewise, sides to 28, ratios to 180; then the
                checkpoint's own smart_resize. Cuts source and target of each turn from the right, and leaves out the turns behind
                the cutoff.
                Read in hiyouga/LLaMA-Factory: data/mm_plugin.py (_preprocess_image), data/processor/supervised.py @0b3022b,
                data/processor/processor_utils.py @1679930 (infer_seqlen).
ms-swift        shrinks to max_pixels (rescale_image), then smart_resize. A sample over max_length is left out (`delete`, the default), or
                cut on the left or right; image tokens are then kept.
                Read in modelscope/ms-swift: llm/template/vision_utils.py @079e60a; the parameters' documentation of 3.11 on truncation.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from boxcar.pipelines.ragged import IntColumn
from boxcar.schemas.errors import ConfigError

LLAMA_FACTORY_MAX_PIXELS = 768 * 768
LLAMA_FACTORY_MIN_PIXELS = 32 * 32
"""Defaults of its arguments image_max_pixels and image_min_pixels."""


@dataclass(frozen=True)
class ConsumerRule:
    """One trainer, and how it cuts."""

    name: str
    version: str
    truncation: str
    """pairs (LLaMA-Factory), delete, left or right."""
    about: tuple[str, ...]


_LLAMA_FACTORY = ConsumerRule(
    "llama-factory",
    "main @0b3022b (2026), processor_utils @1679930",
    "pairs",
    (
        "image: factor = sqrt(image_max_pixels / (w h)), sides int(side * factor); likewise up to 32*32; sides at least 28; a ratio over "
        "200 becomes 180; then smart_resize with the checkpoint's published limits",
        "image_max_pixels: the workflow's, else its default 589824",
        "text: source and target of each turn are cut on the right by infer_seqlen; turns behind the cutoff are left out",
        "images of a dialogue are taken to stand in its first turn",
        "boxes in the text are never rescaled",
    ),
)


def _swift(truncation: str, about: str) -> ConsumerRule:
    name = "ms-swift" if truncation == "delete" else f"ms-swift:{truncation}"
    image = (
        "image: w h over max_pixels: height int(sqrt(max_pixels / (w / h))), width likewise; then smart_resize with the published limits"
    )
    boxes = "boxes in the text are never rescaled (those in `objects` are)"
    return ConsumerRule(name, "3.x @079e60a, truncation as documented for 3.11", truncation, (image, about, boxes))


CONSUMERS: dict[str, ConsumerRule] = {
    rule.name: rule
    for rule in (
        _LLAMA_FACTORY,
        _swift("delete", "text: a sample over max_length is left out (truncation_strategy delete, the default)"),
        _swift("left", "text: a sample over max_length loses its beginning; image tokens are kept (truncation_strategy left)"),
        _swift("right", "text: a sample over max_length loses its end; image tokens are kept (truncation_strategy right)"),
    )
}


def find_consumer(name: str) -> ConsumerRule:
    """Raises ConfigError with the names there are."""
    if name not in CONSUMERS:
        raise ConfigError("--as", found=repr(name), expected=f"one of {', '.join(CONSUMERS)}")
    return CONSUMERS[name]


def llama_factory_size(
    width: npt.ArrayLike, height: npt.ArrayLike, max_pixels: int, min_pixels: int = LLAMA_FACTORY_MIN_PIXELS
) -> tuple[IntColumn, IntColumn]:
    """(width, height) px of images before the processor sees them. (N,) each, 1 or more."""
    w, h = np.asarray(width, np.int64), np.asarray(height, np.int64)
    w, h = _by_root(w, h, max_pixels, w * h > max_pixels)
    w, h = _by_root(w, h, min_pixels, w * h < min_pixels)
    w, h = np.maximum(w, 28), np.maximum(h, 28)
    w = np.where(w > 200 * h, 180 * h, w)
    h = np.where(h > 200 * w, 180 * w, h)
    return w, h


def _by_root(w: IntColumn, h: IntColumn, pixels: int, where: npt.NDArray[np.bool_]) -> tuple[IntColumn, IntColumn]:
    factor = np.sqrt(pixels / np.maximum(w * h, 1))
    return np.where(where, (w * factor).astype(np.int64), w), np.where(where, (h * factor).astype(np.int64), h)


def ms_swift_size(width: npt.ArrayLike, height: npt.ArrayLike, max_pixels: int) -> tuple[IntColumn, IntColumn]:
    """(width, height) px of images before the processor sees them. (N,) each; a side of 0 is one that it cannot make."""
    w, h = np.asarray(width, np.int64), np.asarray(height, np.int64)
    ratio = w / np.maximum(h, 1)
    scaled = np.sqrt(max_pixels / ratio)
    large = w * h > max_pixels
    return np.where(large, (scaled * ratio).astype(np.int64), w), np.where(large, scaled.astype(np.int64), h)


def infer_seqlen(source: IntColumn, target: IntColumn, room: IntColumn) -> tuple[IntColumn, IntColumn]:
    """LLaMA-Factory's lengths of source and target within `room` tokens. (N,) each."""
    share = (room * (target / np.maximum(source + target, 1))).astype(np.int64)
    limit = np.where(target * 2 < room, room, np.where(source * 2 < room, room - source, share))
    kept_target = np.minimum(limit, target)
    return np.minimum(np.maximum(room - kept_target, 0), source), kept_target
