"""Image files for other programs: upright, whole, and of a size that is known, whatever the shards hold.

referenced, as it stands         the file itself, by its absolute path
turned by EXIF                   an upright PNG: LLaMA-Factory, ms-swift and COCO tools do not turn images, and boxes would be beside
embedded                         its own bytes as a file, or an upright PNG
"""

import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash
from PIL import Image

from boxcar.pipelines import storage
from boxcar.pipelines.images.image_file import decode_image, encode_png, load_image, resize_image
from boxcar.schemas.errors import ConfigError
from boxcar.train.data.store import ShardStore

IMAGES = "images"


@dataclass(frozen=True)
class ImageFile:
    """What another program opens."""

    path: str
    """Absolute, or a URI."""
    size_wh: tuple[int, int]
    """Pixels of that file."""


class ImageFiles:
    """Finds or writes the file of each image of rows; each image once."""

    def __init__(self, store: ShardStore | None, folder: Path) -> None:
        """store: where embedded images are; None where there are none. folder: where images are written that cannot be used in place."""
        self.num_written = 0
        self._store = store
        self._folder = folder
        self._known: dict[tuple[Any, ...], ImageFile] = {}

    def find(self, image: dict[str, Any], folder: int, *, resized: bool = False) -> ImageFile:
        """image: of a row of the store, its path joined; folder: number of the row's folder. resized: a PNG of what the model sees.

        Raises ImageError and ShardError where the image cannot be read.
        """
        key = image["path"], folder if image["path"] is None else None, image["shard"], image["shard_row"], resized
        if key not in self._known:
            self._known[key] = self._make(image, folder, resized=resized)
        return self._known[key]

    def _make(self, image: dict[str, Any], folder: int, *, resized: bool) -> ImageFile:
        path = image["path"]
        size = image["width"], image["height"]
        if path is not None and image["orientation"] == 1 and not resized:
            local = storage.local_path(path)
            return ImageFile(path if local is None else os.path.abspath(local), size)
        name, data = path, None
        if path is None:
            assert self._store is not None, "whoever has embedded images has their store"
            name = f"{self._store.folders[folder].path}, image shard {image['shard']}, row {image['shard_row']}"
            data = self._store.image_bytes(folder, image["shard"], image["shard_row"])
        stem = xxhash.xxh3_64_hexdigest(f"{name}|{resized}".encode())
        picture = load_image(path) if data is None else decode_image(data, name)
        if resized:
            seen = image["resized_width"], image["resized_height"]
            return self._write(f"{stem}.png", encode_png(picture if picture.size == seen else resize_image(picture, seen)), seen)
        if data is not None and (stored := _as_stored(data)) is not None and stored[1] == picture.size and image["orientation"] == 1:
            return self._write(f"{stem}.{stored[0]}", data, picture.size)
        return self._write(f"{stem}.png", encode_png(picture), picture.size)

    def _write(self, name: str, data: bytes, size_wh: tuple[int, int]) -> ImageFile:
        self._folder.mkdir(parents=True, exist_ok=True)
        (self._folder / name).write_bytes(data)
        self.num_written += 1
        return ImageFile(str((self._folder / name).absolute()), size_wh)


def _as_stored(data: bytes) -> tuple[str, tuple[int, int]] | None:
    """Suffix and stored size of image bytes that every program opens; None for others."""
    with Image.open(io.BytesIO(data)) as image:
        suffix = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}.get(image.format or "")
        return None if suffix is None else (suffix, image.size)


def require_empty(folder: Path) -> None:
    """Raises ConfigError where a folder to write holds something."""
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise ConfigError(str(folder), found="files that are there already", expected="a new or empty folder", fix="Choose another --out.")
