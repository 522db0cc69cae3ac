"""The files below a folder, as far as they may be annotations or images."""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from boxcar.schemas.errors import ConfigError

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
ROW_SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".json.zst", ".jsonl.zst")
MAX_FILES_IN_FOLDER = 1000
"""Of annotations of one kind: a folder with more holds one file for each image, and the first ones say which format."""
_SKIPPED = frozenset({"node_modules", "__pycache__", "shards", "runs", "audits"})
"""And whatever begins with a dot: what Boxcar writes, and what version control does."""


@dataclass
class Listing:
    """What stands below a folder."""

    root: Path
    by_suffix: dict[str, list[Path]] = field(default_factory=dict)
    """Files that are no images, by suffix in lower case (.json.gz counts as one); of one folder, the first MAX_FILES_IN_FOLDER."""
    image_folders: Counter[Path] = field(default_factory=Counter)
    """Folder -> images directly in it."""

    @property
    def num_images(self) -> int:
        return self.image_folders.total()

    def files(self, *suffixes: str) -> Iterator[Path]:
        for suffix in suffixes:
            yield from self.by_suffix.get(suffix, [])


def list_folder(root: Path) -> Listing:
    """Walk a folder once, without following links to folders. Raises ConfigError where it is none."""
    if not root.is_dir():
        raise ConfigError(str(root), found="a file" if root.exists() else "no such folder", expected="the folder of a data set")
    listing = Listing(root)
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(name for name in subfolders if name not in _SKIPPED and not name.startswith("."))
        counts: Counter[str] = Counter()
        for name in sorted(names):
            suffix = _suffix(name)
            if suffix in IMAGE_SUFFIXES:
                listing.image_folders[Path(folder)] += 1
            elif suffix and not name.startswith("."):
                counts[suffix] += 1
                if counts[suffix] <= MAX_FILES_IN_FOLDER:
                    listing.by_suffix.setdefault(suffix, []).append(Path(folder) / name)
    return listing


def _suffix(name: str) -> str:
    lower = name.lower()
    return next((suffix for suffix in ROW_SUFFIXES if lower.endswith(suffix)), os.path.splitext(lower)[1])


def find_images_root(listing: Listing, annotations: Path, names: Sequence[str]) -> Path | None:
    """The folder to which these image paths of an annotation file are relative: where most of them are. None where none is anywhere."""
    relative = [name for name in names if not os.path.isabs(name) and "://" not in name]
    if not relative:
        return annotations.parent if names else None
    candidates = [annotations.parent, listing.root]
    for folder in listing.image_folders:
        candidates += [folder, *(parent for parent in folder.parents if parent.is_relative_to(listing.root))]
    found = {folder: sum((folder / name).is_file() for name in relative) for folder in dict.fromkeys(candidates)}
    best = max(found, key=lambda folder: found[folder])
    return best if found[best] else None
