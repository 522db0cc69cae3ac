"""Compressed annotation files (.gz, .zst): unpacked once into the work folder, so that readers can cut them by byte offset.

instances.json.gz --gzip, in chunks--> <work folder>/unpacked/instances.json --> the reader, as if it were the source
"""

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import pyarrow as pa

from boxcar.pipelines import storage
from boxcar.schemas.errors import AnnotationError
from boxcar.schemas.workflow import SourceConfig

CODECS = {".gz": "gzip", ".zst": "zstd"}
CHUNK_BYTES = 8 << 20
MAX_RATIO = 200
FREE_BYTES = 1 << 30
"""A file that unpacks to more than this, and to more than MAX_RATIO times its size, is no annotation file: JSON shrinks by 5 to 30."""


def unpacked_name(path: str) -> str:
    """The file's name without the suffix of a compression."""
    name = PurePosixPath(path).name
    return name.removesuffix(PurePosixPath(name).suffix) if PurePosixPath(name).suffix.lower() in CODECS else name


def unpacked(config: SourceConfig, work_dir: Path) -> SourceConfig:
    """The source with every compressed file replaced by its unpacked copy in `work_dir`. Raises AnnotationError where one is damaged."""
    changes = {}
    for key in ("annotations", "captions", "instances"):
        path = getattr(config, key)
        if path and PurePosixPath(path).suffix.lower() in CODECS:
            changes[key] = _unpack(path, work_dir / "unpacked" / key / unpacked_name(path))
    return config.model_copy(update=changes)


def _unpack(path: str, target: Path) -> str:
    limit = max(FREE_BYTES, MAX_RATIO * storage.file_size(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    num_bytes = 0
    with storage.atomic_write(target) as output:
        for chunk in _chunks(path):
            num_bytes += len(chunk)
            if num_bytes > limit:
                found = f"more than {limit:,} bytes inside"
                raise AnnotationError(path, found=found, expected="an annotation file", fix="Unpack it by hand.")
            output.write(chunk)
    return str(target)


def _chunks(path: str) -> Iterator[bytes]:
    codec = CODECS[PurePosixPath(path).suffix.lower()]
    with storage.open_input(path) as packed:
        try:
            with pa.CompressedInputStream(packed, codec) as stream:
                while chunk := stream.read(CHUNK_BYTES):
                    yield chunk
        except (OSError, pa.ArrowInvalid) as error:
            raise AnnotationError(path, found=f"{error}", expected=f"a complete {codec} file", fix="Fetch the file again.") from error
