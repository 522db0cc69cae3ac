"""YOLO text labels: one .txt file per image, one box a line, class names apart.

    what        in the file                              in the record
    class       `cls`, a number from 0                   its name in data.yaml or classes.txt
    box         cx cy w h, fractions of the image        xyxy, relative: (cx - w/2, cy - h/2, cx + w/2, cy + h/2)
    polygon     x1 y1 x2 y2 x3 y3 ..., fractions         its bounding box, relative
    size        nowhere                                  None
    image       /labels/ -> /images/ in the path         path below `images`, or relative to `annotations`

`annotations` is the labels folder, the data set's root, or its data.yaml. With data.yaml, `split` picks one of its paths (train, val,
test; folders, a list of folders, or text files that list images); below a labels folder it picks the folder of that name, if there is one.
The class names are those of `classes`, or of a data.yaml or classes.txt found beside the labels or up to two folders above.

Traps, and what is done:
- an empty label file is a verified negative (a record without regions); an image without label file is unlabelled: no record, counted in
  the notes; a label file without image is rejected. The image folder is listed once and joined by stem, for the suffix is nowhere written.
- a line has 5 values (a box), or an odd number from 7 (a polygon or an oriented box). 6 values are a prediction with its confidence, not a
  label: rejected, so that nobody trains on a model's output unaware. With `kpt_shape` in data.yaml lines are poses: the box comes first
  and the keypoints are left out (with two values a keypoint they would pass for a polygon).
- numpy.savetxt writes class ids as "3.000000": a whole number is taken, 1.5 is not. Ids outside the names are rejected.
- YAML reads the bare words no, yes, on and off as booleans: such a class name is an error that says to quote it.
- Roboflow's `../train/images` that should be `train/images`, and a `path:` of another machine: the folder of data.yaml is tried instead.
- classes.txt among the labels (LabelImg) is not a label file, nor is a text file that lists images (train.txt of Darknet): such lists are
  named in the notes. Values outside 0..1 are passed on: a later step checks the boxes.

Reasons of rejection: bad_line, unknown_category, missing_image, unreadable_file.
"""

import math
import posixpath
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import yaml

from boxcar.pipelines.readers.reader import COMMON_KEYS, Refused, SourcePlan, Unit
from boxcar.pipelines.readers.shared.file_per_image import (
    IMAGE_SUFFIXES,
    UTF8_BOM,
    ListedFile,
    image_stem,
    is_file,
    is_folder,
    list_annotations,
    list_images,
    normal_path,
    read_records,
    read_settings,
    relative_path,
    write_listing,
)
from boxcar.pipelines.storage import join, open_input, read_bytes
from boxcar.schemas.errors import AnnotationError
from boxcar.schemas.record import RELATIVE, Box, ImageRef, Record, Region, Rejected
from boxcar.schemas.workflow import SourceConfig

_YAML = (".yaml", ".yml")
_SPLITS = ("train", "val", "valid", "test", "minival")
_NO_LABELS = frozenset({"classes", "obj", "notes", "readme", "readme.dataset", "readme.roboflow"})
_HEAD_BYTES = 4096
_LABELS_FIX = "Name the labels folder, the data set's root, or its data.yaml."


class _Settings(msgspec.Struct, frozen=True):
    names: dict[int, str]
    """By class id, in the order of the ids."""
    num_keypoint_values: int
    """Values after the box in a line of a pose data set; 0 where it is none."""


class _Folders(NamedTuple):
    """One folder of label files and where its images are."""

    labels: str
    images: str
    listed: frozenset[str] | None = None
    """Stems, relative to the folder, where a text file lists the images of the split."""


class YoloReader:
    name = "yolo"
    uses = COMMON_KEYS | {"classes", "exhaustive"}

    def plan(self, config: SourceConfig, work_dir: Path, records_per_unit: int) -> SourcePlan:
        notes: list[str] = []
        base = _base(config.annotations)
        if not is_folder(base):
            list_annotations(base, ".txt", notes, fix=_LABELS_FIX)  # raises: said before anything is said about class names
        data_path = _find_data_yaml(config)
        data = _load_yaml(data_path) if data_path else {}
        root, folders = _locate(config, data_path, data)
        settings = _Settings(_class_names(config, base, data_path, data, notes), _num_keypoint_values(data))

        files: dict[str, ListedFile] = {}  # by label file: train and val of data.yaml may be the same folder
        rejected: list[Rejected] = []
        shared = list_images(config.images, notes) if config.images else None
        image_lists: list[str] = []
        num_images = 0
        for place in dict.fromkeys(folders):
            images = list_images(place.images, notes) if shared is None else shared
            num_images += len(images if place.listed is None else place.listed)
            label_prefix, image_prefix = _prefix(place.labels, base), "" if config.images else _prefix(place.images, base)
            id_prefix = _prefix(place.labels, root)
            for name, num_bytes in list_annotations(place.labels, ".txt", notes, fix=_LABELS_FIX):
                stem = name[:-4]
                if place.listed is not None and stem not in place.listed:
                    continue
                annotation = label_prefix + name
                record_id = _record_id(id_prefix + stem)
                image = images.find(stem) or (images.find(record_id) if config.images else None)
                if image is not None:
                    files[annotation] = ListedFile(record_id, annotation, image_prefix + image, num_bytes)
                elif posixpath.basename(stem).lower() in _NO_LABELS:
                    continue
                elif _is_image_list(normal_path(join(place.labels, name))):
                    image_lists.append(annotation)
                else:
                    detail = f"found no image {stem}.* in {config.images or place.images}, expected one for this label file"
                    rejected.append(Rejected("missing_image", annotation, detail, record_id=record_id))
        if not files:
            raise AnnotationError(
                folders[0].labels,
                found=f"no label file with an image in {config.images or folders[0].images}",
                expected="images of the same names",
                fix="Set `images` to the folder of the images.",
            )
        if image_lists:
            notes.append(f"{len(image_lists)} text files list images and are not label files, for example {image_lists[0]}")
        if num_images > len(files):
            why = "unlabelled or of another split" if shared else "unlabelled"
            notes.append(f"{num_images - len(files)} of {num_images} images have no label file here: {why}, they make no record")
        fingerprint, units = write_listing(work_dir, list(files.values()), settings, records_per_unit)
        return SourcePlan(fingerprint, units, len(files), tuple(notes), tuple(rejected))

    def read(self, config: SourceConfig, unit: Unit) -> Iterator[Record | Rejected]:
        settings = read_settings(unit, _Settings)
        names = tuple(dict.fromkeys(settings.names.values())) if config.exhaustive is not False else ()
        return read_records(unit, _base(config.annotations), partial(_record, config, settings, names))


def _base(annotations: str) -> str:
    """The folder that the listing's paths are relative to."""
    return posixpath.dirname(normal_path(annotations)) if annotations.lower().endswith(_YAML) else normal_path(annotations)


def _find_data_yaml(config: SourceConfig) -> str:
    """The data.yaml that was named, or the nearest from the annotations upwards; "" where there is none."""
    for named in (config.annotations, config.classes or ""):
        if named.lower().endswith(_YAML):
            return normal_path(named)
    return _find_upwards(config.annotations, ("data.yaml", "data.yml", "dataset.yaml"))


def _find_upwards(folder: str, names: tuple[str, ...]) -> str:
    folder = normal_path(folder)
    for place in (folder, posixpath.dirname(folder), posixpath.dirname(posixpath.dirname(folder))):
        for name in names:
            if is_file(f"{place}/{name}"):
                return f"{place}/{name}"
    return ""


def _load_yaml(path: str) -> dict[str, Any]:
    try:
        data = yaml.safe_load(read_bytes(path))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise AnnotationError(path, found=f"broken YAML ({error})", expected="a YAML file with `names`") from error
    if not isinstance(data, dict):
        raise AnnotationError(path, found=f"a {type(data).__name__}", expected="a mapping with `names` and the paths of the splits")
    return data


def _locate(config: SourceConfig, data_path: str, data: dict[str, Any]) -> tuple[str, list[_Folders]]:
    """The data set's root, which record ids are relative to, and the folders of the split."""
    base = _base(config.annotations)
    splits = {key: value for key, value in data.items() if key in (*_SPLITS, config.split) and value and isinstance(value, str | list)}
    labels = f"{base}/labels" if is_folder(f"{base}/labels") else base
    by_yaml = config.annotations.lower().endswith(_YAML)
    if by_yaml or (splits and posixpath.dirname(data_path) == base and (config.split or labels == base)):
        return _locate_by_yaml(config, data_path, data, splits)
    if config.split and is_folder(f"{labels}/{config.split}"):
        return base, [_Folders(f"{labels}/{config.split}", _swap(f"{labels}/{config.split}", "labels", "images"))]
    return base, [_Folders(labels, _swap(labels, "labels", "images"))]


def _locate_by_yaml(config: SourceConfig, data_path: str, data: dict[str, Any], splits: dict[str, Any]) -> tuple[str, list[_Folders]]:
    known = ", ".join(splits) or "no split at all"
    split = config.split or (next(iter(splits)) if len(splits) == 1 else "")
    if split not in splits:
        found = f"no split {split!r}" if split else "several splits and no `split` in the workflow"
        raise AnnotationError(data_path, found=found, expected=f"one of {known}", fix="Set `split` to one of them.")
    beside = posixpath.dirname(data_path)
    root = normal_path(join(beside, str(data.get("path") or "")))
    root = root if is_folder(root) else beside  # `path` of another machine
    entries = splits[split] if isinstance(splits[split], list) else [splits[split]]
    folders: list[_Folders] = []
    for entry in map(str, entries):
        place = normal_path(join(root, entry))
        if entry.startswith("../") and not is_folder(place):  # Roboflow's data.yaml counts from a folder below its own
            place = normal_path(join(root, entry.removeprefix("../")))
        if entry.lower().endswith(".txt"):
            folders += _listed_images(place)
        else:
            folders.append(_Folders(_swap(place, "images", "labels"), place))
    return root, folders


def _listed_images(path: str) -> list[_Folders]:
    """The folders of a text file that lists images, one a line, relative to the text file."""
    stems: dict[str, set[str]] = {}
    for line in read_bytes(path).decode("utf-8-sig", "replace").splitlines():
        if line.strip():
            folder, name = posixpath.split(normal_path(join(posixpath.dirname(path), line.strip())))
            stems.setdefault(folder, set()).add(image_stem(name))
    return [_Folders(_swap(folder, "images", "labels"), folder, frozenset(names)) for folder, names in sorted(stems.items())]


def _is_image_list(path: str) -> bool:
    """Whether the first line that is not empty ends with the suffix of an image. Reads the first 4 KiB of the file."""
    with open_input(path) as stream:
        head = stream.read(_HEAD_BYTES).decode("utf-8-sig", "replace")
    first = next((line.strip() for line in head.splitlines() if line.strip()), "")
    return first.lower().endswith(IMAGE_SUFFIXES)


def _swap(folder: str, old: str, new: str) -> str:
    """The last `old` of a path replaced, as YOLO finds labels; the folder itself where it has none or the other one is missing."""
    before, found, after = f"{folder}/".rpartition(f"/{old}/")
    other = f"{before}/{new}/{after}".rstrip("/") if found else folder
    return other if is_folder(other) else folder


def _prefix(folder: str, base: str) -> str:
    """What stands before the names of a folder's files in a path relative to `base`."""
    path = relative_path(folder, base)
    return "" if path == "." else f"{path}/"


def _record_id(stem: str) -> str:
    """The label file's path in the data set without the folder name `labels`: the same from the root as from the labels folder."""
    return "/".join(part for part in stem.split("/") if part not in ("labels", ".."))


def _class_names(config: SourceConfig, base: str, data_path: str, data: dict[str, Any], notes: list[str]) -> dict[int, str]:
    where = config.classes or (data_path if "names" in data else "")
    if not where:
        where = _find_upwards(f"{base}/labels" if is_folder(f"{base}/labels") else base, ("classes.txt",))
    if not where:
        expected = "class names: a data.yaml with `names`, or a text file with one name a line"
        raise AnnotationError(data_path or base, found="none", expected=expected, fix="Set `classes` to that file.")
    if not config.classes:
        notes.append(f"class names are those of {relative_path(where, base)}")
    if not where.lower().endswith(_YAML):
        return _checked_names(where, read_bytes(where).decode("utf-8-sig", "replace").rstrip().splitlines())
    data = data if where == data_path else _load_yaml(where)
    names = _checked_names(where, data.get("names"))
    if data.get("nc", len(names)) != len(names):
        raise AnnotationError(where, found=f"nc: {data['nc']} and {len(names)} names", expected="as many names as classes")
    return names


def _checked_names(where: str, names: object) -> dict[int, str]:
    if not isinstance(names, list | dict) or not names:
        expected = "a list of class names, or a mapping of class ids to names"
        raise AnnotationError(where, found=f"{type(names).__name__} of no class names", expected=expected)
    result: dict[int, str] = {}
    for number, name in names.items() if isinstance(names, dict) else enumerate(names):
        good = isinstance(name, str | int | float) and not isinstance(name, bool) and str(number).isdecimal()
        text = str(name).strip() if good else ""
        if not text:
            fix = "Put quotes around it: YAML reads the bare words no, yes, on and off as booleans." if isinstance(name, bool) else ""
            found = repr(name) if isinstance(name, str | bool | None) else f"a {type(name).__name__}"
            raise AnnotationError(f"{where}, class {number}", found=found, expected="a class id from 0 and its name", fix=fix)
        result[int(number)] = text
    return dict(sorted(result.items()))


def _num_keypoint_values(data: dict[str, Any]) -> int:
    shape = data.get("kpt_shape")
    return math.prod(shape) if isinstance(shape, list) and all(isinstance(side, int) for side in shape) else 0


def _record(config: SourceConfig, settings: _Settings, vocabulary: tuple[str, ...], file: ListedFile, data: bytes) -> Record:
    regions = []
    for number, line in enumerate(data.removeprefix(UTF8_BOM).splitlines(), 1):
        if values := line.split():
            regions.append(_region(settings, values, f"line {number}"))
    return Record(
        record_id=file.record_id,
        position=file.annotation,
        images=(ImageRef(file.image),),
        regions=tuple(regions),
        box_space=RELATIVE,
        vocabulary=vocabulary,
        language=config.language,
        split=config.split,
    )


def _region(settings: _Settings, values: list[bytes], where: str) -> Region:
    try:
        numbers = [float(value) for value in values]
    except ValueError:
        text = b" ".join(values)[:100].decode("utf-8", "replace")
        raise Refused("bad_line", f"{where}: found {text!r}, expected numbers: class cx cy w h") from None
    names = settings.names
    label = names.get(int(numbers[0])) if numbers[0].is_integer() else None
    if label is None:
        known = f"0..{len(names) - 1}" if len(names) == max(names) + 1 else ", ".join(map(str, sorted(names)[:50]))
        raise Refused("unknown_category", f"{where}: found class {values[0].decode()}, expected {known}")
    return Region(_box(numbers[1:], settings.num_keypoint_values, where), label, region_id=where)


def _box(numbers: list[float], num_keypoint_values: int, where: str) -> Box:
    """The box of a line's numbers after the class id."""
    if len(numbers) == 4 or (num_keypoint_values and len(numbers) == 4 + num_keypoint_values):
        cx, cy, width, height = numbers[:4]
        return (cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2)
    if num_keypoint_values:
        expected = f"5, or {5 + num_keypoint_values} with the keypoints of data.yaml's kpt_shape"
    elif len(numbers) >= 6 and len(numbers) % 2 == 0:
        xs, ys = numbers[0::2], numbers[1::2]
        return (min(xs), min(ys), max(xs), max(ys))
    else:
        expected = "5 (class cx cy w h), or an odd number from 7 (class and polygon)"
    hint = "; a sixth value is a prediction's confidence, which is no label" if len(numbers) == 5 else ""
    raise Refused("bad_line", f"{where}: found {len(numbers) + 1} values, expected {expected}{hint}")
