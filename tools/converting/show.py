"""`boxcar show`: one row for people, and its boxes on the picture that the model sees.

The boxes are decoded from the text of questions and answers by the family's own grammar, and drawn on the resized image: what the model is
taught, not what the annotations said.
"""

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.text import Text

from boxcar.pipelines import storage
from boxcar.pipelines.families.box_text import TextBox
from boxcar.pipelines.families.catalog import find_family
from boxcar.pipelines.families.family import Family
from boxcar.pipelines.images.image_file import decode_image, load_image, resize_image
from boxcar.pipelines.shards.arrow_files import image_shard_name, open_rows, read_row
from boxcar.schemas import manifest as manifests
from boxcar.schemas.errors import ShardError
from boxcar.schemas.manifest import Manifest
from boxcar.schemas.row import IMAGE_SHARD_SCHEMA, ROW_SCHEMA
from boxcar.tools.plain import visible

_COLOURS_BGR = [(0, 0, 230), (0, 150, 0), (230, 80, 0), (0, 140, 255), (180, 0, 180), (160, 130, 0), (20, 90, 160), (90, 90, 90)]
_TEXT_BOX_PX = 14


def show_row(folder: Path, number: int, out: Path | None, images: str | None) -> None:
    """Print row `number`; draw it to `out` if given. Raises ShardError, ImageError."""
    manifest = manifests.load(folder)
    row = read_row(folder, manifest.shards, number, ROW_SCHEMA)
    family = find_family(manifest.contract.family)
    console = Console(soft_wrap=True)
    _print(console, row, family)
    if out is not None and row["images"]:
        pictures = [_picture(folder, manifest, image, images) for image in row["images"]]  # type: ignore[attr-defined]
        _draw(pictures, row, family)
        _write(out, pictures)
        console.print(Text(f"\n{out}: {len(pictures)} resized image(s), boxes as the text says them, numbered as above", style="bold"))


def _print(console: Console, row: dict[str, Any], family: Family) -> None:
    console.print(Text(visible(row["sample_id"]), style="bold"), Text(visible(f"  ({row['position']})")))
    for image in row["images"]:
        where = image["path"] if image["path"] is not None else f"image shard {image['shard']}, row {image['shard_row']}"
        console.print(
            Text(
                f"image  {visible(where)}: {image['width']}x{image['height']} px -> {image['resized_width']}x{image['resized_height']} px, "
                f"grid {image['grid_t']},{image['grid_h']},{image['grid_w']}, {image['visual_tokens']} visual tokens"
            )
        )
    order = "a dialogue, in order" if row["ordered"] else "any subset, any order"
    console.print(
        Text(
            f"tokens {row['total_tokens']} with all turns = {row['visual_tokens']} image placeholders + {row['text_tokens']} text "
            f"(header {row['header_tokens']}); longest single turn {row['max_turn_tokens']}; {order}"
        )
    )
    box_number = 0
    for number, turn in enumerate(row["turns"]):
        facts = f"{turn['task']}, {turn['language']}, difficulty {turn['difficulty']:.3f}, weight {turn['weight']:g}"
        facts += f", {len(turn['prompt_ids'])} + {len(turn['answer_ids'])} tokens"
        console.print(Text(f"\nturn {number}  ", style="bold"), Text(facts, style="dim"))
        console.print(Text("  Q  ", style="cyan"), Text(visible(turn["question"])))
        console.print(Text("  A  ", style="green"), Text(visible(turn["answer"])))
        for box in _boxes_of(turn, family):
            values = ", ".join(map(str, box.values))
            console.print(Text(visible(f"     box {box_number}: [{values}]{f' {box.label}' if box.label else ''}"), style="dim"))
            box_number += 1


def _boxes_of(turn: dict[str, Any], family: Family) -> list[TextBox]:
    """The boxes that a turn's texts say, in their order."""
    answer = family.box_text.parse_answer(turn["answer"])
    return family.box_text.find_boxes(turn["question"]) + (family.box_text.find_boxes(turn["answer"]) if answer is None else answer)


def _picture(folder: Path, manifest: Manifest, image: dict[str, Any], images: str | None) -> npt.NDArray[np.uint8]:
    """The resized image, (height, width, 3) uint8, BGR as OpenCV draws."""
    if image["path"] is None:
        name = next((entry.name for entry in manifest.image_shards if entry.name == image_shard_name(image["shard"])), None)
        if name is None:
            raise ShardError(str(folder), found=f"no image shard {image['shard']}", expected="the one that the row names")
        table = open_rows(folder / name, IMAGE_SHARD_SCHEMA).read_all()
        stored = table.slice(image["shard_row"], 1).to_pylist()[0]
        picture = decode_image(stored["bytes"], stored["path"])
    else:
        picture = load_image(storage.join(images or manifest.images_root, image["path"]))
    size = (image["resized_width"], image["resized_height"])
    resized = picture if picture.size == size else resize_image(picture, size)
    return np.ascontiguousarray(np.asarray(resized)[:, :, ::-1])


def _draw(pictures: list[npt.NDArray[np.uint8]], row: dict[str, Any], family: Family) -> None:
    """Draw every box of every turn, numbered over the row, in the colour of its turn."""
    number = 0
    for turn_number, turn in enumerate(row["turns"]):
        colour = _COLOURS_BGR[turn_number % len(_COLOURS_BGR)]
        for box in _boxes_of(turn, family):
            image = row["images"][max(turn["image_index"], 0)]
            picture = pictures[max(turn["image_index"], 0)]
            size, resized = (np.array([[image[f"{kind}width"], image[f"{kind}height"]]]) for kind in ("", "resized_"))
            box_px = family.grid.dequantise(np.array([box.values]), size, resized)
            x0, y0, x1, y1 = (box_px * np.tile(resized / size, 2)).round().astype(int)[0].tolist()
            cv2.rectangle(picture, (x0, y0), (x1, y1), colour, 2, cv2.LINE_AA)
            width = 9 * len(str(number)) + 4
            x_text, y_text = min(x0, picture.shape[1] - width), max(y0 - _TEXT_BOX_PX, 0)
            cv2.rectangle(picture, (x_text, y_text), (x_text + width, y_text + _TEXT_BOX_PX), colour, -1)
            cv2.putText(picture, str(number), (x_text + 2, y_text + 11), cv2.FONT_HERSHEY_SIMPLEX, 0.42, (255, 255, 255), 1, cv2.LINE_AA)
            number += 1


def _write(out: Path, pictures: list[npt.NDArray[np.uint8]]) -> None:
    """All images of the row in one PNG, side by side on grey."""
    height = max(picture.shape[0] for picture in pictures)
    gap_px = 4
    grey = (128, 128, 128)
    padded = [cv2.copyMakeBorder(picture, 0, height - picture.shape[0], 0, gap_px, cv2.BORDER_CONSTANT, value=grey) for picture in pictures]
    encoded = cv2.imencode(".png", cv2.hconcat(padded) if len(padded) > 1 else pictures[0])[1]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_bytes(encoded.tobytes())
    except OSError as error:
        raise storage.write_error(out, error) from error
