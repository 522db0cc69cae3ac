"""`boxcar audit`: from a workflow or shards to a result. The wiring; what is computed stands in the rooms beside this one."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import chain
from pathlib import Path

import numpy as np
from pydantic import ValidationError

from boxcar.pipelines import storage
from boxcar.pipelines.audit.annotations import Candidate, Reading, candidate_of, for_family, grammar_of, read_annotations
from boxcar.pipelines.audit.columns import Texts, Things
from boxcar.pipelines.audit.portrait import portrait_of
from boxcar.pipelines.audit.shards import ShardFolder, open_folders, read_shards
from boxcar.pipelines.audit.what_if import TOKEN_EDGES, measure
from boxcar.pipelines.convert import images_root, resolve_paths, source_name
from boxcar.pipelines.families.catalog import find_family
from boxcar.pipelines.tokens.frame import frame_of, resolve_limits
from boxcar.pipelines.turns.lint import labels_alike
from boxcar.schemas.errors import ConfigError
from boxcar.schemas.manifest import Counts, Finding, Rejections
from boxcar.schemas.training import TrainConfig
from boxcar.schemas.workflow import ConvertConfig, Workflow
from boxcar.tools.auditing.consumers import consumer_result
from boxcar.tools.auditing.cost import DEFAULT_GPU, cost_rule, require_used
from boxcar.tools.auditing.grid import (
    Swept,
    coarse,
    knees_of,
    percentiles,
    plan_grid,
    require_something,
    resolutions_of,
    settings_of,
    sweep,
)
from boxcar.tools.auditing.pictures import duplicates_of, leakage_of, look_alikes_of
from boxcar.tools.auditing.result import AuditResult, Consumer, FamilyResult

Say = Callable[[str, int, int], None]
"""(what is done, how far, of how much)."""


@dataclass(frozen=True)
class Request:
    """What a person asks of an audit."""

    families: Sequence[str] = ()
    """FAMILY or FAMILY=TOKENIZER beside the workflow's own."""
    cutoffs: Sequence[int] | None = None
    pixels: Sequence[int] | None = None
    base: str = ""
    gpu: str = DEFAULT_GPU
    mfu: float | None = None
    tokenizer: str = ""
    """Of shards, where it has moved."""
    duplicates: bool = True
    perceptual: bool = False
    against: Sequence[ConvertConfig] = ()
    """Other workflows whose images should not be here."""
    consumers: Sequence[str] = ()
    keep: float | None = None
    """A share of turns for a knee of its own."""
    work: Path = field(default_factory=lambda: Path("audits"))
    """Where columns are kept."""


@dataclass(frozen=True)
class Source:
    """Columns of one family, as often as they are asked for."""

    candidate: Candidate
    chunks: Callable[[], Iterator[tuple[Things, Texts]]]
    num_chunks: int


def audit_workflow(workflow: Workflow, request: Request, say: Say = lambda *_: None) -> AuditResult:
    """Audit the annotations of a workflow's convert section. Raises BoxcarError."""
    assert workflow.convert is not None, "the caller asked for this section"
    config = resolve_paths(workflow.convert)
    candidates = [candidate_of(one) for one in _configs(config, request.families)]
    reading = read_annotations(candidates, request.work, lambda done, total: say("reading headers and texts", done, total))
    sources = [Source(candidate, lambda candidate=candidate: reading.chunks(candidate), reading.num_chunks) for candidate in candidates]  # type: ignore[misc]
    result = _audit(sources, request, workflow.train or TrainConfig(output="runs"), say)
    result.source, result.kind = source_name(config), "annotations"
    result.images_root, result.sizes_trusted = images_root(config), config.trust_sizes
    result.records_read += len(reading.plan.rejected)
    for family in result.families:
        family.counts.records_read += len(reading.plan.rejected)
        for entry in reading.plan.rejected:
            family.counts.records_rejected.setdefault(entry.reason, Rejections()).add(Rejections(1, [f"{entry.position}: {entry.detail}"]))
    result.notes += list(reading.plan.notes)
    if config.trust_sizes:
        result.notes.append("image sizes are the annotations' own; no image was opened (trust_sizes)")
    else:
        _pictures(result, reading, config, request, say)
    return result


def audit_shards(folders: Sequence[Path], request: Request, train: TrainConfig | None = None, say: Say = lambda *_: None) -> AuditResult:
    """Audit conversions of one contract. Raises BoxcarError."""
    opened = open_folders(folders)
    if request.families or request.perceptual or request.against:
        raise ConfigError(
            "command line",
            found="other families, --perceptual or --against with shards",
            expected="a workflow: shards hold one family's texts",
            fix="boxcar audit NAME ...",
        )
    manifest = opened[0].manifest
    frame = frame_of(manifest.contract, str(opened[0].path), request.tokenizer)
    grammar = grammar_of(frame)
    config = _config_of(opened[0])
    source = Source(Candidate(config, frame, grammar), lambda: read_shards(opened, frame, grammar), 0)
    result = _audit([source], request, train or TrainConfig(output="runs"), say)
    result.source, result.kind = ", ".join(str(folder.path) for folder in opened), "shards"
    # What was left out is not in the rows, and the manifests know it: at its own setting a conversion is its own count.
    counts = Counts()
    for folder in opened:
        counts.add(folder.manifest.counts)
    result.families[0].counts = counts
    result.records_read = counts.records_read
    result.images_root = manifest.images_root
    result.sizes_trusted = any(folder.manifest.sizes_trusted for folder in opened)
    for folder in opened:
        for rule, finding in folder.manifest.counts.rules.items():
            if rule != "under_one_token":
                result.rules.setdefault(rule, Finding()).add(finding)
    result.notes.append("from shards: what conversion left out is not here, so a larger cutoff or resolution does not bring it back")
    return result


def _configs(config: ConvertConfig, families: Sequence[str]) -> list[ConvertConfig]:
    """The workflow's own family, then the others. Each takes the workflow's pixel limits where it can."""
    configs = [config]
    for entry in families:
        name, _, tokenizer = entry.partition("=")
        if name == config.family:
            continue
        # Its published ones where it cannot meet the workflow's: it is said in the result.
        limits = (config.image_max_pixels, config.image_min_pixels) if _takes_limits(name, config) else (None, None)
        configs.append(for_family(config, name, tokenizer or config.tokenizer, *limits))
    return configs


def _takes_limits(family: str, config: ConvertConfig) -> bool:
    """Whether a family can meet the workflow's pixel limits. Raises ConfigError where there is no such family."""
    found = find_family(family)
    try:
        resolve_limits(found, config.image_min_pixels, config.image_max_pixels)
    except ConfigError:
        return False
    return True


def _config_of(folder: ShardFolder) -> ConvertConfig:
    settings = {key: value for key, value in folder.manifest.settings.items() if key in ConvertConfig.model_fields}
    try:
        return ConvertConfig.model_validate({**settings, "output": str(folder.path)})
    except ValidationError as error:
        raise ConfigError(
            str(folder.path),
            found=f"settings of another version ({error.error_count()} keys)",
            expected="those of this one",
            fix="Convert again.",
        ) from error


def _audit(sources: Sequence[Source], request: Request, train: TrainConfig, say: Say) -> AuditResult:
    result = AuditResult(
        boxcar_version=version("boxcar-vl"),
        source="",
        kind="",
        images_root="",
        records_read=0,
        sizes_trusted=False,
        rules={},
        lint={},
        alike=[],
        duplicates=None,
        look_alikes=None,
        leakage={},
        leakage_counts={},
        token_edges=TOKEN_EDGES.tolist(),
        families=[],
        consumers=[],
        notes=[],
    )
    for number, source in enumerate(sources):
        swept, facts = _sweep(source, request, say)
        if not number:
            result.records_read = facts.records
            result.rules, result.lint = facts.rules, facts.lint
            result.alike = labels_alike(sorted(facts.labels))
        require_something(swept)
        result.families.append(_family(source.candidate, swept, request, train))
    require_used(request.base, [one.family for one in result.families], [one.assumptions.base for one in result.families])
    for name in request.consumers:
        result.consumers.append(_consumer(name, sources[0], say))
    return result


def _consumer(name: str, source: Source, say: Say) -> Consumer:
    say(f"modelling {name}", 0, 1)
    return consumer_result(name, source.chunks(), source.candidate)


@dataclass
class _Facts:
    """What a first look at the columns says: enough to choose a grid."""

    records: int = 0
    largest_area: int = 0
    largest_sample: int = 0
    rules: dict[str, Finding] = field(default_factory=dict)
    lint: dict[str, Rejections] = field(default_factory=dict)
    labels: set[str] = field(default_factory=set)


def _look(source: Source, say: Say) -> _Facts:
    facts = _Facts()
    candidate = source.candidate
    rule = candidate.grammar.rule(1 << 30)
    for number, (things, texts) in enumerate(source.chunks()):
        facts.records += things.num_read
        used = ~things.rejected[np.repeat(np.arange(things.num_records), np.diff(things.image_offsets))]
        facts.largest_area = max(facts.largest_area, int(things.sizes_wh[used].astype(np.int64).prod(axis=1).max(initial=0)))
        measured = measure(things, texts, candidate.grammar, candidate.frame.limits)
        totals = portrait_of(things, texts, candidate.grammar, measured, rule, split=False).totals
        facts.largest_sample = max(facts.largest_sample, len(totals) - 1)
        for name, finding in things.rules.items():
            facts.rules.setdefault(name, Finding()).add(finding)
        for name, entry in things.lint.items():
            facts.lint.setdefault(name, Rejections()).add(entry)
        facts.labels.update(things.labels)
        say("a first look", number + 1, source.num_chunks)
    return facts


def _sweep(source: Source, request: Request, say: Say) -> tuple[Swept, _Facts]:
    facts = _look(source, say)
    candidate, config = source.candidate, source.candidate.config
    drops = config.rules.under_one_token == "drop"
    if drops and request.pixels:
        raise ConfigError(
            "--pixels",
            found="with rules.under_one_token: drop",
            expected="only the workflow's own limits: under that rule, which boxes there are depends on the resolution",
            fix="Override image_max_pixels and audit again, or rules.under_one_token=keep.",
        )
    own = candidate.frame.limits
    plan = plan_grid(
        candidate.frame.family,
        own,
        config.cutoff_len,
        config.image_min_pixels,
        [own.max_pixels] if drops and candidate.frame.family.resize.limits_matter else request.pixels,
        request.cutoffs,
        facts.largest_area,
        facts.largest_sample,
        config.over_length,
        config.shrink_images,
    )
    done = 0

    def on_chunk() -> None:
        nonlocal done
        done += 1
        say(f"what if, {candidate.frame.family.name}", done, source.num_chunks)

    return sweep(source.chunks(), candidate.grammar, plan, on_chunk), facts


def _family(candidate: Candidate, swept: Swept, request: Request, train: TrainConfig) -> FamilyResult:
    family, config = candidate.frame.family, candidate.config
    cost = cost_rule(family, train, [request.base, train.base, config.tokenizer], request.gpu, request.mfu)
    own_pixels, own_cutoff = swept.plan.own
    portrait = swept.portrait
    counts = swept.outcomes[swept.plan.own].counts
    under = swept.landscapes[own_pixels].under_one
    policy = config.rules.under_one_token
    if under:
        kept, dropped = (0, under) if policy == "drop" else (under, 0)
        counts.rules["under_one_token"] = Finding(kept=kept, dropped=dropped)
        counts.boxes_kept -= dropped
    notes = family.tokenizer_notes(candidate.frame.tokenizer.special_ids)
    if own_cutoff != config.cutoff_len:
        notes.append(f"cutoff_len {config.cutoff_len:,} is beyond the longest sequence of {family.name}: {own_cutoff:,} is taken")
    if family.resize.limits_matter and config.image_max_pixels is None:
        notes.append(f"image_max_pixels is not set: the published limit of {family.name} is taken, {own_pixels:,}")
    keeps = sorted({*(request.keep,), 0.99, 0.999, 1.0}) if request.keep is not None else (0.99, 0.999, 1.0)
    return FamilyResult(
        family=family.name,
        title=family.title,
        tokenizer=candidate.frame.tokenizer_name,
        contract=candidate.frame.contract(),
        limits_matter=family.resize.limits_matter,
        max_sequence=family.max_sequence,
        cutoff_len=own_cutoff,
        max_pixels=own_pixels,
        over_length=config.over_length,
        shrink_images=config.shrink_images,
        counts=counts,
        kinds=portrait.kinds,
        tasks=portrait.tasks,
        categories=dict(sorted(portrait.categories.items(), key=lambda item: (-item[1].turns, item[0]))[:100]),
        splits=portrait.splits,
        sample_tokens=percentiles(portrait.totals),
        sample_tokens_histogram=coarse(portrait.totals),
        longest=portrait.longest,
        smallest=portrait.smallest,
        resolutions=resolutions_of(swept),
        settings=settings_of(swept, cost),
        knees=knees_of(swept, cost, keeps),
        assumptions=cost.assumptions(),
        notes=notes,
    )


def _pictures(result: AuditResult, reading: Reading, config: ConvertConfig, request: Request, say: Say) -> None:
    """Duplicates, within the source and against others. Only where files are opened at all."""
    root = images_root(config)
    if request.duplicates or request.perceptual or request.against:
        splits: dict[str, set[str]] = {}
        for things in reading.things():
            record_of_image = np.repeat(np.arange(things.num_records), np.diff(things.image_offsets))
            for path, record in zip(things.paths, record_of_image.tolist(), strict=True):
                if not things.rejected[record]:
                    splits.setdefault(storage.join(root, path), set()).add(things.splits[record])
        paths = list(splits)
        if request.duplicates:
            say("comparing image files", 0, len(paths))
            result.duplicates = duplicates_of(paths, splits)
        if request.perceptual:
            result.look_alikes = look_alikes_of(paths, splits, lambda done: say("decoding images to compare them", done, len(paths)))
        for other in request.against:
            found = leakage_of(paths, _paths_of(resolve_paths(other), request.work, say))
            name = source_name(other)
            result.leakage[name], result.leakage_counts[name] = [list(pair) for pair in found[:10]], len(found)


def _paths_of(config: ConvertConfig, work: Path, say: Say) -> list[str]:
    """The images of another workflow that can be read."""
    reading = read_annotations([candidate_of(config)], work, lambda done, total: say("reading the other annotations", done, total))
    root = images_root(config)
    paths = []
    for things in reading.things():
        record_of_image = np.repeat(np.arange(things.num_records), np.diff(things.image_offsets))
        paths.append(
            [storage.join(root, path) for path, row in zip(things.paths, record_of_image, strict=True) if not things.rejected[row]]
        )
    return list(dict.fromkeys(chain.from_iterable(paths)))
