"""What an audit found, as data: what `--json` prints, what the page shows, what `boxcar diff` compares."""

from typing import Any, Literal

import msgspec

from boxcar.pipelines.audit.portrait import Example, Share
from boxcar.schemas.contract import FrameContract
from boxcar.schemas.errors import ShardError
from boxcar.schemas.manifest import Counts, Finding, Rejections

FORMAT = "boxcar-audit"
VERSION = 1
RESULT_NAME = "audit.json"
PERCENTILES = (1, 10, 50, 90, 95, 99, 100)


class Box(msgspec.Struct, kw_only=True):
    """Boxes of one size, before and after they are written in the family's numbers."""

    size_px: str
    """Square root of the area, in pixels of the original."""
    boxes: int
    mean_iou: float
    """Of a box with itself after the round trip."""
    under: dict[str, int]
    """IoU -> boxes under it."""


class Resolution(msgspec.Struct, kw_only=True):
    """What one pixel limit makes of images and boxes."""

    max_pixels: int
    min_pixels: int
    images: int
    visual_tokens: int
    image_tokens: dict[str, int]
    """Percentile -> visual tokens of an image."""
    image_tokens_histogram: dict[str, int]
    boxes: int
    under_one_token: int
    """Boxes whose shorter side is under one visual token."""
    under_two_tokens: int
    round_trip: list[Box]
    heat: list[list[int]]
    """(height, width) of boxes in visual tokens, by `token_edges`; the outermost are what lies beyond."""


class Setting(msgspec.Struct, kw_only=True):
    """One point of the grid."""

    max_pixels: int
    cutoff_len: int
    samples: int
    """With turns that the family takes."""
    whole: int
    long: int
    trimmed: int
    over: int
    shrunk: int
    turns: int
    turns_lost: int
    boxes: int
    boxes_lost: int
    under_one_token: int
    """Of all boxes, at this resolution."""
    sequences: int
    """Of an epoch."""
    tokens: int
    visual_tokens: int
    answer_tokens: int
    packs: int
    fill: float
    """Tokens over what the packs hold, packed by the trainer's packer."""
    padded_fill: float
    """Tokens over padded tokens, of shuffled batches of `global_batch` that are padded to their longest (expected)."""
    steps: int
    """Of global_batch packs."""
    flops: float | None
    """Forward and backward of an epoch; None where no base is known."""
    gpu_hours: float | None
    memory_gb: float | None
    """Of one GPU that holds the whole network."""

    @property
    def turns_kept(self) -> float:
        """Share, 0..1; 1 where there are none."""
        return 1 - self.turns_lost / self.turns if self.turns else 1.0


class Knee(msgspec.Struct, kw_only=True):
    """The cheapest setting that keeps so many turns."""

    keep: float
    """Share of turns, 0..1."""
    max_pixels: int | None
    cutoff_len: int | None
    """None: no setting of the grid does."""


class Assumptions(msgspec.Struct, kw_only=True):
    """What figures of cost rest on."""

    base: str
    """config.json that the network was counted from; "": none was found."""
    gpu: str
    peak_tflops: float
    mfu: float
    global_batch: int
    micro_batch: int
    gradient_checkpointing: bool | Literal["auto"]
    lora_rank: int | None
    epochs: float
    weights: int
    trained: int
    lines: list[str]
    """The same in words, with the formulas."""


class FamilyResult(msgspec.Struct, kw_only=True):
    """One family."""

    family: str
    title: str
    tokenizer: str
    contract: FrameContract
    limits_matter: bool
    max_sequence: int
    cutoff_len: int
    """Of the workflow, or the longest the family takes."""
    max_pixels: int
    over_length: str
    shrink_images: bool
    counts: Counts
    """As conversion's manifest will have them, but for difficulty."""
    kinds: dict[str, int]
    """Tokens of the rows, by kind."""
    tasks: dict[str, Share]
    categories: dict[str, Share]
    splits: dict[str, Share]
    sample_tokens: dict[str, int]
    """Percentile -> tokens of a sample with all its turns."""
    sample_tokens_histogram: dict[str, int]
    longest: list[Example]
    smallest: list[Example]
    resolutions: list[Resolution]
    settings: list[Setting]
    knees: list[Knee]
    assumptions: Assumptions
    notes: list[str]


class Duplicates(msgspec.Struct, kw_only=True):
    """Images that are one picture."""

    groups: int = 0
    images: int = 0
    examples: list[list[str]] = []
    across_splits: int = 0
    """Groups with images of more than one split."""
    split_examples: list[list[str]] = []


class Consumer(msgspec.Struct, kw_only=True):
    """What another trainer would make of the same samples."""

    name: str
    version: str
    rules: list[str]
    """What is modelled."""
    samples: int
    would_crash: int
    would_drop: int
    loses_question: int
    loses_answer: int
    mean_box_shift_px: float
    """Mean over boxes of the largest distance of a corner, in pixels of the image that the model sees, where boxes are not rescaled."""
    mean_box_iou: float
    """IoU of the boxes as they would be read with what they should be; 1 where a family's boxes do not hang on the size."""
    boxes: int
    examples: dict[str, list[str]]


class AuditResult(msgspec.Struct, kw_only=True):
    """Everything."""

    format: str = FORMAT
    version: int = VERSION
    boxcar_version: str
    source: str
    kind: str
    """annotations or shards."""
    images_root: str
    """Where relative paths of images start."""
    records_read: int
    sizes_trusted: bool
    rules: dict[str, Finding]
    lint: dict[str, Rejections]
    alike: list[list[str]]
    """Labels that differ in case, blanks, - or _ alone."""
    duplicates: Duplicates | None
    look_alikes: Duplicates | None
    leakage: dict[str, list[list[str]]]
    """Other workflow -> examples of pairs of equal images."""
    leakage_counts: dict[str, int]
    token_edges: list[float]
    families: list[FamilyResult]
    consumers: list[Consumer]
    notes: list[str]

    def dumps(self) -> bytes:
        """Readable JSON, the same bytes for the same result."""
        return msgspec.json.format(msgspec.json.encode(self, order="sorted"), indent=1) + b"\n"


def loads(data: bytes, where: str) -> AuditResult:
    """Raises ShardError where this is no audit of this version."""
    try:
        head: dict[str, Any] = msgspec.json.decode(data, type=dict)
        if (head.get("format"), head.get("version")) != (FORMAT, VERSION):
            raise ShardError(where, found=f"{head.get('format')!r} version {head.get('version')!r}", expected=f"{FORMAT} version {VERSION}")
        return msgspec.json.decode(data, type=AuditResult)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ShardError(where, found=f"a damaged audit ({error})", expected="the file as `boxcar audit` wrote it") from error
