"""The command line: which commands there are, and where each is written. A command's file is read only when the command is called."""

import sys
from importlib import import_module
from typing import Any

import click

from boxcar.schemas.errors import BoxcarError
from boxcar.tools.plain import visible

EXIT_MISTAKE = 2
EXIT_INTERRUPTED = 130

CHAPTERS = {
    "Start": {"init": "running", "run": "running", "demo": "converting", "schema": "converting"},
    "Data": {
        "audit": "auditing",
        "convert": "converting",
        "show": "converting",
        "verify": "converting",
        "diff": "auditing",
        "export-data": "exporting",
        "formats": "converting",
    },
    "Training": {
        "plan": "training",
        "doctor": "training",
        "train": "training",
        "ablate": "training",
        "export": "exporting",
        "families": "converting",
        "tokens": "converting",
        "demo-base": "training",
    },
    "Results": {
        "evaluate": "measuring",
        "predict": "measuring",
        "view": "measuring",
        "rate": "measuring",
        "export-results": "exporting",
    },
}
"""Heading of the help -> its commands -> the file in `tools.commands` that holds each, as a function of the same name with `_` for `-`."""
COMMANDS = {command: file for commands in CHAPTERS.values() for command, file in commands.items()}


class _Group(click.Group):
    """Loads a command when it is called, and prints the user's mistakes without a traceback."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for chapter, names in CHAPTERS.items():
            commands = {name: self.get_command(ctx, name) for name in names}
            with formatter.section(chapter):
                formatter.write_dl([(name, command.get_short_help_str(limit=200)) for name, command in commands.items() if command])

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command = getattr(import_module(f"boxcar.tools.commands.{COMMANDS[cmd_name]}"), cmd_name.replace("-", "_"))
        assert isinstance(command, click.Command)
        return command

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BoxcarError as error:
            click.echo(visible(f"{type(error).__name__}: {error}"), err=True)
            ctx.exit(EXIT_MISTAKE)
        except KeyboardInterrupt:
            click.echo("Stopped.", err=True)
            ctx.exit(EXIT_INTERRUPTED)
        except BrokenPipeError:
            # The reader of our output went away (`boxcar ... | head`): nothing more to say, and no traceback at exit.
            sys.stdout = None
            ctx.exit(0)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(package_name="boxcar-vl", prog_name="boxcar")
def main() -> None:
    """Boxcar: annotations in, a grounded vision-language model out.

    `boxcar run quickstart` shows everything on drawn data and needs nothing. `boxcar init FOLDER` starts with your own annotations.

    NAME is a workflow in workflows.yaml. Every key of it can be overridden: boxcar convert NAME cutoff_len=2048.
    """


if __name__ == "__main__":
    main()
