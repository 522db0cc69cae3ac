"""A small data set that the project draws itself: coloured shapes, COCO instances and captions, and a tokenizer to count with.

Nothing is downloaded. The tokenizer is a byte-level BPE with Qwen2's pre-tokeniser and special tokens, trained on the project's own prompts
and labels: its ids are its own, its borders (digits alone, special tokens) are those of the real one.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from boxcar.pipelines.families.catalog import FAMILIES, find_family
from boxcar.pipelines.tokens.tokenizer import QWEN_SPLIT
from boxcar.schemas.errors import ConfigError
from boxcar.tools.quickstart.tiny_base import write_tiny_base

COLOURS = {
    "red": (220, 50, 47),
    "green": (80, 160, 60),
    "blue": (38, 110, 210),
    "yellow": (235, 190, 40),
    "purple": (130, 70, 170),
    "orange": (235, 120, 40),
}
SHAPES = ("circle", "square", "triangle", "diamond")
BACKGROUNDS = ((245, 245, 240), (225, 232, 240), (240, 228, 220), (222, 236, 224))
SIZES_WH = ((320, 240), (240, 320), (400, 300), (512, 288))
VOCABULARY_SIZE = 800
_SPECIAL_IDS = find_family("qwen2_5_vl").published_special_ids
"""Special tokens of the tokenizer, with their ids in the published one."""
_FAMILIES = {name: family for name, family in FAMILIES.items() if family.published_special_ids == _SPECIAL_IDS}
"""Those that the tokenizer serves."""
USUAL_FOLDER = Path("data/demo")
"""Where the workflow `demo` looks for it."""
_INFO = {"description": "drawn by boxcar demo"}
_BEGINNING = json.dumps({"info": _INFO}).encode()[:-1]


def write_demo(folder: Path, num_images: int, seed: int = 0) -> None:
    """Images, instances.json, captions.json, tokenizer/ and tiny bases in `folder`. Raises ConfigError where there is something else."""
    fix = "Choose another with --out."
    try:
        if folder.exists() and any(folder.iterdir()) and not _is_demo(folder):
            raise ConfigError(str(folder), found="a folder with other files", expected="an empty one, or an earlier demo", fix=fix)
        num_boxes = _write(folder, num_images, seed)
    except OSError as error:
        raise ConfigError(str(folder), found=f"{error}", expected="a folder that can be written", fix=fix) from error
    paths = {"annotations": "instances.json", "captions": "captions.json", "images": "images", "tokenizer": "tokenizer"}
    overrides = [] if folder == USUAL_FOLDER else [f"{key}={folder / name}" for key, name in paths.items()]
    print(f"{folder}: {num_images} scenes, {num_boxes} boxes, and a tokenizer. Next: {' '.join(['boxcar convert demo', *overrides])}")


def _is_demo(folder: Path) -> bool:
    """Whether an earlier demo may be overwritten here. instances.json is the most usual name of real annotations."""
    path = folder / "instances.json"
    return path.is_file() and path.read_bytes()[: len(_BEGINNING)] == _BEGINNING


def _write(folder: Path, num_images: int, seed: int) -> int:
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    categories = [{"id": number + 1, "name": name} for number, name in enumerate(SHAPES)]
    images: list[dict[str, object]] = []
    annotations: list[dict[str, object]] = []
    captions: list[dict[str, object]] = []
    for image_id in range(1, num_images + 1):
        size = SIZES_WH[rng.integers(len(SIZES_WH))]
        picture, things = _scene(rng, size)
        name = f"scene_{image_id:04d}.png"
        picture.save(folder / "images" / name)
        images.append({"id": image_id, "file_name": name, "width": size[0], "height": size[1]})
        for shape, _, (x0, y0, x1, y1) in things:
            box = [x0, y0, x1 - x0, y1 - y0]
            common = {"id": len(annotations) + 1, "image_id": image_id, "iscrowd": 0, "area": box[2] * box[3]}
            annotations.append({**common, "category_id": SHAPES.index(shape) + 1, "bbox": box})
        captions.append({"id": image_id, "image_id": image_id, "caption": _caption(things)})
    _write_json(folder / "instances.json", {"info": _INFO, "images": images, "annotations": annotations, "categories": categories})
    _write_json(folder / "captions.json", {"images": images, "annotations": captions})
    (folder / "tokenizer").mkdir(exist_ok=True)
    train_tokenizer().save(str(folder / "tokenizer" / "tokenizer.json"))
    for family in _FAMILIES:
        write_tiny_base(folder / f"base-{family}", family, str(folder / "tokenizer"))
    return len(annotations)


Thing = tuple[str, str, tuple[int, int, int, int]]
"""(shape, colour, xyxy in px)."""


def _scene(rng: np.random.Generator, size: tuple[int, int]) -> tuple[Image.Image, list[Thing]]:
    picture = Image.new("RGB", size, BACKGROUNDS[rng.integers(len(BACKGROUNDS))])
    pen = ImageDraw.Draw(picture)
    things: list[Thing] = []
    for _ in range(int(rng.integers(2, 7))):
        side = int(rng.integers(24, 90))
        x0, y0 = int(rng.integers(0, size[0] - side)), int(rng.integers(0, size[1] - side))
        box = (x0, y0, x0 + side, y0 + side)
        if any(_overlap(box, other) for _, _, other in things):
            continue
        shape, colour = SHAPES[rng.integers(len(SHAPES))], list(COLOURS)[rng.integers(len(COLOURS))]
        _draw(pen, shape, box, COLOURS[colour])
        things.append((shape, colour, box))
    return picture, things


def _overlap(first: tuple[int, int, int, int], second: tuple[int, int, int, int]) -> bool:
    across = min(first[2], second[2]) - max(first[0], second[0])
    down = min(first[3], second[3]) - max(first[1], second[1])
    return across > 0 and down > 0


def _draw(pen: ImageDraw.ImageDraw, shape: str, box: tuple[int, int, int, int], colour: tuple[int, int, int]) -> None:
    x0, y0, x1, y1 = box
    # Pillow draws its last pixel; the box is half-open.
    last = (x0, y0, x1 - 1, y1 - 1)
    middle = ((x0 + x1 - 1) / 2, (y0 + y1 - 1) / 2)
    if shape == "circle":
        pen.ellipse(last, fill=colour)
    elif shape == "square":
        pen.rectangle(last, fill=colour)
    elif shape == "triangle":
        pen.polygon([(middle[0], y0), (x1 - 1, y1 - 1), (x0, y1 - 1)], fill=colour)
    else:
        pen.polygon([(middle[0], y0), (x1 - 1, middle[1]), (middle[0], y1 - 1), (x0, middle[1])], fill=colour)


def _caption(things: list[Thing]) -> str:
    named = [f"{'an' if colour[0] in 'aeiou' else 'a'} {colour} {shape}" for shape, colour, _ in things]
    return f"A drawing of {named[0]}." if len(named) == 1 else f"A drawing of {', '.join(named[:-1])} and {named[-1]}."


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


def train_tokenizer(corpus: Iterator[str] | None = None, vocabulary_size: int = VOCABULARY_SIZE) -> Tokenizer:
    """A small tokenizer for the Qwen2-VL, Qwen2.5-VL and Qwen3-VL templates. corpus: what it is trained on; None: the demo's texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(QWEN_SPLIT), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    specials = [AddedToken(token, special=True, normalized=False) for token in _SPECIAL_IDS]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=specials,
    )
    tokenizer.train_from_iterator(_corpus() if corpus is None else corpus, trainer)
    return tokenizer


def _corpus() -> Iterator[str]:
    yield from SHAPES
    yield from COLOURS
    for family in _FAMILIES.values():
        yield from (prompt for bank in family.prompts.values() for prompts in bank.values() for prompt in prompts)
        yield from family.not_found.values()
        yield family.box_text.answer_gap(None, "circle", several_labels=False)
        yield family.box_text.answer_gap("circle", "square", several_labels=True)
        yield family.box_text.answer_gap("circle", None, several_labels=False)
    yield "system\nYou are a helpful assistant.\nuser\nassistant\n"
    for shape in SHAPES:
        yield from (f"A drawing of a {colour} {shape} and a {colour} {shape}." for colour in COLOURS)
