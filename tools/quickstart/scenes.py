"""Drawn scenes with boxes that are known to the pixel: what the quick start converts, trains on and is measured with.

    shapes x colours x patterns x sizes, one or several in a picture, overlapping, with scribbles in between that nobody asks for

Phrases are "red star" or 红色星形; a picture's other phrases are truly absent. Same seed, same bytes.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from boxcar.schemas.record import Language

Point = tuple[float, float]

COLOURS = {
    "red": ("红色", (220, 50, 47)),
    "green": ("绿色", (70, 150, 60)),
    "blue": ("蓝色", (38, 110, 210)),
    "yellow": ("黄色", (225, 180, 30)),
    "purple": ("紫色", (130, 70, 170)),
    "orange": ("橙色", (235, 120, 40)),
}
OLD_SHAPES = {"circle": "圆形", "square": "方块", "triangle": "三角形", "diamond": "菱形"}
"""What the small base has seen."""
NEW_SHAPES = {"star": "星形", "cross": "十字", "heart": "心形"}
"""What the quick start teaches."""
PATTERNS = ("plain", "striped", "dotted")
_BACKGROUNDS = ((245, 245, 240), (225, 232, 240), (240, 228, 220), (222, 236, 224))
_SIDE_PX = 96


@dataclass(frozen=True)
class Style:
    """A kind of scenes."""

    shapes: Sequence[str]
    language: Language = "en"
    num_things: tuple[int, int] = (1, 1)
    """Fewest and most in a picture."""
    sides: tuple[float, float] = (0.25, 0.75)
    """Smallest and largest side of a thing, as a share of the picture's."""
    patterns: Sequence[str] = PATTERNS
    num_scribbles: int = 2
    """Distractors."""


def phrase(shape: str, colour: str, language: Language) -> str:
    """What a thing is called."""
    return f"{colour} {shape}" if language == "en" else COLOURS[colour][0] + (OLD_SHAPES | NEW_SHAPES)[shape]


def all_phrases(shapes: Sequence[str], language: Language) -> list[str]:
    """Everything that may be asked for."""
    return [phrase(shape, colour, language) for shape in shapes for colour in COLOURS]


def write_scenes(folder: Path, styles: Sequence[tuple[Style, int]], seed: int, prefix: str) -> dict[Language, int]:
    """images/ and a COCO file for each language, instances_en.json and so on. Returns the number of boxes by language.

    styles: kinds of scenes with their numbers; those of one language share a file, and so a closed list of categories.
    """
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    counts: dict[Language, int] = {}
    for language in dict.fromkeys(style.language for style, _ in styles):
        mine = [(style, number) for style, number in styles if style.language == language]
        names = list(dict.fromkeys(name for style, _ in mine for name in all_phrases(style.shapes, language)))
        images: list[dict[str, Any]] = []
        boxes: list[dict[str, Any]] = []
        for style in (style for style, number in mine for _ in range(number)):
            picture, things = draw_scene(rng, style)
            name = f"{prefix}_{language}_{len(images) + 1:05d}.png"
            picture.save(folder / "images" / name)
            images.append({"id": len(images) + 1, "file_name": name, "width": picture.width, "height": picture.height})
            for shape, colour, (x0, y0, x1, y1) in things:
                category = names.index(phrase(shape, colour, language)) + 1
                box = [x0, y0, x1 - x0, y1 - y0]
                known = {"id": len(boxes) + 1, "image_id": len(images), "category_id": category, "iscrowd": 0}
                boxes.append({**known, "bbox": box, "area": box[2] * box[3]})
        categories = [{"id": number + 1, "name": name} for number, name in enumerate(names)]
        content = {"info": {"description": "drawn by boxcar"}, "images": images, "annotations": boxes, "categories": categories}
        (folder / f"instances_{language}.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
        counts[language] = len(boxes)
    return counts


Thing = tuple[str, str, tuple[int, int, int, int]]
"""(shape, colour, xyxy in px)."""


def draw_scene(rng: np.random.Generator, style: Style) -> tuple[Image.Image, list[Thing]]:
    """A picture and what is in it. Things may overlap by a quarter of the smaller one; no two have the same name."""
    picture = Image.new("RGB", (_SIDE_PX, _SIDE_PX), _BACKGROUNDS[rng.integers(len(_BACKGROUNDS))])
    _scribble(picture, rng, style.num_scribbles)
    things: list[Thing] = []
    wanted = int(rng.integers(style.num_things[0], style.num_things[1] + 1))
    for _ in range(20 * wanted):
        if len(things) == wanted:
            break
        low, high = (round(share * _SIDE_PX) for share in style.sides)
        side = int(rng.integers(low, high + 1))
        if wanted > 1:
            side = min(side, _SIDE_PX // 2)
        x0, y0 = int(rng.integers(0, _SIDE_PX - side + 1)), int(rng.integers(0, _SIDE_PX - side + 1))
        box = (x0, y0, x0 + side, y0 + side)
        shape, colour = style.shapes[int(rng.integers(len(style.shapes)))], list(COLOURS)[rng.integers(len(COLOURS))]
        if any(_overlap(box, other) > 0.25 or (shape, colour) == (name, hue) for name, hue, other in things):
            continue
        _paint(picture, shape, box, COLOURS[colour][1], style.patterns[int(rng.integers(len(style.patterns)))])
        things.append((shape, colour, box))
    return picture, things


def _overlap(first: tuple[int, int, int, int], second: tuple[int, int, int, int]) -> float:
    """Of the smaller box, the share that the other covers."""
    across = min(first[2], second[2]) - max(first[0], second[0])
    down = min(first[3], second[3]) - max(first[1], second[1])
    smaller = min((box[2] - box[0]) * (box[3] - box[1]) for box in (first, second))
    return max(0, across) * max(0, down) / smaller


def _scribble(picture: Image.Image, rng: np.random.Generator, number: int) -> None:
    pen = ImageDraw.Draw(picture)
    for _ in range(number):
        x, y = rng.integers(0, _SIDE_PX, 2).tolist()
        dx, dy = rng.integers(-14, 15, 2).tolist()
        pen.line((x, y, x + dx, y + dy), fill=(150, 150, 150), width=1)


def _paint(picture: Image.Image, shape: str, box: tuple[int, int, int, int], colour: tuple[int, int, int], pattern: str) -> None:
    """The shape fills its half-open box to the last pixel."""
    x0, y0, x1, _ = box
    side = x1 - x0
    big = 4 * side  # drawn large and shrunk: smooth edges
    mask = Image.new("L", (big, big), 0)
    pen = ImageDraw.Draw(mask)
    if shape == "circle":
        pen.ellipse((0, 0, big - 1, big - 1), fill=255)
    else:
        pen.polygon([(x * (big - 1), y * (big - 1)) for x, y in _OUTLINES[shape]()], fill=255)
    texture = Image.new("RGB", (side, side), colour)
    _texture(texture, pattern)
    picture.paste(texture, (x0, y0), mask.resize((side, side), Image.Resampling.BOX))


def _texture(texture: Image.Image, pattern: str) -> None:
    pen, side = ImageDraw.Draw(texture), texture.width
    light = (250, 250, 250)
    if pattern == "striped":
        for y in range(3, side, 8):
            pen.rectangle((0, y, side, y + 2), fill=light)
    elif pattern == "dotted":
        for y in range(4, side, 9):
            for x in range(4, side, 9):
                pen.ellipse((x - 1, y - 1, x + 1, y + 1), fill=light)


def _star() -> list[Point]:
    points = []
    for number in range(10):
        radius, angle = (1.0 if number % 2 == 0 else 0.42), np.pi * (number / 5 - 0.5)
        points.append((float(radius * np.cos(angle)), float(radius * np.sin(angle))))
    return _filling(points)


def _heart() -> list[Point]:
    angles = np.linspace(0, 2 * np.pi, 60, endpoint=False)
    x = 16 * np.sin(angles) ** 3
    y = -(13 * np.cos(angles) - 5 * np.cos(2 * angles) - 2 * np.cos(3 * angles) - np.cos(4 * angles))
    return _filling(list(zip(x.tolist(), y.tolist(), strict=True)))


def _cross() -> list[Point]:
    a, b = 0.33, 0.67
    return [(a, 0), (b, 0), (b, a), (1, a), (1, b), (b, b), (b, 1), (a, 1), (a, b), (0, b), (0, a), (a, a)]


def _filling(points: list[Point]) -> list[Point]:
    """Scaled to the unit square, each way by itself."""
    low, high = np.min(points, axis=0), np.max(points, axis=0)
    scaled: list[list[float]] = ((np.array(points) - low) / (high - low)).tolist()
    return [(x, y) for x, y in scaled]


_OUTLINES: dict[str, Callable[[], list[Point]]] = {
    "square": lambda: [(0, 0), (1, 0), (1, 1), (0, 1)],
    "triangle": lambda: [(0.5, 0), (1, 1), (0, 1)],
    "diamond": lambda: [(0.5, 0), (1, 0.5), (0.5, 1), (0, 0.5)],
    "star": _star,
    "heart": _heart,
    "cross": _cross,
}
