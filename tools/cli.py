"""The command line: which commands there are, and where each is written. A command's file is read only when the command is called."""

import sys
from importlib import import_module
from typing import Any

import click

from boxcar.schemas.errors import BoxcarError
from boxcar.tools.plain import visible

EXIT_MISTAKE = 2
EXIT_INTERRUPTED = 130

COMMANDS = {
    "init": "running",
    "run": "running",
    "audit": "auditing",
    "diff": "auditing",
    "convert": "converting",
    "verify": "converting",
    "show": "converting",
    "tokens": "converting",
    "families": "converting",
    "formats": "converting",
    "schema": "converting",
    "demo": "converting",
    "plan": "training",
    "train": "training",
    "ablate": "training",
    "doctor": "training",
    "demo-base": "training",
    "evaluate": "measuring",
    "predict": "measuring",
    "view": "measuring",
    "rate": "measuring",
    "export": "exporting",
    "export-data": "exporting",
    "export-results": "exporting",
}
"""Command -> the file in `tools.commands` that holds it, as a function of the same name with `_` for `-`."""


class _Group(click.Group):
    """Loads a command when it is called, and prints the user's mistakes without a traceback."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(COMMANDS)

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

    \b
    boxcar run NAME          every stage below, and only what has changed; `boxcar run quickstart` needs nothing
    boxcar audit NAME        what a data set costs, what a cutoff or resolution would lose, what is wrong with it
    boxcar convert NAME      annotations to shards whose rows know their exact cost in tokens
    boxcar plan NAME         what an epoch of training will be, before a GPU is booked
    boxcar train NAME        shards to an adapter, on one machine or a cluster
    boxcar ablate NAME       whether progressive region sampling helps on your data: control arms at equal tokens
    boxcar evaluate NAME     box metrics of an adapter and its base on held-out shards
    boxcar predict           an adapter, an image, a phrase: boxes in the image's own pixels
    boxcar view FOLDER       results or shards as a page for any browser: boxes, filters, before and after, rating
    boxcar rate FILE...      what raters exported from that page: rates, agreement, people against IoU
    boxcar export            an adapter, or base and adapter merged, for transformers and vLLM
    boxcar export-data       shards for LLaMA-Factory, ms-swift or COCO tools
    boxcar export-results    answers as COCO detections or Label Studio tasks
    boxcar show SHARDS       look at a sample, its boxes drawn as its answer text says
    boxcar verify SHARDS     check every hash and every row
    boxcar tokens FAMILY WxH what an image costs

    Workflows stand in workflows.yaml; every key can be overridden: boxcar convert NAME cutoff_len=2048.
    """


if __name__ == "__main__":
    main()
