"""An audit for the terminal: the answer first, then where it comes from."""

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.text import Text

from boxcar.pipelines.turns.lint import ABOUT
from boxcar.schemas.manifest import MAX_EXAMPLES, Finding, Rejections
from boxcar.tools.auditing.grid import MORE_BLUR
from boxcar.tools.auditing.result import AuditResult, Consumer, Duplicates, FamilyResult, Setting
from boxcar.tools.plain import visible
from boxcar.tools.tables import Table

MAX_ROWS = 12


def print_audit(console: Console, result: AuditResult, *, page: str = "", folder: str = "") -> None:
    """Everything a person needs in one screen or two."""
    console.print()
    for family in result.families:
        _say(console, headline(family), style="bold")
        console.print(_grid(family))
        console.print(_knees(family))
        console.print(_tokens(family))
        console.print(_small(family))
        for line in family.assumptions.lines:
            _say(console, f"  cost: {line}", style="dim")
        for note in family.notes:
            _say(console, f"Note: {note}", style="yellow")
    _findings(console, result)
    for consumer in result.consumers:
        _consumer(console, consumer)
    for note in result.notes:
        _say(console, f"Note: {note}", style="yellow")
    console.print(Text("Next", style="bold"))
    if page:
        _say(console, f"  open {page}   sliders, heat map, worst samples")
    if folder:
        _say(console, f"  boxcar diff {folder} OTHER   compare with another audit or manifest")
    console.print(Text("  boxcar audit NAME --keep 99.5%   write the cheapest such setting into the workflow"))


def _say(console: Console, text: str, style: str = "") -> None:
    console.print(Text(visible(text), style=style), soft_wrap=True)


def headline(family: FamilyResult) -> str:
    """The answer in one sentence."""
    own = own_setting(family)
    lost = f"{own.turns_lost:,} of {own.turns:,} turns and {own.boxes_lost:,} of {own.boxes:,} boxes are lost"
    kept = "no sample gives a turn" if not own.turns else "nothing is lost" if not own.turns_lost else lost
    cut = own.trimmed + own.over
    long = f", {own.long:,} samples keep all turns but do not fit one sequence" if own.long else ""
    long += f", {cut:,} samples lose turns" if cut else ""
    cost = f", {gpu_time(own.gpu_hours)} an epoch on {family.assumptions.gpu}" if own.gpu_hours is not None else ""
    return (
        f"{family.family}, cutoff_len {own.cutoff_len:,}, {own.max_pixels:,} px: {kept}{long}. {own.tokens:,} tokens an epoch, "
        f"{own.steps:,} steps of {family.assumptions.global_batch}{cost}."
    )


def gpu_time(hours: float) -> str:
    """In seconds where it is less than a hundredth of an hour."""
    return f"{hours:,.2g} GPU-hours" if hours >= 0.01 else f"{hours * 3600:,.2g} GPU-seconds"


def own_setting(family: FamilyResult) -> Setting:
    """The workflow's own point of the grid."""
    return next(one for one in family.settings if (one.max_pixels, one.cutoff_len) == (family.max_pixels, family.cutoff_len))


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0))
    for number, column in enumerate(columns):
        left = column.startswith("<") or not number
        # A number that is cut is another number: it would rather run over the edge.
        table.add_column(column.removeprefix("<"), justify="left" if left else "right", overflow="fold", no_wrap=not column.startswith("<"))
    return table


def _grid(family: FamilyResult) -> Table:
    """What cutoffs do at the workflow's resolution, and what resolutions do at its cutoff."""
    costs = family.assumptions.base != ""
    head = ("pixels", "cutoff", "whole", "long", "trimmed", "rejected", "turns kept", "boxes lost", "tokens", "fill", "padded")
    table = _table("What if", *head, *(("GPU-h", "GB") if costs else ()))
    shown = [one for one in family.settings if one.max_pixels == family.max_pixels or one.cutoff_len == family.cutoff_len]
    for one in sorted(shown, key=lambda one: (one.cutoff_len != family.cutoff_len, one.max_pixels, one.cutoff_len)):
        is_own = (one.max_pixels, one.cutoff_len) == (family.max_pixels, family.cutoff_len)
        cells = [
            ("> " if is_own else "  ") + f"{one.max_pixels:,}",
            f"{one.cutoff_len:,}",
            *(f"{count:,}" if count else "-" for count in (one.whole, one.long, one.trimmed, one.over)),
            f"{one.turns_kept:.2%}" if one.turns else "-",
            f"{one.boxes_lost:,}" if one.boxes_lost else "-",
            f"{one.tokens:,}",
            f"{one.fill:.1%}",
            f"{one.padded_fill:.1%}",
        ]
        if costs:
            cells += ["" if one.gpu_hours is None else f"{one.gpu_hours:.3g}", "" if one.memory_gb is None else f"{one.memory_gb:,.0f}"]
        table.add_row(*cells, style="bold" if is_own else "")
    table.caption = (
        "samples: whole: fits one sequence; long: an epoch takes what fits, or it is split; trimmed: loses turns; rejected: loses all. "
        "fill: packed by the trainer's own packer; padded: batches of global_batch padded to their longest"
    )
    table.caption_justify = "left"
    return table


def _knees(family: FamilyResult) -> Table:
    table = _table("Cheapest setting that keeps", "turns", "cutoff_len", "image_max_pixels", "tokens", "GPU-h")
    by_key = {(one.max_pixels, one.cutoff_len): one for one in family.settings}
    for knee in family.knees:
        if knee.max_pixels is None or knee.cutoff_len is None:
            table.add_row(f"{knee.keep:.2%}" if knee.keep < 1 else "all", "none of the grid", "", "", "")
            continue
        one = by_key[knee.max_pixels, knee.cutoff_len]
        hours = "" if one.gpu_hours is None else f"{one.gpu_hours:.3g}"
        table.add_row(
            f"{knee.keep:.2%}" if knee.keep < 1 else "all", f"{knee.cutoff_len:,}", f"{knee.max_pixels:,}", f"{one.tokens:,}", hours
        )
    table.caption = f"of resolutions that bring at most {MORE_BLUR:.0%} more boxes under one visual token than the finest"
    table.caption_justify = "left"
    return table


def _tokens(family: FamilyResult) -> Table:
    total = sum(family.kinds.values()) or 1
    kinds = ", ".join(f"{name} {tokens / total:.1%}" for name, tokens in family.kinds.items() if tokens)
    table = _table(
        f"Where the {sum(family.kinds.values()):,} tokens are: {kinds}", "", "total", "p1", "p10", "p50", "p90", "p95", "p99", "max"
    )
    resolution = next(one for one in family.resolutions if one.max_pixels == family.max_pixels)
    for name, tokens, percentiles in (
        ("an image", resolution.visual_tokens, resolution.image_tokens),
        ("a sample, all turns", None, family.sample_tokens),
    ):
        table.add_row(name, "" if tokens is None else f"{tokens:,}", *(f"{value:,}" for value in percentiles.values()))
    for name, share in list(family.tasks.items()):
        each = (share.question_tokens + share.answer_tokens) / max(share.turns, 1)
        table.add_row(f"{name}: {share.turns:,} turns", f"{share.question_tokens + share.answer_tokens:,}", f"{each:.0f} each")
    if family.longest:
        first = family.longest[0]
        table.caption = escape(visible(f"longest: {first.sample_id}, {first.tokens:,} tokens, {first.turns} turns"))
        table.caption_justify = "left"
    return table


def _small(family: FamilyResult) -> Table:
    table = _table(
        "Small boxes and the round trip through the family's numbers",
        "pixels",
        "images",
        "visual tokens",
        "boxes",
        "under 1 token",
        "under 2 tokens",
        "<mean IoU by size",
    )
    for one in family.resolutions:
        boxes = max(one.boxes, 1)
        sizes = ", ".join(f"{box.size_px} px {box.mean_iou:.3f}" for box in one.round_trip)
        table.add_row(
            f"{one.max_pixels:,}",
            f"{one.images:,}",
            f"{one.visual_tokens:,}",
            f"{one.boxes:,}",
            f"{one.under_one_token / boxes:.2%}",
            f"{one.under_two_tokens / boxes:.2%}",
            sizes,
        )
    return table


def _findings(console: Console, result: AuditResult) -> None:
    rules = dict(result.rules)
    own = result.families[0].counts.rules.get("under_one_token")
    if own is not None:
        rules["under_one_token"] = own
    if rules:
        console.print(_rules(rules))
    first = result.families[0].counts
    for title, reasons in (
        ("Records rejected", first.records_rejected),
        ("Turns left out", first.turns_rejected),
        ("Wording", result.lint),
    ):
        if reasons:
            console.print(_reasons(title, reasons))
    if result.alike:
        groups = "; ".join(" / ".join(map(repr, group)) for group in result.alike[:5])
        _say(console, f"Labels alike: {len(result.alike)} groups: {groups}", style="yellow")
    for title, found in (("Images of the same content", result.duplicates), ("Images that look alike", result.look_alikes)):
        if found is not None:
            _duplicates(console, title, found)
    for other, count in result.leakage_counts.items():
        example = f", such as {' = '.join(result.leakage[other][0])}" if count else ""
        _say(console, f"Leakage: {count:,} images are in {other} as well{example}", style="red" if count else "")


def _rules(rules: dict[str, Finding]) -> Table:
    table = _table(
        "What is wrong with boxes and images, and what conversion will do", "rule", "found", "kept", "fixed", "dropped", "<for example"
    )
    for rule, finding in sorted(rules.items(), key=lambda item: -item[1].found):
        numbers = (finding.found, finding.kept, finding.fixed, finding.dropped)
        table.add_row(rule, *(f"{number:,}" if number else "-" for number in numbers), _example(finding.examples))
    return table


def _reasons(title: str, reasons: dict[str, Rejections]) -> Table:
    table = _table(title, "reason", "count", "<for example")
    for reason, entry in sorted(reasons.items(), key=lambda item: -item[1].count)[:MAX_ROWS]:
        about = f"{ABOUT[reason]} " if reason in ABOUT else ""
        table.add_row(reason, f"{entry.count:,}", about + _example(entry.examples))
    return table


def _example(examples: Sequence[str]) -> str:
    return escape(visible(examples[0])) if examples else ""


def _duplicates(console: Console, title: str, found: Duplicates) -> None:
    if not found.groups and not found.across_splits:
        _say(console, f"{title}: none")
        return
    shown = "; ".join(" = ".join(group[:3]) for group in found.examples[:MAX_EXAMPLES])
    _say(console, f"{title}: {found.images:,} in {found.groups:,} groups: {shown}", style="yellow")
    if found.across_splits:
        shown = "; ".join(" = ".join(group[:3]) for group in found.split_examples[:MAX_EXAMPLES])
        _say(console, f"  {found.across_splits:,} of them in more than one split: {shown}", style="red")


def _consumer(console: Console, consumer: Consumer) -> None:
    table = _table(f"As {consumer.name} ({consumer.version}) would take {consumer.samples:,} samples", "", "samples", "<for example")
    for what, count in (
        ("would crash", consumer.would_crash),
        ("would be dropped", consumer.would_drop),
        ("lose part of a question", consumer.loses_question),
        ("lose answers", consumer.loses_answer),
    ):
        table.add_row(what, f"{count:,}", escape(visible(", ".join(consumer.examples.get(what, [])[:3]))))
    console.print(table)
    if consumer.boxes:
        off = f"{consumer.mean_box_shift_px:.1f} px on average, IoU {consumer.mean_box_iou:.3f} with what they should be"
        _say(console, f"  boxes in pixels of the original, not rescaled to what the model sees: off by {off}")
    for rule in consumer.rules:
        _say(console, f"  {rule}", style="dim")
