"""Size -> resized size, grid and tokens: the arithmetic that families share, over columns.

Both rules take arrays of any length, so that one image and ten million rows run the same code.
Checked against transformers 5.23.0 `models/qwen2_vl/image_processing_pil_qwen2_vl.py` (smart_resize) and the golden tables in
`tests/pipelines/families/`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from boxcar.pipelines.ragged import IntColumn
from boxcar.schemas.errors import ConfigError

BoolColumn = npt.NDArray[np.bool_]

MAX_ASPECT_RATIO = 200
"""Exactly 200 passes, as upstream, whose message says otherwise."""


@dataclass(frozen=True)
class PixelLimits:
    """Lower and upper limit of width x height after the resize, in pixels."""

    min_pixels: int
    max_pixels: int

    def lowered(self, max_pixels: npt.ArrayLike) -> tuple[npt.ArrayLike, npt.ArrayLike]:
        """(lower, upper) limits as a resize rule takes them, for these upper ones: the lower is never above the upper."""
        return np.minimum(self.min_pixels, max_pixels), max_pixels


@dataclass(frozen=True)
class ResizedSizes:
    """What the resize makes of N images; columns of length N.

    A refused image (aspect ratio over 200, no pixels) has `refused` set and zeros elsewhere.
    """

    width: IntColumn
    height: IntColumn
    """Pixels after the resize."""
    grid_h: IntColumn
    grid_w: IntColumn
    """Patches; the temporal grid of a still image is 1."""
    visual_tokens: IntColumn
    """Tokens that carry the image, without boundary tokens."""
    position_span: IntColumn
    """Positions that the image takes in the sequence, boundary tokens included."""
    refused: BoolColumn


@dataclass(frozen=True)
class Misfit:
    """Where a base sees other images than a resize rule makes, in the words of an error."""

    found: str
    expected: str
    fix: str = ""


class ResizeRule(Protocol):
    """How a family resizes an image, and what that costs."""

    @property
    def description(self) -> str:
        """The rule in one line, for the frame contract."""

    @property
    def pixels_per_token(self) -> tuple[int, int]:
        """(width, height) in pixels of the resized image that one visual token stands for, at its smallest."""

    @property
    def published_limits(self) -> PixelLimits:
        """The limits of the published checkpoints."""

    @property
    def limits_matter(self) -> bool:
        """False for a family of one fixed size."""

    @property
    def vision_config(self) -> Mapping[str, int]:
        """What the vision section of a base's config.json says where the base sees images of this rule."""

    def pixels_for(self, num_tokens: IntColumn) -> IntColumn:
        """The lowest upper limits in pixels that leave room for so many visual tokens."""

    def misfit(self, vision: Mapping[str, Any], title: str) -> Misfit | None:
        """Where the vision section of a base's config.json says otherwise; None where it fits. title: of the family."""

    def limits(self, image_min_pixels: int | None, image_max_pixels: int | None, name: str) -> PixelLimits:
        """The limits that were set, or the published ones where None. name: of the family. Raises ConfigError for what it cannot meet."""

    def __call__(self, width: npt.ArrayLike, height: npt.ArrayLike, min_pixels: npt.ArrayLike, max_pixels: npt.ArrayLike) -> ResizedSizes:
        """Sizes in pixels of upright images, (N,) each; limits (N,) or one for all."""


@dataclass(frozen=True)
class SmartResize:
    """Qwen2-VL's smart_resize: both sides to the nearest multiple of patch * merge, the area into the limits.

    The aspect ratio is kept only to that multiple, and of very elongated images the area may end above `max_pixels` (a side never
    falls below one multiple).
    """

    patch: int
    merge: int
    published_limits: PixelLimits
    limits_matter: bool = True

    @property
    def factor(self) -> int:
        return self.patch * self.merge

    @property
    def description(self) -> str:
        return f"smart_resize(patch {self.patch}, merge {self.merge}, bicubic)"

    @property
    def pixels_per_token(self) -> tuple[int, int]:
        return self.factor, self.factor

    def pixels_for(self, num_tokens: IntColumn) -> IntColumn:
        return num_tokens * self.factor**2

    @property
    def vision_config(self) -> Mapping[str, int]:
        return {"patch_size": self.patch, "spatial_merge_size": self.merge}

    def misfit(self, vision: Mapping[str, Any], title: str) -> Misfit | None:
        patch, merge = (vision.get(key) for key in self.vision_config)
        if (patch, merge) == (self.patch, self.merge):
            return None
        expected = f"{self.patch} px and {self.merge} x {self.merge}, as the shards were counted"
        return Misfit(f"with patches of {patch} px merged {merge} x {merge}", expected)

    def limits(self, image_min_pixels: int | None, image_max_pixels: int | None, name: str) -> PixelLimits:
        low = self.published_limits.min_pixels if image_min_pixels is None else image_min_pixels
        high = self.published_limits.max_pixels if image_max_pixels is None else image_max_pixels
        if high < self.factor**2:
            raise ConfigError("image_max_pixels", found=f"{high}", expected=f"at least {self.factor**2}, one visual token of {name}")
        if low > high:
            raise ConfigError(
                "image_min_pixels",
                found=f"{low}{' (the published limit)' if image_min_pixels is None else ''}",
                expected=f"at most image_max_pixels, {high}",
                fix="Set image_min_pixels as well.",
            )
        return PixelLimits(low, high)

    def __call__(self, width: npt.ArrayLike, height: npt.ArrayLike, min_pixels: npt.ArrayLike, max_pixels: npt.ArrayLike) -> ResizedSizes:
        w, h, low, high = (np.asarray(column, dtype=np.int64) for column in np.broadcast_arrays(width, height, min_pixels, max_pixels))
        longest, shortest = np.maximum(w, h), np.minimum(w, h)
        refused = (shortest <= 0) | (longest > MAX_ASPECT_RATIO * shortest)
        w_safe, h_safe = np.where(refused, 1, w), np.where(refused, 1, h)
        f = self.factor
        # np.rint rounds halves to even, as Python's round does upstream: 14/28 -> 0, 42/28 -> 2, 70/28 -> 2.
        w_bar = np.rint(w_safe / f).astype(np.int64) * f
        h_bar = np.rint(h_safe / f).astype(np.int64) * f
        area = w_bar * h_bar
        shrink = np.sqrt(h_safe * w_safe / high)
        grow = np.sqrt(low / (h_safe * w_safe))

        def side(bar: IntColumn, pixels: IntColumn) -> IntColumn:
            # The order of the divisions is upstream's: height / beta / factor.
            smaller = np.maximum(f, np.floor(pixels / shrink / f).astype(np.int64) * f)
            larger = np.ceil(pixels * grow / f).astype(np.int64) * f
            return np.where(refused, 0, np.where(area > high, smaller, np.where(area < low, larger, bar)))

        new_w, new_h = side(w_bar, w_safe), side(h_bar, h_safe)
        merged_h, merged_w = new_h // f, new_w // f
        return ResizedSizes(
            width=new_w,
            height=new_h,
            grid_h=new_h // self.patch,
            grid_w=new_w // self.patch,
            visual_tokens=merged_h * merged_w,
            # M-RoPE: the text goes on at max(height, width) of the merged grid; vision_start and vision_end are text.
            position_span=np.where(refused, 0, np.maximum(merged_h, merged_w) + 2),
            refused=refused,
        )


@dataclass(frozen=True)
class SquareResize:
    """Every image to one square, by bicubic interpolation, without regard to its aspect ratio."""

    side: int
    """Pixels."""
    patch: int
    num_visual_tokens: int
    span: int
    """Positions that the image takes in the sequence, boundary tokens included."""
    limits_matter: bool = False

    @property
    def description(self) -> str:
        return f"resize to {self.side}x{self.side} (bicubic, aspect ratio not kept)"

    @property
    def pixels_per_token(self) -> tuple[int, int]:
        return self.patch, self.patch

    @property
    def published_limits(self) -> PixelLimits:
        return PixelLimits(self.side * self.side, self.side * self.side)

    def pixels_for(self, num_tokens: IntColumn) -> IntColumn:
        return num_tokens * self.patch**2

    @property
    def vision_config(self) -> Mapping[str, int]:
        return {"image_size": self.side}

    def misfit(self, vision: Mapping[str, Any], title: str) -> Misfit | None:
        side = vision.get("image_size")
        if side == self.side:
            return None
        fix = f"Choose a base of {title}, or convert again for this one's family."
        return Misfit(f"for images of {side} px", f"{self.side} px, as the shards were counted", fix)

    def limits(self, image_min_pixels: int | None, image_max_pixels: int | None, name: str) -> PixelLimits:
        for key, value in (("image_min_pixels", image_min_pixels), ("image_max_pixels", image_max_pixels)):
            if value is not None:
                expected = f"nothing: {name} resizes every image to one size ({self.description})"
                raise ConfigError(key, found=f"{value}", expected=expected, fix="Remove the key.")
        return self.published_limits

    def __call__(self, width: npt.ArrayLike, height: npt.ArrayLike, min_pixels: npt.ArrayLike, max_pixels: npt.ArrayLike) -> ResizedSizes:
        w, h = (np.asarray(column, dtype=np.int64) for column in np.broadcast_arrays(width, height))
        refused = np.minimum(w, h) <= 0

        def constant(value: int) -> IntColumn:
            return np.where(refused, 0, value).astype(np.int64)

        grid = self.side // self.patch
        return ResizedSizes(
            width=constant(self.side),
            height=constant(self.side),
            grid_h=constant(grid),
            grid_w=constant(grid),
            visual_tokens=constant(self.num_visual_tokens),
            position_span=constant(self.span),
            refused=refused,
        )
