"""`boxcar init`: look at a folder, say what is there, and write a workflow for each source.

folder ──> files ──> sources (format, split, images) ──> a look at each ──> a first audit ──> workflows.yaml
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import click
from rich.console import Console

from boxcar.pipelines.families.catalog import find_family
from boxcar.pipelines.families.family import Family
from boxcar.pipelines.storage import atomic_write
from boxcar.schemas.errors import BoxcarError, ConfigError, TokenizerError
from boxcar.schemas.workflow import Workflow
from boxcar.tools.auditing.command import audit_with_progress
from boxcar.tools.auditing.run import Request
from boxcar.tools.plain import visible
from boxcar.tools.starting import llama_factory
from boxcar.tools.starting.folder import Listing, list_folder
from boxcar.tools.starting.look import Look, look, source_config
from boxcar.tools.starting.sniff import Found, sniff
from boxcar.tools.starting.workflow_text import DEFAULT_CUTOFF_LEN, Budget, Choice, workflow_text
from boxcar.tools.workflows import has_workflow

KEEP = 0.999
"""Share of the turns that the written settings keep."""
BOX_SPACES = ("pixels", "relative", "per_mille", "resized")


@dataclass(frozen=True)
class Source:
    """A source with a name, and what a first look at it gave."""

    name: str
    found: Found
    look: Look | None
    problem: str = ""
    """Why it could not be read; "" where it could."""


def init(folder: Path, file: Path, family: str, tokenizer: str, *, ask: bool, audit: bool) -> int:
    """Look, tell, ask where `ask`, and write. Returns the exit code: 1 where nothing was found that a reader takes."""
    console = Console(soft_wrap=True)
    listing = list_folder(folder)
    sources = [_look(name, found) for name, found in _named(listing)]
    _tell(console, listing, sources)
    usable = [source for source in sources if source.look is not None]
    if not usable:
        console.print("Nothing here that a reader takes. `boxcar formats` lists the formats.", style="bold")
        return 1
    if ask:
        family = click.prompt("Model family", default=family)
    known = find_family(family, "--family")
    tokenizer = tokenizer or known.tokenizer or known.checkpoint
    if ask:
        tokenizer = click.prompt("Tokenizer (Hugging Face id, or a folder with tokenizer.json)", default=tokenizer)
    choices = _choose_all(console, usable, known, tokenizer, ask=ask, audit=audit)
    taken = [choice for choice in choices if has_workflow(file, choice.name)]
    if taken:
        raise ConfigError(
            str(file),
            found=f"a workflow {taken[0].name!r} already",
            expected="a new name",
            fix="Write to another file with --file, or rename the workflow that is there.",
        )
    before = file.read_text(encoding="utf-8").rstrip("\n") + "\n\n" if file.is_file() else f"# Written by `boxcar init {folder}`.\n\n"
    with atomic_write(file) as stream:
        stream.write((before + "\n".join(map(workflow_text, choices))).encode())
    _tell_what_next(console, file, choices)
    return 0


# ---- what there is


def _named(listing: Listing) -> Iterator[tuple[str, Found]]:
    """Sources with names that are unique. The entries of a dataset_info.json keep theirs, and their files are not named a second time."""
    used: set[str] = set()
    listed: set[Path] = set()
    for path in listing.files(".json"):
        if path.name == llama_factory.NAME:
            for name, found in llama_factory.entries(path, listing):
                listed.add(found.path)
                yield _unique(_word(name), used), found
    for found in sniff(listing):
        if found.path not in listed:
            yield _unique(_name(found, listing.root), used), found


def _name(found: Found, root: Path) -> str:
    """From the folder's name and the split, or the file's where that says more."""
    split = f"_{found.split}" if found.split else ""
    home = root.resolve().name or "data"
    if found.reader in ("coco", "coco_captions", "lvis", "yolo", "voc", "labelme"):
        kind = "_captions" if found.reader == "coco_captions" else ""
        return _word(f"{home}{kind}{split}")
    stem = found.path.name.partition(".")[0]
    return _word(f"{home}_{stem}" + (split if found.split not in stem.lower() else ""))


def _word(text: str) -> str:
    return re.sub(r"\W+", "_", text).strip("_") or "data"


def _unique(name: str, used: set[str]) -> str:
    number = 1
    unique = name
    while unique in used:
        number += 1
        unique = f"{name}_{number}"
    used.add(unique)
    return unique


def _look(name: str, found: Found) -> Source:
    if not found.reader:
        return Source(name, found, None, found.what)
    try:
        return Source(name, found, look(found))
    except BoxcarError as error:
        return Source(name, found, None, str(error))


def _tell(console: Console, listing: Listing, sources: Sequence[Source]) -> None:
    console.print(visible(f"{listing.root}: {listing.num_images:,} images in {_folders(len(listing.image_folders))}"), style="bold")
    for source in sources:
        found = source.found
        console.print(f"\n  {visible(source.name)}", style="bold", markup=False)
        console.print(visible(f"    {found.path}"), markup=False)
        if source.look is None:
            console.print(visible(f"    not used: {source.problem}"), markup=False, style="yellow")
            continue
        console.print(visible(f"    {found.what} (reader: {found.reader}){f', split {found.split}' if found.split else ''}"), markup=False)
        for line in _facts(source.look):
            console.print(visible(f"    {line}"), markup=False)
        if found.missing_images:
            console.print("    images: not found below this folder; set `images` in the workflow", style="yellow")
        elif found.images is not None:
            console.print(visible(f"    images: {found.images}"), markup=False)
    console.print()


def _folders(number: int) -> str:
    return "1 folder" if number == 1 else f"{number:,} folders"


def _facts(seen: Look) -> Iterator[str]:
    count = f"{seen.num_records:,} records" if seen.num_records is not None else f"{seen.num_looked_at:,} records or more"
    yield f"{count}; {seen.num_regions:,} boxes in the first {seen.num_looked_at:,}"
    if seen.sizes_wh:
        middle, largest = seen.sizes_wh[len(seen.sizes_wh) // 2], seen.sizes_wh[-1]
        yield f"sizes of {len(seen.sizes_wh):,} images: {middle[0]}x{middle[1]} px (median), {largest[0]}x{largest[1]} px (largest)"
    if seen.num_missing:
        yield f"{seen.num_missing:,} images cannot be read, such as {seen.missing}"
    if seen.num_rejected:
        yield f"{seen.num_rejected:,} records are rejected: {seen.rejection}"
    yield from seen.notes


# ---- what is written


def _choose_all(console: Console, sources: Sequence[Source], family: Family, tokenizer: str, *, ask: bool, audit: bool) -> list[Choice]:
    """A workflow for each source. Held-out sources get the settings of what is trained on: they must have one frame contract."""
    base = tokenizer if Path(tokenizer, "config.json").is_file() else family.checkpoint
    budgets: dict[str, Budget] = {}
    choices: list[Choice] = []
    for source in sorted(sources, key=lambda source: source.found.is_held_out):
        found = source.found
        box_space = _ask_box_space(source.name) if found.needs_box_space and ask else None
        if not found.is_held_out or found.reader not in budgets:
            budgets[found.reader] = _budget(console, source, family.name, tokenizer, box_space, audit=audit)
        held_out = {one.found.split.lower(): one.name for one in sources if one.found.is_held_out and one.found.reader == found.reader}
        validated = next((held_out[split] for split in sorted(held_out, key=lambda split: "test" in split)), "")
        evaluated = next((held_out[split] for split in sorted(held_out, key=lambda split: "test" not in split)), "")
        choices.append(
            Choice(
                name=source.name,
                found=found,
                family=family.name,
                tokenizer=tokenizer,
                base=base,
                budget=budgets[found.reader],
                box_space=box_space,
                comment=f"{found.what}, from {found.path.name}, written by boxcar init.",
                validated_on="" if found.is_held_out else validated,
                evaluated_on="" if found.is_held_out else evaluated,
            )
        )
    return choices


def _ask_box_space(name: str) -> str | None:
    options = click.Choice([*BOX_SPACES, "skip"])
    answer = click.prompt(f"{name}: the text holds boxes. What are their numbers?", type=options, default="skip")
    return None if answer == "skip" else str(answer)


def _budget(console: Console, source: Source, family: str, tokenizer: str, box_space: str | None, *, audit: bool) -> Budget:
    """The cheapest settings that keep KEEP of the turns, by an audit; without one, a usual length and the published resolution."""
    usual = Budget(DEFAULT_CUTOFF_LEN, None, "not audited yet: `boxcar audit NAME --keep 99.9%` writes the cheapest that fits", "")
    if not audit or source.found.missing_images:
        return usual
    settings = source_config(source.found).model_dump(exclude_defaults=True) | ({"box_space": box_space} if box_space else {})
    settings |= {"family": family, "tokenizer": tokenizer, "cutoff_len": DEFAULT_CUTOFF_LEN, "output": f"shards/{source.name}"}
    try:
        result = audit_with_progress(source.name, Workflow.model_validate({"convert": settings}), Request(duplicates=False, keep=KEEP))
    except TokenizerError as error:
        console.print(visible(f"{source.name}: not audited, for the tokenizer cannot be read: {error}"), style="yellow", markup=False)
        return usual
    except BoxcarError as error:
        console.print(visible(f"{source.name}: not audited: {error}"), style="yellow", markup=False)
        return usual
    audited = result.families[0]
    knee = next((one for one in audited.knees if one.keep == KEEP), None)
    if knee is None or knee.cutoff_len is None:
        return usual
    pixels = knee.max_pixels if audited.limits_matter else None
    return Budget(
        knee.cutoff_len,
        pixels,
        f"the cheapest that keeps {KEEP:.1%} of the turns (audit of {result.records_read:,} records)",
        "" if pixels is None else "at most 1 % more boxes are under one visual token than at the published resolution",
    )


def _tell_what_next(console: Console, file: Path, choices: Sequence[Choice]) -> None:
    name = next((choice.name for choice in choices if not choice.found.is_held_out), choices[0].name)
    where = "" if file.name == "workflows.yaml" and file.parent in (Path(), Path.cwd()) else f" --file {file}"
    console.print(f"wrote {file}: {', '.join(choice.name for choice in choices)}", style="bold", markup=False)
    if any("SET THIS" in workflow_text(choice) for choice in choices):
        console.print("Lines with SET THIS need your answer first.", style="yellow")
    console.print(f"next:  boxcar audit {name} --html{where}     what it costs, what a cutoff or resolution would lose", markup=False)
    console.print(f"       boxcar convert {name}{where}          annotations to shards", markup=False)
