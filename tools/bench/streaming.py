"""What streaming costs, against the Hugging Face image processor on the same photographs."""

import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import PIL
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from boxcar.pipelines.convert import Progress, convert
from boxcar.pipelines.families.catalog import find_family
from boxcar.pipelines.images.image_file import load_image
from boxcar.schemas.training import LossConfig, PlanConfig
from boxcar.schemas.workflow import ConvertConfig
from boxcar.tools.bench import data
from boxcar.tools.quickstart.demo import train_tokenizer
from boxcar.train.data.pixels import patch_rule, qwen_patches
from boxcar.train.data.store import ShardStore
from boxcar.train.data.stream import StreamConfig, resize_pixels, stream
from boxcar.train.planning.index import read_index
from boxcar.train.planning.plan import plan_epoch

FAMILY = "qwen2_5_vl"
IMAGES_PER_BATCH = 4
Way = Literal["exact", "fast"]


def throughput(photographs: Path, work: Path, samples: int, passes: int) -> None:
    """Alternating passes; the median of each. One torch thread everywhere."""
    torch.set_num_threads(1)
    paths = [str(path) for path in sorted(photographs.iterdir())]
    sizes = resized_sizes(paths)
    print(f"{len(paths)} photographs, {np.mean([w * h for w, h in sizes]) / 1e6:.2f} MP after the resize of {FAMILY}")
    processor = hugging_face()
    print("\nAn image in this process (CPU-ms, and times as fast as Hugging Face):")
    ways: dict[str, Callable[[], object]] = {
        "Hugging Face: open, convert, processor": lambda: [processor(images=[open_rgb(path)], return_tensors="pt") for path in paths],
        "ours, exact: load, resize": lambda: [resize_pixels(load_image(p), size, "exact") for p, size in zip(paths, sizes, strict=True)],
        "ours, fast: load, resize": lambda: [resize_pixels(load_image(p), size, "fast") for p, size in zip(paths, sizes, strict=True)],
        "  of it: load (JPEG decode, and a copy)": lambda: [load_image(path) for path in paths],
    }
    report(ways, len(paths), passes)

    stores = {how: convert_once(photographs, work, samples, how) for how in ("reference", "embed_resized")}
    plans = {how: plan_of(store) for how, store in stores.items()}
    batches = [[paths[(start + k) % len(paths)] for k in range(IMAGES_PER_BATCH)] for start in range(0, samples, IMAGES_PER_BATCH)]
    print(f"\nA sample through one loader process, {samples} samples (ours with ids, labels and positions, theirs without):")

    def ours(how: str, pixels: Way) -> Callable[[], object]:
        config = StreamConfig(loss=LossConfig(), pixels=pixels, loader_workers=1)
        return lambda: consume(batch.pixels for step in stream(stores[how], plans[how], config) for batch in step)

    report(
        {
            f"Hugging Face: DataLoader, {IMAGES_PER_BATCH} images a batch": lambda: consume(hugging_face_loader(batches)),
            "ours, exact": ours("reference", "exact"),
            "ours, fast": ours("reference", "fast"),
            "ours, pre-shrunk PNGs (embed_resized)": ours("embed_resized", "exact"),
        },
        samples,
        passes,
    )
    other_figures(paths, sizes, processor)


def resized_sizes(paths: list[str]) -> list[tuple[int, int]]:
    """(width, height) at the published limits."""
    resize = find_family(FAMILY).resize
    limits = resize.published_limits
    with_sizes = [resize(*load_image(path).size, limits.min_pixels, limits.max_pixels) for path in paths]
    return [(int(size.width), int(size.height)) for size in with_sizes]


def hugging_face() -> Any:
    """Qwen2-VL's image processor without torchvision, at the published limits."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil  # noqa: PLC0415

    limits = find_family(FAMILY).resize.published_limits
    return Qwen2VLImageProcessorPil(size={"shortest_edge": limits.min_pixels, "longest_edge": limits.max_pixels})


def open_rgb(path: str) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


class _HuggingFace(Dataset[Any]):
    """Batches of pixel_values, as collators that call the processor make them."""

    def __init__(self, batches: list[list[str]]) -> None:
        self.batches = batches
        self.processor = hugging_face()

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> torch.Tensor:
        pixels: torch.Tensor = self.processor(images=[open_rgb(path) for path in self.batches[number]], return_tensors="pt")["pixel_values"]
        return pixels


def hugging_face_loader(batches: list[list[str]]) -> Iterator[torch.Tensor]:
    yield from DataLoader(_HuggingFace(batches), batch_size=None, num_workers=1)


def convert_once(photographs: Path, work: Path, samples: int, image_storage: str) -> ShardStore:
    """A synthetic set over the photographs, converted anew."""
    folder = work / f"stream-{samples}-{image_storage}"
    shutil.rmtree(folder, ignore_errors=True)
    images = data.linked_photographs(photographs, folder / "images", samples)
    data.write_coco(folder / "instances.json", images, 8)
    train_tokenizer().save(str(folder / "tokenizer.json"))
    settings: dict[str, Any] = {
        "reader": "coco",
        "annotations": str(folder / "instances.json"),
        "images": str(folder / "images"),
        "family": FAMILY,
        "tokenizer": str(folder / "tokenizer.json"),
        "cutoff_len": 4096,
        "output": str(folder / "shards"),
        "executor": "inline",
        "image_storage": image_storage,
    }
    convert(ConvertConfig.model_validate(settings), Progress(lambda *_: None, lambda _: None))
    return ShardStore([str(folder / "shards")])


def plan_of(store: ShardStore) -> Any:
    folders = tuple(folder.path for folder in store.folders)
    return plan_epoch(read_index(folders), PlanConfig(shards=folders, cutoff_len=4096), 0).packs


def consume(tensors: Iterator[torch.Tensor]) -> int:
    """Touch every batch as it comes."""
    return sum(tensor.shape[0] for tensor in tensors)


def report(ways: dict[str, Callable[[], object]], count: int, passes: int) -> None:
    """The median over alternating passes, of this process and its children."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(passes + 1):
        for name, work in ways.items():
            cpu = cpu_seconds(work)
            if number:  # the first warms up
                taken[name].append(cpu / count)
    first = next(iter(ways))
    for name, values in taken.items():
        each, ratios = np.median(values), np.array(taken[first]) / np.array(values)
        print(f"  {name:<45} {each * 1e3:7.2f} ms   {1 / each:7.1f} /s   x{np.median(ratios):.2f} ({ratios.min():.2f}..{ratios.max():.2f})")


def cpu_seconds(work: Callable[[], object]) -> float:
    """Of this process, and of its children, which have ended when `work` returns."""
    before = os.times()
    work()
    time.sleep(0.05)
    after = os.times()
    return sum(now - then for now, then in zip(after[:4], before[:4], strict=True))


def other_figures(paths: list[str], sizes: list[tuple[int, int]], processor: Any) -> None:
    """Bytes, what the device does, and how far fast is from exact."""
    images = [load_image(path) for path in paths]
    exact, fast = ([resize_pixels(image, size, how) for image, size in zip(images, sizes, strict=True)] for how in ("exact", "fast"))
    theirs = [processor(images=[image], return_tensors="pt")["pixel_values"] for image in images]
    num_bytes, num_their_bytes = sum(one.nbytes for one in exact), sum(one.nbytes for one in theirs)
    ratio = f"1/{num_their_bytes / num_bytes:.2f}"
    print(f"\nBytes an image: {num_bytes / len(paths):,.0f} against {num_their_bytes / len(paths):,.0f} of pixel_values: {ratio}")

    rule, flat = patch_rule(find_family(FAMILY)), [torch.from_numpy(one.reshape(-1).copy()) for one in exact]

    def patches() -> list[torch.Tensor]:
        return [qwen_patches(one, [size[::-1]], rule, "clip", torch.float32) for one, size in zip(flat, sizes, strict=True)]

    equal = all(torch.equal(mine, other) for mine, other in zip(patches(), theirs, strict=True))
    print(f"pixel_values made of exact bytes: {'bit-identical to theirs' if equal else 'DIFFERENT'} on all {len(paths)}")
    print(f"Patches and normalising, left to the device; on this CPU: {cpu_seconds(patches) / len(paths) * 1e3:.2f} ms an image")
    apart = [np.abs(one.astype(np.int16) - other) for one, other in zip(exact, fast, strict=True)]
    largest, mean = max(int(one.max()) for one in apart), np.mean([one.mean() for one in apart])
    over = np.mean([(one > 2).mean() for one in apart])
    print(f"fast against exact (Pillow {PIL.__version__}): at most {largest} of 255, mean {mean:.4f}, over 2 in {over:.5%} of values")
