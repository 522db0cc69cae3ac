"""The what-if grid: every setting over all chunks of columns, added up; packed by the trainer's own packer; and its knee."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from boxcar.pipelines.audit.columns import Texts, Things
from boxcar.pipelines.audit.portrait import Portrait, portrait_of
from boxcar.pipelines.audit.what_if import (
    IOU_EDGES,
    SIDE_EDGES_PX,
    Grammar,
    Landscape,
    Outcome,
    OverLength,
    Trial,
    landscape_of,
    measure,
    measure_shrunk,
    outcome_of,
)
from boxcar.pipelines.families.family import Family
from boxcar.pipelines.families.patches import PixelLimits
from boxcar.pipelines.ragged import IntColumn
from boxcar.pipelines.tokens.frame import resolve_limits
from boxcar.schemas.errors import BudgetError, ConfigError
from boxcar.tools.auditing.cost import CostRule
from boxcar.tools.auditing.result import PERCENTILES, Box, Knee, Resolution, Setting
from boxcar.train.planning.packing import count_packs

Key = tuple[int, int]
"""(max_pixels, cutoff_len)."""

CUTOFFS = (256, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 12288, 16384, 24576, 32768)
TOKENS_AN_IMAGE = (64, 128, 256, 512, 768, 1280, 2560, 5120, 16384)
"""Pixel limits that are tried, in visual tokens of one image."""
KEEPS = (0.99, 0.999, 1.0)
MORE_BLUR = 0.01
"""A knee may bring this share of the boxes under one visual token, beyond those that are so at the finest resolution of the grid:
without a bound the cheapest setting would always be the coarsest."""


@dataclass(frozen=True)
class Plan:
    """What a grid is over, for one family."""

    limits: Sequence[PixelLimits]
    """Ascending by max_pixels."""
    cutoffs: Sequence[int]
    """Ascending."""
    own: Key
    """The workflow's own setting; it is in the grid."""
    own_limits: PixelLimits
    over_length: OverLength
    shrink_images: bool


@dataclass
class Swept:
    """A grid, evaluated."""

    plan: Plan
    landscapes: dict[int, Landscape] = field(default_factory=dict)
    outcomes: dict[Key, Outcome] = field(default_factory=dict)
    portrait: Portrait = field(default_factory=Portrait)


def plan_grid(
    family: Family,
    own_limits: PixelLimits,
    own_cutoff: int,
    min_pixels: int | None,
    pixels: Sequence[int] | None,
    cutoffs: Sequence[int] | None,
    largest_area: int,
    largest_sample: int,
    over_length: OverLength,
    shrink_images: bool,
) -> Plan:
    """The settings to try. pixels, cutoffs: as asked for; None: what makes sense up to the largest image and sample.

    Raises ConfigError for a limit that the family refuses, or a cutoff beyond its longest sequence.
    """
    if cutoffs is not None and (wrong := [cutoff for cutoff in cutoffs if not 0 < cutoff <= family.max_sequence]):
        raise ConfigError("--cutoffs", found=f"{wrong[0]}", expected=f"1..{family.max_sequence}, the longest sequence of {family.name}")
    own_cutoff = min(own_cutoff, family.max_sequence)
    chosen = [cutoff for cutoff in (cutoffs if cutoffs is not None else CUTOFFS) if cutoff <= family.max_sequence]
    if cutoffs is None:
        enough = next((cutoff for cutoff in chosen if cutoff >= largest_sample), family.max_sequence)
        chosen = [cutoff for cutoff in chosen if cutoff <= enough]
    limits = {own_limits.max_pixels: own_limits}
    if not family.resize.limits_matter:
        if pixels:
            resolve_limits(family, min_pixels, pixels[0])  # says that the family has one size
        return Plan(
            [own_limits], sorted({*chosen, own_cutoff}), (own_limits.max_pixels, own_cutoff), own_limits, over_length, shrink_images
        )
    if pixels is not None:
        for high in pixels:
            limits.setdefault(high, resolve_limits(family, min_pixels, high))
    else:
        for high in family.resize.pixels_for(np.array(TOKENS_AN_IMAGE)).tolist():
            if high >= own_limits.min_pixels:
                limits.setdefault(high, resolve_limits(family, min_pixels, high))
            if high >= largest_area:
                break
    ascending = [limits[high] for high in sorted(limits)]
    return Plan(ascending, sorted({*chosen, own_cutoff}), (own_limits.max_pixels, own_cutoff), own_limits, over_length, shrink_images)


def sweep(chunks: Iterable[tuple[Things, Texts]], grammar: Grammar, plan: Plan, on_chunk: Callable[[], None] = lambda: None) -> Swept:
    """Evaluate every setting over all chunks; memory does not grow with their number."""
    swept = Swept(plan)
    for things, texts in chunks:
        for limits in plan.limits:
            high = limits.max_pixels
            measured = measure(things, texts, grammar, limits)
            swept.landscapes.setdefault(high, Landscape()).add(landscape_of(things, texts, grammar, measured))
            for cutoff in plan.cutoffs:
                here, max_pixels = measure_shrunk(things, texts, grammar, limits, cutoff) if plan.shrink_images else (measured, None)
                is_own = (high, cutoff) == plan.own
                trial = Trial(limits, cutoff, plan.over_length, max_pixels)
                made = outcome_of(things, texts, grammar, here, trial, with_counts=is_own)
                swept.outcomes.setdefault((high, cutoff), Outcome()).add(made)
                if is_own:
                    split = plan.over_length == "split"
                    swept.portrait.add(portrait_of(things, texts, grammar, here, grammar.rule(cutoff), split=split))
        on_chunk()
    return swept


def require_something(swept: Swept) -> None:
    """Raises BudgetError where no setting keeps a single turn: the cutoffs are all smaller than any sample."""
    outcomes = swept.outcomes
    if outcomes and all(outcome.turns and outcome.turns_lost == outcome.turns for outcome in outcomes.values()):
        shortest = int(np.flatnonzero(swept.portrait.totals)[0]) if swept.portrait.totals.any() else 0
        raise BudgetError(
            "cutoff_len",
            found=f"at most {max(swept.plan.cutoffs)} tokens, and no sample of which a turn fits",
            expected=f"more: the shortest sample has {shortest} tokens with all its turns at {swept.plan.own[0]} px",
            fix="Try larger --cutoffs, or smaller --pixels.",
        )


def settings_of(swept: Swept, cost: CostRule) -> list[Setting]:
    """Every point as figures."""
    batch = cost.train.global_batch
    settings = []
    for (high, cutoff), outcome in swept.outcomes.items():
        lengths = np.flatnonzero(outcome.documents)
        counts = outcome.documents[lengths]
        packs = count_packs(lengths, counts, cutoff) if len(lengths) else 0
        flops = cost.flops(outcome)
        settings.append(
            Setting(
                max_pixels=high,
                cutoff_len=cutoff,
                samples=outcome.samples,
                whole=outcome.whole,
                long=outcome.long,
                trimmed=outcome.trimmed,
                over=outcome.over,
                shrunk=outcome.shrunk,
                turns=outcome.turns,
                turns_lost=outcome.turns_lost,
                boxes=outcome.boxes,
                boxes_lost=outcome.boxes_lost,
                under_one_token=swept.landscapes[high].under_one,
                sequences=outcome.num_documents,
                tokens=outcome.tokens,
                visual_tokens=outcome.documents_visual,
                answer_tokens=outcome.answer_tokens,
                packs=packs,
                fill=outcome.tokens / (packs * cutoff) if packs else 0.0,
                padded_fill=padded_fill(outcome.documents, batch),
                steps=-(-packs // batch),
                flops=flops,
                gpu_hours=cost.gpu_hours(flops),
                memory_gb=cost.memory_gb(cutoff),
            )
        )
    return settings


def padded_fill(histogram: IntColumn, batch: int) -> float:
    """Expected tokens over padded tokens, where sequences are drawn into batches and padded to the longest of each.

    E[longest of b] = sum over lengths v of v (F(v)^b - F(v - 1)^b), F the share of sequences up to v (drawn with replacement).
    """
    total = int(histogram.sum())
    if not total:
        return 0.0
    below = np.cumsum(histogram) / total
    longest = float(np.arange(len(histogram)) @ np.diff(np.concatenate([[0.0], below**batch])))
    return float(np.arange(len(histogram)) @ histogram) / total / longest


def knees_of(swept: Swept, cost: CostRule, keeps: Sequence[float] = KEEPS) -> list[Knee]:
    """The cheapest setting that keeps each share of turns, among resolutions that bring few more boxes under one token (MORE_BLUR)."""
    finest = swept.landscapes[swept.plan.limits[-1].max_pixels]
    allowed = finest.under_one + MORE_BLUR * finest.boxes
    fine_enough = {high for high, landscape in swept.landscapes.items() if landscape.under_one <= allowed}
    knees = []
    for keep in keeps:
        candidates = [
            (cost.price(outcome), cutoff, high)
            for (high, cutoff), outcome in swept.outcomes.items()
            # In whole turns: 99 % of 3 turns are 3.
            if high in fine_enough and outcome.turns and outcome.turns_lost <= (1 - keep) * outcome.turns + 1e-9
        ]
        # Equal work: the shorter pack needs less memory.
        best = min(candidates, default=None)
        knees.append(Knee(keep=keep, max_pixels=best[2] if best else None, cutoff_len=best[1] if best else None))
    return knees


def resolutions_of(swept: Swept) -> list[Resolution]:
    """Every resolution as figures."""
    found = []
    for limits in swept.plan.limits:
        landscape = swept.landscapes[limits.max_pixels]
        found.append(
            Resolution(
                max_pixels=limits.max_pixels,
                min_pixels=min(limits.min_pixels, limits.max_pixels),
                images=landscape.images,
                visual_tokens=landscape.visual_tokens,
                image_tokens=percentiles(landscape.image_tokens),
                image_tokens_histogram=coarse(landscape.image_tokens),
                boxes=landscape.boxes,
                under_one_token=landscape.under_one,
                under_two_tokens=landscape.under_two,
                round_trip=[_box(bucket, row) for bucket, row in enumerate(landscape.iou.tolist()) if row[0]],
                heat=landscape.heat.tolist(),
            )
        )
    return found


def _box(bucket: int, row: list[float]) -> Box:
    low, high = SIDE_EDGES_PX[bucket], SIDE_EDGES_PX[bucket + 1]
    name = f"{low:g} and more" if np.isinf(high) else f"{low:g}..{high:g}"
    under = {f"{edge:g}": int(count) for edge, count in zip(IOU_EDGES, row[2:], strict=True)}
    return Box(size_px=name, boxes=int(row[0]), mean_iou=row[1] / row[0], under=under)


def percentiles(histogram: IntColumn) -> dict[str, int]:
    """Percentile -> value, by nearest rank over exact counts; {} where there are none."""
    total = int(histogram.sum())
    if not total:
        return {}
    running = np.cumsum(histogram)
    return {str(percent): int(np.searchsorted(running, max(1, -(-total * percent // 100)))) for percent in PERCENTILES}


def coarse(histogram: IntColumn, num_bins: int = 80) -> dict[str, int]:
    """Lower end of each bin -> count: at most `num_bins` of one width, empty ones left out."""
    if not histogram.any():
        return {}
    width = max(1, -(-len(histogram) // num_bins))
    values = np.flatnonzero(histogram)
    sums = np.bincount(values // width, histogram[values]).astype(np.int64)
    return {str(place * width): int(count) for place, count in enumerate(sums) if count}
