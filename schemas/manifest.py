"""The manifest: what a conversion read, wrote, rejected and noticed. Written last; its presence means that the conversion is complete.

All counts are integers that add exactly, so that the manifest does not depend on how the work was cut or repeated. The file is canonical
JSON with its own hash: `dump` and `load` are inverse to the byte, and any changed bit is found.
"""

from pathlib import Path
from typing import Any

import msgspec
import xxhash

from boxcar.schemas.contract import FrameContract
from boxcar.schemas.errors import ShardError

MANIFEST_NAME = "manifest.json"
FORMAT = "boxcar-shards"
FORMAT_VERSION = 1
MAX_EXAMPLES = 3
_UNSEALED = "0" * 32


class BlockHash(msgspec.Struct, frozen=True):
    """A stretch of a file and its hash. The blocks of a file cover it without a gap: each record batch (the first with schema), footer."""

    offset: int
    """Bytes."""
    num_bytes: int
    xxh3_128: str


class FileEntry(msgspec.Struct, frozen=True):
    """One file of the output folder."""

    name: str
    num_rows: int
    num_bytes: int
    blocks: list[BlockHash]


class Finding(msgspec.Struct):
    """What one rule found. Every found item was kept, fixed or dropped."""

    kept: int = 0
    fixed: int = 0
    dropped: int = 0
    examples: list[str] = []
    """The first few, in the order of the source."""

    @property
    def found(self) -> int:
        return self.kept + self.fixed + self.dropped

    def add(self, other: "Finding") -> None:
        self.kept += other.kept
        self.fixed += other.fixed
        self.dropped += other.dropped
        self.examples = (self.examples + other.examples)[:MAX_EXAMPLES]


class Rejections(msgspec.Struct):
    """Records or turns rejected for one reason."""

    count: int = 0
    examples: list[str] = []

    def add(self, other: "Rejections") -> None:
        self.count += other.count
        self.examples = (self.examples + other.examples)[:MAX_EXAMPLES]


class Counts(msgspec.Struct, kw_only=True):
    """Everything that is counted. records_read = records_written + the records rejected, always."""

    records_read: int = 0
    records_written: int = 0
    rows_written: int = 0
    """More than records_written where records were split."""
    images: int = 0
    """Image references in the rows written."""
    images_shrunk: int = 0
    boxes_read: int = 0
    boxes_kept: int = 0
    turns: dict[str, int] = {}
    """By task."""
    records_rejected: dict[str, Rejections] = {}
    """By reason."""
    turns_rejected: dict[str, Rejections] = {}
    """Turns left out of rows that were written, by reason."""
    rules: dict[str, Finding] = {}
    visual_tokens: int = 0
    text_tokens: int = 0
    total_tokens_histogram: dict[str, int] = {}
    """Sequence length when every turn is used -> rows."""
    visual_tokens_histogram: dict[str, int] = {}
    difficulty_histograms: dict[str, dict[str, int]] = {}
    """By task: bin of 1/4096 of the raw difficulty -> turns."""

    @property
    def num_rejected(self) -> int:
        return sum(entry.count for entry in self.records_rejected.values())

    def add(self, other: "Counts") -> None:
        """Add a unit's counts. Histograms and counters add exactly, examples keep the first."""
        for name in ("records_read", "records_written", "rows_written", "images", "images_shrunk", "boxes_read", "boxes_kept"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.visual_tokens += other.visual_tokens
        self.text_tokens += other.text_tokens
        for name in ("turns", "total_tokens_histogram", "visual_tokens_histogram"):
            add_histogram(getattr(self, name), getattr(other, name))
        for task, histogram in other.difficulty_histograms.items():
            add_histogram(self.difficulty_histograms.setdefault(task, {}), histogram)
        for reason, rejected in other.records_rejected.items():
            self.records_rejected.setdefault(reason, Rejections()).add(rejected)
        for reason, rejected in other.turns_rejected.items():
            self.turns_rejected.setdefault(reason, Rejections()).add(rejected)
        for rule, finding in other.rules.items():
            self.rules.setdefault(rule, Finding()).add(finding)


def add_histogram(total: dict[str, int], other: dict[str, int]) -> None:
    for key, count in other.items():
        total[key] = total.get(key, 0) + count


class Manifest(msgspec.Struct, kw_only=True):
    """One conversion's output."""

    format: str = FORMAT
    format_version: int = FORMAT_VERSION
    manifest_xxh3_128: str = _UNSEALED
    """Hash of this file with 32 zeros in this place."""
    boxcar_version: str
    contract: FrameContract
    settings: dict[str, Any]
    """The convert section with all defaults, without what cannot change the output (folder, executor, workers)."""
    source_fingerprint: str
    source_notes: list[str]
    images_root: str
    """Where relative image paths start."""
    sizes_trusted: bool
    """True: sizes are the annotations' own and no image was opened."""
    shards: list[FileEntry]
    image_shards: list[FileEntry]
    quarantine: list[FileEntry]
    counts: Counts


def dump(manifest: Manifest) -> bytes:
    """Canonical JSON, sealed with its hash."""
    unsealed = _encode(msgspec.structs.replace(manifest, manifest_xxh3_128=_UNSEALED))
    return _encode(msgspec.structs.replace(manifest, manifest_xxh3_128=xxhash.xxh3_128_hexdigest(unsealed)))


def _encode(manifest: Manifest) -> bytes:
    return msgspec.json.format(msgspec.json.encode(manifest, order="sorted"), indent=1) + b"\n"


def load(folder: Path) -> Manifest:
    """Read and check a manifest. Raises ShardError where it is missing, damaged or of another version."""
    path = folder / MANIFEST_NAME
    try:
        data = path.read_bytes()
    except OSError as error:
        found = "no such file" if isinstance(error, FileNotFoundError) else str(error)
        raise ShardError(
            str(path),
            found=found,
            expected="the manifest of a complete conversion",
            fix="Run `boxcar convert` to its end; it goes on where it stopped.",
        ) from error
    return loads(data, str(path))


def loads(data: bytes, where: str) -> Manifest:
    """The manifest in these bytes; `where` names them in messages. Raises ShardError where they are damaged or of another version."""
    try:
        head = msgspec.json.decode(data, type=dict)
        if head.get("format") != FORMAT or head.get("format_version") != FORMAT_VERSION:
            raise ShardError(
                where,
                found=f"format {head.get('format')!r} version {head.get('format_version')!r}",
                expected=f"{FORMAT!r} version {FORMAT_VERSION}",
            )
        manifest = msgspec.json.decode(data, type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ShardError(where, found=f"a damaged manifest ({error})", expected="the file as it was written") from error
    if dump(manifest) != data:
        raise ShardError(
            where,
            found="a manifest whose content is not what its hash says",
            expected="the file as it was written",
            fix="Convert again.",
        )
    return manifest
