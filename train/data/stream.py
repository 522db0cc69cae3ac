"""A rank's slice of the plan -> micro-batches, in the plan's order.

    plan ──> steps ──> this rank's packs ──> loader processes ──────────────────────────────> MicroBatch
                       (rank::world_size)    rows, images: read, decode, resize; collate       uint8 pixels, pinned for CUDA

A pack carries everything that is needed to make it, so a step is the same wherever and whenever it is made: resuming at step k is starting
there. Every rank gets equally many micro-batches of a step; where the packs do not divide, the rest are dummies of weight 0, which add
nothing to a loss that is divided by the weight of the whole step.

Images. exact: decoded and resized by Pillow, as the families' reference processors do with the Pillow that is installed (Pillow 13 may
resize the height first; 12 and older never do: the two differ by up to 20 of 255 in single pixels). fast: torch's bicubic with antialias on
bytes, the pixels of transformers' torchvision processors whatever Pillow is there. On 80 COCO photographs at Qwen2.5-VL's sizes it differs
from Pillow 12 by at most 2 of 255 (mean 0.003), from Pillow 13 by at most 20 (mean 0.11), all of that from the order of the two passes.
JPEGs are decoded by Pillow in both: OpenCV gave the same bytes on all 80 and was hardly faster (2.2 against 2.4 ms), and so a file is
refused here for the same reasons, in the same words, as in the conversion.

Measured by `python -m tools.bench stream`: from file to pixels 3.0 (exact) and 4.9 (fast) times the images for a CPU-second of the Hugging
Face processor, through a loader process 2.5 and 3.3 times; what is left is JPEG decoding (2.4 ms a COCO photograph) and Pillow's resize
(3.4 ms). An eighth of the bytes. Pre-shrunk PNGs (embed_resized) decode slower than such JPEGs: they are for large photographs.
"""

import math
import multiprocessing
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from PIL import Image
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader, Dataset

from boxcar.pipelines.families.catalog import find_family
from boxcar.pipelines.images.image_file import decode_image, load_image, resize_image
from boxcar.schemas.errors import BoxcarError, ImageError, TrainingError
from boxcar.schemas.training import LossConfig
from boxcar.train.data.blank import blank_document
from boxcar.train.data.collate import MicroBatch, Pixels, dummy, pack, pad
from boxcar.train.data.documents import Document, ImageSlot, compose
from boxcar.train.data.positions import NUM_ROWS
from boxcar.train.data.store import ShardStore
from boxcar.train.planning.index import quantile_tables
from boxcar.train.planning.plan_table import rank_packs

DocumentSpec = tuple[int, tuple[int, ...]]
"""(row over all folders, turns in their order)."""
Item = tuple[DocumentSpec, ...]
"""The documents of one micro-batch; () is a dummy."""
PREFETCHED_PER_PROCESS = 2


@dataclass(frozen=True, kw_only=True)
class StreamConfig:
    """How documents become micro-batches."""

    loss: LossConfig
    micro_batch: int = 1
    """Packs (padded: samples) of one forward pass."""
    packing: Literal["packed", "padded"] = "packed"
    pad_to: int | None = None
    """Tokens that a micro-batch is filled up to; None: as long as it is."""
    pixels: Literal["exact", "fast"] = "exact"
    on_bad_image: Literal["stop", "skip"] = "stop"
    loader_workers: int = 0
    """Processes; 0 works in this one."""
    blank_image: bool = False
    """Whether a batch without images gets a blank one (`train.data.blank`)."""


@dataclass(frozen=True)
class Failure:
    """An error on its way out of a loader process: DataLoader would turn it into a RuntimeError around a traceback."""

    error: BoxcarError


class LoaderLost(TrainingError):
    """A loader process was taken away (out of memory, a signal): no mistake in data or settings, so that starting again may help."""


class PackDataset(Dataset[MicroBatch | Failure]):
    """Micro-batches by the documents they hold. Picklable; opens files in the process that reads."""

    def __init__(self, store: ShardStore, config: StreamConfig) -> None:
        self.store = store
        self.config = config
        self.quantiles = quantile_tables(store.folders)
        self.contract = store.contract
        self.network = find_family(self.contract.family).network
        self.blank = blank_document(self.contract) if config.blank_image else None

    def __getitem__(self, item: Item) -> MicroBatch | Failure:
        try:
            return self.make(item)
        except BoxcarError as error:
            return Failure(error)

    def make(self, item: Item) -> MicroBatch:
        """Raises ShardError, and ImageError where the configuration says so."""
        documents: list[Document] = []
        images: list[Pixels] = []
        dropped: list[str] = []
        decoded: dict[tuple[Any, ...], Pixels | ImageError] = {}
        for document in map(self._document, item):
            pixels = [self._pixels(slot, decoded) for slot in document.images]
            if bad := next((found for found in pixels if isinstance(found, ImageError)), None):
                if self.config.on_bad_image == "stop":
                    raise bad
                dropped.append(str(bad))
                continue
            documents.append(document)
            images += [found for found in pixels if not isinstance(found, ImageError)]
        # What fills up must be no image token, whose id is 0 in CogVLM's tokenizer.
        pad_id, pad_to = self.contract.turn_close_ids[0], self.config.pad_to
        packed = self.config.packing == "packed"
        num_real = len(documents)
        if self.blank and not images:
            documents.append(self.blank[0])
            images.append(self.blank[1])
        if not documents:
            return dummy(NUM_ROWS[self.network.positions], packed=packed, pad_id=pad_id, pad_to=pad_to, dropped=dropped)
        batch = (pack if packed else pad)(documents, images, pad_id=pad_id, pad_to=pad_to, dropped=dropped)
        if len(documents) == num_real:
            return batch
        blanks = sum(map(len, documents[num_real:]))
        return replace(batch, sample_ids=batch.sample_ids[:num_real], num_useful_tokens=batch.num_useful_tokens - blanks)

    def _document(self, spec: DocumentSpec) -> Document:
        row, turns = spec
        return compose(self.store.row(row), turns, self.contract, self.network, self.config.loss, self.quantiles)

    def _pixels(self, slot: ImageSlot, decoded: dict[tuple[Any, ...], Pixels | ImageError]) -> Pixels | ImageError:
        """An image, once for all documents of the micro-batch that show it."""
        key = slot.path, slot.folder, slot.shard, slot.shard_row, slot.resized_wh
        if key not in decoded:
            try:
                decoded[key] = load_pixels(slot, self.store, self.config.pixels)
            except ImageError as error:
                decoded[key] = ImageError(
                    slot.where, reason=error.reason, found=f"{error.found} ({error.where})", expected=error.expected, fix=error.fix
                )
        return decoded[key]


def load_pixels(slot: ImageSlot, store: ShardStore, how: Literal["exact", "fast"]) -> Pixels:
    """(H, W, 3) uint8 at the model's size. Raises ImageError where it cannot be read or is of another size than its row says."""
    if slot.path is not None:
        image = load_image(slot.path)
        stored_as = [slot.size_wh]
    else:
        image = decode_image(store.image_bytes(slot.folder, slot.shard, slot.shard_row), slot.where)
        stored_as = [slot.size_wh, slot.resized_wh]  # as it came, or pre-shrunk
    if image.size not in stored_as:
        raise ImageError(
            slot.path or slot.where,
            reason="image_changed",
            found=f"{image.width} x {image.height} px",
            expected=f"{slot.size_wh[0]} x {slot.size_wh[1]} px, as the row says",
            fix="The file was changed after it was converted, or its declared size was wrong (trust_sizes): convert again.",
        )
    return resize_pixels(image, slot.resized_wh, how)


def resize_pixels(image: Image.Image, size_wh: tuple[int, int], how: Literal["exact", "fast"]) -> Pixels:
    """(H, W, 3) uint8 of that size. image: RGB."""
    if image.size == size_wh:
        return np.asarray(image)
    if how == "exact":
        return np.asarray(resize_image(image, size_wh))
    source = torch.from_numpy(np.array(image))  # copied: torch wants memory that may be written
    # The batch dimension first, then the permutation: torch sees channels_last, its fastest path, and answers in the same layout.
    planes = interpolate(source[None].permute(0, 3, 1, 2), size=size_wh[::-1], mode="bicubic", antialias=True)
    return planes[0].permute(1, 2, 0).contiguous().numpy()


# ---- order


def stream(
    store: ShardStore,
    plan: pa.Table,
    config: StreamConfig,
    *,
    first_step: int = 0,
    rank: int = 0,
    world_size: int = 1,
    pin_memory: bool = False,
) -> Iterator[list[MicroBatch]]:
    """This rank's micro-batches of each optimizer step, from `first_step` to the plan's last; equally many on every rank.

    plan: `train.planning.plan.PLAN_SCHEMA`, a row for each pack in global order. pin_memory: for CUDA.
    Raises the BoxcarErrors of `PackDataset.make`, whichever process met them.
    """
    steps = PlanSteps(plan)
    wanted = range(max(first_step, steps.first), steps.stop)
    items = _Items(steps, wanted, rank, world_size, config.micro_batch)
    batches = iter(_loader(PackDataset(store, config), items, config.loader_workers, pin_memory))
    try:
        for step in wanted:
            made = [_next(batches) for _ in range(items.count(step))]
            for one in made:
                if isinstance(one, Failure):
                    raise one.error
            yield [one for one in made if isinstance(one, MicroBatch)]
    finally:
        del batches  # ends the loader's processes now, whoever still holds the error and its traceback


class PlanSteps:
    """A plan's packs by step."""

    def __init__(self, plan: pa.Table) -> None:
        self.numbers = plan.column("step").to_numpy()
        documents = _combined(plan.column("documents"))
        self.document_offsets = documents.offsets.to_numpy()
        self.rows = documents.values.field("row").to_numpy()
        turns = documents.values.field("turns")
        self.turn_offsets, self.turns = turns.offsets.to_numpy(), turns.values.to_numpy()
        self.first = int(self.numbers[0]) if len(self.numbers) else 0
        self.stop = int(self.numbers[-1]) + 1 if len(self.numbers) else 0

    def packs(self, step: int) -> range:
        """Rows of the plan."""
        first, stop = np.searchsorted(self.numbers, [step, step + 1])
        return range(int(first), int(stop))

    def documents(self, number: int) -> Item:
        """What pack `number` holds."""
        documents = range(self.document_offsets[number], self.document_offsets[number + 1])
        return tuple((int(self.rows[one]), tuple(self._turns_of(one).tolist())) for one in documents)

    def _turns_of(self, document: int) -> npt.NDArray[np.int16]:
        turns: npt.NDArray[np.int16] = self.turns[self.turn_offsets[document] : self.turn_offsets[document + 1]]
        return turns


def _combined(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


@dataclass(frozen=True)
class _Items:
    """The micro-batches of a rank, as DataLoader's sampler: made as they are needed, for a plan may be long."""

    steps: PlanSteps
    wanted: range
    rank: int
    world_size: int
    micro_batch: int

    def __iter__(self) -> Iterator[Item]:
        for step in self.wanted:
            packs = self.steps.packs(step)
            mine = rank_packs(packs.start, packs.stop, self.rank, self.world_size)
            for number in range(self.count(step)):
                chosen = mine[number * self.micro_batch : (number + 1) * self.micro_batch]
                yield tuple(chain.from_iterable(map(self.steps.documents, chosen)))

    def count(self, step: int) -> int:
        """Micro-batches of a step, on every rank alike: as many as rank 0 needs, who has the most packs."""
        most = math.ceil(len(self.steps.packs(step)) / self.world_size)
        return math.ceil(most / self.micro_batch)


def _loader(dataset: PackDataset, items: _Items, num_workers: int, pin_memory: bool) -> DataLoader[MicroBatch | Failure]:
    processes: dict[str, Any] = {}
    if num_workers:
        # Forking is instant and asks nothing of the main module, but connections to object stores do not survive it.
        context = multiprocessing.get_context("spawn" if dataset.store.is_remote else "fork")
        processes = {
            "multiprocessing_context": context,
            "prefetch_factor": PREFETCHED_PER_PROCESS,
        }
    # In a loader process torch sets itself to one thread; Pillow has no others.
    return DataLoader(dataset, batch_size=None, sampler=items, num_workers=num_workers, pin_memory=pin_memory, **processes)


def _next(batches: Iterator[MicroBatch | Failure]) -> MicroBatch | Failure:
    try:
        return next(batches)
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise LoaderLost(
            "a loader process",
            found=f"that it ended ({error})",
            expected="one that lives as long as the run",
            fix="Memory or shared memory (/dev/shm) ran out, most likely: lower train.loader_workers or train.micro_batch.",
        ) from error
