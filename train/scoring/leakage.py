"""Whether images that a run is measured with were trained on: by content, not by name.

Referenced images are compared as files (`images.same_images`: only files of one size are read at all), embedded ones by the hash that the
conversion wrote; where one side is embedded and the other is not, the files of that other side are hashed.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from boxcar.pipelines import storage
from boxcar.pipelines.images.same_images import shared_images
from boxcar.schemas.errors import BoxcarError
from boxcar.schemas.row import IMAGE_SHARD_SCHEMA, ROW_SCHEMA
from boxcar.train.planning.index import load_manifest, record_batches

_IMAGES = pa.schema([ROW_SCHEMA.field("images")], metadata=ROW_SCHEMA.metadata)
_EMBEDDED = pa.schema([IMAGE_SHARD_SCHEMA.field(name) for name in ("path", "content_xxh3_128")], metadata=IMAGE_SHARD_SCHEMA.metadata)


@dataclass(frozen=True)
class _Images:
    """The distinct images of some folders of shards."""

    paths: list[str]
    hashes: dict[str, str]
    """xxh3-128 of embedded ones -> their name."""


def shared_with_training(train_shards: Mapping[str, str], evaluation: Sequence[str]) -> tuple[list[tuple[str, str]], str]:
    """Pairs (image of training, image of evaluation) of the same content, and what was looked at, in words.

    train_shards: folders and their manifests' hashes, as the adapter's card has them. A folder that is not here, or holds other shards by
    now, is said not to be compared. Raises BoxcarError where an image of a folder that is here cannot be read.
    """
    here: list[str] = []
    missing: list[str] = []
    for folder, manifest_hash in train_shards.items():
        try:
            found = load_manifest(folder).manifest_xxh3_128
        except BoxcarError:  # the training data may well be elsewhere: said in words, and counted
            found = ""
        (here if found == manifest_hash else missing).append(folder)
    train, test = _images_of(here), _images_of(evaluation)
    pairs = shared_images(train.paths, test.paths)
    pairs += [(name, test.hashes[content]) for content, name in train.hashes.items() if content in test.hashes]
    if train.hashes and test.paths:
        pairs += [(train.hashes[content], path) for path, content in _hashed(test.paths) if content in train.hashes]
    if test.hashes and train.paths:
        pairs += [(path, test.hashes[content]) for path, content in _hashed(train.paths) if content in test.hashes]
    said = f"{len(train.paths) + len(train.hashes)} images of training against {len(test.paths) + len(test.hashes)}: {len(pairs)} shared"
    if missing:
        said += f"; not compared, for they are not here as they were trained on: {', '.join(missing)}"
    return pairs, said


def _hashed(paths: Sequence[str]) -> Iterator[tuple[str, str]]:
    for path in paths:
        filesystem, inner = storage.resolve(path)
        with filesystem.open_input_stream(inner) as stream:
            yield path, xxhash.xxh3_128_hexdigest(stream.read())


def _images_of(folders: Sequence[str]) -> _Images:
    paths: dict[str, None] = {}
    hashes: dict[str, str] = {}
    for folder in folders:
        manifest = load_manifest(folder)
        for entry in manifest.shards:
            for batch in record_batches(storage.join(folder, entry.name), _IMAGES):
                for path in pc.unique(batch.column("images").flatten().field("path").drop_null()).to_pylist():
                    paths[storage.join(manifest.images_root, path)] = None
        for entry in manifest.image_shards:
            for batch in record_batches(storage.join(folder, entry.name), _EMBEDDED, IMAGE_SHARD_SCHEMA):
                hashes |= dict(zip(batch.column("content_xxh3_128").to_pylist(), batch.column("path").to_pylist(), strict=True))
    return _Images(list(paths), hashes)
