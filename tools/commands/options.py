"""Options that several commands share."""

from pathlib import Path

import click

workflow_file = click.option(
    "--file", "path", default="workflows.yaml", show_default=True, type=click.Path(path_type=Path), help="File of workflows."
)
overrides_argument = click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
