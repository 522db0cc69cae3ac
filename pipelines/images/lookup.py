"""Where an image of the annotations lies, and its header.

    name in the annotations ──> place ──> inside `images`? ──> header        (each name once)
                                   └── missing: another spelling, or a hint at what is near

Text of the source is untrusted. A name may lead out of the folder of the images (`..`, an absolute path, a symbolic link), which the rule
`outside_images` counts; or to another storage (`http://`, another bucket), which is not even asked unless the rule `other_storage` says so:
an annotation file must not make a worker call a network address.
"""

import os
import posixpath
import unicodedata
from collections.abc import Iterator, Sequence

import msgspec

from boxcar.pipelines import storage
from boxcar.pipelines.images.image_file import MISSING_IMAGE, ImageHeader, load_image, read_header
from boxcar.schemas.errors import ImageError
from boxcar.schemas.record import ImageRef
from boxcar.schemas.workflow import Policy, RulesConfig

NO_DECLARED_SIZE = "no_declared_size"
OTHER_STORAGE = "other_storage"
OUTSIDE_IMAGES = "outside_images"
WINDOWS_SEPARATORS = "windows_separators"
UNICODE_FORM = "unicode_form"
IN_PARENT_FOLDER = "missing_in_parent_folder"
OTHER_CASE = "missing_other_case"
OTHER_EXTENSION = "missing_other_extension"


Rules = tuple[tuple[str, Policy], ...]
"""(rule, what was done)."""


class FoundImage(msgspec.Struct, frozen=True):
    """An image of the annotations, looked up."""

    path: str
    """As a row names it: relative to the folder of the images, absolute, or a URI."""
    header: ImageHeader | ImageError
    rules: Rules = ()
    """What is unusual about its place."""


class ImageLookup:
    """Looks up the images of one source, each name once."""

    def __init__(self, images_root: str, rules: RulesConfig | None = None, *, trust_sizes: bool, decode: bool = False) -> None:
        """trust_sizes: take the declared sizes and open no file. decode: also refuse a file whose damage only decoding finds; where pixels
        are stored, one such file would else stop the conversion.
        """
        self.rules = rules or RulesConfig()
        self.trust_sizes, self.decode = trust_sizes, decode
        self.root = images_root
        self._place = _Place(images_root)
        self._near = _Near(self._place.local_root)
        self._known: dict[str, FoundImage] = {}

    def __call__(self, image: ImageRef) -> FoundImage:
        if self.trust_sizes:
            return self._trusted(image)
        found = self._known.get(image.path)
        if found is None:
            found = self._known[image.path] = self._look_up(image.path)
        return found

    def _look_up(self, name: str) -> FoundImage:
        first = self._open(name)
        if not _is_missing(first.header):
            return first
        for other, rules in _spellings(name):
            found = self._open(other)
            if not _is_missing(found.header):
                return FoundImage(found.path, found.header, found.rules + rules)
        near = self._near.of(name.replace("\\", "/"))
        if near is None:
            return first
        rule, hint = near
        error = ImageError(storage.join(self.root, name), reason=MISSING_IMAGE, found="no such file", expected="an image file", fix=hint)
        return FoundImage(name, error, ((rule, "drop"),))

    def _open(self, name: str) -> FoundImage:
        path, rules, refusal = self._judge(name)
        return FoundImage(path, refusal or self._header(path), rules)

    def _trusted(self, image: ImageRef) -> FoundImage:
        width, height = image.declared_width, image.declared_height
        # No file is opened, but of several spellings one must be chosen.
        spellings = ((name, rules) for name, rules in _spellings(image.path) if self._exists(name) and not self._exists(image.path))
        name, spelling_rules = next(spellings, (image.path, ()))
        path, rules, refusal = self._judge(name)
        rules += spelling_rules
        if refusal is not None:
            return FoundImage(path, refusal, rules)
        if width is None or height is None:
            error = ImageError(
                image.path,
                reason=NO_DECLARED_SIZE,
                found="no declared width and height",
                expected="both, as trust_sizes takes them for true",
                fix="Set trust_sizes: false.",
            )
            return FoundImage(path, error, rules)
        header = ImageHeader(format="", stored_width=width, stored_height=height, orientation=1, mode_note="", num_bytes=0)
        return FoundImage(path, header, rules)

    def _judge(self, name: str) -> tuple[str, Rules, ImageError | None]:
        """The path to read, the rules that it meets, and why it is not read, if so."""
        path, is_elsewhere = self._place.of(name)
        if is_elsewhere:
            if self.rules.other_storage == "keep":
                return path, ((OTHER_STORAGE, "keep"),), None
            error = ImageError(
                name,
                reason=OTHER_STORAGE,
                found="an image on another storage than the folder of the images",
                expected=f"a path or URI within {self.root or 'the folder of the annotations'}",
                fix="Set `images` to where the images are; or rules.other_storage: keep, if you trust whoever wrote the annotations.",
            )
            return path, (), error
        if self._place.is_inside(path, follow_links=not self.trust_sizes):
            return path, (), None
        if self.rules.outside_images == "keep":
            return path, ((OUTSIDE_IMAGES, "keep"),), None
        error = ImageError(
            name,
            reason=OUTSIDE_IMAGES,
            found="an image outside the folder of the images",
            expected=f"a path within {self.root or 'the folder of the annotations'}",
            fix="Set `images` to a folder that holds all of them, or rules.outside_images: keep.",
        )
        return path, ((OUTSIDE_IMAGES, "drop"),), error

    def _header(self, path: str) -> ImageHeader | ImageError:
        where = storage.join(self.root, path)
        try:
            header = read_header(where)
            if self.decode:
                load_image(where, header)
        except ImageError as error:
            return error
        return header

    def _exists(self, path: str) -> bool:
        local = storage.local_path(storage.join(self.root, path))
        return local is not None and os.path.exists(local)


def _is_missing(header: ImageHeader | ImageError) -> bool:
    return isinstance(header, ImageError) and header.reason == MISSING_IMAGE


def _spellings(name: str) -> Iterator[tuple[str, Rules]]:
    """Other ways to write the same name, and the rules that each is counted under.

    Windows separates folders by a backslash. Archives made by macOS hold names in Unicode's decomposed form (u and a combining mark).
    """
    separated = name.replace("\\", "/")
    rules: Rules = ((WINDOWS_SEPARATORS, "fix"),) if separated != name else ()
    if rules:
        yield separated, rules
    if not name.isascii():
        composed, decomposed = unicodedata.normalize("NFC", separated), unicodedata.normalize("NFD", separated)
        for other in {composed, decomposed} - {separated}:
            yield other, (*rules, (UNICODE_FORM, "fix"))


_MAX_LINKS = 40
"""As many links one after another as Linux follows."""


class _Place:
    """Where names lead, seen from the folder of the images."""

    def __init__(self, images_root: str) -> None:
        self.local_root = storage.local_path(images_root)
        self._storage = _storage_of(images_root)
        self._prefix = _normal(os.path.abspath(self.local_root) if self.local_root is not None else images_root).rstrip("/") + "/"
        self._real_prefix = "" if self.local_root is None else os.path.realpath(self.local_root).rstrip("/") + "/"
        self._real_folders: dict[str, bool] = {}
        """Folder -> whether it lies inside, symbolic links followed."""

    def of(self, name: str) -> tuple[str, bool]:
        """(path to read, whether it is on another storage)."""
        if not storage.is_uri(name):
            if self.local_root is not None:
                return name, False
            if os.path.isabs(name):
                return name, True
            if ".." not in name:
                return name, False
            name = storage.join(self._prefix, name)
        path = _normal(name)  # object stores know no `..`
        return path, _storage_of(path) != self._storage

    def is_inside(self, path: str, *, follow_links: bool) -> bool:
        """Whether a path of the same storage lies below the folder of the images."""
        if ".." in path or os.path.isabs(path) or storage.is_uri(path):
            if self.local_root is None:
                return _normal(path).startswith(self._prefix) or not storage.is_uri(path)
            full = os.path.normpath(os.path.join(self._prefix, storage.local_path(path) or path))
            if not full.startswith(self._prefix):
                return False
        elif self.local_root is None:
            return True
        else:
            full = self._prefix + path
        return not follow_links or self._is_really_inside(full)

    def _is_really_inside(self, full: str) -> bool:
        """Whether a local file lies inside, symbolic links followed. One readlink an image; folders are asked once."""
        for _ in range(_MAX_LINKS):
            folder = os.path.dirname(full)
            inside = self._real_folders.get(folder)
            if inside is None:
                inside = self._real_folders[folder] = f"{os.path.realpath(folder)}/".startswith(self._real_prefix)
            if not inside:
                return False
            try:
                target = os.readlink(full)
            except OSError:  # no link, or no file
                return True
            full = os.path.join(folder, target)
        return False


def _normal(path: str) -> str:
    """Without `.` and `..`."""
    if not storage.is_uri(path):
        return posixpath.normpath(path)
    scheme, _, rest = path.partition("://")
    return f"{scheme}://{posixpath.normpath(rest) if scheme != 'file' else rest}"


def _storage_of(path: str) -> str:
    """Scheme and bucket or host of a URI; "" for the local file system."""
    local = storage.local_path(path)
    if local is not None and (not path.startswith("file://") or os.path.isabs(local)):
        return ""
    return "/".join(path.split("/")[:3])


class _Near:
    """What stands where a missing image was looked for: for local folders, each listed once."""

    def __init__(self, root: str | None) -> None:
        self.root = root
        self._listings: dict[str, tuple[dict[str, str], dict[str, str]]] = {}

    def of(self, name: str) -> tuple[str, str] | None:
        """(rule, what to do) for a missing image; None where nothing is near."""
        if self.root is None or os.path.isabs(name) or storage.is_uri(name) or ".." in name:
            return None
        root = os.path.abspath(self.root)
        parent = os.path.dirname(root)
        if os.path.exists(os.path.join(parent, name)):
            return IN_PARENT_FOLDER, f"It is there below {parent}: set `images` to that folder."
        if (other := self._in_other_case(root, name.split("/"))) is not None:
            return OTHER_CASE, f"There is {other}, in other case: rename the files, or correct the names in the annotations."
        folder, stem = os.path.split(os.path.splitext(name)[0])
        _, by_stem = self._listing(os.path.join(root, folder))
        if (other := by_stem.get(stem.lower())) is not None:
            there = posixpath.join(folder, other)
            return OTHER_EXTENSION, f"There is {there}, with another extension: convert the files, or correct the names in the annotations."
        return None

    def _in_other_case(self, folder: str, parts: Sequence[str]) -> str | None:
        found: list[str] = []
        for part in parts:
            other = self._listing(os.path.join(folder, *found))[0].get(part.lower())
            if other is None:
                return None
            found.append(other)
        return posixpath.join(*found)

    def _listing(self, folder: str) -> tuple[dict[str, str], dict[str, str]]:
        """(name in lower case -> name, the same without its extension -> name)."""
        if folder not in self._listings:
            try:
                names = sorted(os.listdir(folder))
            except OSError:
                names = []
            self._listings[folder] = {name.lower(): name for name in names}, {os.path.splitext(name.lower())[0]: name for name in names}
        return self._listings[folder]
