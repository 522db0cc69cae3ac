"""`boxcar view`: results or shards as a folder of plain files that any browser opens from disk, without a network.

    index.html     the summary, and all items as JSON that is data and never code
    page.css, page.js
    images/        one JPEG for each image, of what the model sees, 512 px at most

Labels, questions and replies are other people's text: Jinja escapes what stands in the HTML, `<`, `>` and `&` are escapes within the JSON,
the script sets text and never markup, and the page's policy runs no script but its own file.
"""

import json
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import xxhash
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from boxcar.pipelines import storage
from boxcar.pipelines.images.image_file import decode_image, load_image, resize_image
from boxcar.schemas import manifest as manifests
from boxcar.schemas.errors import BoxcarError, ConfigError
from boxcar.tools.pages.view_items import RESULTS_NAME, Item, Picture, Shown, items_of_results, items_of_shards
from boxcar.train.data.store import ShardStore

MAX_ITEMS = 1000
THUMBNAIL_PX = 512
JPEG_QUALITY = 88
TEMPLATES = Path(__file__).with_name("page")
INDEX, IMAGES, DATA = "index.html", "images", "page-data"
_OURS = 'name="generator" content="boxcar view"'
_AS_ESCAPES = {ord(sign): f"\\u{ord(sign):04x}" for sign in "<>&\u2028\u2029"}


def write_page(source: str | Path, out: Path | None = None, *, max_items: int = MAX_ITEMS, seed: int = 0) -> Path:
    """Write the page of an evaluation's results or of a folder of shards. Returns the path of its index.html.

    out: folder to write; None: `view/` within the source. A page that is there already is replaced, anything else is not.
    Raises ConfigError where the source is neither or `out` holds other files, ShardError where the source is damaged.
    """
    folder = Path(source)
    if (folder / RESULTS_NAME).is_file():
        shown = items_of_results(folder, max_items, seed)
    elif storage.is_uri(str(source)) or (folder / manifests.MANIFEST_NAME).is_file():
        shown = items_of_shards(str(source), max_items, seed)
    else:
        raise ConfigError(
            str(source),
            found="a folder without results.json or manifest.json" if folder.is_dir() else "no such folder",
            expected="results of `boxcar evaluate`, or shards of `boxcar convert`",
        )
    if out is None and storage.is_uri(str(source)):
        raise ConfigError("--out", found="nothing, and shards that are not on this machine", expected="a local folder to write")
    target = out or folder / "view"
    with storage.writing(target):
        _require_free(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
        try:
            _write(beside, shown)
            beside.chmod(0o755)
            if target.exists():
                shutil.rmtree(target)
            beside.rename(target)
        except BaseException:
            shutil.rmtree(beside, ignore_errors=True)
            raise
    return target / INDEX


def _require_free(target: Path) -> None:
    index = target / INDEX
    if target.is_file() or (target.is_dir() and any(target.iterdir()) and not (index.is_file() and _OURS in index.read_text("utf-8"))):
        raise ConfigError(str(target), found="other files", expected="a new folder, or an earlier page", fix="Choose another with --out.")


def _write(folder: Path, shown: Shown) -> None:
    (folder / IMAGES).mkdir()
    pictures, problems = _write_pictures(folder / IMAGES, shown.items)
    data = {
        "id": shown.fingerprint,
        "title": shown.title,
        "arms": shown.arms,
        "num_items": shown.num_items,
        "items": [_as_data(item, pictures) for item in shown.items],
    }
    environment = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    page = environment.get_template("index.html.j2").render(
        title=shown.title,
        where=shown.where,
        note=shown.note,
        num_items=shown.num_items,
        num_shown=len(shown.items),
        problems=sorted(set(problems.values())),
        tables=[] if shown.results is None else _tables(shown.results),
        headline=[] if shown.results is None else _headline(shown.results),
        remarks=[] if shown.results is None else _remarks(shown.results),
        rated=shown.arms[0] if shown.arms else "the text of the shards",
        data_id=DATA,
        data=_as_script(data),
    )
    (folder / INDEX).write_text(page, encoding="utf-8")
    for name in ("page.css", "page.js"):
        shutil.copyfile(TEMPLATES / name, folder / name)


def _as_script(data: dict[str, Any]) -> Markup:
    """JSON that can stand in a script element: no sign in it can end the element."""
    return Markup(json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":")).translate(_AS_ESCAPES))


def _as_data(item: Item, pictures: dict[Picture, dict[str, Any]]) -> dict[str, Any]:
    content = asdict(item)
    content["picture"] = None if item.picture is None else pictures[item.picture]
    return content


# ---- pictures


def _write_pictures(folder: Path, items: list[Item]) -> tuple[dict[Picture, dict[str, Any]], dict[Picture, str]]:
    """Each picture once: its file and size in pixels that the model sees; and what could not be read, in words."""
    stores: dict[str, ShardStore] = {}
    found: dict[Picture, dict[str, Any]] = {}
    problems: dict[Picture, str] = {}
    for item in items:
        picture = item.picture
        if picture is None or picture in found:
            continue
        width, height = picture.resized_wh
        entry: dict[str, Any] = {"file": None, "width": width, "height": height, "original": list(picture.size_wh), "where": picture.where}
        try:
            thumbnail = _thumbnail(picture, stores)
        except BoxcarError as error:  # the page says so, at the item and at its head; the rest is still worth a look
            problems[picture] = entry["problem"] = str(error)
        else:
            name = f"{xxhash.xxh3_64_hexdigest(f'{picture.where}|{width}x{height}'.encode())}.jpg"
            thumbnail.save(folder / name, "JPEG", quality=JPEG_QUALITY)
            entry["file"] = f"{IMAGES}/{name}"
        found[picture] = entry
    return found, problems


def _thumbnail(picture: Picture, stores: dict[str, ShardStore]) -> Image.Image:
    """What the model sees, at most THUMBNAIL_PX a side. Raises ImageError and ShardError."""
    if picture.path is not None:
        image = load_image(picture.path)
    else:
        assert picture.shard is not None, "embedded"
        assert picture.shard_row is not None, "embedded"
        if picture.folder not in stores:
            stores[picture.folder] = ShardStore([picture.folder])
        image = decode_image(stores[picture.folder].image_bytes(0, picture.shard, picture.shard_row), picture.where)
    seen = image if image.size == picture.resized_wh else resize_image(image, picture.resized_wh)
    seen.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX), Image.Resampling.LANCZOS)
    return seen


# ---- the summary

_TITLES = {
    "rec mean_iou": "One object asked for: mean IoU",
    "rec acc_50": "— right at IoU ≥ 0.5",
    "rec acc_75": "— right at IoU ≥ 0.75",
    "rec acc_90": "— right at IoU ≥ 0.9",
    "objects f1_50": "All boxes: F1 at IoU 0.5",
    "objects precision_50": "— precision",
    "objects recall_50": "— recall",
    "objects hallucinated": "Absent objects that were given boxes",
    "grec n_acc": "Absent objects reported as absent",
    "grec t_acc": "Present objects answered with a box",
    "format strict": "Replies in the exact form",
    "format failed": "Replies that could not be read",
    "format label_exact": "Labels exactly as they were asked for",
}


_HEADLINE = {
    "rec mean_iou": "Mean IoU, one object",
    "rec acc_50": "Right at IoU ≥ 0.5",
    "objects f1_50": "F1 of all boxes",
    "grec n_acc": "Absent objects reported",
    "format strict": "Exact form",
    "format label_exact": "Exact label",
}


def _headline(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The first arm's main figures in percent, with the others' beside them."""
    from boxcar.train.scoring.score import results_of  # noqa: PLC0415  (with `_table`)

    found = {name: results_of(figures["boxes"]) for name, figures in results["arms"].items() if "boxes" in figures}
    entries = []
    for name, title in _HEADLINE.items() if found else ():
        values = {arm: of_arm.value(*name.split(" ")) for arm, of_arm in found.items()}  # type: ignore[arg-type]
        first, *others = [(arm, "–" if value is None else f"{100 * value:.1f}") for arm, value in values.items()]
        if first[1] != "–":
            entries.append({"title": title, "value": first[1], "others": others})
    return entries


def _tables(results: dict[str, Any]) -> list[dict[str, Any]]:
    tables = [_table("Held out", results["arms"])]
    if "forgetting" in results:
        tables.append(_table("Forgetting", results["forgetting"]["arms"]))
    return [table for table in tables if table["rows"]]


def _table(title: str, arms: dict[str, Any]) -> dict[str, Any]:
    from boxcar.train.scoring.evaluate import COMPARED  # noqa: PLC0415  (brings torch; shards are shown without)
    from boxcar.train.scoring.score import number, results_of  # noqa: PLC0415

    found = {name: results_of(figures["boxes"]) for name, figures in arms.items() if "boxes" in figures}
    rows = []
    for section, metric in COMPARED if found else ():
        cells = [number(found[name].measure(section, metric)) if name in found else "" for name in arms]
        if any(cell not in ("", "–") for cell in cells):
            rows.append({"title": _TITLES.get(f"{section} {metric}", f"{section} {metric}"), "cells": cells})
    stats = [figures.get("coco_ap", {}).get("stats") or {} for figures in arms.values()]
    rules = [figures["coco_ap"]["rule"] for figures in arms.values() if "rule" in figures.get("coco_ap", {})]
    for key in ("AP", "AP50") if rules else ():
        cells = ["–" if one.get(key) is None else f"{100 * one[key]:.1f}" for one in stats]
        rows.append({"title": f"COCO {key} (score: {rules[0]})", "cells": cells})
    return {"title": title, "arms": list(arms), "rows": rows}


def _remarks(results: dict[str, Any]) -> list[str]:
    remarks = ["In percent; in brackets 95 % intervals over images.", f"Leakage: {results['leakage']}."]
    for name, figures in results["arms"].items():
        if figures.get("cut"):
            remarks.append(f"{name}: {figures['cut']:.1%} of the replies were cut at max_new_tokens.")
        if warning := figures.get("coco_ap", {}).get("warning"):
            remarks.append(f"COCO AP, {name}: {warning}")
    return remarks
