"""Which reader fits a file or folder, from its own first bytes: `Found` says how a workflow would name it, or why none can.

data.yaml with names                                      yolo, once for each of its splits
labels/*.txt beside images/                               yolo
Annotations/*.xml with <annotation>                       voc, once for each list in ImageSets/Main
*.json with "shapes", one for each image                  labelme
*.json with images, annotations, categories               coco, lvis, coco_captions
refs(*).p, grefs(*).json beside an instances.json         refcoco, grefcoco
a list or lines of JSON                                   sharegpt, ms_swift, qwen_vl_chat, cogvlm_text, jsonl
"""

import json
import mmap
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import yaml

from boxcar.tools.starting.folder import ROW_SUFFIXES, Listing, find_images_root

HEAD_BYTES = 1 << 20
NUM_NAMES = 50
"""Image names of a file that are looked for on disk."""
_SPLIT = re.compile(r"(?<![a-z])(train|training|val|valid|validation|test|testA|testB|trainval|dev)(?![a-z])", re.IGNORECASE)
_HELD_OUT = frozenset({"val", "valid", "validation", "test", "testa", "testb", "dev"})
_NUMBER = r"\s*\d+(?:\.\d+)?\s*"
_BOXES_IN_TEXT = re.compile(rf"bbox_2d|<box>|<\|box_start\|>|\[{_NUMBER},{_NUMBER},{_NUMBER},{_NUMBER}\]")


@dataclass(frozen=True)
class Found:
    """A source that a workflow can name; or, without reader, a file that none can read, and why."""

    path: Path
    """What `annotations` names."""
    reader: str
    what: str
    """In words."""
    split: str = ""
    images: Path | None = None
    """None: the reader finds them itself, or (see `missing_images`) they are not below the folder."""
    missing_images: bool = False
    keys: dict[str, str] = field(default_factory=dict)
    """Other keys of the convert section."""
    needs_box_space: bool = False
    """Boxes stand in the text, and nothing says in which space."""

    @property
    def is_held_out(self) -> bool:
        return self.split.lower() in _HELD_OUT


def sniff(listing: Listing) -> list[Found]:
    """Everything below the folder, in the order of paths; a file that belongs to another one is not named twice."""
    found = [*_yolo(listing), *_voc(listing)]
    labelme: set[Path] = set()
    objects: list[Found] = []
    for path in listing.files(*ROW_SUFFIXES):
        if path.name == "dataset_info.json" or path.parent in labelme:
            continue
        one = _json_file(path, listing)
        if one is not None and one.reader == "labelme":
            labelme.add(path.parent)
        if one is not None:
            objects.append(one)
    return sorted([*found, *_refer(listing, objects), *_with_captions(objects)], key=lambda one: (str(one.path), one.split))


def split_of(path: Path, root: Path) -> str:
    """train, val, test ... where the file's name or its folder's, below the root, says it; else an empty string."""
    for part in reversed(path.relative_to(root).parts[-2:]):
        if match := _SPLIT.search(part.replace("_", " ")):
            return match[1].lower()
    return ""


def sniff_rows(path: Path, listing: Listing) -> Found | None:
    """A single file of JSON. None where it is no format that a reader takes."""
    return _json_file(path, listing)


# ---- one file for each image


def _yolo(listing: Listing) -> Iterator[Found]:
    homes: set[Path] = set()
    for path in listing.files(".yaml", ".yml"):
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError):
            continue
        if not isinstance(content, dict) or "names" not in content:
            continue
        homes.add(path.parent)
        splits = [name for name in ("train", "val", "test") if content.get(name)] or [""]
        for split in splits:
            yield Found(path, "yolo", f"YOLO labels, {len(content['names'])} classes", split)
    for folder in sorted({path.parent for path in listing.files(".txt")}):
        labels = next((one for one in (folder, *folder.parents) if one.name == "labels" and one.is_relative_to(listing.root)), None)
        if labels is not None and labels.parent not in homes and (labels.parent / "images").is_dir():
            homes.add(labels.parent)
            yield Found(labels, "yolo", "YOLO labels, class names in classes.txt")


def _voc(listing: Listing) -> Iterator[Found]:
    for folder in sorted({path.parent for path in listing.files(".xml")}):
        first = next(path for path in listing.files(".xml") if path.parent == folder)
        if b"<annotation" not in first.read_bytes()[:HEAD_BYTES]:
            continue
        if folder.name != "Annotations":
            yield Found(folder, "voc", "Pascal VOC files", split_of(folder, listing.root))
            continue
        lists = folder.parent / "ImageSets" / "Main"
        splits = [name for name in ("train", "val", "test") if (lists / f"{name}.txt").is_file()] or [""]
        for split in splits:
            yield Found(folder.parent, "voc", "Pascal VOC", split)


# ---- JSON


def _json_file(path: Path, listing: Listing) -> Found | None:
    data = _content(path)
    start = bytes(data[:HEAD_BYTES]).lstrip(b"\xef\xbb\xbf \t\r\n")
    if start.startswith(b"{") and (".jsonl" not in path.name.lower()):
        try:
            keys = msgspec.json.decode(data, type=dict[str, msgspec.Raw])
        except (msgspec.DecodeError, UnicodeDecodeError):
            keys = {}
        if keys and not _is_row(keys):
            return _object(path, keys, listing)
    rows = [row for row in _elements(start) if isinstance(row, dict)]
    return _rows(path, rows, listing) if rows else None


def _is_row(keys: dict[str, msgspec.Raw]) -> bool:
    """One row alone in a .json file."""
    return bool({"conversations", "messages", "regions"} & keys.keys()) and "annotations" not in keys


def _content(path: Path) -> Any:
    """The bytes of a file, decompressed; mapped where it is plain."""
    if path.suffix.lower() in (".gz", ".zst"):
        with pa.input_stream(str(path)) as stream:
            return stream.read()
    with path.open("rb") as stream:
        return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) if path.stat().st_size else b""


def _elements(data: bytes, most: int = NUM_NAMES) -> Iterator[Any]:
    """The first elements of a list, or the first values of lines."""
    text = data[:HEAD_BYTES].decode("utf-8", errors="ignore")
    decoder, place = json.JSONDecoder(), 0
    for _ in range(most):
        while place < len(text) and text[place] in "[, \t\r\n":
            place += 1
        try:
            value, place = decoder.raw_decode(text, place)
        except ValueError:
            return
        yield value


def _object(path: Path, keys: dict[str, msgspec.Raw], listing: Listing) -> Found | None:
    if "shapes" in keys and "imagePath" in keys:
        return Found(path.parent, "labelme", "LabelMe files", split_of(path.parent, listing.root))
    if "images" not in keys or not {"annotations", "categories"} & keys.keys():
        return None
    images = [image for image in _elements(bytes(keys["images"])[:HEAD_BYTES]) if isinstance(image, dict)]
    first = next((one for one in _elements(_head(keys, "annotations"), 1) if isinstance(one, dict)), {})
    category = next((one for one in _elements(_head(keys, "categories"), 1) if isinstance(one, dict)), {})
    names = [str(image.get("file_name", "")) for image in images]
    root = find_images_root(listing, path, [name for name in names if name])
    reader, what = _coco_kind(path, first, category, images)
    if reader == "lvis" and not any(names):
        # coco_url ends in train2017/000000000009.jpg, which the reader joins with `images`.
        root = find_images_root(listing, path, ["/".join(str(image.get("coco_url", "")).split("/")[-2:]) for image in images])
    return Found(path, reader, what, split_of(path, listing.root), root, root is None)


def _coco_kind(path: Path, annotation: dict[str, Any], category: dict[str, Any], images: list[dict[str, Any]]) -> tuple[str, str]:
    """(reader, what it is in words) of a COCO-shaped file, by its first annotation, category and images."""
    if not annotation:
        return "", "COCO images without annotations: for `boxcar predict`, or visual tokens in `boxcar audit`"
    if "segments_info" in annotation:
        return "", "COCO panoptic segmentation: no boxes of single things for stuff; use its instances file"
    if path.name.startswith("stuff_"):
        return "", "COCO stuff: regions without instances, whose boxes mean nothing"
    if "caption" in annotation:
        return "coco_captions", "COCO captions"
    is_lvis = "frequency" in category or "neg_category_ids" in (images[0] if images else {})
    return ("lvis", "LVIS") if is_lvis else ("coco", "COCO boxes")


def _head(keys: dict[str, msgspec.Raw], name: str) -> bytes:
    return bytes(keys[name])[:HEAD_BYTES] if name in keys else b""


def _rows(path: Path, rows: list[dict[str, Any]], listing: Listing) -> Found | None:
    first = rows[0]
    keys = first.keys()
    if "ann_id" in keys and ("sentences" in keys or "sents" in keys):
        return Found(path, "grefcoco" if any(isinstance(row["ann_id"], list) for row in rows) else "refcoco", "referring expressions")
    text = json.dumps(rows, ensure_ascii=False)
    images = [name for row in rows for name in _images_of(row)]
    if {"query", "response"} <= keys:
        reader, what = "ms_swift", "ms-swift conversations (query, response)"
    elif "conversations" in keys and "<img>" in text:
        reader, what = "qwen_vl_chat", "Qwen-VL conversations"
        images = re.findall(r"<img>(.*?)</img>", text)
    elif "objects" in keys and "messages" in keys:
        reader, what = "ms_swift", "ms-swift conversations with objects"
    elif "conversations" in keys or "messages" in keys:
        reader, what = "sharegpt", "conversations (LLaMA-Factory sharegpt, LLaVA)"
    elif {"prompt", "query"} & keys and {"label", "answer"} & keys and "image" in keys:
        reader, what = "cogvlm_text", "CogVLM prompts and labels"
    elif {"image", "images"} & keys and {"regions", "captions", "dialogue", "absent"} & keys:
        reader, what = "jsonl", "Boxcar's own rows"
    else:
        return None
    root = find_images_root(listing, path, images[:NUM_NAMES])
    needs_space = reader in ("sharegpt", "ms_swift") and "objects" not in keys and _BOXES_IN_TEXT.search(text) is not None
    return Found(path, reader, what, split_of(path, listing.root), root, root is None, needs_box_space=needs_space)


def _images_of(row: dict[str, Any]) -> list[str]:
    found: list[str] = []
    for value in (row.get("images"), row.get("image")):
        for image in value if isinstance(value, list) else [value]:
            path = image.get("path") if isinstance(image, dict) else image
            if isinstance(path, str):
                found.append(path)
    return found


# ---- files that belong together


def _refer(listing: Listing, objects: list[Found]) -> Iterator[Found]:
    """Refs with the instances.json beside them, once for each split that the format has."""
    pickles = [(path, "refcoco") for path in listing.files(".p", ".pkl") if path.name.startswith("refs")]
    lists = [(one.path, one.reader) for one in objects if one.reader in ("refcoco", "grefcoco")]
    for path, reader in sorted([*pickles, *lists]):
        instances = next((one for one in objects if one.reader == "coco" and one.path.parent == path.parent), None)
        if instances is None:
            yield Found(path, "", f"{reader}: referring expressions without the instances.json that holds their boxes")
            continue
        keys = {"instances": str(instances.path)}
        for split in ("train", "val"):
            yield Found(path, reader, "referring expressions", split, instances.images, instances.missing_images, keys)


def _with_captions(objects: list[Found]) -> Iterator[Found]:
    """COCO boxes with the captions of the same images, which then are no source of their own."""
    captions = {(one.path.parent, one.path.name.replace("captions", "")): one for one in objects if one.reader == "coco_captions"}
    refs = {one.path.parent for one in objects if one.reader in ("refcoco", "grefcoco")}
    used: set[Path] = set()
    for one in objects:
        if one.reader != "coco" or one.path.parent in refs:
            continue
        beside = captions.get((one.path.parent, one.path.name.replace("instances", "")))
        if beside is None:
            yield one
        else:
            used.add(beside.path)
            yield replace(one, what="COCO boxes and captions", keys={"captions": str(beside.path)})
    yield from (one for one in objects if one.reader not in ("coco", "refcoco", "grefcoco") and one.path not in used)
