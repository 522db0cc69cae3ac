"""Which image files are the same picture: by content exactly, or by looks.

    paths ──stat──> sizes ──those that stand more than once──> xxh3-128 of the whole file ──> groups
                                                          (opt-in) decode ──> 64-bit difference hash ──> groups that look alike

Two files of different sizes differ, so almost no file is read; a file that several names link to is read once. Files are compared, not
paths: a copy under another name is found, the same path twice is one file.
"""

import os
from collections.abc import Iterator, Sequence
from itertools import combinations

import numpy as np
import numpy.typing as npt
from PIL import Image

from boxcar.pipelines import storage
from boxcar.pipelines.images.image_file import MISSING_IMAGE, load_image
from boxcar.schemas.errors import AnnotationError, ImageError

HASH_SIDE = 8
"""A difference hash compares neighbours in a picture of 9 x 8 pixels: 64 bits."""
NEAR_BITS = 4
"""Hashes that differ in so many bits or fewer look alike. Of 64: re-compressed and resized copies differ in 0 to 3."""

Identity = tuple[object, ...]
"""Equal for two names of one file."""


def shared_images(paths_a: Sequence[str], paths_b: Sequence[str]) -> list[tuple[str, str]]:
    """Every pair (path of a, path of b) of files with the same content, in the order of `paths_a`, then of `paths_b`.

    Paths are local or URIs, as `pipelines.storage` takes them; a path that stands several times in a list counts once. Raises ImageError
    for a file that cannot be read.
    """
    of_a, of_b = list(dict.fromkeys(paths_a)), list(dict.fromkeys(paths_b))
    contents = _contents([*of_a, *of_b])
    by_content: dict[str, list[str]] = {}
    for path in of_b:
        if path in contents:
            by_content.setdefault(contents[path], []).append(path)
    return [(first, second) for first in of_a if first in contents for second in by_content.get(contents[first], [])]


def same_content(paths: Sequence[str]) -> list[list[str]]:
    """Groups of two or more paths with the same content, in the order of their first paths. Raises ImageError."""
    contents = _contents(list(dict.fromkeys(paths)))
    return _groups(contents)


def _contents(paths: Sequence[str]) -> dict[str, str]:
    """Path -> content, for those of the given paths whose content stands twice among them, or may. No file is hashed twice."""
    identities = {path: _identity(path) for path in dict.fromkeys(paths)}
    names_of_size: dict[int, list[str]] = {}
    for path in paths:
        names_of_size.setdefault(identities[path][0], []).append(path)
    hashes: dict[Identity, str] = {}
    contents = {}
    for size, names in names_of_size.items():
        distinct = {identities[path][1] for path in names}
        for path in names if len(names) > 1 else []:
            identity = identities[path][1]
            if identity not in hashes:
                # Several names of one file and no other of its size: nothing to read.
                hashes[identity] = f"{size} {identity}" if len(distinct) == 1 else f"{size} {_hash(path)}"
            contents[path] = hashes[identity]
    return contents


def _identity(path: str) -> tuple[int, Identity]:
    """(bytes, what two names of one file have in common)."""
    local = storage.local_path(path)
    try:
        if local is None:
            return storage.file_size(path), (path,)
        found = os.stat(local)
    except AnnotationError as error:
        raise ImageError(path, reason="unreadable_image", found=error.found, expected="a readable file", fix=error.fix) from error
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error
    return found.st_size, (found.st_dev, found.st_ino)


def _hash(path: str) -> str:
    try:
        return storage.hash_file(path)
    except AnnotationError as error:
        raise ImageError(path, reason="unreadable_image", found=error.found, expected="a readable file", fix=error.fix) from error
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: str, error: Exception) -> ImageError:
    reason = MISSING_IMAGE if isinstance(error, FileNotFoundError | NotADirectoryError) else "unreadable_image"
    return ImageError(path, reason=reason, found=f"{error}", expected="a readable file", fix="Check the path and the mount.")


def _groups(contents: dict[str, str]) -> list[list[str]]:
    groups: dict[str, list[str]] = {}
    for path, content in contents.items():
        groups.setdefault(content, []).append(path)
    order = {path: place for place, path in enumerate(contents)}
    return sorted((group for group in groups.values() if len(group) > 1), key=lambda group: order[group[0]])


# ---- by looks


def difference_hash(path: str) -> int:
    """64 bits: whether each pixel of the picture, upright, grey, shrunk to 9 x 8, is darker than its right neighbour.

    The dHash of Neal Krawetz (2013), by Pillow's box filter. Decodes the picture. Raises ImageError.
    """
    grey = load_image(path).convert("L").resize((HASH_SIDE + 1, HASH_SIDE), Image.Resampling.BOX)
    pixels = np.asarray(grey, np.int16)
    bits = (pixels[:, :-1] < pixels[:, 1:]).ravel()
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def look_alikes(paths: Sequence[str], hashes: Sequence[int], max_bits: int = NEAR_BITS) -> list[list[str]]:
    """Groups of two or more paths whose hashes are joined by steps of at most `max_bits` differing bits, in the order of their first paths.

    hashes: one for each path, 64 bits. Pictures without structure (one colour: no bit is set) all look alike and are left out.
    """
    places = [place for place, value in enumerate(hashes) if value not in (0, (1 << 64) - 1)]
    values = np.array([hashes[place] for place in places], np.uint64)
    parent = list(range(len(places)))

    def root(place: int) -> int:
        while parent[place] != place:
            parent[place] = parent[parent[place]]
            place = parent[place]
        return place

    for first, second in _near_pairs(values, max_bits):
        a, b = root(first), root(second)
        parent[max(a, b)] = min(a, b)
    groups: dict[int, list[str]] = {}
    for number, place in enumerate(places):
        groups.setdefault(root(number), []).append(paths[place])
    return [group for group in groups.values() if len(group) > 1]


def _near_pairs(values: npt.NDArray[np.uint64], max_bits: int) -> Iterator[tuple[int, int]]:
    """Pairs of at most `max_bits` differing bits: of max_bits + 1 stretches of the 64 bits, one at least is then equal (pigeonhole)."""
    cuts = np.linspace(0, 64, max_bits + 2).astype(int)
    for low, high in zip(cuts[:-1].tolist(), cuts[1:].tolist(), strict=True):
        keys = (values >> np.uint64(low)) & np.uint64((1 << (high - low)) - 1)
        order = np.argsort(keys, kind="stable")
        borders = np.flatnonzero(np.r_[True, np.diff(keys[order]) != 0, True]) if len(order) else np.zeros(1, np.int64)
        for start, stop in zip(borders[:-1].tolist(), borders[1:].tolist(), strict=True):
            for first, second in combinations(order[start:stop].tolist(), 2):
                if int(values[first] ^ values[second]).bit_count() <= max_bits:
                    yield min(first, second), max(first, second)
