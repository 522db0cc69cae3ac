"""What an audit costs: its one pass over annotations, its grid, its pass over shards, and the same counts by the Hugging Face processor."""

import os
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TypeVar

import msgspec
import numpy as np
from PIL import Image

from boxcar.pipelines.audit.annotations import Candidate, Reading, candidate_of, read_annotations
from boxcar.pipelines.audit.columns import Texts, Things
from boxcar.pipelines.audit.consumers import LLAMA_FACTORY_MAX_PIXELS, llama_factory_size
from boxcar.pipelines.audit.shards import open_folders, read_shards
from boxcar.pipelines.convert import Progress, convert
from boxcar.pipelines.families.catalog import find_family
from boxcar.pipelines.images.image_file import read_header
from boxcar.schemas import manifest as manifests
from boxcar.schemas.training import TrainConfig
from boxcar.schemas.workflow import ConvertConfig
from boxcar.tools.auditing.cost import cost_rule
from boxcar.tools.auditing.grid import Plan, Swept, plan_grid, settings_of, sweep
from boxcar.tools.bench.conversion import prepare

CUTOFFS = (512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 16384)
PIXELS = (65_536, 131_072, 262_144, 524_288, 1_003_520)
T = TypeVar("T")


def grid(photographs: Path, tokenizer: Path, work: Path, samples: int, repeat: int) -> None:
    """One core. `repeat`: how often the columns are gone through, for more samples than are written as JSON."""
    config = _config(photographs, tokenizer, work, samples)
    candidate = candidate_of(config)
    paths = [str(path) for path in islice((work / f"coco-{samples}-8" / "images").iterdir(), 100_000)]
    _, header_s = _measured(lambda: [read_header(path) for path in paths])
    print(f"headers: {len(paths) / header_s:,.0f} files for one CPU-second (warm disk, with the check for truncation)")
    shutil.rmtree(work / "columns", ignore_errors=True)
    reading, read_s = _measured(lambda: read_annotations([candidate], work / "columns"))
    print(
        f"reading {samples:,} samples (index, headers, rules, turns, tokens): {read_s:.1f} CPU-s, {read_s / samples * 1e3:.3f} ms a sample"
    )
    plan = _plan(candidate)
    before = _peak_mb()
    swept, sweep_s = _measured(lambda: sweep(_again(reading, candidate, repeat), candidate.grammar, plan))
    cost = cost_rule(candidate.frame.family, TrainConfig(output="runs"), [""], "H100", None)
    settings, pack_s = _measured(lambda: settings_of(swept, cost))
    total = samples * repeat
    print(
        f"what if: {len(settings)} settings over {total:,} samples ({settings[0].turns:,} turns): {sweep_s + pack_s:.1f} CPU-s "
        f"({sweep_s:.1f} lengths and budget, {pack_s:.1f} packing); peak memory {_peak_mb():.0f} MB ({before:.0f} before)"
    )


def shards(photographs: Path, tokenizer: Path, work: Path, samples: int, rows: tuple[int, ...]) -> None:
    """Seconds and memory over shards: one conversion whose files a manifest lists as often as it takes."""
    config = _config(photographs, tokenizer, work, samples)
    folder = Path(config.output)
    if not (folder / manifests.MANIFEST_NAME).exists():
        convert(config, Progress(lambda *_: None, lambda _: None))
    candidate = candidate_of(config)
    manifest = manifests.load(folder)
    written = sum(entry.num_rows for entry in manifest.shards)
    plan = _plan(candidate)
    for wanted in rows:
        times = max(1, round(wanted / written))
        many = work / f"shards-{wanted}"
        shutil.rmtree(many, ignore_errors=True)
        many.mkdir()
        for entry in manifest.shards:
            os.link(folder / entry.name, many / entry.name)
        repeated = msgspec.structs.replace(manifest, shards=manifest.shards * times)
        (many / manifests.MANIFEST_NAME).write_bytes(manifests.dump(repeated))
        _, taken = _measured(partial(_sweep_shards, many, candidate, plan))
        each = taken / (times * written) * 1e6
        print(
            f"shards of {times * written:,} rows, {len(plan.cutoffs) * len(plan.limits)} settings: {taken:.1f} CPU-s, "
            f"{each:.1f} microseconds a row; peak memory {_peak_mb():.0f} MB"
        )


def against_processor(photographs: Path, num_photographs: int) -> None:
    """CPU-ms for the visual tokens of a photograph: by its header, and as LLaMA-Factory calls the Hugging Face processor."""
    from boxcar.tools.bench.streaming import hugging_face  # noqa: PLC0415  (torch and transformers)

    paths = [str(path) for path in sorted(photographs.iterdir())]
    paths = [paths[number % len(paths)] for number in range(num_photographs)]
    family = find_family("qwen2_5_vl")
    limits = family.resize.published_limits
    processor = hugging_face()

    def theirs() -> list[int]:
        counts = []
        for path in paths:
            with Image.open(path) as image:
                width, height = llama_factory_size(*image.size, LLAMA_FACTORY_MAX_PIXELS)
                shrunk = image.convert("RGB").resize((int(width), int(height)))
            grid_thw = np.asarray(processor(images=[shrunk], return_tensors="np")["image_grid_thw"])
            counts.append(int(grid_thw.prod()) // 4)
        return counts

    def ours() -> list[int]:
        headers = [read_header(path) for path in paths]
        width, height = llama_factory_size([one.width for one in headers], [one.height for one in headers], LLAMA_FACTORY_MAX_PIXELS)
        return [int(count) for count in family.resize(width, height, limits.min_pixels, limits.max_pixels).visual_tokens]

    ours(), theirs()  # warm disk and caches
    found, our_s = _measured(ours)
    expected, their_s = _measured(theirs)
    same = sum(one == other for one, other in zip(found, expected, strict=True))
    print(
        f"{len(paths)} photographs, {same} counts equal: {our_s / len(paths) * 1e3:.4f} CPU-ms by header, "
        f"{their_s / len(paths) * 1e3:.1f} by decode, resize and processor: {their_s / our_s:,.0f} times"
    )


def _config(photographs: Path, tokenizer: Path, work: Path, samples: int) -> ConvertConfig:
    annotations, images = prepare(photographs, work, samples, 8)
    return ConvertConfig(
        reader="coco",
        annotations=str(annotations),
        images=str(images),
        family="qwen2_5_vl",
        tokenizer=str(tokenizer.absolute()),
        cutoff_len=4096,
        image_max_pixels=PIXELS[-1],
        output=str(work / f"audit-shards-{samples}"),
        executor="inline",
    )


def _sweep_shards(folder: Path, candidate: Candidate, plan: Plan) -> Swept:
    return sweep(read_shards(open_folders([folder]), candidate.frame, candidate.grammar), candidate.grammar, plan)


def _plan(candidate: Candidate) -> Plan:
    return plan_grid(
        candidate.frame.family,
        candidate.frame.limits,
        4096,
        None,
        PIXELS,
        CUTOFFS,
        0,
        0,
        candidate.config.over_length,
        candidate.config.shrink_images,
    )


def _again(reading: Reading, candidate: Candidate, repeat: int) -> Iterator[tuple[Things, Texts]]:
    for _ in range(repeat):
        yield from reading.chunks(candidate)


def _measured(work: Callable[[], T]) -> tuple[T, float]:
    start = time.process_time()
    result = work()
    return result, time.process_time() - start


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
