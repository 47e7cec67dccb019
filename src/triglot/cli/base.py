"""What the commands share: the application, how it tells what can be mended, options of more than one command."""

import errno
import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from triglot.allocator import keep_freed_memory
from triglot.errors import ConfigError, TriglotError, require

NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}
"""What the system says of a disk that takes no more."""


class Commands(TyperGroup):
    """Tells what a user can mend in one red line; everything else keeps its traceback."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
            return result
        except BrokenPipeError as error:  # who reads our output has had enough: `triglot translate … | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is still to be flushed
            raise typer.Exit(141) from error
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            typer.secho(str(error), fg=typer.colors.RED, err=True)
            raise typer.Exit(2) from error
        except TriglotError as error:
            typer.secho(" ".join(str(error).split()), fg=typer.colors.RED, err=True)
            raise typer.Exit(2) from error


app = typer.Typer(cls=Commands, no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False)


class Precision(StrEnum):
    """What decoding multiplies in."""

    fp32 = "fp32"
    bf16 = "bf16"
    int8 = "int8"
    int4 = "int4"


class TooLong(StrEnum):
    """What to do with what the model can not read whole."""

    cut = "cut"
    error = "error"


Run = Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder.", show_default=False)]
Which = Annotated[str, typer.Option("--checkpoint", help="best, last, or a number of steps.")]
Tag = Annotated[
    str | None,
    typer.Option(metavar="TAG", help="The target tag, where pairs had a third column.", show_default=False),
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, …; the GPU if there is one.", show_default=False)]

InPrecision = Annotated[Precision, typer.Option("--precision", help="What decoding multiplies in, on a processor.")]


def _version(wanted: bool) -> bool:
    if wanted:
        from importlib.metadata import version

        typer.echo(version("triglot"))
        raise typer.Exit
    return wanted


@app.callback()
def _main(
    version: Annotated[  # noqa: ARG001 its callback has acted
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and leave.")
    ] = False,
) -> None:
    """Encoder–decoders, language models and mixtures of experts: train, use and explain them."""
    keep_freed_memory()


def device_of(wanted: str | None) -> str:
    """A device that is there; the GPU if nothing is said and there is one."""
    from triglot.distributed.team import device_here

    return str(device_here(wanted, "--device"))


def left_out(where: str, **given: Any) -> None:
    """Raise ConfigError for an option that is given where it does not count."""
    for name, value in given.items():
        if value is True:
            raise ConfigError(f"`--{name.replace('_', '-')}` must be left out {where}, but is given instead.")
        require(value in (None, False), f"--{name.replace('_', '-')}", f"left out {where}", value, ConfigError)
