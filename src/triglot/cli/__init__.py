"""The command line. Each command imports what it needs when it is called, so that `triglot --help` loads no torch."""

from triglot.cli import runs, text
from triglot.cli.base import app

__all__ = ["app", "runs", "text"]
