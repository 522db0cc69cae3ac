"""Files, wherever they are: local paths and any URI that `pyarrow.fs` knows (`s3://`, `gs://`, `file://`).

Reading is by ranges, so that a header costs a few kilobytes of a remote image. Writing is local (or a shared mount) and atomic: beside
the target, fsynced, renamed, and the folder fsynced, so that a file that exists is complete.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, cast

import pyarrow.fs as pafs
import xxhash
from pyarrow import NativeFile

from boxcar.schemas.errors import AnnotationError, BoxcarError, ConfigError

HASH_CHUNK_BYTES = 8 << 20
UNFINISHED = ".*.tmp"
"""The names, as a glob, that `atomic_write` gives to files until they are complete; a process that is killed leaves them."""
_UNREACHABLE = (OSError, ValueError, NotImplementedError)
"""What pyarrow raises for a path: besides the system's errors, for what no path can hold and for a kind of URI that it does not know."""

_OPTIONS = re.compile(r"\?(?:[^/]*&)?(?:endpoint_override|scheme|region|access_key|secret_key|allow_bucket_creation)=")
"""pyarrow's own way to say where an S3 storage is. Names are joined to a URI's end, so that they would become part of the query."""


def is_uri(path: str) -> bool:
    return "://" in path


def join(root: str, path: str) -> str:
    """`path` under `root`; a path that is absolute or a URI by itself stays as it is."""
    if not root or is_uri(path) or os.path.isabs(path):
        return path
    return f"{root.rstrip('/')}/{path}"


@lru_cache(maxsize=16)
def _filesystem(scheme_and_host: str) -> pafs.FileSystem:
    return pafs.FileSystem.from_uri(scheme_and_host)[0]


def resolve(path: str) -> tuple[pafs.FileSystem, str]:
    """The file system of a path or URI, and the path within it. File systems are kept: connecting is slow.

    Raises ConfigError for a URI with options: a name that is joined to it would become part of them.
    """
    local = local_path(path)
    if local is not None:
        return _local(), local
    if options := _OPTIONS.search(path):
        raise ConfigError(
            path[: options.start()],
            found="options behind the URI",
            expected="the place alone",
            fix="Set AWS_ENDPOINT_URL, AWS_DEFAULT_REGION, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the environment of every worker.",
        )
    scheme, _, rest = path.partition("://")
    host, _, inner = rest.partition("/")
    filesystem = _filesystem(f"{scheme}://{host}/")
    return filesystem, f"{host}/{inner}" if host else inner


@lru_cache(maxsize=1)
def _local() -> pafs.FileSystem:
    return pafs.LocalFileSystem()


def local_path(path: str) -> str | None:
    """The plain local path of a path or file:// URI, taken literally; None where it is remote."""
    if path.startswith("file://"):
        return path.removeprefix("file://localhost" if path.startswith("file://localhost/") else "file://")
    return None if is_uri(path) else path


def open_input(path: str) -> NativeFile:
    """Open for random access. Raises AnnotationError where it is missing, a folder, or not allowed."""
    try:
        filesystem, inner = resolve(path)
        info = filesystem.get_file_info(inner)
        if info.type == pafs.FileType.Directory:
            raise AnnotationError(path, found="a folder", expected="a file", fix="Name the file inside it.")
        if info.type == pafs.FileType.NotFound:
            raise AnnotationError(path, found="no such file", expected="a file that exists", fix=_nearest_hint(path))
        return filesystem.open_input_file(inner)
    except _UNREACHABLE as error:
        raise AnnotationError(path, found=f"{error}", expected="a readable file") from error


def _nearest_hint(path: str) -> str:
    local = local_path(path)
    if local is None:
        return "Check the URI and the credentials."
    parent = Path(local).absolute().parent
    while not parent.exists():
        parent = parent.parent
    return f"The nearest folder that exists is {parent}; relative paths start at {Path.cwd()}."


def read_bytes(path: str) -> bytes:
    with open_input(path) as stream:
        return cast(bytes, stream.readall())


def file_size(path: str) -> int:
    """Size in bytes."""
    with open_input(path) as stream:
        return int(stream.size())


def hash_file(path: str) -> str:
    """xxh3-128 of the whole file, in hex, read in chunks."""
    digest = xxhash.xxh3_128()
    with open_input(path) as stream:
        while chunk := stream.read(HASH_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def list_files(folder: str, suffixes: tuple[str, ...], *, recursive: bool = True) -> list[tuple[str, int]]:
    """(path relative to the folder with forward slashes, size in bytes) of its files, sorted by path.

    Raises AnnotationError where the folder is missing or a file. Suffixes are compared without case; () takes every file.
    """
    try:
        filesystem, inner = resolve(folder)
        info = filesystem.get_file_info(inner.rstrip("/") or inner)
        if info.type != pafs.FileType.Directory:
            found = "a file" if info.type == pafs.FileType.File else "no such folder"
            raise AnnotationError(folder, found=found, expected="a folder", fix=_nearest_hint(folder))
        entries = filesystem.get_file_info(pafs.FileSelector(info.path, recursive=recursive))
    except _UNREACHABLE as error:
        raise AnnotationError(folder, found=f"{error}", expected="a folder that can be listed") from error
    base = info.path.rstrip("/") + "/"
    found_files = []
    for entry in entries:
        if entry.type == pafs.FileType.File and (not suffixes or entry.path.lower().endswith(suffixes)):
            found_files.append((entry.path.removeprefix(base), int(entry.size)))
    found_files.sort()
    return found_files


def fingerprint_listing(files: list[tuple[str, int]]) -> str:
    """xxh3-128 in hex over the names and sizes of a listing."""
    digest = xxhash.xxh3_128()
    for name, size in files:
        digest.update(f"{name}\0{size}\n".encode())
    return digest.hexdigest()


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Write a local file so that it either exists complete or not at all, even after a power cut.

    Raises BoxcarError where the disk is full or the folder cannot be written; what was there before stays.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # see UNFINISHED
    try:
        with open(beside, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.rename(beside, path)
        sync_folder(path.parent)
    except BaseException as error:
        with suppress(OSError):  # where it could not even be opened, the first error says why
            beside.unlink()
        if isinstance(error, OSError):
            raise write_error(path, error) from error
        raise


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Around other changes of a folder: what the system refuses becomes the same error."""
    try:
        yield
    except OSError as error:
        raise write_error(path, error) from error


def write_error(path: Path, error: OSError) -> BoxcarError:
    return BoxcarError(
        str(path),
        found=f"{error.strerror or error} while writing",
        expected="a writable folder with enough disk space",
        fix="Nothing that was there is lost. Free disk space or change `output`, then run the same command again: it continues where it "
        "stopped.",
    )


def sync_folder(folder: Path) -> None:
    """Make a rename in this folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
