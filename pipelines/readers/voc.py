"""Pascal VOC: one XML file per image, `annotation/object/bndbox`.

    what            in the file                                     in the record
    corners         xmin, ymin, xmax, ymax, pixels                  xyxy, pixels, 0-based, half-open
    first pixel     1, last one included (officially); 0 by some    1: (xmin - 1, ymin - 1, xmax, ymax); 0: the numbers as they are
    size            size/width, size/height                         declared_width, declared_height; None where 0, missing or no number
    image           filename, below JPEGImages/                     path below `images`

`annotations` is the folder of the XML files, or the data set's root with Annotations/, ImageSets/Main/<split>.txt and JPEGImages/.

Origin. VOC counts pixels from 1, but many tools write 0-based corners. `voc_origin: auto` looks at every box of the folder, whatever the
split, so that two splits cannot be read differently: a single xmin or ymin of 0 says 0-based, for pixel 0 does not exist in VOC; otherwise
it is 1-based, as the format says, and boxes that start at 1 or end at the width or height are the evidence. The plan's notes report the
counts. Boxes without extent (0, 0, 0, 0 stands for "nothing" in some exports) are no evidence.

Traps, and what is done:
- xmin == xmax. By the letter a box of one pixel; in real files (BCCD) a click without a drag. It stays without extent, for the rule about
  zero area to find. Swapped corners stay swapped; the 1 is then taken from the smaller number, which is the first pixel.
- `<filename>` without suffix, with a Windows path, or left over from before a renaming: the image folder is listed once while planning (one
  listing instead of a look-up per file). An image with the XML's own stem wins, as in every loader that goes by the split lists; then
  `<filename>`, with or without its suffix. Where no image matches, the record names what `<filename>` says, or else the XML's stem.
- the order of the children of `<bndbox>`, floats in it, `<part>` (ignored), several `<bndbox>` in an object (a region each), an image
  without objects (a record without regions), wrong `<size>` (passed on as declared: a later step compares it with the image).
- an object with a `<polygon>` and no box (old LabelMe, segmentation exports): the hull of its corners; a note counts them.
- an object without name or box (rotated boxes): the whole file is rejected, for the rest of it would teach a lie.
- entity bombs: expat 2.4+ stops them at 100-fold and 8 MiB, and never fetches an external entity; we refuse any `<!ENTITY` before parsing.
- GBK, Big5 and other multi-byte encodings, which expat does not know, are decoded by Python; any other unknown encoding is rejected.

Reasons of rejection: broken_xml, unsafe_xml, not_voc, bad_object, missing_annotation (in the split list only), unreadable_file.
"""

import posixpath
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

import msgspec

from boxcar.pipelines.readers.reader import COMMON_KEYS, Refused, SourcePlan, Unit
from boxcar.pipelines.readers.shared.file_per_image import (
    ImageNames,
    ListedFile,
    image_stem,
    is_folder,
    list_annotations,
    list_images,
    normal_path,
    read_file,
    read_records,
    read_settings,
    relative_path,
    write_listing,
)
from boxcar.pipelines.storage import join, list_files, read_bytes
from boxcar.schemas.errors import AnnotationError
from boxcar.schemas.record import Box, ImageRef, Record, Region, Rejected
from boxcar.schemas.workflow import SourceConfig

# Multi-byte encodings that keep ASCII bytes as they are (so `<!ENTITY` cannot hide in them), and the superset to decode them with.
_MULTI_BYTE = {
    **dict.fromkeys(("gb2312", "gbk", "gb18030", "cp936"), "gb18030"),
    **dict.fromkeys(("big5", "shift_jis", "euc-jp", "euc-kr", "cp932", "cp949"), ""),
}
_ENCODING = re.compile(rb"""^\s*<\?xml[^>]*?encoding\s*=\s*["']([\w.-]+)["']""")


class _Settings(msgspec.Struct, frozen=True):
    origin: int
    vocabulary: tuple[str, ...]


class _Object(msgspec.Struct, frozen=True):
    number: int
    name: str
    is_difficult: bool
    boxes: tuple[Box, ...]
    """As written."""
    is_hull: bool = False
    """The box is the hull of a polygon."""


class _Annotation(msgspec.Struct, frozen=True):
    filename: str
    width: int | None
    height: int | None
    objects: tuple[_Object, ...]


class _Evidence:
    """What the boxes of the whole source say about the number of the first pixel."""

    def __init__(self) -> None:
        self.num_boxes = self.num_at_zero = self.num_at_one = self.num_at_size = 0

    def add(self, box: Box, annotation: _Annotation) -> None:
        x0, y0, x1, y1 = box
        if x0 < x1 and y0 < y1:
            self.num_boxes += 1
            self.num_at_zero += x0 == 0 or y0 == 0
            self.num_at_one += x0 == 1 or y0 == 1
            self.num_at_size += x1 == annotation.width or y1 == annotation.height

    def decide(self, wanted: str | int) -> tuple[int, str]:
        """The origin, and a sentence about it ("" where there is nothing to say)."""
        counts = (
            f"{self.num_boxes} boxes, {self.num_at_zero} with xmin or ymin = 0, {self.num_at_one} with 1, "
            f"{self.num_at_size} with xmax = width or ymax = height"
        )
        if wanted != "auto":
            doubt = wanted == 1 and self.num_at_zero > 0
            return int(wanted), f"voc_origin: found {counts}, but reads them as 1-based, as it was told" if doubt else ""
        origin = 0 if self.num_at_zero else 1
        by_rule = "" if self.num_at_zero or self.num_at_one or self.num_at_size else ", the format's rule, for no box touches a border"
        return origin, f"voc_origin: found {counts} -> read as {origin}-based{by_rule}; set voc_origin: 0 or 1 to decide it yourself"


class VocReader:
    name = "voc"
    uses = COMMON_KEYS | {"voc_origin", "exhaustive"}

    def plan(self, config: SourceConfig, work_dir: Path, records_per_unit: int) -> SourcePlan:
        notes: list[str] = []
        has_root = is_folder(join(config.annotations, "Annotations"))
        prefix = "Annotations/" if has_root else ""
        xml_folder = join(config.annotations, "Annotations") if has_root else config.annotations
        root = config.annotations if has_root else posixpath.dirname(normal_path(config.annotations))
        fix = "Name the folder of the XML files, or the root that holds Annotations/, ImageSets/ and JPEGImages/."
        listed = list_annotations(xml_folder, ".xml", notes, fix=fix)
        selected, rejected = _select(root, config.split, {name[:-4] for name, _ in listed})

        pictures = join(root, "JPEGImages")
        image_folder = config.images or (pictures if is_folder(pictures) else xml_folder)
        images = list_images(image_folder, notes)
        image_prefix = "" if config.images else relative_path(image_folder, config.annotations)

        evidence, names, files = _Evidence(), set[str](), list[ListedFile]()
        first_refusal, num_refused, num_other_images, num_hulls = "", 0, 0, 0
        for name, num_bytes in listed:
            try:
                annotation = _parse(read_file(join(xml_folder, name)))
            except Refused as refused:  # said again, and counted, when its unit is read
                first_refusal = first_refusal or f"{name}: {refused.detail}"
                num_refused += 1
                annotation = _Annotation("", None, None, ())
            for thing in annotation.objects:
                names.add(thing.name)
                num_hulls += thing.is_hull
                for box in thing.boxes:
                    evidence.add(box, annotation)
            stem = name[:-4]
            if stem in selected:
                image, names_another = _find_image(stem, annotation.filename, images)
                num_other_images += names_another
                path = posixpath.normpath(posixpath.join(image_prefix, image))
                files.append(ListedFile(stem, prefix + name, path, num_bytes))
        if num_refused == len(listed):
            raise AnnotationError(
                xml_folder, found=f"no file among {len(listed)} that can be read; {first_refusal}", expected="Pascal VOC XML files", fix=fix
            )
        if num_other_images:
            notes.append(f"{num_other_images} files name another image in <filename> than the one of their own name; theirs is read")
        if num_hulls:
            notes.append(f"{num_hulls} objects have no <bndbox>: the hull of their <polygon> is taken")
        origin, sentence = evidence.decide(config.voc_origin)
        notes += [sentence] if sentence else []
        settings = _Settings(origin, tuple(sorted(names)) if config.exhaustive is not False else ())
        fingerprint, units = write_listing(work_dir, files, settings, records_per_unit)
        return SourcePlan(fingerprint, units, len(files), tuple(notes), tuple(rejected))

    def read(self, config: SourceConfig, unit: Unit) -> Iterator[Record | Rejected]:
        return read_records(unit, config.annotations, partial(_record, config, read_settings(unit, _Settings)))


def _select(root: str, split: str, stems: set[str]) -> tuple[set[str], list[Rejected]]:
    """The stems of a split, and a rejection for each that the list names and no XML file has. Without split lists: every stem."""
    lists = join(root, "ImageSets/Main")
    if not split or not is_folder(lists):
        return stems, []
    splits = [name[:-4] for name, _ in list_files(lists, (".txt",), recursive=False)]
    path = f"{lists}/{split}.txt"
    if split not in splits:
        # VOC's own folder also holds 80 lists such as aeroplane_train: the plain names are the ones that are meant.
        plain = [name for name in splits if "_" not in name] or splits
        known = ", ".join(plain[:20]) or "a list in that folder"
        raise AnnotationError(path, found="no such split list", expected=f"one of {known}", fix="Set `split` to one of them.")
    lines = read_bytes(path).decode("utf-8-sig", "replace").splitlines()
    # "2008_000008 -1": lists of one class mark each image; the image belongs to the split whatever the mark.
    entries = list(dict.fromkeys(re.sub(r"\s+(-1|0|1)$", "", line.strip()) for line in lines if line.strip()))
    wanted = [entry if entry in stems else image_stem(entry.removesuffix(".xml")) for entry in entries]
    rejected = [
        Rejected("missing_annotation", f"{split}.txt", f"found {entry!r} in the list, expected a file {stem}.xml", record_id=stem)
        for entry, stem in zip(entries, wanted, strict=True)
        if stem not in stems
    ]
    selected = stems.intersection(wanted)
    if not selected:
        raise AnnotationError(path, found=f"{len(entries)} names, none of an XML file", expected="names of XML files without suffix")
    return selected, rejected


def _find_image(stem: str, filename: str, images: ImageNames) -> tuple[str, bool]:
    """The image of an XML file, relative to the image folder, and whether `<filename>` names another one that exists."""
    declared = posixpath.basename(filename.replace("\\", "/"))
    beside = posixpath.join(posixpath.dirname(stem), declared)
    by_name = images.find(image_stem(beside)) or images.find(image_stem(declared)) if declared else None
    if own := images.find(stem):
        return own, by_name is not None and by_name != own
    guess = beside if declared else stem
    return by_name or (guess if image_stem(guess) != guess else f"{guess}.jpg"), False


def _record(config: SourceConfig, settings: _Settings, file: ListedFile, data: bytes) -> Record:
    annotation = _parse(data)
    return Record(
        record_id=file.record_id,
        position=file.annotation,
        images=(ImageRef(file.image, annotation.width, annotation.height),),
        regions=tuple(
            Region(_half_open(box, settings.origin), thing.name, is_difficult=thing.is_difficult, region_id=f"object {thing.number}")
            for thing in annotation.objects
            for box in thing.boxes
        ),
        vocabulary=settings.vocabulary,
        language=config.language,
        split=config.split,
    )


def _half_open(box: Box, origin: int) -> Box:
    """0-based half-open corners. The first pixel of each pair loses `origin`; where both are the same there is no first."""
    x0, y0, x1, y1 = box
    return (x0 - origin * (x0 < x1), y0 - origin * (y0 < y1), x1 - origin * (x1 < x0), y1 - origin * (y1 < y0))


def _parse(data: bytes) -> _Annotation:
    root = _tree(data)
    if root.tag != "annotation":
        raise Refused("not_voc", f"found a root element <{root.tag}>, expected <annotation>")
    filename, width, height = "", None, None
    objects: list[_Object] = []
    for child in root:
        if child.tag == "object":
            objects.append(_object(child, len(objects) + 1))
        elif child.tag == "filename":
            filename = (child.text or "").strip()
        elif child.tag == "size":
            width, height = _size(child.findtext("width")), _size(child.findtext("height"))
    return _Annotation(filename, width, height, tuple(objects))


def _tree(data: bytes) -> ElementTree.Element:
    if b"<!ENTITY" in data or (b"\0" in data and b"<!ENTITY" in data.replace(b"\0", b"")):  # the second: UTF-16
        raise Refused("unsafe_xml", "found an entity declaration, expected none: entities can fill the memory")
    declared = _ENCODING.match(data[:200])
    encoding = declared.group(1).decode().lower() if declared else ""
    try:
        if encoding in _MULTI_BYTE:
            return ElementTree.fromstring(data.decode(_MULTI_BYTE[encoding] or encoding))
        return ElementTree.fromstring(data)
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise Refused("broken_xml", f"found {error}, expected well-formed XML") from error


def _size(text: str | None) -> int | None:
    """Pixels; None where there is no positive number."""
    try:
        number = float(text or 0)
    except ValueError:
        return None
    return int(number) if 1 <= number < 1e9 else None


def _object(element: ElementTree.Element, number: int) -> _Object:
    name, is_difficult = "", False
    boxes: list[ElementTree.Element] = []
    polygon = None
    for child in element:
        if child.tag == "name":
            name = (child.text or "").strip()
        elif child.tag == "difficult":
            is_difficult = (child.text or "").strip().lower() in ("1", "true")
        elif child.tag == "bndbox":
            boxes.append(child)
        elif child.tag == "polygon":
            polygon = child
    where = f"object {number} ({name})" if name else f"object {number}"
    if not name:
        raise Refused("bad_object", f"{where}: found no <name>, expected a category name")
    if not boxes and polygon is not None:
        return _Object(number, name, is_difficult, (_hull(polygon, where),), is_hull=True)
    if not boxes:
        tags = ", ".join(f"<{child.tag}>" for child in element)
        raise Refused("bad_object", f"{where}: found {tags}, expected a <bndbox> among them")
    return _Object(number, name, is_difficult, tuple(_corners(box, where) for box in boxes))


def _hull(polygon: ElementTree.Element, where: str) -> Box:
    """Around corners as <x1>, <y1>, <x2>, ... or <pt><x>, <y></pt>; as written, in the file's own count of pixels."""
    across = [child.text or "" for child in polygon.iter() if re.fullmatch(r"x[0-9]*", str(child.tag))]
    down = [child.text or "" for child in polygon.iter() if re.fullmatch(r"y[0-9]*", str(child.tag))]
    try:
        xs, ys = list(map(float, across)), list(map(float, down))
    except ValueError:
        xs, ys = [], []
    if len(xs) != len(ys) or len(xs) < 3:
        raise Refused(
            "bad_object", f"{where}: found {len(across)} x and {len(down)} y in <polygon>, expected the numbers of 3 corners or more"
        )
    return min(xs), min(ys), max(xs), max(ys)


def _corners(element: ElementTree.Element, where: str) -> Box:
    texts = {child.tag: child.text or "" for child in element}
    try:
        return (float(texts["xmin"]), float(texts["ymin"]), float(texts["xmax"]), float(texts["ymax"]))
    except (KeyError, ValueError):
        found = ", ".join(f"{tag}={text.strip()!r}" for tag, text in texts.items()) or "nothing"
        raise Refused("bad_object", f"{where}: found {found} in <bndbox>, expected the numbers xmin, ymin, xmax, ymax") from None
