"""What a conversion did, for people."""

from rich.console import Console, Group
from rich.markup import escape
from rich.text import Text

from boxcar.schemas.manifest import MAX_EXAMPLES, Counts, Finding, Manifest
from boxcar.tools.plain import visible
from boxcar.tools.tables import Table

PERCENTILES = (50, 90, 95, 99, 100)


def percentiles(histogram: dict[str, int]) -> dict[int, int]:
    """Percentile -> value, by nearest rank over exact counts."""
    values = sorted((int(value), count) for value, count in histogram.items())
    total = sum(count for _, count in values)
    result = {}
    for percent in PERCENTILES:
        rank = max(1, -(-total * percent // 100))
        seen = 0
        for value, count in values:
            seen += count
            if seen >= rank:
                result[percent] = value
                break
    return result


def print_summary(console: Console, manifest: Manifest, folder: str) -> None:
    """Counts, tokens, rules, rejections, and what to do next."""
    counts = manifest.counts
    console.print()
    console.print(_totals(counts))
    console.print(_tokens(counts, manifest))
    if counts.rules:
        console.print(_rules(counts))
    for title, reasons in (("Records rejected", counts.records_rejected), ("Turns left out of rows", counts.turns_rejected)):
        if reasons:
            table = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0))
            table.add_column("reason")
            table.add_column("count", justify="right")
            table.add_column("for example", overflow="fold")
            for reason, entry in sorted(reasons.items(), key=lambda item: -item[1].count):
                table.add_row(reason, f"{entry.count:,}", _example(entry.examples))
            console.print(table)
    for note in manifest.source_notes:
        console.print(Text(visible(f"Note: {note}"), style="yellow"))
    if manifest.sizes_trusted:
        console.print(Text("Note: image sizes are the annotations' own; no image was opened (trust_sizes).", style="yellow"))
    console.print(_next_steps(manifest, folder))


def _totals(counts: Counts) -> Table:
    table = Table(title="Converted", title_justify="left", title_style="bold", box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column()
    table.add_column(justify="right")
    table.add_column()
    turns = ", ".join(f"{task} {count:,}" for task, count in sorted(counts.turns.items()))
    table.add_row("records read", f"{counts.records_read:,}", f"= {counts.records_written:,} written + {counts.num_rejected:,} rejected")
    table.add_row("samples (rows)", f"{counts.rows_written:,}", "")
    shrunk = f"{counts.images_shrunk:,} shrunk to fit the cutoff" if counts.images_shrunk else ""
    table.add_row("images", f"{counts.images:,}", shrunk)
    table.add_row("boxes", f"{counts.boxes_kept:,}", f"of {counts.boxes_read:,} read")
    table.add_row("turns", f"{sum(counts.turns.values()):,}", turns)
    return table


def _tokens(counts: Counts, manifest: Manifest) -> Table:
    contract, cutoff = manifest.contract, manifest.settings["cutoff_len"]
    table = Table(
        title=f"Tokens ({contract.family}, cutoff_len {cutoff:,}, images {contract.min_pixels:,}..{contract.max_pixels:,} px)",
        title_justify="left",
        title_style="bold",
        box=None,
        padding=(0, 2, 0, 0),
    )
    table.add_column("")
    table.add_column("total", justify="right")
    for percent in PERCENTILES:
        table.add_column("max" if percent == 100 else f"p{percent}", justify="right")
    # A family of one question for each image pays for the image with every turn: no sequence is as long as this.
    whole = "a row, each turn its own sequence" if contract.one_question_per_image else "a row, all turns"
    for name, total, histogram in (
        ("visual", counts.visual_tokens, counts.visual_tokens_histogram),
        ("text", counts.text_tokens, None),
        (whole, counts.visual_tokens + counts.text_tokens, counts.total_tokens_histogram),
    ):
        shown = percentiles(histogram) if histogram else {}
        table.add_row(name, f"{total:,}", *(f"{shown[percent]:,}" if percent in shown else "" for percent in PERCENTILES))
    return table


def _rules(counts: Counts) -> Table:
    table = Table(title="Rules", title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0))
    table.add_column("rule")
    for name in ("found", "kept", "fixed", "dropped"):
        table.add_column(name, justify="right")
    table.add_column("for example", overflow="fold")
    for rule, finding in sorted(counts.rules.items(), key=lambda item: -item[1].found):
        numbers = (finding.found, finding.kept, finding.fixed, finding.dropped)
        table.add_row(rule, *(f"{number:,}" if number else "-" for number in numbers), _examples(finding))
    return table


def _examples(finding: Finding) -> str:
    """One example; all of them where they are few and boxes were dropped: a person will want to look at each."""
    shown = finding.examples if finding.dropped and finding.found <= MAX_EXAMPLES else finding.examples[:1]
    return "\n".join(escape(visible(example)) for example in shown)


def _example(examples: list[str]) -> str:
    return escape(visible(examples[0])) if examples else ""


def _next_steps(manifest: Manifest, folder: str) -> Group:
    lines = [Text("Next", style="bold")]
    if manifest.quarantine:
        names = ", ".join(entry.name for entry in manifest.quarantine[:3]) + (", ..." if len(manifest.quarantine) > 3 else "")
        lines.append(Text(f"  rejected records, with reasons: {names} in {folder}"))
    lines.append(Text(f"  boxcar show {folder} --row 0     look at a sample, its boxes drawn as its answers say"))
    lines.append(Text(f"  boxcar verify {folder}           check every hash and every row"))
    return Group(*lines)
