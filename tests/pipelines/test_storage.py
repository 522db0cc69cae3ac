"""Files by path and by URI, whatever their names; and files that exist complete or not at all."""

import errno
import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import xxhash

from boxcar.pipelines import storage
from boxcar.schemas.errors import AnnotationError, BoxcarError

NAMES = [
    pytest.param("plain.json", id="plain"),
    pytest.param("two blanks  here.json", id="blanks"),
    pytest.param("100%.json", id="percent sign"),
    pytest.param("a%20b%2Fc.json", id="what a URI would decode stays as it is"),
    pytest.param("no#1?x=2&y.json", id="marks of a URI"),
    pytest.param("Straße_猫_🙂.json", id="unicode"),
    pytest.param("e\N{COMBINING ACUTE ACCENT}.json", id="not in composed form"),
    pytest.param("[1]*{a}.json", id="marks of a glob"),
    pytest.param("back\\slash.json", id="backslash"),
    pytest.param("line\nbreak\ttab.json", id="line break and tab"),
    pytest.param("-rf", id="like an option"),
    pytest.param("x" * 255, id="255 bytes"),
]


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A folder on a file system that is mounted read-only: root could write anywhere else."""
    folder = tmp_path / "read only"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", folder], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip(f"cannot mount a file system here: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.mark.parametrize(
    ("root", "path", "expected"),
    [
        pytest.param("/data", "a.jpg", "/data/a.jpg", id="below a folder"),
        pytest.param("/data/", "a.jpg", "/data/a.jpg", id="one slash between them"),
        pytest.param("", "a.jpg", "a.jpg", id="no root"),
        pytest.param("/data", "/else/a.jpg", "/else/a.jpg", id="an absolute path stays"),
        pytest.param("/data", "s3://bucket/a.jpg", "s3://bucket/a.jpg", id="a URI stays"),
        pytest.param("s3://bucket/train", "0/a.jpg", "s3://bucket/train/0/a.jpg", id="below a URI"),
        pytest.param("/data", "./../a.jpg", "/data/./../a.jpg", id="dots are left to the system"),
    ],
)
def test_a_path_is_joined_to_its_root(root: str, path: str, expected: str) -> None:
    assert storage.join(root, path) == expected


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        pytest.param("data/a.json", "data/a.json", id="relative"),
        pytest.param("/data/a.json", "/data/a.json", id="absolute"),
        pytest.param("file:///data/a%20b.json", "/data/a%20b.json", id="URI of a file, taken literally"),
        pytest.param("file://localhost/data/a.json", "/data/a.json", id="URI of a file with this host"),
        pytest.param("s3://bucket/a.json", None, id="remote"),
    ],
)
def test_only_local_paths_have_a_local_path(path: str, expected: str | None) -> None:
    assert storage.local_path(path) == expected


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("form", ["{}", "file://{}", "file://localhost{}"], ids=["path", "URI", "URI with host"])
def test_a_file_is_found_whatever_its_name(tmp_path: Path, name: str, form: str) -> None:
    content = name.encode() * 3
    (tmp_path / name).write_bytes(content)
    path = form.format(tmp_path / name)
    assert storage.read_bytes(path) == content
    assert storage.file_size(path) == len(content)
    assert storage.hash_file(path) == xxhash.xxh3_128_hexdigest(content)
    assert storage.list_files(form.format(tmp_path), ()) == [(name, len(content))]


def test_a_large_file_is_hashed_in_chunks_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "HASH_CHUNK_BYTES", 7)
    content = bytes(range(256)) * 3
    (tmp_path / "file").write_bytes(content)
    assert storage.hash_file(str(tmp_path / "file")) == xxhash.xxh3_128_hexdigest(content)


@pytest.mark.parametrize(
    ("path", "found"),
    [
        pytest.param("no/such/file.json", "no such file", id="missing"),
        pytest.param("", "no such file", id="no name"),
        pytest.param("folder", "a folder", id="folder"),
        pytest.param("file.json/below", "no such file", id="below a file"),
        pytest.param("x" * 256, "too long", id="256 bytes"),
        pytest.param("loop", "no such file", id="link to itself"),
        pytest.param("null\0byte", "NUL", id="null byte"),
        pytest.param("lone\udc80surrogate", "surrogate", id="lone surrogate"),
        pytest.param("ftps://host/file.json", "ftps", id="unknown kind of URI"),
    ],
)
def test_a_file_that_cannot_be_opened_is_named_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, found: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file.json").touch()
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(AnnotationError, match=found) as caught:
        storage.open_input(path)
    assert caught.value.where == path


def test_a_missing_file_comes_with_the_nearest_folder_that_exists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    with pytest.raises(AnnotationError) as caught:
        storage.open_input("data/coco/annotations/instances.json")
    assert f"The nearest folder that exists is {tmp_path / 'data'}; relative paths start at {tmp_path}." in str(caught.value)


@pytest.mark.parametrize("form", ["{}", "{}/", "{}//", "file://{}/", "{}/b/.."], ids=["bare", "slash", "slashes", "URI", "dots"])
def test_a_listing_is_sorted_and_relative_to_the_folder(tmp_path: Path, form: str) -> None:
    for name in ("b/z.xml", "b/a.xml", "B.XML", "a.xml", "c.txt", "b.xml/inside.xml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    folder = form.format(tmp_path)
    names = ["B.XML", "a.xml", "b.xml/inside.xml", "b/a.xml", "b/z.xml"]
    assert storage.list_files(folder, (".xml",)) == [(name, len(name)) for name in names]
    assert [name for name, _ in storage.list_files(folder, (), recursive=False)] == ["B.XML", "a.xml", "c.txt"]


@pytest.mark.parametrize(
    ("path", "found"),
    [
        pytest.param("none", "no such folder", id="missing"),
        pytest.param("file", "a file", id="file"),
        pytest.param("null\0byte", "NUL", id="null byte"),
        pytest.param("ftps://host/folder", "ftps", id="unknown kind of URI"),
    ],
)
def test_what_is_no_folder_cannot_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, found: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(AnnotationError, match=found):
        storage.list_files(path, ())


@pytest.mark.parametrize(
    "other",
    [
        pytest.param([("a", 1), ("b", 3)], id="another size"),
        pytest.param([("a", 1), ("c", 2)], id="another name"),
        pytest.param([("a", 1)], id="one less"),
        pytest.param([("b", 2), ("a", 1)], id="another order"),
        pytest.param([("a", 12)], id="neighbours run together"),
    ],
)
def test_the_fingerprint_of_a_listing_tells_it_from_others(other: list[tuple[str, int]]) -> None:
    listing = [("a", 1), ("b", 2)]
    assert storage.fingerprint_listing(listing) == storage.fingerprint_listing(list(listing))
    assert storage.fingerprint_listing(listing) != storage.fingerprint_listing(other)


# ---- writing


def test_a_file_appears_when_it_is_complete_and_not_before(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with storage.atomic_write(path) as stream:
        stream.write(b"new")
        stream.flush()
        assert not path.exists()
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["file"]


def _fail_in_the_body(_: pytest.MonkeyPatch) -> None:
    raise ValueError("a mistake of ours")


def _interrupt(_: pytest.MonkeyPatch) -> None:
    raise KeyboardInterrupt


def _failing(function: str) -> Callable[[pytest.MonkeyPatch], None]:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return lambda monkeypatch: monkeypatch.setattr(os, function, refuse)


@pytest.mark.parametrize(
    ("fail", "kind"),
    [
        pytest.param(_fail_in_the_body, ValueError, id="mistake while writing"),
        pytest.param(_interrupt, KeyboardInterrupt, id="Ctrl-C"),
        pytest.param(_failing("fsync"), BoxcarError, id="full disk at fsync"),
        pytest.param(_failing("rename"), BoxcarError, id="full disk at rename"),
    ],
)
@pytest.mark.parametrize("before", [None, b"old"], ids=["nothing there before", "a file there before"])
def test_a_write_that_fails_leaves_what_was_there(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fail: Callable[[pytest.MonkeyPatch], None],
    kind: type[BaseException],
    before: bytes | None,
) -> None:
    path = tmp_path / "file"
    if before is not None:
        path.write_bytes(before)

    def attempt() -> None:
        with storage.atomic_write(path) as stream:
            stream.write(b"new")
            fail(monkeypatch)

    with pytest.raises(kind):
        attempt()
    monkeypatch.undo()
    assert {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()} == ({} if before is None else {"file": before})


@pytest.mark.parametrize(
    ("path", "found"),
    [
        pytest.param("no folder/file", "No such file or directory", id="missing folder"),
        pytest.param("a file/below", "Not a directory", id="below a file"),
        pytest.param("a folder", "Is a directory", id="onto a folder"),
    ],
)
def test_a_place_that_cannot_be_written_is_named_with_the_way_out(tmp_path: Path, path: str, found: str) -> None:
    (tmp_path / "a file").touch()
    (tmp_path / "a folder").mkdir()
    with (
        pytest.raises(BoxcarError, match=f"found {found} while writing.*Free disk space or change `output`") as caught,
        storage.atomic_write(tmp_path / path),
    ):
        pass
    assert caught.value.where == str(tmp_path / path)
    assert sorted(os.listdir(tmp_path)) == ["a file", "a folder"]


def test_a_read_only_file_system_is_an_error_of_ours(read_only: Path) -> None:
    with pytest.raises(BoxcarError, match="Read-only file system while writing"), storage.atomic_write(read_only / "file"):
        pass


def test_of_two_writers_at_once_one_whole_file_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads stand in for two processes: each has a process id of its own here."""
    path = tmp_path / "file"
    ids = iter((1, 2))
    own = threading.local()
    monkeypatch.setattr(os, "getpid", lambda: own.id)
    both_inside = threading.Barrier(2)

    def write(number: int, content: bytes) -> None:
        own.id = number
        with storage.atomic_write(path) as stream:
            stream.write(content)
            both_inside.wait()

    threads = [threading.Thread(target=write, args=(next(ids), letter * 100_000)) for letter in (b"a", b"b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_bytes() in (b"a" * 100_000, b"b" * 100_000)
    assert os.listdir(tmp_path) == ["file"]
