"""Names of images in annotations: inside and outside the folder, other storages, other spellings, and what is near a missing one."""

import unicodedata
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from boxcar.pipelines.images import lookup as lookups
from boxcar.pipelines.images.image_file import ImageHeader
from boxcar.pipelines.images.lookup import FoundImage, ImageLookup
from boxcar.schemas.errors import ImageError
from boxcar.schemas.record import ImageRef
from boxcar.schemas.workflow import RulesConfig


def picture(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6)).save(path)
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    picture(tmp_path / "images/train/a.jpg")
    picture(tmp_path / "images/b.jpg")
    picture(tmp_path / "elsewhere/c.jpg")
    return tmp_path / "images"


def look_up(root: Path | str, name: str, **rules: Any) -> FoundImage:
    return ImageLookup(str(root), RulesConfig(**rules), trust_sizes=False)(ImageRef(name))


@pytest.mark.parametrize("name", ["b.jpg", "train/a.jpg", "train/../b.jpg", "./b.jpg", "b..jpg"])
def test_a_name_inside(root: Path, name: str) -> None:
    picture(root / "b..jpg")
    found = look_up(root, name)
    assert isinstance(found.header, ImageHeader)
    assert (found.path, found.header.width, found.rules) == (name, 8, ())


def test_an_absolute_path_or_a_file_uri_inside(root: Path) -> None:
    assert look_up(root, f"{root}/b.jpg").rules == ()
    assert look_up(root, f"file://{root}/b.jpg").rules == ()


@pytest.mark.parametrize(
    "form", ["../elsewhere/c.jpg", "train/../../elsewhere/c.jpg", "{there}/elsewhere/c.jpg", "file://{there}/elsewhere/c.jpg"]
)
def test_a_name_that_leads_outside_is_kept_and_counted_or_dropped(root: Path, form: str) -> None:
    name = form.format(there=root.parent)
    kept = look_up(root, name)
    assert isinstance(kept.header, ImageHeader)
    assert kept.rules == (("outside_images", "keep"),)
    dropped = look_up(root, name, outside_images="drop")
    assert isinstance(dropped.header, ImageError)
    assert dropped.header.reason == "outside_images"
    assert "rules.outside_images: keep" in str(dropped.header)
    assert dropped.rules == (("outside_images", "drop"),)


def test_symbolic_links_are_followed_and_counted(root: Path) -> None:
    (root / "link.jpg").symlink_to(root.parent / "elsewhere/c.jpg")
    (root / "linked").symlink_to(root.parent / "elsewhere")
    (root / "inner.jpg").symlink_to(root / "b.jpg")
    assert look_up(root, "link.jpg").rules == (("outside_images", "keep"),)
    assert look_up(root, "linked/c.jpg").rules == (("outside_images", "keep"),)
    (root / "around.jpg").symlink_to("../images/train/../inner.jpg")
    (root / "farther.jpg").symlink_to("link.jpg")
    assert look_up(root, "inner.jpg").rules == ()
    assert look_up(root, "around.jpg").rules == ()
    assert look_up(root, "farther.jpg").rules == (("outside_images", "keep"),)
    assert isinstance(look_up(root, "linked/c.jpg", outside_images="drop").header, ImageError)
    (root.parent / "alias").symlink_to(root)
    assert look_up(root.parent / "alias", "b.jpg").rules == (), "a link that is the folder itself leads nowhere else"


@pytest.mark.parametrize(
    ("images", "name"),
    [
        ("/data/images", "s3://bucket/a.jpg"),
        ("/data/images", "http://169.254.169.254/latest/meta-data"),
        ("/data/images", "file://host/a.jpg"),
        ("s3://bucket/images", "s3://other/images/a.jpg"),
        ("s3://bucket/images", "gs://bucket/images/a.jpg"),
        ("s3://bucket/images", "../../other/a.jpg"),
        ("s3://bucket/images", "/etc/passwd"),
        ("s3://bucket/images", "file:///etc/passwd"),
    ],
)
@pytest.mark.parametrize("trust_sizes", [False, True])
def test_another_storage_is_not_asked(images: str, name: str, trust_sizes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    monkeypatch.setattr(lookups, "read_header", read.append)
    found = ImageLookup(images, trust_sizes=trust_sizes)(ImageRef(name, 8, 6))
    assert isinstance(found.header, ImageError)
    assert found.header.reason == "other_storage"
    assert read == []


def test_another_storage_is_read_where_the_workflow_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    monkeypatch.setattr(lookups, "read_header", read.append)
    assert look_up("/data/images", "s3://bucket/a.jpg", other_storage="keep").rules == (("other_storage", "keep"),)
    assert read == ["s3://bucket/a.jpg"]


@pytest.mark.parametrize(
    ("name", "read", "rules"),
    [
        ("a.jpg", "s3://bucket/images/a.jpg", ()),
        ("s3://bucket/images/a.jpg", "s3://bucket/images/a.jpg", ()),
        ("s3://bucket/others/a.jpg", "s3://bucket/others/a.jpg", (("outside_images", "keep"),)),
        ("../others/a.jpg", "s3://bucket/others/a.jpg", (("outside_images", "keep"),)),
    ],
)
def test_names_in_the_bucket_of_the_images(name: str, read: str, rules: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(lookups, "read_header", asked.append)
    assert look_up("s3://bucket/images", name).rules == rules
    assert asked == [read]


def test_windows_separators_where_the_literal_name_does_not_exist(root: Path) -> None:
    found = look_up(root, r"train\a.jpg")
    assert (found.path, found.rules) == ("train/a.jpg", (("windows_separators", "fix"),))
    picture(root / r"train\a.jpg")
    assert look_up(root, r"train\a.jpg").path == r"train\a.jpg"
    trusting = ImageLookup(str(root), trust_sizes=True)
    assert trusting(ImageRef(r"train\a.jpg", 8, 6)).path == r"train\a.jpg"
    (root / r"train\a.jpg").unlink()
    assert trusting(ImageRef(r"train\a.jpg", 8, 6)).path == "train/a.jpg"


@pytest.mark.parametrize("trust_sizes", [False, True])
def test_windows_separators_do_not_lead_outside_unseen(root: Path, trust_sizes: bool) -> None:
    image = ImageRef(r"..\elsewhere\c.jpg", 8, 6)
    kept = ImageLookup(str(root), trust_sizes=trust_sizes)(image)
    assert (kept.path, kept.rules) == ("../elsewhere/c.jpg", (("outside_images", "keep"), ("windows_separators", "fix")))
    dropped = ImageLookup(str(root), RulesConfig(outside_images="drop"), trust_sizes=trust_sizes)(image)
    assert isinstance(dropped.header, ImageError)
    assert dropped.header.reason == "outside_images"


@pytest.mark.parametrize(("stored", "named"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_names_in_another_unicode_form(root: Path, stored: Any, named: Any) -> None:
    picture(root / unicodedata.normalize(stored, "Tür/é.jpg"))
    name = unicodedata.normalize(named, "Tür/é.jpg")
    found = look_up(root, name)
    assert (found.path, found.rules) == (unicodedata.normalize(stored, name), (("unicode_form", "fix"),))
    found = look_up(root, name.replace("/", "\\"))
    assert found.rules == (("windows_separators", "fix"), ("unicode_form", "fix"))


@pytest.mark.parametrize(
    ("name", "rule", "hint"),
    [
        ("elsewhere/c.jpg", "missing_in_parent_folder", "set `images` to that folder"),
        ("train/A.JPG", "missing_other_case", "There is train/a.jpg, in other case"),
        ("Train/a.jpg", "missing_other_case", "There is train/a.jpg, in other case"),
        ("train/a.png", "missing_other_extension", "There is train/a.jpg, with another extension"),
        ("b", "missing_other_extension", "There is b.jpg"),
    ],
)
def test_a_missing_image_says_what_is_near(root: Path, name: str, rule: str, hint: str) -> None:
    found = look_up(root, name)
    assert isinstance(found.header, ImageError)
    assert found.header.reason == "missing_image"
    assert hint in str(found.header)
    assert found.rules == ((rule, "drop"),)


@pytest.mark.parametrize("name", ["nothing.jpg", "../nothing.jpg", "no/such/folder.jpg", "/no/such.jpg"])
def test_a_missing_image_with_nothing_near(root: Path, name: str) -> None:
    found = look_up(root, name)
    assert isinstance(found.header, ImageError)
    assert found.header.reason == "missing_image"
    assert [rule for rule, action in found.rules if action == "drop"] == []


def test_each_name_is_read_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    monkeypatch.setattr(lookups, "read_header", read.append)
    look = ImageLookup(str(root), trust_sizes=False)
    assert [look(ImageRef("b.jpg")).path for _ in range(3)] == ["b.jpg"] * 3
    assert len(read) == 1
