"""What an annotation format must answer, and the units of work it is cut into.

    SourceConfig --plan()--> SourcePlan(fingerprint, units) --read(unit)--> Record | Rejected, one by one

`plan` runs once, reads no image, and cuts the input into units by the input alone: never by the number of workers. `read` runs anywhere,
in any order, any number of times, and yields the same for the same unit. A row that cannot be used is yielded as `Rejected`; an
`AnnotationError` is raised only where the file as a whole cannot be read.

How to add a format: one file in this folder with a class that has these members, one line in `catalog.py`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from boxcar.schemas.record import Record, Rejected
from boxcar.schemas.workflow import SourceConfig

COMMON_KEYS = frozenset({"reader", "annotations", "images", "split", "source", "language"})
"""The keys of SourceConfig that every format uses."""


class Refused(Exception):
    """A part of a source that cannot be understood. Caught within the reader, which yields it as `Rejected`; never leaves it."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class Unit:
    """A piece of the input that becomes one shard."""

    path: str
    """The file to read: a source file, or one that `plan` prepared in its work folder."""
    start: int
    """First item: a byte offset, a row or a file number, as the reader says."""
    stop: int
    """One past the last item."""


@dataclass(frozen=True)
class SourcePlan:
    """The units of a source, in order, and what identifies its content."""

    fingerprint: str
    """xxh3-128 in hex over the content of the annotation files; for formats of one file per image, over their names and sizes."""
    units: tuple[Unit, ...]
    num_records: int | None = None
    """How many records there are in all, where the plan knows it: for the progress bar only."""
    notes: tuple[str, ...] = field(default=())
    """What a person should know about how the source was understood, such as a detected VOC origin."""
    rejected: tuple[Rejected, ...] = ()
    """Rows that can never belong to a unit, such as an annotation of an image that is not in the file."""
    unlabelled: str = ""
    """What the source is, where it has images and no annotations: it can be audited, not converted."""


class Reader(Protocol):
    """One annotation format. Readers are stateless: everything they need is in the config, the unit and the work folder."""

    @property
    def name(self) -> str:
        """The word in `reader:` of workflows.yaml."""

    @property
    def uses(self) -> frozenset[str]:
        """The keys of SourceConfig that mean something to this format; any other that is set is refused."""

    def plan(self, config: SourceConfig, work_dir: Path, records_per_unit: int) -> SourcePlan:
        """Cut the source into units of about `records_per_unit` records. May prepare files in `work_dir`.

        Raises AnnotationError where a file is missing, empty, a folder, or broken as a whole.
        """

    def read(self, config: SourceConfig, unit: Unit) -> Iterator[Record | Rejected]:
        """The unit's records, lazily, in the order of the source."""
